"""Measure how the cost of a spectrum grows with its size, and predict the cost for models that do not fit here.

    python benchmarks/growth.py [--largest 4096] [--figure FILE.png] [--json PATH]

This times the exact spectrum of square matrices on one thread, with the default and with `--fast`, and fits the
exponent of the cost over the largest orders. With that it adds up the modules of four models, on two and sixteen such
cores that do not slow each other down, and on one and eight GPUs at best (the roofline of
`esdtool.analysis.timing.at_best`, from data sheets; no GPU was measured).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import machine
import torch

from esdtool.analysis.plan import make_plan
from esdtool.analysis.timing import ACCELERATORS, Calibration, at_best, calibrate, makespan
from esdtool.modules import WeightModule
from esdtool.spectra.options import ScoreOptions
from esdtool.support.balance import balance

ORDERS = (256, 512, 1024, 2048, 4096)

# (how often, rows, columns)
MODELS: dict[str, list[tuple[int, int, int]]] = {
    "LLaMA 1B": [(24 * 4, 2048, 2048), (24 * 3, 5461, 2048)],
    "LLaMA 7B": [(32 * 4, 4096, 4096), (32 * 3, 11008, 4096)],
    "LLaMA 70B": [(80 * 2, 8192, 8192), (80 * 2, 1024, 8192), (80 * 3, 28672, 8192)],
    # Latent attention by its parts, 3 dense layers, 58 with 257 experts of 2048.
    "DeepSeek-V3 671B": [
        *[
            (61, 1536, 7168),
            (61, 24576, 1536),
            (61, 512, 7168),
            (61, 64, 7168),
            (2 * 61, 16384, 512),
            (61, 7168, 16384),
        ],
        *[(3 * 3, 18432, 7168), (58 * 257 * 3, 2048, 7168)],
    ],
}


def modules_of(model: str) -> list[WeightModule]:
    """Build the weight modules of a model from their shapes alone."""
    return [
        WeightModule(name="", parameter="", role="", layer=None, shape=(rows, columns), dtype="bfloat16")
        for count, rows, columns in MODELS[model]
        for _ in range(count)
    ]


def measured(fast: bool, largest: int) -> Calibration:
    """Time the spectra on one thread."""
    orders = [order for order in ORDERS if order <= largest]
    plan = make_plan(
        {"layers.0.mlp.up_proj.weight": torch.empty(orders[-1], orders[-1])}, ScoreOptions(fast=fast), jobs=1
    )
    return calibrate(plan, orders=tuple(orders))


def exponent(calibration: Calibration) -> float:
    """Fit the exponent of the cost between the two largest orders."""
    (low, high), (fast, slow) = calibration.orders[-2:], calibration.seconds[-2:]
    return math.log(slow / fast) / math.log(high / low)


def estimates(calibration: Calibration, modules: list[WeightModule]) -> dict[str, float]:
    """Predict the seconds on each hardware."""
    costs = [calibration.of_module(module) for module in modules]
    found = {f"{cores} cores like these": makespan(costs, cores) for cores in (2, 16)}
    for accelerator in ACCELERATORS:
        each = [at_best([module], accelerator) for module in modules]
        owners = balance(each, 8)
        eight = max(sum(cost for cost, owner in zip(each, owners, strict=True) if owner == rank) for rank in range(8))
        found |= {f"1 x {accelerator.name}, at best": sum(each), f"8 x {accelerator.name}, at best": eight}
    return found


def main() -> None:
    """Measure, extrapolate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=ORDERS[-1])
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    document: dict[str, Any] = {"machine": machine.describe(), "curves": {}, "models": {}}
    curves = {"default": measured(False, arguments.largest), "--fast": measured(True, arguments.largest)}
    for name, calibration in curves.items():
        document["curves"][name] = {
            "seconds": dict(zip(map(str, calibration.orders), calibration.seconds, strict=True)),
            "exponent": exponent(calibration),
        }
    for model in MODELS:
        modules = modules_of(model)
        document["models"][model] = {
            "modules": len(modules),
            "seconds": {name: estimates(calibration, modules) for name, calibration in curves.items()},
        }
    print(json.dumps(document, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.figure:
        draw(curves, arguments.figure)


def draw(curves: dict[str, Calibration], path: Path) -> None:
    """Draw the cost against the order on logarithmic axes."""
    from esdtool.report.figures.style import legend_below, new_figure, nth_style, set_title

    with new_figure(path, width=5.6, height=4.0) as (figure, (axes,)):
        for index, (name, calibration) in enumerate(curves.items()):
            label = f"{name}, n^{exponent(calibration):.2f} at the end"
            axes.loglog(calibration.orders, calibration.seconds, label=label, **nth_style(index))
        axes.set_xlabel("order n of a square matrix")
        axes.set_ylabel("seconds on one thread")
        set_title(axes, "Cost of an exact spectrum")
        legend_below(figure, axes)


if __name__ == "__main__":
    main()
