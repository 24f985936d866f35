"""Scores of a snapshot of the weights, computed beside the training steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from esdtool.modules import WeightModule
from esdtool.optim.live_scores import LiveScore, Measure, Operands
from esdtool.optim.shared_scores import (
    LiveRanks,
    computes_on_cpu,
    describe,
    gather_scores,
    is_sharded,
    scores_of,
    waves,
    work_queues,
)
from esdtool.support.threads import Beside


class PendingScores:
    """The result of `live_scores` for the current operands, available later. A collective where `ranks` has several.

    The caller takes the snapshot: this rank's own parameters are copied (sharded ones gathered) before it goes on.
    Threads do the rest, on CUDA in a stream of their own. All communication is in the caller's thread.

    Args:
        parameters: the modules that each parameter holds, the same on every rank, in the same order.
        operands: what `Measure.operands` lists of each parameter.
        measure: what to compute.
        ranks: who shares the work.
        jobs: modules at a time, on the CPU; default 1 where that CPU trains, else torch's number of threads.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[WeightModule]],
        operands: Sequence[Operands],
        measure: Measure,
        *,
        ranks: LiveRanks,
        jobs: int | None = None,
    ) -> None:
        self._count, self._ranks = len(parameters), ranks
        self._mine: dict[int, list[LiveScore]] = {}
        self._scores: list[list[LiveScore]] | None = None
        trains_on_cpu = all(operand.device.type == "cpu" for each in operands for operand in each)
        workers = 1
        if all(computes_on_cpu(each, measure) for each in operands):
            workers = jobs or (1 if trains_on_cpu else torch.get_num_threads())
        elif measure.options.fast:
            # float32 products on CUDA need a setting of the whole process, which the training must not see.
            measure = replace(measure, options=replace(measure.options, fast=False))
        with torch.no_grad():
            mine = [
                (index, tuple(_copy(whole, own, measure) for whole, own in zip(each, operands[index], strict=True)))
                for wave in waves(work_queues(parameters, ranks), operands, rank=ranks.rank, size=self._count)
                for index, each in wave
            ]

        def score(index: int, copies: Operands, stream: torch.cuda.Stream | None) -> None:
            with torch.no_grad(), torch.cuda.stream(stream):
                self._mine[index] = scores_of(measure, parameters[index], copies)

        self._beside = Beside([partial(score, index, copies, _side_stream(copies)) for index, copies in mine], workers)

    def settle(self) -> list[list[LiveScore]]:
        """Wait for the scores and gather those of all ranks. A collective, the first time.

        Raises:
            RuntimeError: on every rank, if the computation failed on one.
        """
        if self._scores is None:
            failure: str | None = None
            try:
                self._beside.wait()
            except Exception as error:
                if self._ranks.size == 1:
                    raise
                failure = describe(error)
            self._scores = gather_scores(self._mine, failure, ranks=self._ranks, count=self._count)
        return self._scores

    def drop(self) -> None:
        """Compute nothing further, and forget the scores."""
        self._beside.drop()


def _copy(whole: torch.Tensor, operand: torch.Tensor, measure: Measure) -> torch.Tensor:
    """Bring `whole` to where its score will be computed, into memory that updates of the operand do not change."""
    device = measure.device or whole.device
    # Gathered from several ranks it is new; from a single one it is the parameter itself.
    local = operand.to_local() if is_sharded(operand) else operand  # type: ignore[attr-defined]
    if device != whole.device or whole.untyped_storage().data_ptr() != local.untyped_storage().data_ptr():
        return whole.to(device)
    return whole.clone()


def _side_stream(copies: Operands) -> torch.cuda.Stream | None:
    """Make a stream that begins when the copies are there; None on other devices."""
    if not copies or copies[0].device.type != "cuda":
        return None
    stream = torch.cuda.Stream(copies[0].device)
    stream.wait_stream(torch.cuda.current_stream(copies[0].device))
    for copy in copies:
        copy.record_stream(stream)
    return stream
