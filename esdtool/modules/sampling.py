"""Choose some of a model's layers, evenly by depth, with all their modules (`--sample-layers`)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from esdtool.errors import UsageError
from esdtool.modules.base import Selection, WeightModule
from esdtool.modules.skipped import SkipKind, SkippedTensor


def sample_layers(selection: Selection, count: int) -> Selection:
    """Keep the modules of some layers, evenly by depth, and those outside of the layers.

    Each stack of layers (an encoder, a decoder) is sampled by itself. What is left out is listed with the reason.

    Args:
        selection: the modules of the whole model.
        count: layers of each stack; all, where it has no more.

    Raises:
        UsageError: if `count` is less than 1.
    """
    if count < 1:
        raise UsageError(f"--sample-layers must be at least 1, not {count}")
    stacks: dict[str, set[int]] = defaultdict(set)
    for module in selection.modules:
        if module.layer is not None:
            stacks[_stack(module)].add(module.layer)
    chosen = {stack: evenly(sorted(layers), count) for stack, layers in stacks.items()}
    kept, left_out = [], []
    for module in selection.modules:
        if module.layer is None or module.layer in chosen[_stack(module)]:
            kept.append(module)
        else:
            left_out.append(
                SkippedTensor(
                    name=module.parameter if module.view is None else module.name,
                    shape=module.shape,
                    dtype=module.dtype,
                    kind=SkipKind.NOT_CHOSEN,
                    reason=f"not in the sample of {count} layers (--sample-layers)",
                    parameter=None if module.view is None else module.parameter,
                )
            )
    return replace(selection, modules=tuple(kept), skipped=(*selection.skipped, *left_out))


def evenly(layers: list[int], count: int) -> list[int]:
    """Choose layers at equal distances, the first and the last among them; of one, that in the middle.

    >>> evenly(list(range(32)), 3), evenly(list(range(32)), 1), evenly([0, 1], 5)
    ([0, 16, 31], [16], [0, 1])
    """
    if count >= len(layers):
        return layers
    if count == 1:
        return [layers[len(layers) // 2]]
    last = len(layers) - 1
    return [layers[(2 * last * position + count - 1) // (2 * (count - 1))] for position in range(count)]


def _stack(module: WeightModule) -> str:
    """Return the part of a module's name before its layer's number."""
    return f".{module.name}.".partition(f".{module.layer}.")[0]
