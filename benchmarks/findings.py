"""Measure how often findings are wrong: on random matrices, on models of random matrices, and on real models.

    python benchmarks/findings.py [CHECKPOINT ...] [--matrices 1000] [--json PATH]

1. Random matrices of several shapes and laws of elements, each as a model of its own: `untrained` has to find it, and
   every other finding is false.
2. Models of 8 layers with 7 roles whose matrices have a planted tail of large eigenvalues: every finding is false.
3. Merges of two models that changed independently, and LoRA updates of random factors: every finding is false.
4. Models of 20 spectra with Pareto tails of exponents 2 to 6: `ks-limits` may find nothing.
5. Checkpoints that are known to be sound: what is found in each.

No time is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from safetensors.torch import save_file

import esdtool
from esdtool.findings.rules import load_rules

SHAPES = ((64, 64), (64, 172), (172, 64), (96, 96), (128, 512), (192, 192), (256, 320))

LAWS: dict[str, Callable[[tuple[int, int], torch.Generator], torch.Tensor]] = {
    "normal": lambda shape, generator: torch.randn(shape, generator=generator),
    "uniform": lambda shape, generator: torch.rand(shape, generator=generator) - 0.5,
    "normal, cut at 2 sigma": lambda shape, generator: _cut(shape, generator),
    "normal, bfloat16": lambda shape, generator: torch.randn(shape, generator=generator).bfloat16(),
}

MODULE_SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 64),
    "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (160, 64),
    "mlp.up_proj": (160, 64),
    "mlp.down_proj": (64, 160),
}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", help="sound models")
    parser.add_argument("--matrices", type=int, default=1000, help="random matrices")
    parser.add_argument("--models", type=int, default=300, help="models with planted tails")
    parser.add_argument("--json", type=Path, help="where the results go")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "random": random_matrices(arguments.matrices),
        "planted": planted_models(arguments.models),
        "updates": random_updates(arguments.models),
        "within limits": within_limits(arguments.models),
        "real": {named(path): real_model(path) for path in arguments.checkpoints},
        "rules": list(load_rules()),
        "machine": machine.describe(),
    }
    print(json.dumps({name: part for name, part in result.items() if name != "machine"}, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def random_matrices(count: int) -> dict[str, Any]:
    """Count what is found in random matrices, one by one."""
    generator = torch.Generator().manual_seed(0)
    found: Counter[str] = Counter()
    for number in range(count):
        shape = SHAPES[number % len(SHAPES)]
        draw = list(LAWS.values())[number // len(SHAPES) % len(LAWS)]
        analysis = esdtool.analyze({"model.layers.0.mlp.up_proj.weight": draw(shape, generator)}, jobs=1)
        found.update({finding.rule for finding in analysis.findings or ()})
    return {"matrices": count, "found": dict(found)}


def planted_models(count: int) -> dict[str, Any]:
    """Count the models with heavy-tailed matrices in which anything is found."""
    generator = torch.Generator().manual_seed(1)
    found: Counter[str] = Counter()
    for _ in range(count):
        tensors = {
            f"model.layers.{layer}.{name}.weight": _heavy_tailed(shape, generator)
            for layer in range(8)
            for name, shape in MODULE_SHAPES.items()
        }
        found.update({finding.rule for finding in esdtool.analyze(tensors, jobs=1).findings or ()})
    return {"models": count, "modules": 8 * len(MODULE_SHAPES), "found": dict(found)}


def random_updates(count: int) -> dict[str, Any]:
    """Count models in which updates that have nothing to do with each other, or with any direction, are found."""
    generator = torch.Generator().manual_seed(3)
    base = {f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(64, 64, generator=generator) for layer in range(20)}
    found: Counter[str] = Counter()
    for _ in range(count):
        parents = [
            {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
            for _ in range(2)
        ]
        merged = {name: (parents[0][name] + parents[1][name]) / 2 for name in base}
        adapter = {
            f"base_model.model.{name.removesuffix('.weight')}.{part}.weight": torch.randn(shape, generator=generator)
            for name in base
            for part, shape in (("lora_A", (8, 64)), ("lora_B", (64, 8)))
        }
        with tempfile.TemporaryDirectory() as folder:
            save_file(adapter, Path(folder) / "adapter_model.safetensors")
            settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["up_proj"]}
            (Path(folder) / "adapter_config.json").write_text(json.dumps(settings))
            analyses = (
                esdtool.analyze(merged, base=base, merged_from=parents, jobs=1),
                esdtool.analyze(folder, cache=False, jobs=1),
            )
        found.update({finding.rule for analysis in analyses for finding in analysis.findings or ()})
    return {"models": count, "modules": len(base), "found": dict(found)}


def within_limits(count: int) -> dict[str, Any]:
    """Count the models of spectra with Pareto tails of exponents 2 to 6 in which `ks-limits` finds one outside."""
    generator = torch.Generator().manual_seed(2)
    found = 0
    for _ in range(count):
        alphas = 2 + 4 * torch.rand(20, generator=generator)
        draws = torch.rand(20, 200, generator=generator, dtype=torch.float64)
        # The square root of a Pareto variable on the diagonal makes it an eigenvalue.
        tensors = {
            f"model.layers.{layer}.mlp.up_proj.weight": torch.diag(draws[layer] ** (-0.5 / (float(alpha) - 1)))
            for layer, alpha in enumerate(alphas)
        }
        rules = {finding.rule for finding in esdtool.analyze(tensors, fit="ks", jobs=1).findings or ()}
        found += "ks-limits" in rules
    return {"models": count, "modules": 20, "found": found}


def real_model(path: str) -> list[dict[str, Any]]:
    """List what is found in a checkpoint."""
    analysis = esdtool.analyze(path)
    return [
        {"rule": finding.rule, "severity": finding.severity.value, "where": list(finding.where)}
        for finding in analysis.findings or ()
    ]


def named(path: str) -> str:
    """Name a checkpoint without the folder that it happens to lie in here."""
    parts = [part for part in Path(path).parts if part not in ("/", "model", "weights", "transformers", "models")]
    return "/".join(parts[-2:])


def _heavy_tailed(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Draw noise with a tail of planted directions: Pareto eigenvalues, channels of log-normal norms."""
    noise = torch.randn(shape, generator=generator) / sum(shape) ** 0.5
    rank = min(shape) // 4
    left = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator)).Q
    # Quantiles of the Pareto law of exponent 3, jittered: draws of its maximum would be outliers by right.
    levels = (torch.arange(rank) + 0.25 + 0.5 * torch.rand(rank, generator=generator)) / rank
    values = 1.5 * levels ** (-1 / 4)
    spread = torch.exp(0.2 * torch.randn(shape[0], 1, generator=generator))
    return (noise + (left * values) @ right.T) * spread


def _cut(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.nn.init.trunc_normal_(torch.empty(shape), a=-2, b=2, generator=generator)


if __name__ == "__main__":
    main()
