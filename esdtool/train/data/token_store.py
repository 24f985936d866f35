"""A whole corpus as token ids in two files of the cache, made once and memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from esdtool.errors import ConfigError
from esdtool.support.files import atomic_write
from esdtool.train.data.cache import cache_folder, locked
from esdtool.train.data.corpus import Corpus, fingerprint_of
from esdtool.train.data.packing import Ids, PackingName, document_row
from esdtool.train.data.tokenizer import Encoder

# Change this when the same corpus and tokenizer would give other files.
_FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """All documents of a corpus, one after the other."""

    tokens: npt.NDArray[Any]
    """Ids, uint16 or uint32 [num_tokens], memory-mapped."""
    offsets: npt.NDArray[np.int64]
    """Document i is tokens[offsets[i]:offsets[i + 1]]; [num_documents + 1]."""

    def num_rows(self, packing: PackingName, length: int) -> int:
        """Training rows: documents, or full rows of joined documents (what is left at the end is not used)."""
        return len(self.offsets) - 1 if packing == "document" else len(self.tokens) // length

    def row(self, index: int, packing: PackingName, length: int) -> Ids:
        """Return one row of at most `length` ids."""
        if packing == "document":
            return document_row(self.document(index), length)
        return self.tokens[index * length : (index + 1) * length]

    def document(self, index: int) -> Ids:
        """Return one whole document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def open_token_store(corpus: Corpus, encoder: Encoder) -> TokenStore:
    """Tokenise the corpus, or find it in the cache by the fingerprints of text and tokenizer.

    Raises:
        ConfigError: if the corpus holds no document.
        OutputError: if the cache cannot be written.
    """
    key = fingerprint_of("tokens", _FORMAT, corpus.fingerprint, encoder.fingerprint)
    # The offsets are written last: where they are, the tokens are whole.
    target = cache_folder("tokens") / f"{key}.offsets.npy"
    with locked(target):
        store = _open(target, encoder)
        if store is None:
            _write(corpus, encoder, target)
            store = _open(target, encoder)
    assert store is not None
    return store


def _tokens_file(target: Path) -> Path:
    return target.with_name(target.name.replace(".offsets.npy", ".tokens"))


def _open(target: Path, encoder: Encoder) -> TokenStore | None:
    """Return the cached files, or None if they are not there or not whole."""
    tokens = _tokens_file(target)
    try:
        offsets = np.load(target)
        if tokens.stat().st_size != int(offsets[-1]) * np.dtype(encoder.dtype).itemsize:
            return None
        return TokenStore(tokens=np.memmap(tokens, dtype=encoder.dtype, mode="r"), offsets=offsets)
    except (OSError, ValueError, EOFError, IndexError):
        return None


def _write(corpus: Corpus, encoder: Encoder, target: Path) -> None:
    lengths = []
    with atomic_write(_tokens_file(target)) as temporary, temporary.open("wb") as stream:
        for ids in encoder.encode_all(corpus.documents()):
            stream.write(ids.tobytes())
            lengths.append(len(ids))
        if not lengths:
            raise ConfigError(f"{corpus.name}: the corpus is empty: no document has any text")
    with atomic_write(target) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
