"""Codes with companions of any shape, dtype and setting: read in the shape that is promised, left out, or one line."""

from __future__ import annotations

import random

import pytest
import torch

from esdtool.checkpoint import from_state_dict
from esdtool.errors import EsdtoolError

LEAVES = (
    "weight", "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "scale",
    "weight_zero_point", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "SCB", "weight_format",
    "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", "weight.nested_absmax",
    "weight.nested_quant_map", "w_blocks", "w_scales",
)  # fmt: skip
DTYPES = (
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float16, torch.float32, torch.float64,
    torch.float8_e4m3fn,
)  # fmt: skip
SHAPES = (
    (), (0,), (1,), (2,), (16,), (64,), (8, 8), (8, 1), (1, 8), (0, 8), (8, 0), (8, 16), (2, 8, 8), (2, 4, 16),
    (2, 3, 4, 16),
)  # fmt: skip
STATES = (
    b'{"shape":[8,8],"blocksize":64}',
    b'{"shape":[8,8],"blocksize":99999999999999999999}',
    b'{"shape":[8,8],"blocksize":64,"nested_offset":1e999,"nested_blocksize":1}',
    b'{"shape":[8,8],"blocksize":1,"nested_offset":0.1,"nested_blocksize":99999999999}',
    b'{"shape":' + b"9" * 5000 + b"}",
    b"[" * 3000,
)
CONFIGS = (
    {},
    *({"quant_method": "gptq", "bits": 4, "group_size": size} for size in (-1, 0, 8, 2**40)),
    *({"quant_method": "fp8", "weight_block_size": [size, 8]} for size in (0, 1, 128, 2**31)),
)


@pytest.mark.parametrize("seed", range(4))
def test_any_companions(seed: int) -> None:
    generator = random.Random(seed)
    read = 0
    for _ in range(400):
        tensors = {
            f"l.0.{leaf}": torch.ones(generator.choice(SHAPES)).to(generator.choice(DTYPES))
            for leaf in generator.sample(LEAVES, generator.randrange(1, 6))
        }
        if generator.random() < 0.3:
            state = torch.tensor(list(generator.choice(STATES)), dtype=torch.uint8)
            tensors |= {
                "l.0.weight": torch.ones(32, 1, dtype=torch.uint8),
                "l.0.weight.quant_state.bitsandbytes__nf4": state,
                "l.0.weight.absmax": torch.ones(generator.choice(SHAPES)),
                "l.0.weight.quant_map": torch.ones(16),
            }
        try:
            checkpoint = from_state_dict(tensors, config={"quantization_config": generator.choice(CONFIGS)})
            for name, info in checkpoint.tensors.items():
                assert checkpoint.read(name).shape == info.shape
                read += 1
        except EsdtoolError as error:
            assert str(error).isprintable()  # noqa: PT017 - most inputs are no errors
    assert read > 400
