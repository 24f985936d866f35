"""Output heads whose names alone do not tell: the last matrix of a numbered classifier, a lone `fc` at the end."""

from __future__ import annotations

from collections.abc import Mapping

from esdtool.checkpoint.base import TensorInfo
from esdtool.names import Segments, without_root

_NUMBERED = frozenset({"classifier", "head", "heads", "logits", "output_layer"})
"""Sequentials at the end of a model (torchvision's VGG, MobileNet, EfficientNet), the last of which is the head."""
_LONE = frozenset({"fc", "last_linear", "linear"})
"""Names of the head of a network that ends in one linear layer (ResNet, Inception)."""


def output_heads(modules: Mapping[Segments, TensorInfo], *, root: int = 0) -> frozenset[Segments]:
    """Find the output heads that stand at the root of a model beside its numbered or named parts.

    Args:
        modules: the tensor of every module, by the path of the module.
        root: how many segments all names begin with.

    Returns:
        The paths of the heads. A model that has no other matrices has no head.
    """
    matrices = [path for path, tensor in modules.items() if len(tensor.shape) >= 2 and path[-1] != "bias"]
    heads: set[Segments] = set()
    last: dict[str, tuple[int, Segments]] = {}
    for path in matrices:
        inner = without_root(path[root:])
        if len(inner) == 2 and inner[0] in _NUMBERED and inner[1].isdecimal():
            last[inner[0]] = max(last.get(inner[0], (-1, path)), (int(inner[1]), path))
        elif len(inner) == 1 and inner[0] in _LONE and modules[path].name.endswith(".weight"):
            heads.add(path)
    heads.update(path for _, path in last.values())
    rest = [path for path in matrices if path not in heads and without_root(path[root:])[0] not in _NUMBERED]
    return frozenset(heads) if any(len(without_root(path[root:])) > 1 for path in rest) else frozenset()
