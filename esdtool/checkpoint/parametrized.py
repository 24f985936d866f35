"""Re-parametrised weights as the product that the model applies: weight and spectral normalisation, pruning masks.

Their parts lie in the file under the names of torch's two generations: `NAME_g` and `NAME_v`, `NAME_orig` and
`NAME_mask` or `NAME_u`; or `parametrizations.NAME.original0`, `original1`, `0._u` and so on. A parametrization that the
file does not determine stays as it is.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from esdtool.checkpoint.base import Checkpoint, TensorInfo, TrainedParameter
from esdtool.checkpoint.derived import DerivedCheckpoint, DerivedTensor, inherited, listing

_SUFFIX = re.compile(r"(?P<name>(?:.+\.)?[^.]*weight[^.]*)_(?P<part>g|v|u|orig|mask)")
"""Parts in torch's first generation."""
_REGISTERED = re.compile(r"(?P<module>(?:.+\.)?)parametrizations\.(?P<leaf>[^.]+)\.(?P<part>.+)")
"""Parts in torch's second generation (`torch.nn.utils.parametrize`)."""
_NEWER = {"original0": "g", "original1": "v", "original": "orig", "0._u": "u", "0._v": "right"}


@dataclass(frozen=True, kw_only=True)
class _WeightNorm(DerivedTensor):
    """Weight normalisation (Salimans and Kingma 2016, arXiv 1602.07868): W = g v / |v|."""

    length: str
    direction: str
    axis: int | None
    """The dimension along which each slice has a length of its own; None: the whole tensor has one."""

    def read(self, source: Checkpoint) -> torch.Tensor:
        """Compute the weight."""
        return self.read_rows(source, 0, self.info.shape[0])

    def read_rows(self, source: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Compute some rows; where each has a length of its own, from these rows alone."""
        length = source.read(self.length).double()
        alone = self.axis == 0
        direction = source.read_rows(self.direction, start, stop) if alone else source.read(self.direction)
        direction = direction.double()
        if self.axis is None:
            weight = direction * (length.reshape(()) / torch.linalg.vector_norm(direction))
        else:
            others = [dim for dim in range(direction.ndim) if dim != self.axis]
            length = length.reshape([-1 if dim == self.axis else 1 for dim in range(direction.ndim)])
            norm: torch.Tensor = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
            weight = direction * ((length[start:stop] if alone else length) / norm)
        result: torch.Tensor = weight if alone else weight[start:stop]
        return result.to(getattr(torch, self.info.dtype))


@dataclass(frozen=True, kw_only=True)
class _SpectralNorm(DerivedTensor):
    """Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957): W / sigma with sigma = u^T W v, both stored."""

    original: str
    left: str
    """Name of u, the estimate of the first left singular vector."""
    right: str | None
    """Name of v; old files lack it."""

    def read(self, source: Checkpoint) -> torch.Tensor:
        """Compute the weight."""
        weight, u = source.read(self.original).double(), source.read(self.left).double().flatten()
        axis = next((dim for dim in range(weight.ndim) if weight.shape[dim] == u.numel()), 0)
        matrix = weight.movedim(axis, 0).flatten(1)
        if self.right is None:
            sigma = torch.linalg.vector_norm(matrix.mT @ u)
        else:
            sigma = u @ (matrix @ source.read(self.right).double().flatten())
        result: torch.Tensor = weight / sigma
        return result.to(getattr(torch, self.info.dtype))


@dataclass(frozen=True, kw_only=True)
class _Masked(DerivedTensor):
    """A pruned weight (`torch.nn.utils.prune`): W * mask."""

    original: str
    mask: str

    def read(self, source: Checkpoint) -> torch.Tensor:
        """Compute the weight."""
        return self.read_rows(source, 0, self.info.shape[0])

    def read_rows(self, source: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Compute some rows."""
        weight = source.read_rows(self.original, start, stop)
        return weight * source.read_rows(self.mask, start, stop).to(weight.dtype)


def applied_weights(checkpoint: Checkpoint) -> Checkpoint:
    """Replace the parts of re-parametrised weights by the weights; return the checkpoint itself if there are none.

    Each weight has the name that it has without the parametrization, and `TensorInfo.trained` names the parameters that
    a live model has in its place. Nothing is read before a weight is.
    """
    parts = _parts(checkpoint)
    found = [weight for name, named in parts.items() if (weight := _weight(checkpoint, name, named)) is not None]
    if not found:
        return checkpoint
    derived = {weight.info.name: weight for weight in found}
    count = f"{len(derived)} weights are" if len(derived) > 1 else "a weight is"
    return DerivedCheckpoint(
        **inherited(checkpoint),
        tensors=listing(checkpoint, derived),
        notes=(
            *checkpoint.notes,
            f"{checkpoint.location}: {count} computed from parts as the model applies them (weight or spectral "
            f"normalisation, pruning): {next(iter(derived))}",
        ),
        inner=checkpoint,
        derived=derived,
    )


def _parts(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Stored names by part, by the name of the weight."""
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name in checkpoint.tensors:
        newer = _REGISTERED.fullmatch(name)
        if newer is not None:
            part = _NEWER.get(newer["part"], newer["part"])
            parts[newer["module"] + newer["leaf"]][f"new {part}"] = name
            continue
        older = _SUFFIX.fullmatch(name)
        if older is not None:
            parts[older["name"]][f"old {older['part']}"] = name
    return parts


def _weight(checkpoint: Checkpoint, name: str, named: Mapping[str, str]) -> DerivedTensor | None:
    """Return the weight that its parts determine; None if they do not."""
    if name in checkpoint.tensors:
        return None  # it is stored itself
    tensors = checkpoint.tensors
    for generation in ("new", "old"):
        parts = {part.partition(" ")[2]: other for part, other in named.items() if part.startswith(generation)}
        if parts.keys() == {"g", "v"}:
            return _normalised(tensors, name, parts["g"], parts["v"])
        if parts.keys() == {"orig", "mask"} and tensors[parts["orig"]].shape == tensors[parts["mask"]].shape:
            original = parts["orig"]
            return _Masked(
                info=_info(tensors, name, original, original),
                stored=(original, parts["mask"]),
                original=original,
                mask=parts["mask"],
            )
        # In the first generation v is the right singular vector, too.
        right = parts.get("right", parts.get("v"))
        if {"orig", "u"} <= parts.keys() <= {"orig", "u", "v", "right"}:
            return _spectral(tensors, name, parts["orig"], parts["u"], right)
    return None


def _normalised(tensors: Mapping[str, TensorInfo], name: str, length: str, direction: str) -> DerivedTensor | None:
    g, v = tensors[length], tensors[direction]
    if len(v.shape) < 2 or not _is_float(g) or not _is_float(v) or v.numel == 0:
        return None
    if g.numel == 1:
        axis = None
    elif len(g.shape) == 1 and g.shape[0] == v.shape[0]:
        axis = 0
    else:
        axis = next((dim for dim, size in enumerate(g.shape) if size > 1), 0)
        if len(g.shape) != len(v.shape) or g.numel != g.shape[axis] or g.shape[axis] != v.shape[axis]:
            return None
    return _WeightNorm(
        info=_info(tensors, name, direction, length, direction),
        stored=(length, direction),
        length=length,
        direction=direction,
        axis=axis,
    )


def _spectral(
    tensors: Mapping[str, TensorInfo], name: str, original: str, left: str, right: str | None
) -> DerivedTensor | None:
    weight = tensors[original]
    if len(weight.shape) < 2 or weight.numel == 0 or not _is_float(weight):
        return None
    u, v = tensors[left].numel, None if right is None else tensors[right].numel
    if u not in weight.shape or (v is not None and u * v != math.prod(weight.shape)):
        return None
    return _SpectralNorm(
        info=_info(tensors, name, original, original),
        stored=tuple(part for part in (original, left, right) if part is not None),
        original=original,
        left=left,
        right=right,
    )


def _info(tensors: Mapping[str, TensorInfo], name: str, like: str, *trained: str) -> TensorInfo:
    return replace(
        tensors[like],
        name=name,
        trained=tuple(TrainedParameter(name=part, shape=tensors[part].shape) for part in trained),
    )


def _is_float(info: TensorInfo) -> bool:
    return info.dtype in ("float64", "float32", "float16", "bfloat16")
