"""Measure what assigned sparsities and bits do to perplexity, against the uniform value of the same mean.

    python benchmarks/quantities.py [--checkpoint FOLDER] [--json results/quantities.json]

Weights are pruned by magnitude inside each matrix, or rounded to the nearest of 2^b - 1 symmetric levels per row. Text:
the sources of Python's standard library that training holds out, as for the bundled checkpoint. Every assignment is
compared with its controls: the mean (for bits: the same rule without alpha), shuffled over five seeds, and reversed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe
from safetensors.torch import load_file, save_file

from esdtool.analysis.document import Analysis
from esdtool.analysis.run import analyze
from esdtool.assignment.allocate import AllocateOptions, allocate
from esdtool.assignment.assign_options import AssignOptions
from esdtool.assignment.rounding import rounded_rows
from esdtool.train.config.sections import StdlibData
from esdtool.train.evaluate import EvalRequest, evaluate_checkpoint

BUNDLED = Path(__file__).parents[1] / "examples" / "checkpoints" / "stdlib-llama"
SEEDS = range(5)


def pruned(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Set the share of the weights with the smallest magnitudes to 0."""
    count = round(sparsity * weight.numel())
    order = weight.abs().flatten().argsort(stable=True)
    result = weight.clone().flatten()
    result[order[:count]] = 0
    return result.view_as(weight)


def rounded(weight: torch.Tensor, bits: float) -> torch.Tensor:
    """Round to the nearest level of a symmetric grid per row."""
    return rounded_rows(weight, int(bits))


def values(analysis: Analysis, quantity: str, key: str, **settings: Any) -> dict[str, float]:
    """Return the values of a quantity by parameter."""
    options = AllocateOptions.of([quantity], {quantity: settings}, decays=AssignOptions())
    return allocate(analysis, options).allocation.values(key)


class Model:
    """A checkpoint whose block matrices are changed before its perplexity is taken."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.folder, self.tokens = folder, tokens
        self.weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}

    def perplexity(self, change: Callable[[torch.Tensor, float], torch.Tensor], of: dict[str, float]) -> float:
        """Return the perplexity with each listed weight changed by its value."""
        changed = {name: change(weight, of[name]) if name in of else weight for name, weight in self.weights.items()}
        with tempfile.TemporaryDirectory() as folder:
            for file in self.folder.iterdir():
                if file.suffix == ".json":
                    (Path(folder) / file.name).write_bytes(file.read_bytes())
            save_file(changed, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            request = EvalRequest(
                checkpoint=folder,
                data=StdlibData(source="stdlib", validation_fraction=0.05),
                held_out=True,
                tokens=self.tokens,
                device="cpu",
            )
            return evaluate_checkpoint(request).perplexity


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = Model(arguments.checkpoint, arguments.tokens)
    analysis = analyze(arguments.checkpoint, fit=["hill", "fix-finger-legacy", "farms-fix-finger", "hill-classic"])
    rows: list[dict[str, Any]] = [{"what": "unchanged", "perplexity": model.perplexity(pruned, {})}]

    def record(what: str, change: Callable[[torch.Tensor, float], torch.Tensor], of: dict[str, float]) -> float:
        found = model.perplexity(change, of)
        rows.append({"what": what, "perplexity": found})
        print(f"{what:60s} {found:10.3f}", flush=True)
        return found

    for target in (0.5, 0.7):
        for name, settings in {
            "uniform": {"control": "mean"},
            "AlphaPruning, eps 0.3": {},
            "AlphaPruning, eps 0.1": {"eps": 0.1},
            "AlphaPruning with FARMS, eps 0.3": {"fit": "farms-fix-finger"},
            "reversed": {"control": "reversed"},
        }.items():
            record(
                f"sparsity {target:.0%}: {name}",
                pruned,
                values(analysis, "sparsity", "sparsity", target=target, **settings),
            )
        shuffled = [
            record(
                f"sparsity {target:.0%}: shuffled, seed {seed}",
                pruned,
                values(analysis, "sparsity", "sparsity", target=target, control="shuffled", control_seed=seed),
            )
            for seed in SEEDS
        ]
        rows.append({"what": f"sparsity {target:.0%}: shuffled, median", "perplexity": statistics.median(shuffled)})

    names = list(values(analysis, "bits", "bits"))
    for width in (3, 4):
        record(f"bits: uniform {width}", rounded, dict.fromkeys(names, width))
    for name, settings in {
        "AlphaQ, gamma 1": {},
        "AlphaQ, gamma 10": {"gamma": 10},
        "AlphaQ, error of the step": {"error": "step"},
        "AlphaQ, measured error": {"error": "rounding"},
        "measured error alone (gamma 0)": {"error": "rounding", "gamma": 0},
        "variance alone (gamma 0)": {"gamma": 0},
        "reversed": {"control": "reversed"},
    }.items():
        found = values(analysis, "bits", "bits", budget=3.5, choices="2,3,4,8", **settings)
        sizes = [model.weights[parameter].numel() for parameter in found]
        mean = sum(width * size for width, size in zip(found.values(), sizes, strict=True)) / sum(sizes)
        record(f"bits 3.5: {name} (mean {mean:.3f})", rounded, found)
    # Uniform widths have no mean of 3.5: half of the weights at 3 and half at 4, matrices dealt at random.
    mixed = []
    for seed in SEEDS:
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        total, dealt = 0, dict.fromkeys(names, 3.0)
        half = sum(model.weights[parameter].numel() for parameter in names) / 2
        for index in order:
            size = model.weights[names[index]].numel()
            if total + size <= half:
                total += size
                dealt[names[index]] = 4.0
        mixed.append(record(f"bits 3.5: 3 or 4 at random, seed {seed}", rounded, dealt))
    rows.append({"what": "bits 3.5: 3 or 4 at random, median", "perplexity": statistics.median(mixed)})
    if arguments.json is not None:
        result = {
            "machine": describe(),
            "command": f"python benchmarks/quantities.py {shlex.join(sys.argv[1:])}",
            "checkpoint": arguments.checkpoint.name,
            "tokens": arguments.tokens,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
