"""Several checkpoints of one training run: how alpha moves over the steps (format `esdtool.trajectory`, version 1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Final, Literal, Self

from pydantic import Field

from esdtool._version import __version__
from esdtool.analysis.document import Analysis, read_document
from esdtool.analysis.record import Record
from esdtool.support.csv_text import csv_text
from esdtool.support.json_text import model_json

FORMAT: Final = "esdtool.trajectory"
VERSION: Final = 1


class Step(Record):
    """One checkpoint's alphas."""

    checkpoint: str
    step: int | None = Field(default=None, description="The last number in the checkpoint's name; null without one.")
    mean_alpha: float | None
    alpha_by_role: dict[str, float] = Field(description="Mean alpha of the modules of each role.")


class Trajectory(Record):
    """The analyses of several checkpoints, and their alphas by role over the steps."""

    format: Literal["esdtool.trajectory"] = FORMAT
    version: Literal[1] = VERSION
    created_by: str
    roles: tuple[str, ...] = Field(description="All roles, in the order of the first checkpoint that has them.")
    steps: tuple[Step, ...] = Field(description="In the order of training.")
    analyses: tuple[Analysis, ...] = Field(description="One for each step, in the same order.")

    def to_json(self) -> str:
        """Return the trajectory as indented JSON with a final newline; the same input gives the same text."""
        return model_json(self)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a trajectory that `to_json` wrote.

        Raises:
            CheckpointError: if the file is missing, is no JSON, or is no trajectory of version 1.
        """
        return read_document(path, cls, format_name=FORMAT, version=VERSION, what="trajectory")

    def to_csv(self) -> str:
        """Return one line a module and checkpoint: the columns of `Analysis.to_csv` after `checkpoint` and `step`."""
        rows = [
            {"checkpoint": step.checkpoint, "step": step.step, **row}
            for step, analysis in zip(self.steps, self.analyses, strict=True)
            for row in analysis.flat_rows()
        ]
        return csv_text(list(rows[0]) if rows else [], rows)


def in_order_of_training(checkpoints: Sequence[str]) -> list[str]:
    """Checkpoints by the last number in their names, or as given where these do not tell them apart.

    >>> in_order_of_training(["run/step_1000", "run/step_200/", "run/step_30"])
    ['run/step_30', 'run/step_200/', 'run/step_1000']
    >>> in_order_of_training(["b", "a"])
    ['b', 'a']
    """
    steps = [step_of(checkpoint) for checkpoint in checkpoints]
    if None in steps or len(set(steps)) < len(steps):
        return list(checkpoints)
    return sorted(checkpoints, key=lambda checkpoint: step_of(checkpoint) or 0)


def step_of(checkpoint: str) -> int | None:
    """Return the last number in the name of a file or folder, without its suffix."""
    name = re.sub(r"\.(safetensors|bin|pth?|ckpt|gguf|onnx|h5|keras|json)$", "", PurePath(checkpoint).name)
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else None


def make_trajectory(analyses: Sequence[Analysis]) -> Trajectory:
    """Return the trajectory of analyses that stand in the order of training."""
    steps = [
        Step(
            checkpoint=analysis.source.checkpoint,
            step=step_of(analysis.source.checkpoint),
            mean_alpha=analysis.summary.mean_alpha,
            alpha_by_role={row.role: row.mean_alpha for row in analysis.summary.by_role},
        )
        for analysis in analyses
    ]
    return Trajectory(
        created_by=f"esdtool {__version__}",
        roles=tuple(dict.fromkeys(role for step in steps for role in step.alpha_by_role)),
        steps=tuple(steps),
        analyses=tuple(analyses),
    )
