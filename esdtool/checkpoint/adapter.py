"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) as checkpoints: alone, or merged into their base.

An adapter file holds a pair of factors for each adapted module: A [rank, in] and B [out, rank]. The weight update is
s B A with s = lora_alpha / rank (rank-stabilised LoRA: / sqrt(rank)). PEFT's names are understood, in files and in
state dicts of live models, and those of diffusers and kohya (`lora_down`, `lora_up`, `alpha`).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from esdtool.checkpoint.base import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

_FACTOR = re.compile(
    r"(?P<target>.+?)\.lora_(?P<embedding>embedding_)?(?P<side>A|B|down|up|magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
)
_SIDES = {"A": "right", "down": "right", "B": "left", "up": "left", "magnitude_vector": "magnitude"}
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Update:
    """One adapted module's factors, by the names of their tensors."""

    target: str
    """Name of the weight in the base model."""
    left: str
    """B [out, rank]."""
    right: str
    """A [rank, in]."""
    scale: float
    """s of s B A."""
    transposed: bool
    """Whether the base stores its weight [in, out] (GPT-2's Conv1D, embeddings)."""
    magnitude: str | None = None
    """Length of each row of the merged weight (DoRA)."""


@dataclass(kw_only=True)
class AdapterCheckpoint(Checkpoint):
    """Weight updates, one tensor of low rank for each adapted module."""

    inner: Checkpoint = field(repr=False)
    """The file with the factors."""
    updates: Mapping[str, Update] = field(repr=False)
    """By the name of the update's tensor."""

    def read(self, name: str) -> torch.Tensor:
        """The update s B A in float32, or a tensor that the adapter holds whole (`modules_to_save`)."""
        self.info(name)
        update = self.updates.get(name)
        if update is None:
            return self.inner.read(_stored_name(name, self.inner))
        left, right = self._oriented(update)
        if left.ndim > 2:  # a convolution: B is 1 x 1
            import torch

            return torch.einsum("or,ri...->oi...", left.flatten(1), right).float()
        return (left @ right).float()

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(left [rows, rank], right [rank, columns]) in float64; None for a tensor that is no update."""
        update = self.updates.get(name)
        if update is None or self.info(name).rank is None:
            return None
        return self._oriented(update)

    def _oriented(self, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = self.inner.read(update.left).double() * update.scale, self.inner.read(update.right).double()
        return (right.mT, left.mT) if update.transposed else (left, right)


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds weight updates rather than weights."""
    return isinstance(checkpoint, AdapterCheckpoint)


def adapter_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The updates of an adapter file, or the checkpoint itself if it has no LoRA factors.

    Each update has its base weight's name (without PEFT's `base_model.model.`) and shape, and `TensorInfo.rank`. In a
    file with several adapters the adapter's name stands before `.weight`. Factors without a counterpart stay as they
    are, and a note names them.
    """
    parts = _parts(checkpoint)
    if not parts:
        return checkpoint
    several = len({adapter for _, adapter, _ in parts}) > 1
    updates: dict[str, Update] = {}
    used: set[str] = set()
    for (target, adapter, embedding), sides in parts.items():
        if not _fits(checkpoint, sides):
            continue
        stem = target.removeprefix(_PEFT_PREFIX) + (f".{adapter}" if several and adapter else "")
        name = f"{stem}.weight" if f"{stem}.weight" not in checkpoint.tensors else f"{stem}.lora.weight"
        rank = checkpoint.tensors[sides["right"]].shape[0]
        alpha = f"{target}.alpha"
        updates[name] = Update(
            target=f"{target.removeprefix(_PEFT_PREFIX)}.weight",
            left=sides["left"],
            right=sides["right"],
            scale=_scale(checkpoint, target, rank, alpha),
            transposed=embedding or bool(checkpoint.config.get("fan_in_fan_out")),
            magnitude=sides.get("magnitude"),
        )
        used |= {*sides.values(), *([alpha] if alpha in checkpoint.tensors else [])}
    if not updates:
        return checkpoint
    others = {_base_name(name): info for name, info in checkpoint.tensors.items() if name not in used}
    tensors = {name: replace(info, name=name) for name, info in others.items()}
    tensors |= {name: _info(checkpoint, name, update) for name, update in updates.items()}
    return AdapterCheckpoint(
        location=checkpoint.location,
        tensors=tensors,
        files=checkpoint.files,
        revision=checkpoint.revision,
        config=checkpoint.config,
        notes=(*checkpoint.notes, *_notes(checkpoint, parts, updates, used)),
        collective_reads=checkpoint.collective_reads,
        inner=checkpoint,
        updates=updates,
    )


def _parts(checkpoint: Checkpoint) -> dict[tuple[str, str | None, bool], dict[str, str]]:
    """Tensor names of the factors, by (target, adapter's name, whether an embedding's) and side."""
    parts: dict[tuple[str, str | None, bool], dict[str, str]] = defaultdict(dict)
    magnitudes: list[tuple[str, str | None, str]] = []
    for name in checkpoint.tensors:
        found = _FACTOR.fullmatch(name)
        if found is None:
            continue
        if found["side"] == "magnitude_vector":
            magnitudes.append((found["target"], found["adapter"], name))
        else:
            parts[found["target"], found["adapter"], bool(found["embedding"])][_SIDES[found["side"]]] = name
    for target, adapter, name in magnitudes:
        if (target, adapter, False) in parts:
            parts[target, adapter, False]["magnitude"] = name
    return dict(parts)


def _fits(checkpoint: Checkpoint, sides: Mapping[str, str]) -> bool:
    """Whether both factors are there and can be multiplied."""
    if "left" not in sides or "right" not in sides:
        return False
    left, right = (checkpoint.tensors[sides[side]].shape for side in ("left", "right"))
    return len(left) == len(right) >= 2 and left[1] == right[0] and set(left[2:]) <= {1}


def _scale(checkpoint: Checkpoint, target: str, rank: int, alpha_name: str) -> float:
    """s of a module: by the file's own `alpha`, else by the configuration as PEFT reads it, else 1."""
    if alpha_name in checkpoint.tensors and checkpoint.tensors[alpha_name].numel == 1:
        return float(checkpoint.read(alpha_name).item()) / rank
    config = checkpoint.config
    if "lora_alpha" not in config:
        return 1.0
    alpha = _pattern_value(config.get("alpha_pattern"), target, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern_value(patterns: Any, target: str, default: Any) -> Any:
    """The value of the first key that matches the end of a module's name, at a dot."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", target):
            return value
    return default


def _info(checkpoint: Checkpoint, name: str, update: Update) -> TensorInfo:
    left, right = checkpoint.tensors[update.left], checkpoint.tensors[update.right]
    shape = (left.shape[0], right.shape[1], *right.shape[2:])
    return TensorInfo(
        name=name,
        shape=shape[::-1] if update.transposed else shape,
        dtype="float32",
        file=", ".join(dict.fromkeys((left.file, right.file))),
        rank=None if len(shape) > 2 else right.shape[0],
    )


def _base_name(name: str) -> str:
    return name.removeprefix(_PEFT_PREFIX)


def _stored_name(name: str, inner: Checkpoint) -> str:
    return name if name in inner.tensors else _PEFT_PREFIX + name


def _notes(
    checkpoint: Checkpoint,
    parts: Mapping[tuple[str, str | None, bool], Mapping[str, str]],
    updates: Mapping[str, Update],
    used: set[str],
) -> list[str]:
    notes = [f"{checkpoint.location}: a LoRA adapter: {len(updates)} weight updates of low rank"]
    lost = [name for sides in parts.values() for name in sides.values() if name not in used]
    if lost:
        count = f"{len(lost)} LoRA factors" if len(lost) > 1 else "a LoRA factor"
        notes.append(f"{checkpoint.location}: left out {count} without a fitting counterpart: {lost[0]}")
    with_own = any(name.endswith(".alpha") for name in used)
    if "lora_alpha" not in checkpoint.config and not with_own:
        notes.append(
            f"{checkpoint.location}: no adapter_config.json, so the scale is taken as 1: it changes norms, not alphas"
        )
    if any(update.magnitude is not None for update in updates.values()):
        notes.append(
            f"{checkpoint.location}: a DoRA adapter: alone, its direction B A is analysed; --base merges it in full"
        )
    return notes
