"""Small models whose spectra look trained, to plant faults in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from esdtool.analysis.document import Analysis, Settings, Source, Summary
from esdtool.analysis.module_record import ModuleResult

Tensors = dict[str, torch.Tensor]

SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 64),
    "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (160, 64),
    "mlp.up_proj": (160, 64),
    "mlp.down_proj": (64, 160),
}


def trained(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """A matrix with a heavy tail of eigenvalues over noise, and channels of moderately different norms."""
    rows, columns = shape
    short = min(shape)
    left = torch.linalg.qr(torch.randn(rows, short, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, short, generator=generator)).Q
    # Singular values i^(-1/2): a spectrum of eigenvalues with a tail of exponent 2.
    values = torch.arange(1, short + 1).float().rsqrt()
    spread = torch.exp(0.3 * torch.randn(columns, generator=generator))
    return (left * values @ right.T + 0.01 * torch.randn(shape, generator=generator)) * spread


def healthy(layers: int = 8, *, seed: int = 0) -> Tensors:
    """A model of the LLaMA family, under the names of Hugging Face."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.{name}.weight": trained(shape, generator)
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }


def module(name: str, **values: object) -> ModuleResult:
    """A module of an analysis file, scored unless `values` say otherwise."""
    known: dict[str, object] = {
        "name": name,
        "parameter": f"{name}.weight",
        "role": "q_proj",
        "layer": 0,
        "shape": (64, 64),
        "dtype": "float32",
        "num_eigs": 64,
    }
    return ModuleResult.model_validate(known | values)


def analysis_of(modules: Sequence[ModuleResult], *, checkpoint: str = "m") -> Analysis:
    """An analysis with these modules, nobody has looked for findings in."""
    return Analysis(
        created_by="test",
        source=Source(checkpoint=checkpoint),
        settings=Settings(fit=("ks",), k_fraction=0.5, min_eigs=50, spectrum="auto", fast=False),
        modules=tuple(modules),
        summary=Summary(num_modules=len(modules), num_scored=len(modules), num_skipped=0),
    )
