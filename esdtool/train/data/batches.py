"""Batches: a deterministic order of rows, split over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from esdtool.errors import ConfigError
from esdtool.train.config.loading import check_batch
from esdtool.train.config.train_config import TrainConfig
from esdtool.train.data.packing import Ids, MicroBatch, PackingName, count_targets, targets_of, to_micro_batches

__all__ = ["BatchLayout", "MicroBatch", "TrainBatches", "ValidationBatches", "check_identity", "count_targets"]

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """A function that turns rows into the tensors of this rank."""

    global_size: int
    """Rows per optimizer step, over all ranks."""
    micro_size: int
    """Rows per forward pass."""
    sequence_length: int
    """Tokens per row."""
    packing: PackingName
    pad: int
    """Token id that fills rows up."""
    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_config(cls, config: TrainConfig, *, pad: int, rank: int, world_size: int) -> BatchLayout:
        """Return the layout of [batch] and [data].

        Raises:
            ConfigError: if the global batch cannot be split evenly.
        """
        check_batch(config, world_size)
        return cls(
            global_size=config.batch.global_size,
            micro_size=config.batch.micro_size,
            sequence_length=config.batch.sequence_length,
            packing=config.data.packing,
            pad=pad,
            rank=rank,
            world_size=world_size,
        )

    def part(self, rows: Sequence[Row]) -> Sequence[Row]:
        """This rank's consecutive part of a global batch."""
        size = self.global_size // self.world_size
        return rows[self.rank * size : (self.rank + 1) * size]

    def tensors(self, rows: Sequence[Ids], micro_size: int | None = None) -> list[MicroBatch]:
        """Return the rows as micro-batches."""
        return to_micro_batches(
            rows,
            micro_size=micro_size or self.micro_size,
            packing=self.packing,
            length=self.sequence_length,
            pad=self.pad,
        )


class TrainBatches(Protocol):
    """The training rows in the order of the seed.

    Global batch i holds the same rows whatever the number of ranks; each rank gets its
    own consecutive part of it. Pass every loss as a sum over its targets, and divide by
    the targets of all micro-batches of all ranks (`count_targets`, then an all-reduce):
    then the gradient does not depend on how the batch was split.
    """

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's part of global batch `step` (from 0): global_size / micro_size / world_size of them."""

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state from which a resumed run continues with batch `step`: the last one served, or the next.

        Plain values (int, str, list, dict, None), the same on every rank.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position, with any number of ranks.

        Raises:
            ConfigError: if text, tokenizer, packing, batch size or seed differ from the saved ones; says which.
        """


class ValidationBatches:
    """The first rows of the validation text, up to a token budget; the same rows for any number of ranks."""

    num_rows: int
    """Rows over all ranks."""
    num_targets: int
    """Targets over all ranks: what the sum of the losses is divided by."""

    def __init__(self, rows: Iterable[Ids], layout: BatchLayout, *, tokens: int, micro_size: int, name: str) -> None:
        """Take rows until they hold `tokens` targets or end.

        Raises:
            ConfigError: if there is no target at all; `name` says what text it was.
        """
        taken: list[Ids] = []
        self.num_targets = 0
        for row in rows:
            # A copy: a view would keep the whole array alive that the row was cut from.
            taken.append(row.copy())
            self.num_targets += targets_of(row)
            if self.num_targets >= tokens:
                break
        if not self.num_targets:
            raise ConfigError(
                f"{name}: no validation text; raise data.validation_fraction, or give data.validation_files or "
                "data.validation_split"
            )
        self.num_rows = len(taken)
        self._layout = layout
        self._micro_size = micro_size
        # A row of one token has no target: it fills up what does not come out even.
        per_rank = -(-len(taken) // layout.world_size)
        filler = taken[0][:1]
        own = taken[layout.rank :: layout.world_size]
        self._rows = own + [filler] * (per_rank - len(own))

    def micro_batches(self) -> list[MicroBatch]:
        """This rank's rows, equally many micro-batches on each rank.

        Sum the losses of all ranks and divide by `num_targets`; a micro-batch may have
        few targets or none, so never average means.
        """
        return self._layout.tensors(self._rows, self._micro_size)


_IDENTITY_NAMES: Final = {
    "corpus": "the training text",
    "tokenizer": "the tokenizer",
    "packing": "data.packing",
    "shuffle_block": "data.shuffle_block",
    "sequence_length": "batch.sequence_length",
    "global_size": "batch.global_size",
}


def check_identity(saved: dict[str, Any], current: dict[str, Any], *, seed_key: str = "run.seed") -> None:
    """Refuse to go on with other batches than those of the checkpoint.

    Args:
        saved: what the batches of the checkpoint depend on.
        current: what they would depend on now.
        seed_key: the setting that the seed comes from, for the message.

    Raises:
        ConfigError: naming the first thing that differs, with both values.
    """
    for key, name in {**_IDENTITY_NAMES, "seed": seed_key}.items():
        before, now = saved.get(key), current.get(key)
        if before == now:
            continue
        values = "" if key in ("corpus", "tokenizer") else f" ({before} then, {now} now)"
        raise ConfigError(
            f"cannot resume: {name} differs from the checkpoint's{values}, so the run would not see the same batches; "
            "restore it, or begin a new run with model.from"
        )
