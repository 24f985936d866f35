"""One analysis by several processes: `torchrun --nproc-per-node N -m esdtool analyze CKPT`, on one machine or several.

Each rank opens the checkpoint and computes its share of the modules, on a GPU of its own where there are any; the first
one collects the results. Only results travel, so that the ranks need no fast network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from esdtool.errors import EsdtoolError, UsageError
from esdtool.modules import WeightModule
from esdtool.modules.base import cost
from esdtool.support.balance import balance

Result = TypeVar("Result")

_PATIENCE = timedelta(days=2)
"""How long a rank waits for the slowest one: as long as an analysis may take."""


class RankError(EsdtoolError):
    """The error of a rank, as the first one reports it."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        """An error with the exit code of what it stands for."""
        super().__init__(message)
        self.exit_code = exit_code


class OtherRankError(RankError):
    """This rank failed, and the first one reports it."""

    reported_elsewhere = True


@dataclass(frozen=True, kw_only=True)
class AnalysisRanks:
    """The processes that share an analysis."""

    rank: int
    size: int
    local_size: int
    """Ranks on this machine, which share its cores."""

    @property
    def is_first(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def share(self, modules: Sequence[WeightModule]) -> list[WeightModule]:
        """This rank's modules: the shares have nearly equal predicted costs."""
        owners = balance([cost(module) for module in modules], self.size)
        return [module for module, owner in zip(modules, owners, strict=True) if owner == self.rank]

    def cost(self, modules: Sequence[WeightModule]) -> float:
        """Predicted work of this rank's share, in flops."""
        return sum(map(cost, self.share(modules)))

    def collect(self, work: Callable[[], Sequence[Result]]) -> list[Result]:
        """Do this rank's work, and bring the results of all ranks to the first one; the others get none.

        Raises:
            RankError: on the first rank the error of any rank; on one that failed itself `OtherRankError`.
        """
        import torch.distributed as dist

        found: Sequence[Result] = ()
        problem: tuple[str, int] | None = None
        try:
            found = work()
        except EsdtoolError as error:
            problem = str(error), error.exit_code
        gathered: list[tuple[Sequence[Result], tuple[str, int] | None]] | None = (
            [((), None)] * self.size if self.is_first else None
        )
        dist.gather_object((found, problem), gathered, dst=0)
        if gathered is None:
            if problem is not None:
                raise OtherRankError(problem[0], exit_code=problem[1])
            return []
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                raise RankError(failure[0] if rank == 0 else f"rank {rank}: {failure[0]}", exit_code=failure[1])
        return [result for results, _ in gathered for result in results]

    def device(self, wanted: str) -> str:
        """The device of this rank: of `auto` and `cuda` each rank of a machine takes a GPU of its own, in turns."""
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if wanted not in ("auto", "cuda") or count == 0:
            return wanted
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}"


@contextmanager
def join_ranks() -> Iterator[AnalysisRanks | None]:
    """Join the processes that torchrun started; None in a process of its own.

    Raises:
        UsageError: if the environment is not torchrun's.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield None
        return
    import torch.distributed as dist

    try:
        # gloo also beside GPUs: only Python objects travel.
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        raise UsageError(
            f"WORLD_SIZE={size}, but the ranks cannot meet: {first_line}; start them by torchrun"
        ) from error
    try:
        yield AnalysisRanks(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
    finally:
        dist.destroy_process_group()
