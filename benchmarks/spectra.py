"""Single spectra on one thread: esdtool against the ways in use.

    python benchmarks/spectra.py [SHAPE ...] [--json PATH]

Peers: `torch.linalg.svdvals` in float32, in the orientation given and in the better one (the public AlphaDecay way),
and `scipy.linalg.svdvals` in float64 (the WeightWatcher way; with --scipy, it is slow). Every contestant starts
from the same float32 weights. Each is warmed up on a small matrix, then timed; the figure is the best of the repeats.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import scipy.linalg
import torch
from threadpoolctl import threadpool_limits

from esdtool import lapack
from esdtool.options import ScoreOptions
from esdtool.scoring import score_matrices
from esdtool.tail import hill

SHAPES = ("512x512", "768x3072", "1024x2736", "2048x2048", "2048x5461", "4096x4096", "4096x11008", "11008x4096")


def best_of(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - start)
    return best, result


def contest(rows: int, columns: int, *, with_scipy: bool) -> dict[str, Any]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    tall = weight if rows >= columns else weight.T
    repeats = 7 if rows * columns < 2**21 else 3
    contestants: dict[str, Callable[[], float]] = {
        "svdvals float32": lambda: hill(torch.linalg.svdvals(weight).double().square()).alpha,
        "svdvals float32, tall": lambda: hill(torch.linalg.svdvals(tall.contiguous()).double().square()).alpha,
        "esdtool": lambda: score_matrices([weight], ScoreOptions()).alpha or float("nan"),
        "esdtool --fast": lambda: score_matrices([weight], ScoreOptions(fast=True)).alpha or float("nan"),
    }
    if with_scipy:
        contestants["scipy svdvals float64"] = lambda: (
            hill(scipy.linalg.svdvals(weight.double().numpy(), check_finite=False) ** 2).alpha
        )
    exact = hill(np.linalg.svd(tall.double().numpy(), compute_uv=False) ** 2).alpha
    row: dict[str, Any] = {"shape": f"{rows}x{columns}"}
    for name, function in contestants.items():
        seconds, alpha = best_of(function, repeats)
        row[name] = {"seconds": seconds, "alpha error": abs(alpha / exact - 1)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="SHAPE")
    parser.add_argument("--scipy", action="store_true", help="also time scipy's float64 SVD")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # One thread for torch's BLAS and for every BLAS that numpy and scipy have loaded.
    torch.set_num_threads(1)
    threadpool_limits(limits=1)
    contest(64, 64, with_scipy=options.scipy)
    print(f"one thread, LAPACK: {lapack.backend()}")
    rows = []
    for shape in options.shapes:
        row = contest(*map(int, shape.split("x")), with_scipy=options.scipy)
        rows.append(row)
        base = row["svdvals float32"]["seconds"]
        print(row["shape"])
        for name, result in row.items():
            if name != "shape":
                print(
                    f"  {name:30s} {result['seconds']:8.4f} s  x {base / result['seconds']:5.1f}"
                    f"  alpha off by {result['alpha error']:.0e}"
                )
    if options.json:
        document = {"machine": machine.describe(), "lapack": lapack.backend(), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
