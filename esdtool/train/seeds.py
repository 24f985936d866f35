"""Seeds of random numbers that a resumed run draws again as it would have drawn them."""

from __future__ import annotations

import hashlib


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the random numbers of one step on one rank (dropout)."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
