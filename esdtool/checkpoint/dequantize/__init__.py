"""Quantised checkpoints: the tensors of codes, scales and zero points as the weights that they stand for.

One file a family of formats; each defines `find`, a function from a `Source` to the weights that it recognises. What
none of them recognises keeps its codes, which are never scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.dequantize.source import Source, Weight

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class DequantizedCheckpoint(Checkpoint):
    """A checkpoint with weights in the place of their codes. Scales and zero points stay in the catalogue."""

    stored: Checkpoint = field(repr=False)
    weights: Mapping[str, Weight] = field(repr=False)
    """By name."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor; de-quantised weights in float32."""
        self.info(name)
        weight = self.weights.get(name)
        return self.stored.read(name) if weight is None else weight.read(None)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As `read`; formats that store rows one after the other leave the others on disk."""
        self.info(name)
        weight = self.weights.get(name)
        return self.stored.read_rows(name, start, stop) if weight is None else weight.read((start, stop))

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `Checkpoint.factors`."""
        return None if name in self.weights else self.stored.factors(name)


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint's weights, de-quantised as they are read; the checkpoint itself if nothing is quantised.

    Formats: FP8 and int8 with scales for the tensor, for rows or for blocks (DeepSeek, compressed-tensors, FBGEMM),
    bitsandbytes int8, NF4 and FP4, MXFP4 (gpt-oss), NVFP4, GPTQ, AWQ, compressed-tensors' packed integers.
    """
    # Imported here: they import the parts of this package.
    from esdtool.checkpoint.dequantize import bitsandbytes, microscaling, packed, scaled

    source = Source(checkpoint)
    if not source.looks_quantized:
        return checkpoint
    weights: dict[str, Weight] = {}
    for find in (bitsandbytes.find, packed.find, microscaling.find, scaled.find):
        for weight in find(source):
            weights.setdefault(weight.name, weight)
    notes = list(source.problems)
    if weights:
        kinds = ", ".join(sorted({weight.quantization for weight in weights.values()}))
        notes.insert(
            0,
            f"{checkpoint.location}: {len(weights)} weights are de-quantised ({kinds}): their spectra are those of the "
            "quantised weights, not of the originals",
        )
    if not notes:
        return checkpoint
    codes = {weight.codes for weight in weights.values()}
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in codes}
    tensors |= {
        name: TensorInfo(
            name=name,
            shape=weight.shape,
            dtype="float32",
            file=checkpoint.tensors[weight.codes].file,
            quantization=weight.quantization,
            roundoff=weight.roundoff,
        )
        for name, weight in weights.items()
    }
    return DequantizedCheckpoint(
        location=checkpoint.location,
        tensors=tensors,
        files=checkpoint.files,
        revision=checkpoint.revision,
        config=checkpoint.config,
        notes=(*checkpoint.notes, *notes),
        collective_reads=checkpoint.collective_reads,
        stored=checkpoint,
        weights=weights,
    )
