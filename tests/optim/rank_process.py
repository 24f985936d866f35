"""One rank of a gloo job: trains the tiny model with AlphaDecay in several ways and prints what it saw, as JSON.

python rank_process.py RENDEZVOUS_FILE RANK NUM_RANKS
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import tiny_model
import torch
import torch.distributed as dist
from torch import nn

from esdtool.errors import AssignmentError
from esdtool.optim import AlphaDecay, LayerwiseLR, live_scores

STEPS, INTERVAL = 6, 2


def train(wrap: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """Decays at every step, how many spectra this rank computed, and a fingerprint of the final weights."""
    rank, size = dist.get_rank(), dist.get_world_size()
    computed: list[str] = []
    original = live_scores.score_matrices

    def counting(*arguments: Any, **keywords: Any) -> Any:
        computed.append("spectrum")
        return original(*arguments, **keywords)

    live_scores.score_matrices = counting
    model = wrap(tiny_model.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = AlphaDecay(model, optimizer, interval=INTERVAL, **options)
    refused = ""
    seen = [schedule.last_decays]
    for step in range(STEPS):
        tiny_model.loss(model, step, rank=rank, num_ranks=size).backward()
        schedule.step()
        seen.append(schedule.last_decays)
        optimizer.step()
        optimizer.zero_grad()
    if schedule.is_pending and size > 1:
        try:
            schedule.state_dict()
        except RuntimeError as error:
            refused = str(error)
    schedule.settle()
    late = schedule.state_dict()["late"]
    live_scores.score_matrices = original
    in_groups = sorted({group["weight_decay"] for group in optimizer.param_groups})
    return {"decays": seen, "alphas": schedule.last_alphas, "spectra": len(computed), "in_groups": in_groups} | {
        "late": late,
        "refused": refused,
    }


def both(wrap: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """Learning rates and decays at every step, and how many spectra this rank computed for both schedules."""
    rank, size = dist.get_rank(), dist.get_world_size()
    computed: list[str] = []
    original = live_scores.score_matrices

    def counting(*arguments: Any, **keywords: Any) -> Any:
        computed.append("spectrum")
        return original(*arguments, **keywords)

    live_scores.score_matrices = counting
    model = wrap(tiny_model.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    decay = AlphaDecay(model, optimizer, interval=INTERVAL, **options)
    rates = LayerwiseLR(model, optimizer, fraction=1, interval=INTERVAL, glide=2, share=decay, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    seen = []
    for step in range(STEPS):
        tiny_model.loss(model, step, rank=rank, num_ranks=size).backward()
        decay.step()
        rates.step()
        seen.append({"rates": rates.last_rates, "decays": decay.last_decays})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    for schedule in (decay, rates):
        schedule.settle()
    live_scores.score_matrices = original
    return {"seen": seen, "state": [decay.state_dict(), rates.state_dict()], "spectra": len(computed)}


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def mismatch() -> str:
    """Ranks with different models must get an error, all of them."""
    model = tiny_model.build(layers=1 + dist.get_rank())
    try:
        AlphaDecay(model, torch.optim.AdamW(model.parameters()))
    except AssignmentError as error:
        return str(error)
    return "accepted"


def failure(**options: Any) -> str:
    """A solver that breaks down on one rank must be an error on all, at once or when the decays are due."""
    original = live_scores.score_matrices

    def broken(*arguments: Any, **keywords: Any) -> Any:
        if dist.get_rank() == 1:
            raise MemoryError("no memory")
        return original(*arguments, **keywords)

    live_scores.score_matrices = broken
    model = sharded(tiny_model.build())
    try:
        schedule = AlphaDecay(model, torch.optim.AdamW(model.parameters()), interval=2, **options)
        for _ in range(3):
            schedule.step()
    except RuntimeError as error:
        return str(error)
    finally:
        live_scores.score_matrices = original
    return "accepted"


def main() -> None:
    rendezvous, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    ddp = nn.parallel.DistributedDataParallel
    results: dict[str, Any] = {
        "ddp": train(ddp),
        "fsdp": train(sharded),
        "first-rank": train(ddp, compute="first-rank"),
        "ddp-late": train(ddp, delay=1),
        "fsdp-late": train(sharded, delay=1),
        "both-ddp": both(ddp),
        "both-fsdp-late": both(sharded, delay=1),
        "gradients": train(sharded, score="gradient_norm", assign="sigmoid"),
    }
    if size > 1:
        results |= {"mismatch": mismatch(), "failure": failure(), "late failure": failure(delay=1, initial=False)}
    print(json.dumps(results), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads must not meet Python's finalization: see esdtool.__main__


if __name__ == "__main__":
    main()
