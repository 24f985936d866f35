"""The scores of a live model's modules: on one process or spread over the ranks of a job.

Every module has one owner, who computes its spectrum; the scores are gathered, so that all ranks
hold the same numbers. Sharded weights (DTensor) are gathered one after the other, in the same
order on every rank, and only their owner keeps them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from esdtool.assignment.options import ScoreName
from esdtool.errors import AssignmentError, UsageError
from esdtool.modules import WeightModule
from esdtool.modules.base import cost
from esdtool.spectra.metrics import spectral_metrics
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.scoring import score_matrices
from esdtool.support.balance import balance, dearest_first
from esdtool.support.threads import single_blas_workers

LiveScoreName = Literal[ScoreName, "gradient_norm"]
Compute = Literal["all-ranks", "first-rank", "each-rank"]


@dataclass(frozen=True, kw_only=True)
class LiveScore:
    """One module's numbers at one time."""

    status: str
    """`ok`, or why there is no score, in words."""
    alpha: float | None = None
    """Tail exponent, where the score needs a spectrum."""
    value: float | None = None
    """The score that decays follow; None unless the status is `ok`."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is computed of one module. Called with its whole parameter."""

    score: LiveScoreName
    options: ScoreOptions
    device: torch.device | None
    """Where spectra are computed; None: where the tensor is."""

    def __post_init__(self) -> None:
        """Refuse unknown scores.

        Raises:
            UsageError: with the valid names.
        """
        valid = (*get_args(ScoreName), "gradient_norm")
        if self.score not in valid:
            raise UsageError(f"unknown score {self.score!r}; choose from {', '.join(valid)}")

    @property
    def reads_gradients(self) -> bool:
        """Whether the tensor to measure is the gradient instead of the weight."""
        return self.score == "gradient_norm"

    def __call__(self, module: WeightModule, tensor: torch.Tensor) -> LiveScore:
        """The score of a module from its parameter (or the gradient), shape `module.stored_shape`."""
        matrices = module.matrices(tensor)
        if self.reads_gradients:
            precision = torch.float32 if tensor.device.type == "mps" else torch.float64
            norm = math.hypot(*(float(torch.linalg.vector_norm(matrix, dtype=precision)) for matrix in matrices))
            if norm != norm or norm == float("inf"):
                return LiveScore(status="the gradient contains NaN or infinity")
            return LiveScore(status="ok", value=norm)
        found = score_matrices(matrices, self.options, device=self.device, scale=module.eigenvalue_scale)
        if found.alpha is None or found.spectrum is None:
            return LiveScore(status=found.status)
        if self.score == "alpha":
            return LiveScore(status="ok", alpha=found.alpha, value=found.alpha)
        metrics = spectral_metrics(found.spectrum, module.matrix_shape, num_matrices=module.num_matrices)
        value = (
            found.alpha * metrics.log_spectral_norm if self.score == "alpha_weighted" else getattr(metrics, self.score)
        )
        if value is None:
            return LiveScore(status=f"{self.score} is outside the range of float64")
        return LiveScore(status="ok", alpha=found.alpha, value=value)


class Ranks:
    """The processes that share the work; one without torch.distributed.

    Args:
        compute: `all-ranks`: spread the modules; `first-rank`: all on rank 0 of the group; `each-rank`: every process
            on its own, without communication (for processes that train different models).
        group: process group; None for the default one.
    """

    def __init__(self, compute: Compute, group: Any = None) -> None:
        if compute not in get_args(Compute):
            raise UsageError(f"unknown compute {compute!r}; choose from {', '.join(get_args(Compute))}")
        together = compute != "each-rank" and dist.is_available() and dist.is_initialized()
        self._group = group
        self._spread = compute == "all-ranks"
        self.size = dist.get_world_size(group) if together else 1
        self.rank = dist.get_rank(group) if together else 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in the order of ranks. A collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def owners(self, costs: Sequence[float]) -> list[int]:
        """The rank that owns each module, the same on every rank."""
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
    tensors: Sequence[torch.Tensor | None],
    measure: Measure,
    *,
    ranks: Ranks,
    jobs: int | None = None,
) -> list[list[LiveScore]]:
    """The score of every module. A collective where `ranks` has several.

    Args:
        parameters: the modules that each parameter holds, the same on every rank, in the same order.
        tensors: the parameters (or their gradients, None where there is none), plain or DTensor.
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
    on_cpu = all(computes_on_cpu(tensor, measure) for tensor in tensors)
    workers = (jobs or torch.get_num_threads()) if on_cpu else None
    with torch.no_grad(), _workers(workers) as run:
        for wave in waves(queues, tensors, rank=ranks.rank, size=workers or 1):
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


def work_queues(parameters: Sequence[Sequence[WeightModule]], ranks: Ranks) -> list[list[int]]:
    """The parameters that each rank owns, dearest first; the same on every rank."""
    costs = [sum(map(cost, modules)) for modules in parameters]
    owners = ranks.owners(costs)
    return [[index for index in dearest_first(costs) if owners[index] == rank] for rank in range(ranks.size)]


def gather_scores(
    mine: Mapping[int, list[LiveScore]], failure: str | None, *, ranks: Ranks, count: int
) -> list[list[LiveScore]]:
    """The scores of all parameters from those of each rank. A collective.

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
    """An error for the other ranks."""
    return f"{type(error).__name__}: {error}"


def computes_on_cpu(tensor: torch.Tensor | None, measure: Measure) -> bool:
    """Whether the spectrum of this tensor is computed on the CPU."""
    return tensor is None or (measure.device or tensor.device).type == "cpu"


def scores_of(measure: Measure, modules: Sequence[WeightModule], tensor: torch.Tensor | None) -> list[LiveScore]:
    """The scores of the modules of one whole parameter."""
    if tensor is None:
        return [LiveScore(status="no gradient")] * len(modules)
    return [measure(module, tensor) for module in modules]


def waves(
    queues: Sequence[Sequence[int]], tensors: Sequence[torch.Tensor | None], *, rank: int, size: int
) -> Iterator[list[tuple[int, torch.Tensor | None]]]:
    """This rank's (index, whole tensor), `size` at a time; all of them at once where nothing is sharded."""
    if not any(is_sharded(tensor) for tensor in tensors):
        yield [(index, tensors[index]) for index in queues[rank]]
        return
    wave: list[tuple[int, torch.Tensor | None]] = []
    # Round by round, one parameter of every owner: while one round is being computed no rank runs ahead.
    for turn in itertools.zip_longest(*queues):
        for owner, index in enumerate(turn):
            if index is None:
                continue
            tensor = tensors[index]
            whole = tensor.full_tensor() if tensor is not None and is_sharded(tensor) else tensor  # type: ignore[attr-defined]
            if owner == rank:
                wave.append((index, whole))
            del whole
        if len(wave) >= size:
            yield wave
            wave = []
    yield wave


def is_sharded(tensor: torch.Tensor | None) -> bool:
    """Whether ranks hold parts of it (DTensor)."""
    return hasattr(tensor, "full_tensor")


Item = tuple[int, torch.Tensor | None]
Run = Callable[[Callable[[Item], list[LiveScore]], Sequence[Item]], list[list[LiveScore]]]


@contextmanager
def _workers(count: int | None) -> Iterator[Run]:
    """A map over `count` threads; None: no threads, for an accelerator."""
    if count is None:
        yield lambda function, items: [function(item) for item in items]
        return
    with single_blas_workers(count) as pool:
        yield lambda function, items: list(pool.map(function, items))
