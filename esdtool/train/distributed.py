"""Ranks: who this process is, how the model is spread, and the few collectives that the loop needs.

One process without torchrun is the ordinary case: then nothing here communicates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from esdtool.analysis.ranks import meet
from esdtool.errors import ConfigError, DeviceError, EsdtoolError
from esdtool.support.launch import launched
from esdtool.train.config.train_config import TrainConfig

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

Result = TypeVar("Result")

_FAREWELL: Final = 10.0
"""Seconds after a broken connection in which the watch finds out which rank is lost, and ends this process."""


@dataclass(frozen=True, kw_only=True)
class TrainingRanks:
    """This process among the others."""

    rank: int
    """0 to world_size - 1; rank 0 writes."""
    world_size: int
    device: torch.device
    """Where this rank computes."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64; the same on every rank."""
        if self.world_size == 1:
            return [float(value) for value in values]
        # MPS has no float64, but it has no ranks either.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return cast("list[float]", total.tolist())

    def on_first(self, work: Callable[[], Result]) -> Result | None:
        """Let rank 0 do something while the others wait; its failure is every rank's.

        Returns:
            What `work` returns, on rank 0; None on the others.

        Raises:
            EsdtoolError: what `work` raised on rank 0, or on the other ranks one that says so.
        """
        problem: EsdtoolError | None = None
        result: Result | None = None
        if self.is_first:
            try:
                result = work()
            except EsdtoolError as error:
                problem = error
        failed = self.sum([0.0 if problem is None else 1.0])[0]
        if problem is not None:
            raise problem
        if failed:
            raise RankZeroError("rank 0 has failed and says why")
        return result

    def together(self, work: Callable[[], Result]) -> Result:
        """Do something without collectives on every rank; if it fails on any, all stop, and rank 0 says why.

        Raises:
            EsdtoolError: on rank 0 what failed first, by rank; on the others one that rank 0 reports.
        """
        if self.world_size == 1:
            return work()
        done: list[Result] = []
        problem: EsdtoolError | None = None
        try:
            done.append(work())
        except EsdtoolError as error:
            problem = error
        found: list[str | None] = [None] * self.world_size
        dist.all_gather_object(found, None if problem is None else str(problem))
        failed = next((rank for rank, message in enumerate(found) if message is not None), None)
        if failed is None:
            return done[0]
        if not self.is_first:
            raise RankZeroError("a rank has failed, and rank 0 says why")
        raise problem or EsdtoolError(f"rank {failed}: {found[failed]}")


class RankZeroError(EsdtoolError):
    """An error that all ranks know of and rank 0 reports; this one just ends."""

    reported_elsewhere = True


class LoneRankError(EsdtoolError):
    """An error of one rank alone, which no other can report."""


@contextmanager
def open_ranks(config: TrainConfig) -> Iterator[TrainingRanks]:
    """Join the process group that torchrun describes, and leave it at the end; alone, just choose a device.

    NCCL for GPUs, gloo for CPUs.

    Raises:
        DeviceError: if run.device is not there.
        UsageError: if the environment is not a launcher's, or the ranks cannot meet.
        LostRanksError: if some of them do not come. One that dies later ends all, with a line that names it.
    """
    launch = launched()
    if launch is None:
        yield TrainingRanks(rank=0, world_size=1, device=check_device(config, world_size=1))
        return
    device = check_device(config, world_size=launch.size, local_rank=launch.local_rank)
    store, watch = meet(launch, remedy="go on with --resume auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", store=store, rank=launch.rank, world_size=launch.size, device_id=device)
    else:
        dist.init_process_group("gloo", store=store, rank=launch.rank, world_size=launch.size)
    ranks = TrainingRanks(rank=launch.rank, world_size=launch.size, device=device)
    try:
        yield ranks
        watch.leave()
    except RankZeroError:
        watch.leave()
        raise
    except EsdtoolError as error:
        if ranks.is_first:
            watch.leave()
            raise
        raise LoneRankError(f"rank {launch.rank}: {error}") from error
    except RuntimeError:
        # A collective fails when another rank dies: then the watch ends this process, and says which.
        time.sleep(_FAREWELL)
        raise
    finally:
        dist.destroy_process_group()


def check_device(config: TrainConfig, *, world_size: int, local_rank: int = 0) -> torch.device:
    """The device of a rank.

    Args:
        config: for [run].
        world_size: ranks in all.
        local_rank: this rank among those of this machine.

    Raises:
        DeviceError: if run.device is not there.
        ConfigError: if run.distributed needs more ranks.
    """
    wanted = config.run.device
    if world_size == 1 and config.run.distributed == "fsdp2":
        raise ConfigError(
            'run.distributed = "fsdp2" needs ranks: torchrun --nproc-per-node N -m esdtool train ..., or "ddp"'
        )
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if local_rank >= available:
        raise DeviceError(
            f'run.device = "{wanted}": torch sees {available} CUDA devices, rank {local_rank} of this machine has none'
        )
    return torch.device("cuda", local_rank)


class Spread:
    """The model as it is called, spread over the ranks.

    `model` keeps its parameter names under DDP and `fully_shard` alike; `call` is what the
    forward pass goes through.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, ranks: TrainingRanks) -> None:
        """Move the model to the rank's device, shard or wrap it, and compile it if asked to.

        With fully_shard, every transformer block is one unit, and the rest another.
        """
        self.model = model.to(ranks.device)
        self._ranks = ranks
        self._sharded = ranks.world_size > 1 and config.run.distributed == "fsdp2"
        if self._sharded:
            self.model = _shard(self.model, ranks)
        call: Any = torch.compile(self.model) if config.run.compile else self.model
        self._ddp: nn.parallel.DistributedDataParallel | None = None
        if ranks.world_size > 1 and not self._sharded:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self._ddp = call = nn.parallel.DistributedDataParallel(call, device_ids=ids)
        self.call: nn.Module = call

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: gradients are reduced over the ranks with the last one."""
        if self._sharded:
            cast("FSDPModule", self.model).set_requires_gradient_sync(last)
        if self._ddp is not None and not last:
            with self._ddp.no_sync():
                yield
        else:
            yield

    def weights_changed(self) -> None:
        """Let go of gathered copies of the parameters, after a change that no optimizer made."""
        if self._sharded:
            cast("FSDPModule", self.model).reshard()


def _shard(model: nn.Module, ranks: TrainingRanks) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    return cast("nn.Module", fully_shard(model, mesh=mesh))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the members of the longest ModuleList."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max((list(found) for found in lists), key=lambda found: len(found), default=[])
