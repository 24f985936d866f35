"""The scores of a live model's modules: on one process or spread over the ranks of a job.

Every module has one owner, who computes its spectrum; the scores are gathered, so that all ranks
hold the same numbers. Sharded weights (DTensor) are gathered one after the other, in the same
order on every rank, and only their owner keeps them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist

from esdtool.assignment.options import check_choice
from esdtool.errors import AssignmentError
from esdtool.modules import WeightModule
from esdtool.modules.base import cost
from esdtool.optim.live_scores import LiveScore, Measure, Operands
from esdtool.support.balance import balance, most_expensive_first
from esdtool.support.threads import single_blas_workers

Compute = Literal["all-ranks", "first-rank", "each-rank"]

Item = tuple[int, Operands]
"""Number of a parameter, and what is measured of it."""


class LiveRanks:
    """The processes that share the work; one without torch.distributed.

    Args:
        compute: `all-ranks`: spread the modules; `first-rank`: all on rank 0 of the group; `each-rank`: every process
            on its own, without communication (for processes that train different models).
        group: process group; None for the default one.
    """

    def __init__(self, compute: Compute, group: Any = None) -> None:
        check_choice("compute", compute, Compute)
        together = compute != "each-rank" and dist.is_available() and dist.is_initialized()
        self._group = group
        self._spread = compute == "all-ranks"
        self.size = dist.get_world_size(group) if together else 1
        self.rank = dist.get_rank(group) if together else 0

    def gather(self, value: Any) -> list[Any]:
        """Gather the value of every rank, in the order of ranks. A collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Choose the rank that owns each module, the same on every rank."""
        return balance(costs, self.size) if self._spread else [0] * len(costs)

    def check_same(self, names: Sequence[str]) -> None:
        """Refuse a job whose ranks hold different modules (pipeline stages): they would wait for each other forever.

        Raises:
            AssignmentError: on every rank.
        """
        if any(other != list(names) for other in self.gather(list(names))):
            raise AssignmentError(
                "the ranks hold different weight modules: pass process_group with the ranks that hold the same model "
                'part, or compute="each-rank" for independent models'
            )


def live_scores(
    parameters: Sequence[Sequence[WeightModule]],
    operands: Sequence[Operands],
    measure: Measure,
    *,
    ranks: LiveRanks,
    jobs: int | None = None,
) -> list[list[LiveScore]]:
    """Score every module. A collective where `ranks` has several.

    Args:
        parameters: the modules that each parameter holds, the same on every rank, in the same order.
        operands: what `Measure.operands` lists of each parameter.
        measure: what to compute.
        ranks: who shares the work.
        jobs: modules at a time, on the CPU; default torch's number of threads. The results do not depend on it.

    Returns:
        One score a module, parameter by parameter; identical on every rank.

    Raises:
        RuntimeError: on every rank, if the computation failed on one.
    """
    queues = work_queues(parameters, ranks)
    mine: dict[int, list[LiveScore]] = {}
    failure: str | None = None
    on_cpu = all(computes_on_cpu(each, measure) for each in operands)
    workers = (jobs or torch.get_num_threads()) if on_cpu else None
    with torch.no_grad(), _workers(workers) as run:
        for wave in waves(queues, operands, rank=ranks.rank, size=workers or 1):
            if failure is not None:
                continue  # keep taking part in the collectives
            try:
                found = run(lambda item: scores_of(measure, parameters[item[0]], item[1]), wave)
                mine |= {index: score for (index, _), score in zip(wave, found, strict=True)}
            except Exception as error:
                if ranks.size == 1:
                    raise
                failure = describe(error)
    return gather_scores(mine, failure, ranks=ranks, count=len(parameters))


def work_queues(parameters: Sequence[Sequence[WeightModule]], ranks: LiveRanks) -> list[list[int]]:
    """List the parameters that each rank owns, the most expensive first; the same on every rank."""
    costs = [sum(map(cost, modules)) for modules in parameters]
    owners = ranks.owners(costs)
    return [[index for index in most_expensive_first(costs) if owners[index] == rank] for rank in range(ranks.size)]


def gather_scores(
    mine: Mapping[int, list[LiveScore]], failure: str | None, *, ranks: LiveRanks, count: int
) -> list[list[LiveScore]]:
    """Put the scores of all parameters together from those of each rank. A collective.

    Raises:
        RuntimeError: on every rank, if `failure` is given on one.
    """
    gathered: dict[int, list[LiveScore]] = {}
    for rank, (scores, problem) in enumerate(ranks.gather((mine, failure))):
        if problem is not None:
            raise RuntimeError(f"the spectra failed on rank {rank}: {problem}")
        gathered |= scores
    return [gathered[index] for index in range(count)]


def describe(error: BaseException) -> str:
    """Describe an error to the other ranks."""
    return f"{type(error).__name__}: {error}"


def computes_on_cpu(operands: Operands, measure: Measure) -> bool:
    """Tell whether the score of these operands is computed on the CPU."""
    return all((measure.device or operand.device).type == "cpu" for operand in operands)


def scores_of(measure: Measure, modules: Sequence[WeightModule], operands: Operands) -> list[LiveScore]:
    """Score the modules of one whole parameter."""
    return [measure(module, operands) for module in modules]


def waves(
    queues: Sequence[Sequence[int]], operands: Sequence[Operands], *, rank: int, size: int
) -> Iterator[list[Item]]:
    """Yield this rank's (index, whole operands), `size` at a time; all of them at once where nothing is sharded."""
    if not any(is_sharded(operand) for each in operands for operand in each):
        yield [(index, operands[index]) for index in queues[rank]]
        return
    wave: list[Item] = []
    # Round by round, one parameter of every owner: while one round is being computed no rank runs ahead.
    for turn in itertools.zip_longest(*queues):
        for owner, index in enumerate(turn):
            if index is None:
                continue
            whole = tuple(map(_whole, operands[index]))
            if owner == rank:
                wave.append((index, whole))
            del whole
        if len(wave) >= size:
            yield wave
            wave = []
    yield wave


def is_sharded(tensor: torch.Tensor) -> bool:
    """Tell whether ranks hold parts of a tensor (DTensor)."""
    return hasattr(tensor, "full_tensor")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor. A collective then."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


Run = Callable[[Callable[[Item], list[LiveScore]], Sequence[Item]], list[list[LiveScore]]]


@contextmanager
def _workers(count: int | None) -> Iterator[Run]:
    """Yield a map over `count` threads; None: no threads, for an accelerator."""
    if count is None:
        yield lambda function, items: [function(item) for item in items]
        return
    with single_blas_workers(count) as pool:
        yield lambda function, items: list(pool.map(function, items))
