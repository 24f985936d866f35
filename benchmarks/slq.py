"""Compare estimated with exact alphas on one thread: speed and error of `--spectrum slq`.

    python benchmarks/slq.py [SHAPE ...] [--json PATH]

Each shape is analysed with random weights, and with a heavy-tailed part of low rank added, as training produces it.
All contestants start from the same float32 weights; times are the best of the repeats.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import machine
import torch
from spectra import best_of
from threadpoolctl import threadpool_limits

from esdtool.spectra import slq
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.scoring import score_matrices

SHAPES = ("1024x1024", "1536x1536", "2048x2048", "4096x4096", "4096x11008", "8192x8192")
RANK = 64


def weights(rows: int, columns: int, *, trained: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    if trained:
        strength = torch.linspace(1, 8, RANK).square() / RANK
        left = torch.randn(rows, RANK, generator=generator) * strength
        weight += left @ torch.randn(RANK, columns, generator=generator)
    return weight / columns**0.5


def contest(rows: int, columns: int, *, trained: bool) -> dict[str, Any]:
    weight = weights(rows, columns, trained=trained)
    repeats = 3 if rows * columns < 2**23 else 1
    exact_seconds, exact = best_of(lambda: score_matrices([weight], ScoreOptions()), repeats)
    fast_seconds, _ = best_of(lambda: score_matrices([weight], ScoreOptions(fast=True)), repeats)
    seconds, estimate = best_of(lambda: slq.estimate_tail(weight), max(repeats, 2))
    row: dict[str, Any] = {
        "shape": f"{rows}x{columns}",
        "weights": "with a heavy tail" if trained else "random",
        "exact": {"seconds": exact_seconds, "alpha": exact.alpha},
        "exact --fast": {"seconds": fast_seconds},
        "slq": {"seconds": seconds},
        "times faster than exact": exact_seconds / seconds,
        "times faster than --fast": fast_seconds / seconds,
    }
    if estimate is not None:
        low, high = estimate.alpha_ci
        row["slq"] |= {
            "alpha": estimate.alpha,
            "relative error of alpha": estimate.alpha / exact.alpha - 1,
            "relative half-width of the interval": (high - low) / 2 / estimate.alpha,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="SHAPE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(limits=1)
    slq.SMALLEST = 512  # to see where it does not pay
    contest(600, 600, trained=False)
    print(f"one thread, LAPACK: {machine.lapack_names()}")
    rows = []
    for shape in options.shapes:
        for trained in (False, True):
            row = contest(*map(int, shape.split("x")), trained=trained)
            rows.append(row)
            found = row["slq"]
            print(
                f"{shape:12s} {row['weights']:18s} exact {row['exact']['seconds']:7.2f} s,"
                f" slq {found['seconds']:6.2f} s"
                f"  x {row['times faster than exact']:5.1f} (--fast: x {row['times faster than --fast']:5.1f})"
                + (
                    f"  alpha off by {100 * found['relative error of alpha']:+.2f} %"
                    if "alpha" in found
                    else "  refused"
                ),
                flush=True,
            )
    if options.json:
        document = {"machine": machine.describe(), "lapack": machine.lapack_names(), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
