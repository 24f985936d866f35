"""Learning-rate schedules: pure functions of the step, so that nothing needs saving."""

from __future__ import annotations

import math

from esdtool.train.config.train_config import TrainConfig


def lr_factor(config: TrainConfig, step: int) -> float:
    """Learning rate of one update over the peak learning rate.

    With W warm-up steps, N steps and final ratio r, the update of index t (from 0) has

    - t < W: `(t + 1) / (W + 1)`: linear from above 0, the peak comes with update W;
    - `cosine`: `r + (1 - r) (1 + cos(pi p)) / 2`, `linear`: `1 - (1 - r) p`, with `p = (t - W) / (N - W)`;
    - `wsd`: 1, and over the last D steps `1 - (1 - r) p` with `p = (t - (N - D)) / D`.

    p stays below 1 by one step: the last update still has a little more than r.

    Args:
        config: for its [schedule].
        step: index of the update, 0 <= step < schedule.steps; beyond it stays at r.
    """
    schedule = config.schedule
    warmup, steps, floor = config.warmup_steps, schedule.steps, schedule.min_lr_ratio
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.name == "wsd":
        decay = config.decay_steps
        return _linear((step - (steps - decay)) / decay, floor)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if schedule.name == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    return _linear(progress, floor)


def _linear(progress: float, floor: float) -> float:
    return 1 - (1 - floor) * min(1.0, max(0.0, progress))
