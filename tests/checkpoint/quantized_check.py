"""What the tests of de-quantisation share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from esdtool.checkpoint.base import Checkpoint
from esdtool.checkpoint.memory import from_state_dict
from esdtool.checkpoint.quantized.wrapper import dequantized

TensorDict = dict[str, torch.Tensor]


def opened(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Checkpoint:
    settings_ = None if config is None else {"quantization_config": config}
    return dequantized(from_state_dict(tensors, config=settings_))


def check(checkpoint: Checkpoint, name: str, expected: torch.Tensor, *, tolerance: float = 1e-6) -> None:
    """Catalogue, values and every way to read rows."""
    info = checkpoint.info(name)
    assert info.shape == tuple(expected.shape)
    assert info.dtype == "float32"
    assert info.quantization
    assert info.roundoff is not None
    assert 0 < info.roundoff < 1
    read = checkpoint.read(name)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, expected.float(), rtol=tolerance, atol=0)
    last = read.shape[0]
    for start, stop in ((0, last), (0, 1), (last // 3, last // 2 + 1), (last - 1, last), (1, 1)):
        assert torch.equal(checkpoint.read_rows(name, start, stop), read[start:stop])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pack_stream(codes: list[int], bits: int) -> list[int]:
    """Codes one after the other in a stream of bits, cut into signed words of 32."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.tensor([pack_stream(row, bits) for row in codes.tolist()], dtype=torch.int32)
