"""Measure which share of a training loop's time SpectralMonitor takes, beside the bound that it was given.

    python benchmarks/monitor_share.py

A stack of eight MLP blocks of width 384 trains on noise for a number of seconds at each bound; the time inside
`monitor.step()` is measured from outside.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

import esdtool

WIDTH, BLOCKS, SECONDS = 384, 8, 20.0


def main(seconds: float = SECONDS) -> None:
    """Print a line for each bound."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for bound in (None, 0.1, 0.03, 0.01):
        blocks = [
            nn.ModuleDict(
                {
                    "up_proj": nn.Linear(WIDTH, 4 * WIDTH, bias=False),
                    "down_proj": nn.Linear(4 * WIDTH, WIDTH, bias=False),
                }
            )
            for _ in range(BLOCKS)
        ]
        model = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monitor = esdtool.SpectralMonitor(model, every=5, max_seconds_share=bound, jobs=1)
        inside, steps, measured = 0.0, 0, 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            x = torch.randn(64, WIDTH)
            y = x
            for block in blocks:
                y = y + block["down_proj"](torch.relu(block["up_proj"](y)))
            (y - x).pow(2).mean().backward()
            before = time.perf_counter()
            measured += monitor.step() is not None
            inside += time.perf_counter() - before
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        share = inside / (time.perf_counter() - start)
        words = "none" if bound is None else f"{bound:.0%}"
        print(f"bound {words:>4}: {share:6.2%} of the time, {measured} measurements in {steps} steps")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
