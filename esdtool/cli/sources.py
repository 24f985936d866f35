"""Recognise a source on the command line: a checkpoint, one of esdtool's documents, a run, or a folder of runs."""

from __future__ import annotations

from enum import Enum, auto
from pathlib import Path

from esdtool.checkpoint.layout import INDEX_SUFFIX
from esdtool.errors import CheckpointError
from esdtool.support.json_text import JsonTextError, parse_json
from esdtool.train.run.log import CONFIG, METRICS


class SourceKind(Enum):
    """The kind of a source, determined from the file system without opening a checkpoint."""

    CHECKPOINT = auto()
    """Anything that is nothing else: a path, a Hub id, or a mistake that opening it will name."""
    ANALYSIS = auto()
    TRAJECTORY = auto()
    ASSIGNMENT = auto()
    OTHER_DOCUMENT = auto()
    """A JSON document of esdtool that no command reads as a source."""
    RUN = auto()
    """A run directory of `esdtool train`."""
    MONITOR_LOG = auto()
    """A JSONL file of `SpectralMonitor`."""


def kind_of(source: str) -> SourceKind:
    """Recognise a source by its files.

    Raises:
        CheckpointError: if it is a JSON file that cannot be read.
    """
    if is_run(Path(source)):
        return SourceKind.RUN
    document = format_of(source)
    if document is None or not document.startswith("esdtool."):
        return SourceKind.CHECKPOINT
    # The models of all formats take a tenth of a second to load, which most commands have no use for.
    from esdtool.analysis.document import FORMAT as ANALYSIS
    from esdtool.assignment.document import FORMAT as ASSIGNMENT
    from esdtool.comparison.trajectory import FORMAT as TRAJECTORY
    from esdtool.optim.monitor_writers import FORMAT as MONITOR

    kinds = {
        ANALYSIS: SourceKind.ANALYSIS,
        TRAJECTORY: SourceKind.TRAJECTORY,
        ASSIGNMENT: SourceKind.ASSIGNMENT,
        MONITOR: SourceKind.MONITOR_LOG,
    }
    return kinds.get(document, SourceKind.OTHER_DOCUMENT)


def format_of(source: str) -> str | None:
    """Read the `format` of a JSON document, or of the first line of a JSONL file; None where there is none.

    Raises:
        CheckpointError: if it is a JSON file that cannot be read; indices of shards are not looked into.
    """
    path = Path(source)
    if path.suffix not in (".json", ".jsonl") or source.endswith(INDEX_SUFFIX) or not path.is_file():
        return None
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as stream:
                document = parse_json(stream.readline())
        else:
            document = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error
    except JsonTextError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    found = document.get("format") if isinstance(document, dict) else None
    return found if isinstance(found, str) else None


def is_run(path: Path) -> bool:
    """Tell whether a folder is a run directory of `esdtool train`."""
    return (path / CONFIG).is_file() and (path / METRICS).is_file()


def runs_in(source: str) -> list[str]:
    """List the folder itself, if it is a run; or the runs that it holds, as a sweep lays them (FOLDER/NAME/seed-N)."""
    path = Path(source)
    if is_run(path):
        return [source]
    if not path.is_dir() or (path / "config.json").is_file():
        return []
    return [str(folder) for pattern in ("*", "*/*") for folder in sorted(path.glob(pattern)) if is_run(folder)]


def checkpoint_of(source: str, *, quiet: bool) -> str:
    """Return the checkpoint that a source stands for: of a run directory the final one, or else the newest whole one.

    Args:
        source: as the user gave it; what is no run directory is returned as it is.
        quiet: whether the choice is not mentioned.
    """
    if not is_run(Path(source)):
        return source
    from esdtool.cli.output import note
    from esdtool.comparison.landed import landings

    final = Path(source) / "final"
    whole = [landing.path for landing in landings(source) if landing.has_all_shards]
    if not final.is_dir() and not whole:
        return source
    chosen = str(final) if final.is_dir() else whole[-1]
    note(f"{source} is a training run: taking its checkpoint {chosen}", quiet=quiet)
    return chosen
