"""Measure the cost of a refresh as a share of the training between two refreshes, for the models of the paper.

    python benchmarks/refresh.py [PRESET ...] [--rate FLOPS] [--cores N] [--device cpu|cuda] [--ranks N] [--json PATH]

Measured: the spectrum of every distinct module shape, one matrix at a time on one thread ("1 thread"), and two
matrices at a time on two threads with one BLAS thread each ("2 threads"). For comparison, `torch.linalg.svdvals` in
float32 followed by Hill's formula on one thread, as in the public code. The refresh of a model is the sum over its
modules (on two threads: half the measured time of two at once, for each module).

Extrapolated: "N cores", for machines with more than two cores per rank (GPU nodes have 8 and more per GPU). It assumes
as many modules at a time, at the efficiency measured with two, but never less than the slowest module takes alone.

Estimated: the time of `interval` steps, as flops divided by a rate that you can replace by your own. The flops of a
step are 6 x (parameters of the blocks and the lm_head) x tokens, and 12 x layers x hidden x sequence length x tokens
for attention. The rate is per rank; the default, 1.25e14, is 40 % of an A100's 312e12 bfloat16 flop/s.

Not counted: copying weights from the GPU to the CPU (weights of 2.4 GB take about 0.2 s over PCIe 4), and with
`--device cpu` the GPU's own solver, which runs where the weights are. With N ranks a step takes 1/N of the time.
esdtool divides the modules between the ranks, so its share does not change. In the public code every rank repeats all
of them, so the share grows N-fold.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine
import torch
from threadpoolctl import threadpool_limits

from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.scoring import score_matrices
from esdtool.train.config.presets import PRESETS, Preset

PAPER = ("llama-60m", "llama-130m", "llama-350m", "llama-1b")
TOKENS = 512 * 256
SEQUENCE_LENGTH = 256
INTERVAL = 500

Shape = tuple[int, int]


def shapes_of(preset: Preset) -> Counter[Shape]:
    """Count the modules of each shape (rows, columns) of a model."""
    hidden, intermediate, layers = preset.hidden_size, preset.intermediate_size, preset.num_hidden_layers
    return Counter({(hidden, hidden): 4 * layers, (intermediate, hidden): 2 * layers, (hidden, intermediate): layers})


def step_flops(preset: Preset) -> float:
    """Count the floating-point operations of one optimizer step on the paper's batch."""
    assert preset.vocab_size is not None
    matrices = sum(rows * columns * count for (rows, columns), count in shapes_of(preset).items())
    matrices += preset.vocab_size * preset.hidden_size
    attention = 12 * preset.num_hidden_layers * preset.hidden_size * SEQUENCE_LENGTH
    return TOKENS * (6.0 * matrices + attention)


def best_of(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the shortest time of several calls in seconds, after a warm-up call."""

    def once() -> float:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(repeats))


def measure(shape: Shape, device: torch.device, *, quick: bool) -> dict[str, float]:
    """Measure the seconds per matrix of this shape."""
    rows, columns = shape
    # The spectrum of an early checkpoint: nearly random, with a few strong directions.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    weight += 4 * torch.outer(torch.randn(rows, generator=generator), torch.randn(columns, generator=generator)) / rows
    weight = weight.to(device)
    repeats = 1 if quick else 3

    def spectral(options: ScoreOptions) -> float | None:
        return score_matrices([weight], options).alpha

    def public() -> float:
        eigenvalues = torch.linalg.svdvals(weight.float()).square().flip(0)
        tail = eigenvalues[len(eigenvalues) // 2 :]
        return float(1 + len(tail) / torch.log(tail / tail[0]).sum())

    exact, fast = ScoreOptions(), ScoreOptions(fast=True)
    seconds = {
        "1 thread": best_of(lambda: spectral(exact), repeats, device),
        "1 thread, fast": best_of(lambda: spectral(fast), repeats, device),
        "public": best_of(public, 1 if rows * columns > 2**22 else repeats, device),
    }
    if device.type == "cpu":
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            both = best_of(lambda: list(pool.map(spectral, [exact, exact])), repeats, device)
        seconds["2 threads"] = both / 2
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=PAPER, metavar="PRESET")
    parser.add_argument("--rate", type=float, default=1.25e14, help="training flop/s of one rank (default: 1.25e14)")
    parser.add_argument("--device", default="cpu", help="where the spectra are computed")
    parser.add_argument(
        "--cores", type=int, default=8, help="CPU cores of one rank, for the extrapolation (default: 8)"
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one repeat instead of three")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    # One thread for torch's BLAS and for every BLAS that numpy and scipy have loaded.
    torch.set_num_threads(1)
    threadpool_limits(limits=1)
    print(f"spectra on {device}, LAPACK: {machine.lapack_names()}; training at {options.rate:.3g} flop/s a rank")
    print(f"interval of {INTERVAL} steps of {TOKENS:,} tokens, {options.ranks} rank(s)")
    on_one = ("1 thread", "1 thread, fast")
    kinds = [*on_one, "public", *(["2 threads"] if device.type == "cpu" else [])]
    load = os.getloadavg()[0]
    timings: dict[Shape, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    for name in options.presets:
        preset = PRESETS[name]
        shapes = shapes_of(preset)
        for shape in shapes:
            if shape not in timings:
                timings[shape] = measure(shape, device, quick=options.quick)
        training = INTERVAL * step_flops(preset) / (options.rate * options.ranks)
        refresh = {kind: sum(count * timings[shape][kind] for shape, count in shapes.items()) for kind in kinds}
        if device.type == "cpu":
            efficiency = min(1.0, refresh["1 thread"] / (2 * refresh["2 threads"]))
            dearest = max(timings[shape]["1 thread"] for shape in shapes)
            spread = refresh["1 thread"] / (options.cores * efficiency)
            refresh[f"{options.cores} cores"] = max(dearest, spread)
        row: dict[str, Any] = {"model": name, "training seconds": training, "refresh": {}}
        print(f"{name}: {sum(shapes.values())} modules, {training:,.0f} s of training between two refreshes")
        for kind, total in refresh.items():
            on_each_rank = total if kind == "public" else total / options.ranks
            share = on_each_rank / training
            row["refresh"][kind] = {"seconds": on_each_rank, "share": share}
            ratio = f"  x {refresh['public'] / total:.1f}" if kind in on_one else ""
            print(f"  {kind:15s} {on_each_rank:9.2f} s  {100 * share:7.3f} % of training{ratio}")
        rows.append(row)
    if options.json:
        document = {
            "machine": machine.describe(),
            "load before": load,
            "lapack": machine.lapack_names(),
            "device": str(device),
            "rate": options.rate,
            "ranks": options.ranks,
            "shapes": {f"{rows_}x{columns}": seconds for (rows_, columns), seconds in timings.items()},
            "rows": rows,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
