"""Training batches from a corpus that is tokenised as a whole: any batch can be made at once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from esdtool.errors import ConfigError
from esdtool.train.data.batches import BatchLayout, check_identity
from esdtool.train.data.packing import Ids, MicroBatch
from esdtool.train.data.token_store import TokenStore


class LocalBatches:
    """Rows of a `TokenStore`, in a new permutation each epoch; batches run on from one epoch into the next."""

    def __init__(
        self,
        store: TokenStore,
        layout: BatchLayout,
        *,
        seed: int,
        corpus_fingerprint: str,
        tokenizer_fingerprint: str,
        name: str,
        seed_key: str = "run.seed",
    ) -> None:
        """Check that there is enough text.

        Args:
            store: the tokens.
            layout: sizes, packing and rank.
            seed: with the epoch, all that the order depends on.
            corpus_fingerprint: of the training text, for resuming.
            tokenizer_fingerprint: of the tokenizer, for resuming.
            name: the corpus in messages.
            seed_key: the setting that the seed comes from, for messages.

        Raises:
            ConfigError: if one epoch is shorter than one global batch.
        """
        self.num_rows = store.num_rows(layout.packing, layout.sequence_length)
        """Rows of one epoch."""
        if self.num_rows < layout.global_size:
            raise ConfigError(
                f"{name}: the training text is shorter than one batch: {len(store.tokens):,} tokens make "
                f"{self.num_rows} rows of {layout.sequence_length}, but batch.global_size is {layout.global_size}"
            )
        self._store = store
        self._layout = layout
        self._seed = seed
        self._seed_key = seed_key
        self._identity = {
            "corpus": corpus_fingerprint,
            "tokenizer": tokenizer_fingerprint,
            "packing": layout.packing,
            "sequence_length": layout.sequence_length,
            "global_size": layout.global_size,
            "seed": seed,
        }
        # Two, as a batch may reach from one epoch into the next.
        self._order = lru_cache(maxsize=2)(self._permutation)

    def global_rows(self, step: int) -> list[int]:
        """Indices of the rows of global batch `step`, over all ranks, in order."""
        size = self._layout.global_size
        positions = range(step * size, (step + 1) * size)
        return [int(self._order(position // self.num_rows)[position % self.num_rows]) for position in positions]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this rank's part of global batch `step`."""
        return self._layout.tensors([self._row(index) for index in self._layout.part(self.global_rows(step))])

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"step": step, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        check_identity(state, self._identity, seed_key=self._seed_key)

    def _row(self, index: int) -> Ids:
        return self._store.row(index, self._layout.packing, self._layout.sequence_length)

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)
