"""Scores of a snapshot of the weights, computed beside the training steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from esdtool.modules import WeightModule
from esdtool.optim.live_scores import (
    LiveScore,
    Measure,
    Ranks,
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
    """What `live_scores` would return for the tensors as they are now, later. A collective where `ranks` has several.

    The caller takes the snapshot: this rank's own parameters are copied (sharded ones gathered) before it goes on.
    Threads do the rest, on CUDA in a stream of their own. All communication is in the caller's thread.

    Args: as of `live_scores`, but `jobs` is 1 by default where the spectra are computed on the CPU that trains.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[WeightModule]],
        tensors: Sequence[torch.Tensor | None],
        measure: Measure,
        *,
        ranks: Ranks,
        jobs: int | None = None,
    ) -> None:
        self._count, self._ranks = len(parameters), ranks
        self._mine: dict[int, list[LiveScore]] = {}
        self._scores: list[list[LiveScore]] | None = None
        trains_on_cpu = all(tensor is None or tensor.device.type == "cpu" for tensor in tensors)
        workers = 1
        if all(computes_on_cpu(tensor, measure) for tensor in tensors):
            workers = jobs or (1 if trains_on_cpu else torch.get_num_threads())
        elif measure.options.fast:
            # float32 products on CUDA need a setting of the whole process, which the training must not see.
            measure = replace(measure, options=replace(measure.options, fast=False))
        with torch.no_grad():
            mine = [
                (index, _copy(tensor, tensors[index], measure))
                for wave in waves(work_queues(parameters, ranks), tensors, rank=ranks.rank, size=self._count)
                for index, tensor in wave
            ]

        def score(index: int, tensor: torch.Tensor | None, stream: torch.cuda.Stream | None) -> None:
            with torch.no_grad(), torch.cuda.stream(stream):
                self._mine[index] = scores_of(measure, parameters[index], tensor)

        self._beside = Beside([partial(score, index, tensor, _side_stream(tensor)) for index, tensor in mine], workers)

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
        """Forget about it."""
        self._beside.drop()


def _copy(whole: torch.Tensor | None, parameter: torch.Tensor | None, measure: Measure) -> torch.Tensor | None:
    """`whole` where its spectrum will be computed, in memory that updates of the parameter do not change."""
    if whole is None or parameter is None:
        return None
    device = measure.device or whole.device
    # Gathered from several ranks it is new; from a single one it is the parameter itself.
    local = parameter.to_local() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
    if device != whole.device or whole.untyped_storage().data_ptr() != local.untyped_storage().data_ptr():
        return whole.to(device)
    return whole.clone()


def _side_stream(tensor: torch.Tensor | None) -> torch.cuda.Stream | None:
    """A stream that begins when the copy is there; None on other devices."""
    if tensor is None or tensor.device.type != "cuda":
        return None
    stream = torch.cuda.Stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    tensor.record_stream(stream)
    return stream
