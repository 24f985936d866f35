"""What the formats look at: a checkpoint's catalogue, its quantisation settings, and the weights found in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from esdtool.checkpoint.base import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

Rows = tuple[int, int] | None
"""Positions of the first dimension; None: all."""

FP8: Final = frozenset({"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"})

_SIGNS = (
    "qweight",
    "SCB",
    "weight_packed",
    "_blocks",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
    "weight_scale",
    "weight_scale_inv",
    "scale_weight",
    "weight.scale",
    "weight_scales",
    "weight._scale",
    "_scale_inv",
    "proj_scale",
)
"""How the name of some tensor ends wherever weights are quantised."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight that is stored as codes."""

    name: str
    """Name of the weight, e.g. `model.layers.0.self_attn.q_proj.weight`."""
    codes: str
    """Name of the tensor whose place it takes."""
    shape: tuple[int, ...]
    """[out, in], or [experts, ., .]."""
    quantization: str
    """The format, in words."""
    roundoff: float
    """Relative root-mean-square rounding error of the format on normally distributed weights."""
    read: Callable[[Rows], torch.Tensor]
    """The weight, or some of its rows, in float32."""


class Source:
    """A checkpoint as the formats see it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors: Mapping[str, TensorInfo] = checkpoint.tensors
        self.problems: list[str] = []
        """What could not be de-quantised, and why: one line each."""
        self.settings: Mapping[str, Any] = _settings(checkpoint.config)
        """`quantization_config` of config.json."""

    @property
    def looks_quantized(self) -> bool:
        """Whether any tensor's name speaks of codes or scales."""
        return any(name.endswith(_SIGNS) for name in self.tensors)

    @property
    def method(self) -> str:
        """`quant_method`, e.g. `gptq`; empty where it is not said."""
        return str(self.settings.get("quant_method", ""))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None if there is none of that name."""
        info = self.tensors.get(name)
        return None if info is None else info.shape

    def ending(self, suffix: str) -> list[str]:
        """What stands before a suffix in the names that have it."""
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def refuse(self, name: str, why: str) -> None:
        """Note that a tensor keeps its codes. Further ones of the same kind are not repeated."""
        text = f"codes are left as they are: {why}"
        if not any(problem.endswith(text) for problem in self.problems):
            self.problems.append(f"{self.checkpoint.location}: {name}: {text}")


def absmax_roundoff(levels: int, reach: float = 3.0) -> float:
    """Relative error of rounding to `levels` equal steps on either side of 0, up to the largest weight of a group.

    The largest of a group of 32 to 128 normally distributed weights is about `reach` standard deviations, a step is
    that over `levels`, and an equally distributed error has a root mean square of a step over sqrt(12).
    """
    return reach / levels / math.sqrt(12)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if isinstance(found := part.get(key), Mapping):
                return found
    return {}
