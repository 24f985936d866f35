"""Readers of our own against the libraries that define the formats: `torch.load` and `safetensors`."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from esdtool.checkpoint import open_checkpoint
from esdtool.errors import CheckpointError

DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "int16", "int8", "uint8", "uint16",
    "uint32", "uint64", "bool", "complex64", "complex128",
)  # fmt: skip
OLD = frozenset(DTYPES) - {"float8_e4m3fn", "uint16", "uint32", "uint64"}
"""What torch's old format has room for."""


def views(dtype: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    base = (torch.randn(6, 4, generator=generator) * 3).abs().to(getattr(torch, dtype))
    made = {
        "whole": base,
        "rows": base[2:5],
        "columns": base[:, 1:3],
        "turned": base.T,
        "steps": base[::2, ::3],
        "scalar": base[1, 2],
        "empty": base[:0],
        "expanded": base[:1].expand(5, 4),
        "deep": base.reshape(2, 3, 2, 2).permute(3, 0, 2, 1),
    }
    if dtype.startswith("complex"):
        made["conjugated"] = (base + 1j * base).conj()
        made["imaginary"] = (base + 1j * base).conj().imag  # torch notes that its sign is to be turned
    return made


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same elements; torch compares no 8-bit floats."""
    if "float8" in str(one.dtype):
        one, other = one.float(), other.float()
    return torch.equal(one, other)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_torch_save(tmp_path: Path, dtype: str, new_format: bool) -> None:
    if not new_format and dtype not in OLD:
        pytest.skip("not in the old format")
    tensors = views(dtype, torch.Generator().manual_seed(0))
    path = tmp_path / "w.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=new_format)
    expected = torch.load(path, weights_only=True)
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.tensors) == list(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert (read.shape, read.dtype, checkpoint.tensors[name].shape) == (tensor.shape, tensor.dtype, tensor.shape)
        assert same(read, tensor)
        for rows in ((0, 2), (1, 1), (1, 99)) if tensor.ndim else ():
            assert same(checkpoint.read_rows(name, *rows), tensor[slice(*rows)])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_what_else_torch_save_writes(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 4)
            self.register_buffer("steps", torch.arange(3))

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    model.linear(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    parameter = torch.nn.Parameter(torch.randn(2, 2))
    parameter.note = "kept"  # an attribute of its own
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "extra": [1, 2.5, "text", None, True, {3, 4}, complex(1, 2), b"bytes", bytearray(b"x"), torch.Size([2])],
        "types": OrderedDict(a=torch.float32, b=torch.strided, c=torch.device("cpu")),
    }
    path = tmp_path / "w.ckpt"
    others = (parameter, torch.nn.Buffer(torch.ones(2)), torch.ones(2, 3).to_sparse_csr(), torch.ones(2, 3).to_sparse())
    for content in (state, *({"a": tensor} for tensor in others)):
        torch.save(content, path)
        checkpoint = open_checkpoint(path)
        expected = content.get("model", content)
        assert set(checkpoint.tensors) == set(expected)
        for name, tensor in expected.items():
            dense = tensor.detach() if tensor.layout == torch.strided else tensor.to_dense()
            assert checkpoint.read(name).equal(dense)
            assert not checkpoint.read(name).requires_grad


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    quantized = torch.quantize_per_tensor(torch.randn(3, 2), 0.1, 0, torch.qint8)
    torch.save({"w": quantized, "v": torch.ones(2)}, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["w"].dtype == "qint8"
    with pytest.raises(CheckpointError, match="tensor 'w': with torch's own quantisation"):
        checkpoint.read("w")
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.strided)
    torch.save({"n": nested, "v": torch.ones(2)}, path)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == {"v"}
    assert checkpoint.notes == (f"{path}: left out 1 nested tensor: n",)


def test_numbers_in_the_other_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    complex_ = torch.randn(2, dtype=torch.complex64)
    tensors = {"w": torch.randn(3, 2), "h": torch.arange(4, dtype=torch.int16), "c": complex_}
    swapped = {
        name: torch.from_numpy(tensor.numpy().view(tensor.numpy().real.dtype).byteswap().view(tensor.numpy().dtype))
        for name, tensor in tensors.items()
    }
    torch.save(swapped, path)
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(path, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, b"big" if name.endswith("byteorder") else archive.read(name))
    checkpoint = open_checkpoint(path)
    assert all(checkpoint.read(name).equal(tensor) for name, tensor in tensors.items())


def accepted(path: Path) -> dict[str, tuple[int, ...]] | None:
    """What the library says of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def test_safetensors_headers_are_accepted_as_by_the_library(tmp_path: Path) -> None:
    generator = random.Random(0)
    path = tmp_path / "m.safetensors"
    agreed = {True: 0, False: 0}
    words = ["F32", "F16", "I8", "F4", "BOOL", "XX"]
    for _ in range(3000):
        position, header = 0, {}
        for index in range(generator.randrange(4)):
            dtype = generator.choice(words[:5])
            shape = [generator.randrange(4) for _ in range(generator.randrange(4))]
            bits = {"F32": 32, "F16": 16, "I8": 8, "F4": 4, "BOOL": 8}[dtype]
            count = 1
            for size in shape:
                count *= size
            length = count * bits // 8
            header[f"t{index}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + length]}
            position += length
        if header and generator.random() < 0.6:
            entry = header[generator.choice(list(header))]
            change = generator.randrange(8)
            if change == 0:
                entry["dtype"] = generator.choice(words)
            elif change == 1:
                entry["shape"] = [*entry["shape"], generator.choice([0, 1, 2, -1, 2**40, 1.0, True, None])]
            elif change == 2:
                entry["data_offsets"][generator.randrange(2)] += generator.choice([-1, 1, 4])
            elif change == 3:
                del entry[generator.choice(list(entry))]
            elif change == 4:
                entry["data_offsets"] = entry["data_offsets"][::-1]
            elif change == 5:
                header["__metadata__"] = generator.choice([{"a": "b"}, {"a": 1}, [], "x", None])
            elif change == 6:
                position += generator.choice([-1, 1])
            else:
                header[generator.choice(["t9", ""])] = generator.choice([entry, 3, [], {}])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(max(0, position)))
        expected = accepted(path)
        try:
            shapes = {name: info.shape for name, info in open_checkpoint(path).tensors.items()}
        except CheckpointError:
            shapes = None
        assert shapes == expected, text
        agreed[expected is not None] += 1
    assert min(agreed.values()) > 300


def test_safetensors_values(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {name: (torch.randn(5, 3) * 3).abs().to(getattr(torch, name)) for name in DTYPES if name != "complex128"}
    save_file(tensors, path)
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.read(name).view(torch.uint8).equal(tensor.view(torch.uint8))
        assert checkpoint.read_rows(name, 1, 4).view(torch.uint8).equal(tensor[1:4].view(torch.uint8))
