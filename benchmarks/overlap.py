"""Measure what a refresh of the decays adds to training steps on a CPU: within the step, and in parallel.

    python benchmarks/overlap.py [--preset NAME] [--interval N] [--delay N] [--repeats N] [--json PATH]

This trains a LLaMA on random tokens with AdamW on one thread, in three ways by turns: without refreshes, with
AlphaDecay as published (`delay=0`), and with the spectra in parallel with the steps (`delay`). It prints the best time
of one interval of each, divided by that without refreshes. The third way uses one more thread, which needs an idle
core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import machine
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from esdtool import AlphaDecay
from esdtool.train.config.presets import PRESETS

VOCAB, BATCH, LENGTH = 1024, 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-11m")
    parser.add_argument("--interval", type=int, default=20)
    parser.add_argument("--delay", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = {
        name: prepare(arguments, delay) for name, delay in (("none", None), ("in step", 0), ("beside", arguments.delay))
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(arguments.repeats):
        for name, interval in ways.items():
            best[name] = min(best[name], interval())
    ratios = {name: seconds / best["none"] for name, seconds in best.items()}
    for name, seconds in best.items():
        print(f"{name:8} {seconds:7.3f} s an interval, {ratios[name]:.3f} times that without refreshes")
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        record = {"machine": machine.describe(), "settings": settings, "seconds": best, "ratios": ratios}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def prepare(arguments: argparse.Namespace, delay: int | None) -> Any:
    """Return a function that trains for one interval and returns its seconds; its first step starts the refresh."""
    preset = PRESETS[arguments.preset]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=preset.hidden_size,
            intermediate_size=preset.intermediate_size,
            num_attention_heads=preset.num_attention_heads,
            num_hidden_layers=preset.num_hidden_layers,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = AlphaDecay(model, optimizer, interval=arguments.interval, delay=delay or 0, jobs=1)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        if delay is not None:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(arguments.interval - 1):  # so that the first step of each interval refreshes
        step()

    def interval() -> float:
        began = time.perf_counter()
        for _ in range(arguments.interval):
            step()
        return time.perf_counter() - began

    return interval


if __name__ == "__main__":
    main()
