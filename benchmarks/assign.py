"""Time putting a wd.json into the optimizer of a 1B-shaped LLaMA (24 layers, hidden 2048; meta tensors, no memory).

    python benchmarks/assign.py

This times `param_groups` (static use, equal values merged) and `apply` on an optimizer with one group per value, and
counts groups, per module and per role. For comparison: one AdamW step over the same parameters takes longer than both.
It is not timed here, because the tensors have no data.
"""

from __future__ import annotations

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import esdtool
from esdtool.analysis.document import Analysis, Settings, Source, Summary
from esdtool.analysis.module_record import ModuleResult
from esdtool.checkpoint import from_model
from esdtool.modules import select_modules


def main() -> None:
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5461, num_hidden_layers=24, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    selection = select_modules(from_model(model).tensors.values())
    alphas = torch.rand(len(selection.modules), generator=torch.Generator().manual_seed(0)).add(1.5).tolist()
    modules = tuple(
        ModuleResult(
            name=module.name,
            parameter=module.parameter,
            role=module.role,
            layer=module.layer,
            shape=module.shape,
            dtype=module.dtype,
            num_eigs=module.num_eigs,
            alpha=alpha,
            alphas={"hill": alpha},
        )
        for module, alpha in zip(selection.modules, alphas, strict=True)
    )
    analysis = Analysis(
        created_by="benchmark",
        source=Source(checkpoint="memory"),
        settings=Settings(fit=("hill",), k_fraction=0.5, min_eigs=50, spectrum="auto", fast=False),
        modules=modules,
        summary=Summary(num_modules=len(modules), num_scored=len(modules), num_skipped=0),
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e9:.2f}B parameters, {len(modules)} weight modules")
    for granularity in ("module", "role"):
        start = time.perf_counter()
        assignment = esdtool.assign(analysis, granularity=granularity)
        assigned = time.perf_counter()
        groups = esdtool.param_groups(model, assignment)
        grouped = time.perf_counter()
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        built = time.perf_counter()
        report = esdtool.apply(optimizer, assignment, model=model)
        applied = time.perf_counter()
        print(
            f"per {granularity:6s}: assign {assigned - start:.3f} s, param_groups {grouped - assigned:.3f} s, "
            f"apply {applied - built:.3f} s; {len(optimizer.param_groups)} groups, {len(report.matched)} matched"
        )


if __name__ == "__main__":
    main()
