"""Everything that a run would refuse, found without training: for `esdtool train --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esdtool.train.base_decay import base_decay, explanation
from esdtool.train.config.loading import check_batch
from esdtool.train.config.presets import PRESETS
from esdtool.train.config.sections import HubData
from esdtool.train.config.train_config import TrainConfig
from esdtool.train.data.open import open_data
from esdtool.train.distributed import check_device
from esdtool.train.estimate import Estimate, estimate
from esdtool.train.model import unallocated_model
from esdtool.train.optimizers import build_optimizers, rate_modules, scored_modules
from esdtool.train.run import directory as run_directory
from esdtool.train.run.checkpoints import check_same_run
from esdtool.train.run.log import check_loggers
from esdtool.train.target import make_target


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The facts about a run that are known beforehand."""

    estimate: Estimate
    num_modules: int
    """Modules with a decay of their own."""
    base_decay: float
    """Base decay of [weight_decay], given, by default, or predicted."""
    base_explanation: str | None
    """How the base decay comes about; None where it is given."""
    train_tokens: int | None
    """Tokens in one pass over the training text; None for a dataset of the Hub, which is not fetched."""


def rehearse(config: TrainConfig, *, resume: str | None = None, world_size: int = 1) -> Rehearsal:
    """Build what can be built without weights, and refuse what the run would refuse.

    Args:
        config: the run.
        resume: as for the run.
        world_size: ranks that it will have.

    Raises:
        ConfigError, DeviceError, AssignmentError, CheckpointError, MissingExtraError: for what the run would refuse.
    """
    check_device(config, world_size=world_size)
    check_batch(config, world_size)
    check_loggers(config)
    run = Path(config.run_dir)
    saved, _ = run_directory.find(run, resume)
    if saved is not None:
        check_same_run(saved, config)
    run_directory.check_unused(run, resume=resume)
    train_tokens = None
    if isinstance(config.data, HubData):
        preset = PRESETS.get(config.model.preset or "")
        vocab_size = (preset.vocab_size if preset else None) or 1
    else:
        data = open_data(config, world_size=world_size)
        vocab_size, train_tokens = data.vocab_size, data.train_tokens
    model = unallocated_model(config, vocab_size=vocab_size)
    modules = scored_modules(model, config)
    optimizers = build_optimizers(model, config, modules)
    config.weight_decay.rehearse(make_target(config, model, optimizers, modules))
    config.learning_rate.rehearse(make_target(config, model, optimizers, rate_modules(model, config)))
    return Rehearsal(
        estimate=estimate(config, vocab_size=vocab_size, world_size=world_size),
        num_modules=len(modules),
        base_decay=base_decay(config, model),
        base_explanation=explanation(config, model),
        train_tokens=train_tokens,
    )
