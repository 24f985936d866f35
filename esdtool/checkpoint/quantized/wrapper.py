"""Present a checkpoint of codes as a checkpoint of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.boundary import one_line_errors
from esdtool.checkpoint.formats import container_of
from esdtool.checkpoint.quantized.base import FLOAT8, INTEGERS, QuantizedTensor, Stored, UnconvertibleError
from esdtool.checkpoint.quantized.bitsandbytes import find_normal_float
from esdtool.checkpoint.quantized.float4 import find_float4
from esdtool.checkpoint.quantized.gptq import find_gptq
from esdtool.checkpoint.quantized.packed import find_packed
from esdtool.checkpoint.quantized.scaled import find_float8, find_int8
from esdtool.checkpoint.quantized.scales import WEIGHT_SCALES
from esdtool.errors import EsdtoolError
from esdtool.support.words import counted

if TYPE_CHECKING:
    import torch

_FORMATS: tuple[Callable[[TensorInfo, Stored], QuantizedTensor | None], ...] = (
    find_gptq,
    find_packed,
    find_normal_float,
    find_float4,
    find_float8,
    find_int8,
)
"""Formats in order of precedence, because int8 may hold 4-bit floats or bytes of bitsandbytes."""

_UNREAD = {
    "W_q": "HQQ",
    "codes": "AQLM",
    "_data": "quanto",
    "_weight_qdata": "torchao",
    "weight_qdata": "torchao",
    "Qidxs": "QuIP#",
    "q_weight": "ExLlamaV2",
    "indices": "VPTQ",
    "B": "Marlin",
    "qweight": "GPTQ or AWQ",
}
"""Names of the codes of methods that esdtool does not read."""


@dataclass(kw_only=True)
class DequantizedCheckpoint(Checkpoint):
    """A checkpoint with weights in place of their codes, and everything else as it is stored."""

    inner: Checkpoint = field(repr=False)
    weights: Mapping[str, QuantizedTensor] = field(repr=False)
    """Weights by their logical names."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor; a weight that is stored as codes is de-quantised to float32."""
        return self._read(name, 0, self.info(name).shape[0]) if name in self.weights else self.inner.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read some rows of a tensor; most formats read only the codes of these rows."""
        info = self.info(name)
        if name not in self.weights:
            return self.inner.read_rows(name, start, stop)
        first, last, _ = slice(start, stop).indices(info.shape[0])
        return self._read(name, first, max(first, last))

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """De-quantise some rows. The values of codes and companions may contradict what their shapes promise."""
        with one_line_errors(self.location, tensor=name):
            return self.weights[name].read_rows(self.inner, start, stop)

    def stored_bytes(self, name: str) -> int:
        """Return the bytes of a tensor as it is stored; of a weight those of its codes, the largest part."""
        return self.inner.stored_bytes(self.weights[name].codes if name in self.weights else name)

    def fingerprint(self, name: str) -> str | None:
        """Return the identity of a stored tensor, or of all files for what is computed from several."""
        return super().fingerprint(name) if name in self.weights else self.inner.fingerprint(name)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the factors of a stored tensor; a de-quantised weight has none."""
        return None if name in self.weights else self.inner.factors(name)


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """Replace codes by weights in a checkpoint; return it unchanged if it holds no codes.

    Known formats are fp8 and int8 with scales, MXFP4 and NVFP4, int8, nf4 and fp4 of bitsandbytes, GPTQ, AWQ and the
    packed integers of compressed-tensors. Each tensor of codes is replaced by the weight that it represents, named
    `<module>.weight` (stacked MXFP4: `...gate_up_proj`), of shape [out, in], read as float32, with
    `TensorInfo.quantization` and `TensorInfo.roundoff`. Scales and other companions stay in the catalogue.

    Codes that cannot be converted with certainty stay as they are stored: codes of unknown methods, or with companions
    that are missing or do not fit. A note names the first such tensor. The dtype of a floating-point tensor among them
    is marked as codes, so that nothing takes it for a weight.

    Only the catalogue is read, except for the few bytes that hold the shape of a weight of bitsandbytes, or sometimes
    of compressed-tensors.
    """
    stored = Stored(checkpoint)
    tensors: dict[str, TensorInfo] = {}
    weights: dict[str, QuantizedTensor] = {}
    refused: dict[str, str] = {}
    for name, info in checkpoint.tensors.items():
        try:
            weight = _recognised(info, stored)
        except UnconvertibleError as error:
            refused[name] = str(error)
            weight = None
        except EsdtoolError:
            raise
        # Companions of shapes that no format has, and settings that contradict them, meet arithmetic of any kind.
        except Exception as error:
            refused[name] = f"its parts do not fit ({type(error).__name__})"
            weight = None
        if weight is None:
            tensors[name] = info
        else:
            tensors[weight.info.name] = weight.info
            weights[weight.info.name] = weight
    refused |= _without_scales(tensors, weights, refused, stored)
    if not weights and not refused:
        return checkpoint
    for name in refused:
        tensors[name] = _marked(tensors[name], stored)
    return DequantizedCheckpoint(
        location=checkpoint.location,
        tensors=tensors,
        files=checkpoint.files,
        revision=checkpoint.revision,
        config=checkpoint.config,
        notes=(*checkpoint.notes, *_notes(checkpoint.location, weights, refused)),
        folder=checkpoint.folder,
        collective_reads=checkpoint.collective_reads,
        inner=checkpoint,
        weights=weights,
    )


def _recognised(info: TensorInfo, stored: Stored) -> QuantizedTensor | None:
    container = container_of(info.file)
    if info.quantization is not None or (container is not None and container.quantizes):
        return None  # the reader of its container has already converted it, or said why not
    for find in _FORMATS:
        weight = find(info, stored)
        if weight is not None:
            if weight.info.name != info.name and stored.find(weight.info.name) is not None:
                raise UnconvertibleError(f"there is a tensor {weight.info.name!r}, too")
            return weight
    if info.dtype in INTEGERS and len(info.shape) >= 2:
        leaf = info.name.rpartition(".")[2]
        if leaf in _UNREAD:
            raise UnconvertibleError(f"codes of {_UNREAD[leaf]} are not read")
        if leaf == "weight":
            raise UnconvertibleError(f"{info.dtype} codes of a method that is not read ({stored.settings.named})")
    return None


def _without_scales(
    tensors: Mapping[str, TensorInfo],
    weights: Mapping[str, QuantizedTensor],
    refused: Mapping[str, str],
    stored: Stored,
) -> dict[str, str]:
    """Find fp8 weights without a scale, if others have one or the configuration names a quantisation.

    An fp8 checkpoint without any scales holds weights that were cast to fp8.
    """
    if stored.settings.method is None and not any(
        (weight.info.quantization or "").startswith("float8") for weight in weights.values()
    ):
        return {}
    return {
        name: f"{info.dtype} without a scale"
        for name, info in tensors.items()
        if info.dtype in FLOAT8 and name not in refused and len(info.shape) >= 2 and name.endswith("weight")
    }


def _marked(info: TensorInfo, stored: Stored) -> TensorInfo:
    """Mark a refused tensor as codes in its dtype, unless a scale with a usual name already shows it."""
    base = info.name.removesuffix("weight")
    told = info.name.endswith("weight") and stored.first(*(base + suffix for suffix in WEIGHT_SCALES)) is not None
    return info if "float" not in info.dtype or told else replace(info, dtype=f"{info.dtype} codes")


def _notes(location: str, weights: Mapping[str, QuantizedTensor], refused: Mapping[str, str]) -> list[str]:
    notes = []
    if weights:
        kinds = Counter(weight.info.quantization for weight in weights.values())
        listed = "; ".join(f"{counted(number, 'tensor')} of {kind}" for kind, number in kinds.most_common())
        notes.append(
            f"{location}: de-quantised as they are read: {listed}. The alphas describe the quantised weights, not the "
            "originals"
        )
    if refused:
        name, why = next(iter(refused.items()))
        notes.append(
            f"{location}: left out {counted(len(refused), 'tensor')} of codes that cannot be de-quantised: "
            f"{name!r}: {why}; analyse the original checkpoint, or save this one de-quantised with the library "
            "that made it"
        )
    return notes
