"""One analysis by several processes: `torchrun --nproc-per-node N -m esdtool analyze CKPT`, on one machine or several.

Each rank opens the checkpoint and computes its share of the modules, on a GPU of its own where there are any; the first
one collects the results. Only results travel, so that the ranks need no fast network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from esdtool.analysis.watch import LostRanksError, Watch
from esdtool.errors import EsdtoolError, UsageError
from esdtool.modules import WeightModule
from esdtool.modules.base import cost
from esdtool.support.balance import balance
from esdtool.support.launch import Launch, launched
from esdtool.support.words import one_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Result = TypeVar("Result")

_LONGEST_ANALYSIS = timedelta(days=2)
"""How long a rank waits for the results of the slowest one. One that dies is noticed at once (`Watch`)."""

_MEETING_BY_LAUNCHER, _MEETING = 60.0, 10.0
"""Seconds in which all ranks must come: a launcher starts them together; else WORLD_SIZE may be a leftover."""

_FAREWELL = 10.0
"""Seconds after a broken connection in which the watch finds out which rank is lost, and ends this process."""


class RankError(EsdtoolError):
    """The error of a rank, as the first one reports it."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        """Make an error with the exit code of what it stands for."""
        super().__init__(message)
        self.exit_code = exit_code


class OtherRankError(RankError):
    """An error that another rank reports."""

    reported_elsewhere = True


Problem = tuple[str, int]
"""Message and exit code of an error."""


@dataclass(frozen=True, kw_only=True)
class AnalysisRanks:
    """The processes that share an analysis."""

    rank: int
    size: int
    local_size: int
    """Ranks on this machine, which share its cores."""
    local_rank: int = 0
    """Number of this process among those."""

    @property
    def is_first(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def share(self, modules: Sequence[WeightModule]) -> list[WeightModule]:
        """Choose this rank's modules: the shares have nearly equal predicted costs."""
        owners = balance([cost(module) for module in modules], self.size)
        return [module for module, owner in zip(modules, owners, strict=True) if owner == self.rank]

    def cost(self, modules: Sequence[WeightModule]) -> float:
        """Predict the work of this rank's share, in flops."""
        return sum(map(cost, self.share(modules)))

    def together(self, work: Callable[[], Result]) -> Result:
        """Do the same on every rank; if it fails on any, all stop, and the first one says why.

        Raises:
            RankError: on the first rank; on the others `OtherRankError`.
        """
        import torch.distributed as dist

        done, problem = _attempt(work)
        problems: list[Problem | None] = [None] * self.size
        _communicate(lambda: dist.all_gather_object(problems, problem))
        for rank, found in enumerate(problems):
            if found is not None:
                raise self._error(rank, found)
        (result,) = done
        return result

    def collect(self, work: Callable[[], Sequence[Result]]) -> list[Result]:
        """Do this rank's work, and bring the results of all ranks to the first one; the others get none.

        Raises:
            RankError: on the first rank the error of any rank; on one that failed itself `OtherRankError`.
        """
        import torch.distributed as dist

        done, problem = _attempt(work)
        found = done[0] if done else ()
        gathered: list[tuple[Sequence[Result], Problem | None]] | None = (
            [((), None)] * self.size if self.is_first else None
        )
        _communicate(lambda: dist.gather_object((found, problem), gathered, dst=0))
        if gathered is None:
            if problem is not None:
                raise self._error(self.rank, problem)
            return []
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                raise self._error(rank, failure)
        return [result for results, _ in gathered for result in results]

    def device(self, wanted: str) -> str:
        """Choose the device of this rank: of `auto` and `cuda` each rank of a machine takes its own GPU, in turns."""
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if wanted not in ("auto", "cuda") or count == 0:
            return wanted
        return f"cuda:{self.local_rank % count}"

    def _error(self, rank: int, problem: Problem) -> RankError:
        message, exit_code = problem
        if not self.is_first:
            return OtherRankError(message, exit_code=exit_code)
        return RankError(message if rank == 0 else f"rank {rank}: {message}", exit_code=exit_code)


@contextmanager
def join_ranks() -> Iterator[AnalysisRanks | None]:
    """Join the processes that torchrun started; None in a process of its own.

    Raises:
        UsageError: if the environment is not a launcher's, or the ranks cannot meet.
        LostRanksError: if some of them do not come. One that ends early ends all, with a line that names it.
    """
    launch = launched()
    if launch is None:
        yield None
        return
    import torch.distributed as dist

    store, watch = meet(launch, remedy="start the analysis again")
    try:
        # gloo also beside GPUs: only Python objects travel.
        dist.init_process_group(
            "gloo", store=store, rank=launch.rank, world_size=launch.size, timeout=_LONGEST_ANALYSIS
        )
        yield AnalysisRanks(
            rank=launch.rank, size=launch.size, local_size=launch.local_size, local_rank=launch.local_rank
        )
        watch.leave()
    except RankError:  # which all ranks know of
        watch.leave()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def meet(launch: Launch, *, remedy: str) -> tuple[Store, Watch]:
    """Bring all ranks together.

    Args:
        launch: this process among the others.
        remedy: what to do when one of them is lost later, for the message.

    Raises:
        UsageError: if the meeting place cannot be opened or reached.
        LostRanksError: if some do not come.
    """
    import torch.distributed as dist

    patience = _MEETING_BY_LAUNCHER if launch.by_launcher else _MEETING
    is_host = launch.rank == 0 and not launch.agent_store
    try:
        host: Store = dist.TCPStore(  # type: ignore[attr-defined]
            launch.address,
            launch.port,
            launch.size,
            is_master=is_host,
            timeout=timedelta(seconds=patience),
            wait_for_workers=False,
        )
    except (ValueError, RuntimeError) as error:
        if is_host:
            raise UsageError(
                f"the ranks cannot meet at MASTER_ADDR {launch.address}, MASTER_PORT {launch.port}: {one_line(error)}"
            ) from error
        raise LostRanksError([0], "did not come: start all ranks with torchrun, or unset WORLD_SIZE") from error
    store: Store = dist.PrefixStore(f"esdtool/{launch.attempt}", host)  # type: ignore[attr-defined]
    return store, Watch(launch, store, patience=patience, remedy=remedy)


def _attempt(work: Callable[[], Result]) -> tuple[tuple[Result, ...], Problem | None]:
    """Do some work: (its result alone, None), or (nothing, what went wrong)."""
    try:
        return (work(),), None
    except EsdtoolError as error:
        return (), (str(error), error.exit_code)


def _communicate(collective: Callable[[], Any]) -> None:
    """Carry out a collective. If another rank is lost meanwhile, the watch ends this process and says which."""
    try:
        collective()
    except RuntimeError as error:
        time.sleep(_FAREWELL)
        raise EsdtoolError(f"the ranks lost contact with each other: {one_line(error)}") from error
