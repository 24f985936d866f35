"""One `.gguf` file of llama.cpp, or a set of `name-00001-of-00003.gguf` shards. Needs the extra `gguf`.

Format (GGUF versions 2 and 3): magic, version, two counts, metadata as typed key-value pairs, one record for each
tensor (name, dimensions, type, offset), then the aligned data. Dimensions are listed fastest first, so that ggml's
`[in, out]` is `[out, in]` here. The header is parsed here rather than by `gguf.GGUFReader`, which makes several arrays
of each token of the vocabulary; the package de-quantises.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from esdtool.checkpoint.base import TensorInfo
from esdtool.checkpoint.container import WeightFile
from esdtool.checkpoint.formats.gguf import SHARD
from esdtool.checkpoint.formats.gguf.header import TensorRecord, read_header
from esdtool.checkpoint.stored_file import StoredFile, exists
from esdtool.errors import CheckpointError, MissingExtraError
from esdtool.support.words import counted, listed

_PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_BFLOAT16 = "BF16"
_HEAD_MAJOR = re.compile(r"(?:.*\.)?blk\.\d+\.attn_(?P<which>[kv])_b\.weight")
"""Up-projections of latent attention. llama.cpp cuts `kv_b` in two, head by head: [heads, ., .]."""


class GGUFFile(WeightFile):
    """A GGUF model, known by the headers of its file or files."""

    def __init__(self, file: StoredFile, label: str) -> None:
        """Read the header of a file and, if it is a shard, of the whole set around it.

        Raises:
            MissingExtraError: without the package `gguf`.
            CheckpointError: if the file is damaged, no GGUF, or its set is incomplete.
        """
        path = file.path
        types = _ggml_types(file)
        folder = label[: len(label) - len(path.name)]
        self._records: dict[str, TensorRecord] = {}
        tensors: dict[str, TensorInfo] = {}
        codes: dict[str, int] = {}
        headers = {part.path: read_header(part, types) for part in _parts(file)}
        for part, header in headers.items():
            for name, record in header.tensors.items():
                if name in self._records:
                    raise CheckpointError(f"{part}: tensor {name!r} is in {self._records[name].file.path.name}, too")
                self._records[name] = record
                tensors[name] = info = _info(name, record, folder + part.name)
                if info.dtype == "uint8":
                    codes[record.type] = codes.get(record.type, 0) + 1
        first = next(iter(headers.values())).metadata
        _check_count(file, first, len(tensors))
        self.tensors = tensors
        self.config = _config(first)
        self.notes = tuple(
            f"{path}: {counted(count, 'tensor')} of type {kind}: the package gguf cannot de-quantise it; "
            "they are listed as bytes and not scored"
            for kind, count in sorted(codes.items())
        )

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some positions of its first dimension; only their bytes, where they are whole blocks.

        Quantised ones come as float32, times the tensor `<module>.scale` where there is one.
        """
        record, shape = self._records[name], self.tensors[name].shape
        start, stop, _ = (rows or slice(None)).indices(shape[0]) if shape else (0, 1, 1)
        stop = max(start, stop)
        if _transposed(name, record):
            whole = _decode(record, 0, record.nbytes, record.shape)
            tensor = whole.transpose(1, 2).flatten(0, 1)[start:stop]
        elif len(shape) > 1 and shape[0] > 0:
            each = record.nbytes // shape[0]
            tensor = _decode(record, start * each, (stop - start) * each, (stop - start, *shape[1:]))
        else:  # one row
            tensor = _decode(record, 0, record.nbytes, shape)
            tensor = tensor if rows is None else tensor[start:stop]
        return self._scaled(name, tensor, slice(start, stop))

    def stored_bytes(self, name: str) -> int:
        """Return the bytes of the quantised blocks."""
        return self._records[name].nbytes

    def _scaled(self, name: str, tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        """Apply the second scale that llama.cpp keeps beside NVFP4 and ternary weights: one, or one for each expert."""
        scale_name = f"{name.removesuffix('.weight')}.scale"
        if scale_name not in self._records or self.tensors[name].quantization is None or not name.endswith(".weight"):
            return tensor
        scale = self.read(scale_name).float().reshape(-1)
        if scale.numel() == 1:
            return tensor * scale
        if tensor.ndim != 3 or scale.numel() != self.tensors[name].shape[0]:
            raise CheckpointError(
                f"{self._records[name].file.path}: tensor {name!r}: its scale {scale_name!r} does not fit"
            )
        return tensor * scale[rows].reshape(-1, 1, 1)


def _ggml_types(file: StoredFile) -> Mapping[int, tuple[str, int, int]]:
    """(name, weights in a block, bytes of a block) of each tensor type, by its number in the file."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(f"{file.path}: reading a GGUF file", "gguf") from error
    return {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


def _parts(file: StoredFile) -> list[StoredFile]:
    """Return the file itself, or all files of its set."""
    path = file.path
    shard = SHARD.fullmatch(path.name)
    if shard is None:
        return [file]
    count = int(shard["count"])
    suffix = path.name[-len(".gguf") :]
    parts = [path.with_name(f"{shard['stem']}-{number:05d}-of-{count:05d}{suffix}") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not exists(part)]
    if missing or not parts:
        raise CheckpointError(
            f"{path}: {len(missing)} of the set's {count} files not in the folder: {listed(missing)}; "
            "download or copy them again"
        )
    return [StoredFile.at(part) for part in parts]


def _check_count(file: StoredFile, metadata: Mapping[str, Any], found: int) -> None:
    """Compare with the number of tensors that a split model tells in its first file."""
    promised, files = metadata.get("split.tensors.count"), metadata.get("split.count")
    if isinstance(promised, int) and promised != found and isinstance(files, int) and files > 1:
        raise CheckpointError(
            f"{file.path}: its set has {promised} tensors, but {found} are in the files; they do not fit together"
            if SHARD.fullmatch(file.path.name)
            else f"{file.path}: one file of a set of {files}, renamed; restore its name '...-00001-of-...'"
        )


def _info(name: str, record: TensorRecord, label: str) -> TensorInfo:
    """Catalogue entry. Types that cannot be de-quantised are bytes: [..., bytes of a row]."""
    shape = record.shape
    if len(shape) == 3 and (match := _HEAD_MAJOR.fullmatch(name)):
        heads, first, second = shape
        shape = (heads * second, first) if match["which"] == "k" else (heads * first, second)
    if record.type in _PLAIN:
        dtype = {"f": "float", "i": "int"}[_PLAIN[record.type].kind] + str(8 * _PLAIN[record.type].itemsize)
        return TensorInfo(name=name, shape=shape, dtype=dtype, file=label)
    if record.type == _BFLOAT16:
        return TensorInfo(name=name, shape=shape, dtype="bfloat16", file=label)
    if not _can_dequantise(record.type):
        lines = math.prod(record.shape[:-1])
        width = record.nbytes // lines if lines else 0
        return TensorInfo(name=name, shape=(*record.shape[:-1], width), dtype="uint8", file=label)
    return TensorInfo(
        name=name,
        shape=shape,
        dtype="float32",
        file=label,
        quantization=f"gguf {record.type}",
        roundoff=roundoff(record.type),
    )


def roundoff(kind: str) -> float:
    """Relative root-mean-square rounding error of weights of a ggml type, e.g. `Q4_K`: 1.2 * 2**-bits.

    An estimate from the bits of one weight's code, which the type's name tells. Each bit halves the step. The factor
    is that of round-to-nearest with one scale for 32 Gaussian weights, the largest of which is 2.07 standard
    deviations on average: Q8_0 has a step of 2.07 / 127 and so an error of 2.07 / 127 / sqrt(12) = 0.0047. For normal
    weights the true error is within a factor of 1.6 of it, but for the ternary types, which are meant for weights that
    are ternary already.

    >>> roundoff("Q4_0"), round(roundoff("Q8_0"), 4)
    (0.075, 0.0047)
    """
    digit = re.search(r"\d", kind)
    return 1.2 * 2.0 ** -int(digit[0] if digit else 1)


def _transposed(name: str, record: TensorRecord) -> bool:
    """Return whether each head's matrix is stored transposed: `attn_k_b`, which llama.cpp applies to the query."""
    match = _HEAD_MAJOR.fullmatch(name)
    return match is not None and match["which"] == "k" and len(record.shape) == 3


@functools.cache
def _can_dequantise(kind: str) -> bool:
    """Return whether the package knows the type: tried on a block of zeros, since it has no list to ask."""
    import gguf

    number = getattr(gguf.GGMLQuantizationType, kind, None)
    if number is None:
        return False
    _, nbytes = gguf.GGML_QUANT_SIZES[number]
    try:
        gguf.dequantize(np.zeros((1, nbytes), dtype=np.uint8), number)
    except NotImplementedError:
        return False
    return True


def _decode(record: TensorRecord, start: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
    """`nbytes` bytes of a tensor from its byte `start` on, as values of shape `shape`."""
    import gguf

    raw = record.file.read(record.offset + start, nbytes)
    if record.type in _PLAIN:
        native = _PLAIN[record.type].newbyteorder("=")
        return torch.from_numpy(raw.view(_PLAIN[record.type]).astype(native, copy=False).reshape(shape))
    if record.type == _BFLOAT16:
        return torch.from_numpy(raw.view(np.int16).reshape(shape)).view(torch.bfloat16)
    if not _can_dequantise(record.type):
        return torch.from_numpy(raw.reshape(shape))
    blocks = raw.reshape(math.prod(shape[:-1]), -1)
    with np.errstate(all="ignore"):  # a block of nonsense gives infinities; these are reported where they are used
        values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[record.type])
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32).reshape(shape))


_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "vocab_size": "vocab_size",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    # Qwen3-Next's linear attention
    "linear_num_key_heads": "ssm.group_count",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_value_heads": "ssm.time_step_rank",
}
"""Keys of a `config.json`, and llama.cpp's for the same after the architecture's name."""


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes in the metadata, under the names of a `config.json`."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        return {}
    prefix = architecture
    if f"{prefix}.block_count" not in metadata:  # mmproj files: clip.vision, clip.audio
        towers = (f"{prefix}.{part}" for part in ("vision", "audio"))
        prefix = next((tower for tower in towers if f"{tower}.block_count" in metadata), prefix)

    def size(key: str) -> int | None:
        value = metadata.get(f"{prefix}.{key}")
        if isinstance(value, list):  # layer by layer, 0 where a layer has no attention
            different = {item for item in value if item}
            value = different.pop() if len(different) == 1 else None
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    config: dict[str, Any] = {"model_type": architecture}
    if metadata.get("general.type") == "adapter":  # the alpha of a LoRA; 0 means that the product is not scaled
        alpha = metadata.get("adapter.lora.alpha")
        return config | {"peft_type": "LORA"} | ({"lora_alpha": alpha} if alpha else {})
    config |= {name: value for name, key in _SIZES.items() if (value := size(key)) is not None}
    key, value, rope = size("attention.key_length"), size("attention.value_length"), size("rope.dimension_count")
    if "kv_lora_rank" in config:  # latent attention; `_mla`: where the other two describe the compressed cache
        key, value = size("attention.key_length_mla") or key, size("attention.value_length_mla") or value
        if key and value and rope:
            config |= {"qk_nope_head_dim": key - rope, "qk_rope_head_dim": rope, "v_head_dim": value}
    elif key is not None and (value is None or key == value):
        config["head_dim"] = key
    inner, heads = size("ssm.inner_size"), size("ssm.time_step_rank")
    if inner and heads:
        config["linear_value_head_dim"] = inner // heads
    return config
