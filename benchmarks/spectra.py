"""Compare single spectra on one thread: esdtool and the routines that other tools use.

    python benchmarks/spectra.py [SHAPE ...] [--dtype float32|bfloat16] [--scipy] [--json PATH]

Peers: `torch.linalg.svdvals` in float32, in the orientation given and in the better one (the public AlphaDecay way),
and `scipy.linalg.svdvals` in float64 (the WeightWatcher way; only with --scipy, because it is slow). All start from
the same weights, stored in `--dtype`. Each is warmed up on a small matrix, then timed; the figure is the best of
the repeats.

The bound is the time of the work at the rate of a matrix product, measured in the same run: n^2 m flops for the Gram
matrix on the short side n, and 4/3 n^3 for its reduction to tridiagonal form, for which no solver reaches that rate.
esdtool is compared with the float64 rate, `--fast` with the float32 rate.
"""

from __future__ import annotations

import argparse
import itertools
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

from esdtool.spectra.estimators.hill import hill
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.scoring import score_matrices

SHAPES = ("512x512", "768x3072", "1024x2736", "2048x2048", "2048x5461", "4096x4096", "4096x11008", "11008x4096")


_LONG_SECONDS = 5.0
"""Time after which a call is not repeated: the noise of one that takes this long is small beside the differences."""


def best_of(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - start)
        if best > _LONG_SECONDS:
            break
    return best, result


def product_rate(dtype: type[np.floating[Any]], order: int = 2048) -> float:
    """Measure the flop/s of numpy's matrix product."""
    left = np.random.default_rng(0).standard_normal((order, order)).astype(dtype)
    seconds, _ = best_of(lambda: left @ left, 12)
    return 2 * order**3 / seconds


def bound(rows: int, columns: int, rate: float) -> float:
    """Return the seconds that the work would take at `rate` flop/s."""
    short, long = sorted((rows, columns))
    return (short**2 * long + 4 / 3 * short**3) / rate


def contest(rows: int, columns: int, *, dtype: torch.dtype, with_scipy: bool) -> dict[str, Any]:
    stored = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5).to(dtype)
    weight = stored.float()
    tall = weight if rows >= columns else weight.T
    repeats = 7 if rows * columns < 2**21 else 3
    contestants: dict[str, Callable[[], float]] = {
        "svdvals float32": lambda: hill(torch.linalg.svdvals(stored.float()).double().square()).alpha,
        "svdvals float32, tall": lambda: hill(torch.linalg.svdvals(tall.contiguous()).double().square()).alpha,
        "esdtool": lambda: score_matrices([stored], ScoreOptions()).alpha or float("nan"),
        "esdtool --fast": lambda: score_matrices([stored], ScoreOptions(fast=True)).alpha or float("nan"),
    }
    if with_scipy:
        contestants["scipy svdvals float64"] = lambda: (
            hill(scipy.linalg.svdvals(stored.double().numpy(), check_finite=False) ** 2).alpha
        )
    exact = hill(np.linalg.svd(tall.double().numpy(), compute_uv=False) ** 2).alpha
    row: dict[str, Any] = {"shape": f"{rows}x{columns}", "storage": str(dtype).removeprefix("torch.")}
    for name, function in contestants.items():
        seconds, alpha = best_of(function, repeats)
        row[name] = {"seconds": seconds, "alpha error": abs(alpha / exact - 1)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="SHAPE")
    parser.add_argument("--scipy", action="store_true", help="also time scipy's float64 SVD")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="storage; repeatable")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # One thread for torch's BLAS and for every BLAS that numpy and scipy have loaded.
    torch.set_num_threads(1)
    threadpool_limits(limits=1)
    contest(64, 64, dtype=torch.float32, with_scipy=options.scipy)
    rates = {"esdtool": product_rate(np.float64), "esdtool --fast": product_rate(np.float32)}
    print(
        f"one thread, LAPACK: {machine.lapack_names()}, products at {rates['esdtool'] / 1e9:.0f} and "
        f"{rates['esdtool --fast'] / 1e9:.0f} Gflop/s in float64 and float32"
    )
    rows = []
    for shape, dtype in itertools.product(options.shapes, options.dtype or ["float32"]):
        height, width = map(int, shape.split("x"))
        row = contest(height, width, dtype=getattr(torch, dtype), with_scipy=options.scipy)
        rows.append(row)
        base = row["svdvals float32"]["seconds"]
        print(row["shape"], dtype)
        for name, result in row.items():
            if name in ("shape", "storage"):
                continue
            line = f"  {name:30s} {result['seconds']:8.4f} s  x {base / result['seconds']:5.1f}"
            line += f"  alpha off by {result['alpha error']:.0e}"
            if name in rates:
                result["fraction of bound"] = bound(height, width, rates[name]) / result["seconds"]
                line += f"  {result['fraction of bound']:.0%} of the bound"
            print(line)
    if options.json:
        document = {
            "machine": machine.describe(),
            "lapack": machine.lapack_names(),
            "product flop/s": rates,
            "rows": rows,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
