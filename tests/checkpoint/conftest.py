"""A small state dict of every dtype, and the ways to write it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

TensorDict = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator) * 3
    floats = ("float64", "float32", "float16", "bfloat16")
    eights = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    integers = ("int64", "int32", "int16", "int8", "uint8")
    made = {f"layers.0.{name}": base.to(getattr(torch, name)) for name in (*floats, *eights)}
    made |= {f"layers.1.{name}": base.abs().to(getattr(torch, name)) for name in integers}
    made |= {"layers.1.bool": base > 0, "scale": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    made |= {"conv.weight": torch.randn(2, 3, 5, generator=generator)}
    return made


@pytest.fixture
def assert_same() -> Callable[[Any, Mapping[str, torch.Tensor]], None]:
    """Compare every tensor of a checkpoint with the original: names, catalogue and bits."""

    def check(checkpoint: Any, expected: Mapping[str, torch.Tensor]) -> None:
        assert set(checkpoint.tensors) == set(expected)
        for name, tensor in expected.items():
            info, read = checkpoint.tensors[name], checkpoint.read(name)
            assert info.name == name
            assert info.shape == tuple(tensor.shape) == tuple(read.shape)
            assert info.dtype == str(tensor.dtype).removeprefix("torch.")
            assert read.dtype == tensor.dtype
            assert read.device.type == "cpu"
            assert info.nbytes == tensor.numel() * tensor.element_size()
            assert (
                read.contiguous().reshape(-1).view(torch.uint8).equal(tensor.contiguous().reshape(-1).view(torch.uint8))
            )

    return check


@pytest.fixture
def write_shards() -> Callable[..., Path]:
    """Spread tensors over `count` files with an index; returns the index's path."""

    def write(
        folder: Path, tensors: TensorDict, count: int = 3, stem: str = "model", suffix: str = "safetensors"
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        weight_map: dict[str, str] = {}
        for number in range(count):
            shard = f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"
            part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % count == number}
            if suffix == "safetensors":
                save_file(part, folder / shard)
            else:
                torch.save(part, folder / shard)
            weight_map |= dict.fromkeys(part, shard)
        index = folder / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return index

    return write


@pytest.fixture
def raw_safetensors() -> Callable[..., bytes]:
    """The bytes of a safetensors file with any header, however wrong."""

    def build(header: Any, data: bytes = b"") -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    return build
