"""Floats of 8 bits and integers of 8 bits with a scale beside them: for the tensor, for each row, for each block."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from esdtool.checkpoint.dequantize.source import FP8, Rows, Source, Weight, absmax_roundoff

_SCALES_OF_WEIGHT = ("_scale_inv", "_scale", ".scale", "_scales", "._scale")
_CODES = ".qweight"
"""How some tools name the codes of `X`, whose scale is `X.scale`."""
_BLOCK = 128
_ROUNDOFF = {"float8_e4m3fn": 0.6 / 16, "float8_e4m3fnuz": 0.6 / 16, "float8_e5m2": 0.6 / 8, "float8_e5m2fnuz": 0.6 / 8}


def find(source: Source) -> Iterator[Weight]:
    """Every FP8 or int8 matrix with a scale whose shape fits it."""
    for name, info in source.tensors.items():
        if info.dtype not in FP8 and info.dtype != "int8":
            continue
        scale = _scale_of(source, name)
        if scale is None or len(info.shape) < 2:
            continue
        layout = _Layout.of(source, info.shape, scale)
        if layout is None:
            source.refuse(
                name, f"its scale {scale} is {list(source.shape(scale) or ())}, which fits no layout that is known"
            )
            continue
        zero_point = f"{name}_zero_point" if f"{name}_zero_point" in source.tensors else None
        is_float = info.dtype in FP8
        yield Weight(
            name=name.removesuffix(_CODES),
            codes=name,
            shape=info.shape,
            quantization=f"{info.dtype}, {layout.words}",
            roundoff=_ROUNDOFF[info.dtype] if is_float else absmax_roundoff(127, 4.0),
            read=_Reader(source, name, scale, zero_point, layout),
        )


def _scale_of(source: Source, name: str) -> str | None:
    if name.endswith(_CODES):
        candidate = f"{name.removesuffix(_CODES)}.scale"
        return candidate if candidate in source.tensors else None
    stem = name.removesuffix("weight")
    candidates = [f"{name}{suffix}" for suffix in _SCALES_OF_WEIGHT]
    if stem != name:
        candidates += [f"{stem}scale_weight"]
    return next((candidate for candidate in candidates if candidate in source.tensors), None)


class _Layout:
    """How a scale of some shape applies to a matrix, or a stack of them."""

    def __init__(self, shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None) -> None:
        self.shape, self.scale, self.block = shape, scale, block

    @property
    def words(self) -> str:
        """In words."""
        if self.block is not None:
            return f"scales of {self.block[0]}x{self.block[1]}"
        if math.prod(self.scale) == 1:
            return "one scale"
        of_rows = len(self.shape) == 2 or math.prod(self.scale) > self.shape[0]
        return "scales of rows" if of_rows else "scales of experts"

    @classmethod
    def of(cls, source: Source, shape: tuple[int, ...], name: str) -> _Layout | None:
        """The layout of a scale tensor; None if its shape fits none."""
        scale = source.shape(name)
        assert scale is not None
        if math.prod(scale) == 1:
            return cls(shape, scale, None)
        *stack, rows, columns = shape
        if scale in ((*stack, rows), (*stack, rows, 1)) or (stack and scale in (tuple(stack), (*stack, 1, 1))):
            return cls(shape, scale, None)
        if len(scale) == len(shape) and scale[:-2] == tuple(stack):
            given = source.settings.get("weight_block_size")
            blocks = [(int(given[0]), int(given[1]))] if given else []
            # One block in a direction says nothing of its size, nor does it matter.
            for block in (*blocks, (_BLOCK, _BLOCK), *_exact(rows, columns, scale)):
                if scale[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
                    return cls(shape, scale, block)
        return None


def _exact(rows: int, columns: int, scale: tuple[int, ...]) -> list[tuple[int, int]]:
    """The block size if the blocks fill the matrix exactly."""
    if rows % scale[-2] or columns % scale[-1]:
        return []
    return [(rows // scale[-2], columns // scale[-1])]


class _Reader:
    """Codes times scale, for all rows or some."""

    def __init__(self, source: Source, codes: str, scale: str, zero_point: str | None, layout: _Layout) -> None:
        self._checkpoint = source.checkpoint
        self._codes, self._scale, self._zero_point, self._layout = codes, scale, zero_point, layout

    def __call__(self, rows: Rows) -> torch.Tensor:
        layout = self._layout
        start, stop = (0, layout.shape[0]) if rows is None else rows
        if rows is None:
            codes = self._checkpoint.read(self._codes)
        else:
            codes = self._checkpoint.read_rows(self._codes, start, stop)
        values = codes.to(torch.float32)
        if self._zero_point is not None:
            values -= self._spread(self._checkpoint.read(self._zero_point), start, stop)
        return values.mul_(self._spread(self._checkpoint.read(self._scale), start, stop))

    def _spread(self, scale: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The scale in a shape that broadcasts with the rows."""
        layout = self._layout
        scale = scale.to(torch.float32)
        if scale.numel() == 1:
            return scale.reshape(())
        if layout.block is not None:
            columns = layout.shape[-1]
            if len(layout.shape) == 2:
                row = torch.arange(start, stop) // layout.block[0]
                return scale[row].repeat_interleave(layout.block[1], dim=1)[:, :columns]
            wide = scale[start:stop].repeat_interleave(layout.block[0], dim=1)[:, : layout.shape[1]]
            return wide.repeat_interleave(layout.block[1], dim=2)[:, :, :columns]
        # One for each row, or for each expert: the same for all that follows.
        return scale[start:stop].reshape(stop - start, *scale.shape[1:], *(1,) * (len(layout.shape) - scale.ndim))
