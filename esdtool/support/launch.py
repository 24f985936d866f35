"""Identify this process among several, by the environment that torchrun and other launchers set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from esdtool.errors import UsageError

_LAUNCHERS = frozenset({"TORCHELASTIC_RUN_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"})
"""Variables that launchers of several processes set in each of them."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among those that were launched together."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Processes on this machine."""
    address: str
    """Where the processes meet: a host name or IP address of rank 0's machine."""
    port: int
    agent_store: bool
    """Whether torchrun itself holds the store through which they meet."""
    attempt: str
    """Which start of the same processes this is: torchrun starts them again if one fails."""
    by_launcher: bool
    """Whether torchrun, Slurm or MPI started them: then all of them are there, or about to be."""


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Read the environment; None for a process of its own.

    Raises:
        UsageError: if the variables are no launcher's.
    """
    size = _number(environment, "WORLD_SIZE", default=1)
    if size == 1:
        return None
    rank = _number(environment, "RANK")
    if rank >= size:
        raise UsageError(f"RANK={rank} does not fit WORLD_SIZE={size}: start all ranks with torchrun, or unset both")
    address = environment.get("MASTER_ADDR", "")
    if not address:
        raise UsageError(f"WORLD_SIZE={size}, but no MASTER_ADDR: start all ranks with torchrun, or unset WORLD_SIZE")
    return Launch(
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", default=0),
        local_size=_number(environment, "LOCAL_WORLD_SIZE", default=1),
        address=address,
        port=_number(environment, "MASTER_PORT"),
        agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        by_launcher=not _LAUNCHERS.isdisjoint(environment),
    )


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process reports what all ranks alike find wrong; in doubt it does.

    >>> speaks({}), speaks({"RANK": "0", "LOCAL_RANK": "0"}), speaks({"RANK": "1", "LOCAL_RANK": "1"})
    (True, True, False)
    """
    rank = environment.get("RANK", "")
    # Schedulers leave RANK in the environment of lone processes, too, but no LOCAL_RANK.
    return not ("LOCAL_RANK" in environment and rank.isdecimal() and int(rank) > 0)


def _number(environment: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    """Read a whole number; an empty variable is as good as none."""
    text = environment.get(name, "").strip()
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or (name.endswith("SIZE") and int(text) < 1):
        given = f"{name}={text!r}" if text else f"WORLD_SIZE={environment.get('WORLD_SIZE')}, but no {name}"
        raise UsageError(f"{given}: not what a launcher sets; start all ranks with torchrun, or unset WORLD_SIZE")
    return int(text)
