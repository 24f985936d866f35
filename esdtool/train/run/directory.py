"""The run directory: whose it is, and where a run goes on."""

from __future__ import annotations

from pathlib import Path

from esdtool.errors import ConfigError, OutputError
from esdtool.support.files import atomic_write_text
from esdtool.train.config.loading import to_toml
from esdtool.train.config.train_config import TrainConfig
from esdtool.train.run.log import CONFIG, DECAY, METRICS
from esdtool.train.run.manifest import SavedRun, find_checkpoint, list_checkpoints


def find(run: Path, resume: str | None) -> tuple[SavedRun | None, list[str]]:
    """Return the checkpoint to go on from, if any, and remarks for the user.

    Raises:
        CheckpointError: if the checkpoint named by `resume` cannot be used.
    """
    if resume is None:
        return None, []
    saved, remarks = find_checkpoint(run, resume)
    if saved is None:
        remarks.append(f"no checkpoint in {run}: starting from the beginning")
    return saved, remarks


def check_unused(run: Path, *, resume: str | None) -> None:
    """Do not write over another run.

    Raises:
        ConfigError: if the run directory holds one and it is not that run that is resumed.
    """
    used = bool(list_checkpoints(run)) or any((run / name).exists() for name in (METRICS, DECAY))
    is_own = resume == "auto" or (resume is not None and Path(resume).resolve().is_relative_to(run.resolve()))
    if used and not is_own:
        raise ConfigError(
            f"run.dir {run} already holds a run: go on with --resume auto, or choose another with --set run.dir=..."
        )


def claim(run: Path, config: TrainConfig) -> None:
    """Make the run directory and write config.toml there.

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{run}: cannot make the run directory: {error.strerror}") from error
    atomic_write_text(run / CONFIG, to_toml(config))
