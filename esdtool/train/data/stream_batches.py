"""Training batches from a stream: read in blocks, shuffled within each, and found again after a restart.

A block of documents is the unit of both shuffling and resuming: a position is where
the block began in the stream and how many of its rows were used. Every rank reads the
whole stream, so that the batches do not depend on the number of ranks; with the packing
`document` each rank tokenises its own rows only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from esdtool.errors import ConfigError
from esdtool.train.data.batches import BatchLayout, check_identity
from esdtool.train.data.corpus import Stream, StreamReader
from esdtool.train.data.packing import Ids, MicroBatch, document_row, pack
from esdtool.train.data.tokenizer import Encoder


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """The position of a batch: everything before it is consumed."""

    epoch: int = 0
    """Passes over the stream that are behind."""
    block: int = 0
    """Blocks that are behind, over all epochs; with the seed it decides the block's order."""
    source: dict[str, Any] | None = None
    """Where the block began in the stream; None: at the start."""
    carry: tuple[int, ...] = ()
    """dense: tokens that the block before left over, less than a row."""
    used: int = 0
    """Rows of the block that are behind."""


class StreamBatches:
    """Batches of a `Stream`, served in order; a few are prepared ahead in a background thread."""

    def __init__(
        self,
        stream: Stream,
        encoder: Encoder,
        layout: BatchLayout,
        *,
        seed: int,
        block_size: int,
        prefetch: int,
        seed_key: str = "run.seed",
    ) -> None:
        """Nothing is read yet.

        Args:
            stream: the training text.
            encoder: its tokenizer.
            layout: sizes, packing and rank.
            seed: of the order within the blocks.
            block_size: documents that are shuffled among themselves.
            prefetch: batches prepared ahead; 0: none, and no thread.
            seed_key: the setting that the seed comes from, for messages.
        """
        self._stream = stream
        self._encoder = encoder
        self._layout = layout
        self._seed = seed
        self._seed_key = seed_key
        self._block_size = block_size
        self._prefetch = prefetch
        self._identity = {
            "corpus": stream.fingerprint,
            "tokenizer": encoder.fingerprint,
            "packing": layout.packing,
            "shuffle_block": block_size,
            "sequence_length": layout.sequence_length,
            "global_size": layout.global_size,
            "seed": seed,
        }
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="esdtool-data") if prefetch else None
        # Where batches begin that may be asked for again, or saved.
        self._cursors: dict[int, Cursor] = {0: Cursor()}
        self._pending: dict[int, Future[list[MicroBatch]]] = {}
        # The block that is open, and the step whose cursor points into it.
        self._open: _Block | None = None

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this rank's part of global batch `step`. Skipping or going back reads from the last known position."""
        if self._thread is None:
            batch = self._make(step)
        else:
            if step not in self._pending:
                self._drain()
            ahead = range(step, step + self._prefetch + 1)
            for later in ahead:
                if later not in self._pending:
                    self._pending[later] = self._thread.submit(self._make, later)
            batch = self._pending.pop(step).result()
        for old in [known for known in list(self._cursors) if known < step]:
            del self._cursors[old]
        return batch

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        cursor = asdict(self._cursors[step])
        return {"step": step, **self._identity, "cursor": {**cursor, "carry": list(cursor["carry"])}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        check_identity(state, self._identity, seed_key=self._seed_key)
        self._drain()
        cursor = state["cursor"]
        self._cursors = {state["step"]: Cursor(**{**cursor, "carry": tuple(cursor["carry"])})}
        self._open = None

    def _drain(self) -> None:
        """Wait for the thread and forget what it prepared."""
        for future in self._pending.values():
            future.cancel()
        for future in self._pending.values():
            if not future.cancelled():
                future.exception()
        self._pending.clear()

    def _make(self, step: int) -> list[MicroBatch]:
        """Batch `step`, and the cursor of the one after it."""
        # A list: the other thread may add to the dictionary or drop from it meanwhile.
        known = max((at for at in list(self._cursors) if at <= step), default=None)
        if known is None:
            raise ValueError(f"batch {step} is behind the position that this run resumed from")
        for at in range(known, step):
            self._cursors[at + 1], _ = self._take(self._cursors[at], at)
        self._cursors[step + 1], items = self._take(self._cursors[step], step)
        return self._layout.tensors(self._rows(self._layout.part(items)))

    def _take(self, cursor: Cursor, step: int) -> tuple[Cursor, list[Any]]:
        """Return the items of one global batch from `cursor` on, and where the next one begins."""
        items: list[Any] = []
        while True:
            block = self._block_at(cursor)
            more = block.items[cursor.used : cursor.used + self._layout.global_size - len(items)]
            items += more
            cursor = replace(cursor, used=cursor.used + len(more))
            if len(items) == self._layout.global_size:
                return cursor, items
            if block.is_last and step == 0:
                raise ConfigError(
                    f"{self._stream.name}: the training text is shorter than one batch: it makes {len(items)} rows of "
                    f"{self._layout.sequence_length}, but batch.global_size is {self._layout.global_size}"
                )
            cursor = Cursor(
                epoch=cursor.epoch + block.is_last,
                block=cursor.block + 1,
                source=None if block.is_last else block.end,
                carry=block.carry,
            )

    def _block_at(self, cursor: Cursor) -> _Block:
        """The block that the cursor points into: the open one, the next one, or one found again by its position."""
        block = self._open
        if block is not None and block.number == cursor.block:
            return block
        follows = block is not None and block.number + 1 == cursor.block and not block.is_last
        reader = block.reader if block is not None and follows else self._stream.reader(cursor.source)
        self._open = self._read_block(reader, cursor)
        return self._open

    def _read_block(self, reader: StreamReader, cursor: Cursor) -> _Block:
        documents = reader.read(self._block_size)
        is_last = len(documents) < self._block_size
        if not documents and cursor.source is None:
            raise ConfigError(f"{self._stream.name}: the corpus is empty: no document has any text")
        # Before the order is drawn, as reading ahead must not move the position.
        end = None if is_last else reader.position()
        order = np.random.default_rng([self._seed, cursor.block])
        texts = [documents[index] for index in order.permutation(len(documents))]
        items: list[Any] = texts
        carry: tuple[int, ...] = ()
        if self._layout.packing == "dense":
            items, carry = self._dense_rows(texts, cursor.carry)
            items = [items[index] for index in order.permutation(len(items))]
        return _Block(number=cursor.block, items=items, carry=carry, end=end, is_last=is_last, reader=reader)

    def _dense_rows(self, texts: list[str], carry: tuple[int, ...]) -> tuple[list[Ids], tuple[int, ...]]:
        def documents() -> Iterator[Ids]:
            yield np.array(carry, dtype=self._encoder.dtype)
            yield from self._encoder.encode_all(texts)

        length = self._layout.sequence_length
        rows = list(pack(documents(), "dense", length))
        rest = rows.pop() if rows and len(rows[-1]) < length else np.array([], dtype=self._encoder.dtype)
        return rows, tuple(rest.tolist())

    def _rows(self, items: Sequence[Any]) -> list[Ids]:
        """Items as rows: texts are tokenised only here, where they are this rank's own."""
        if self._layout.packing == "dense":
            return list(items)
        return [document_row(ids, self._layout.sequence_length) for ids in self._encoder.encode(items)]


@dataclass(frozen=True, kw_only=True)
class _Block:
    number: int
    """Value of `Cursor.block`."""
    items: list[Any]
    """In their shuffled order: rows of ids (dense), or texts that make one row each (document)."""
    carry: tuple[int, ...]
    """dense: the tokens left over."""
    end: dict[str, Any] | None
    """Where the next block begins; None after the last."""
    is_last: bool
    """Whether the stream ended in it."""
    reader: StreamReader
    """Stands at the end of the block."""
