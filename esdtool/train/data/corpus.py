"""The text of a run: documents in a fixed order, divided into training and validation.

A `Corpus` can be read from its start any number of times. A `Stream` is one that is too
large to tokenise beforehand: it can also be read on from a saved position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in a fixed order."""

    name: str
    """For messages: `stdlib`, `data.files corpus/*.txt`, `allenai/c4 (en), split train`."""
    fingerprint: str
    """Hexadecimal; differs wherever the documents differ. For a stream it tells names and settings, not content."""
    documents: Callable[[], Iterator[str]]
    """Reads all documents, none of them blank, from the first one."""


class StreamReader(Protocol):
    """A place in a stream."""

    def read(self, count: int) -> list[str]:
        """Return the next documents; fewer than `count` only where the stream ends. Held-out documents do not count."""

    def position(self) -> dict[str, Any]:
        """Return the position of the next `read`, as plain values."""


@dataclass(frozen=True, kw_only=True)
class Stream(Corpus):
    """A corpus that is read while training."""

    reader: Callable[[dict[str, Any] | None], StreamReader]
    """Opens the stream at a position, or at its start."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Two corpora that have no document in common."""

    train: Corpus
    validation: Corpus


def held_out_splits(corpus: Corpus, fraction: float) -> Splits:
    """Divide a corpus by the hash of each document.

    Equal documents fall on the same side, so that no validation text is also training
    text; the choice depends on nothing but the text, so that runs of different seeds
    are measured on the same documents.
    """
    return Splits(
        train=_part(corpus, fraction, held_out=False, label="train"),
        validation=_part(corpus, fraction, held_out=True, label="validation"),
    )


def is_held_out(document: str, fraction: float) -> bool:
    """Return whether a document is validation text: its 64-bit hash is in the lowest `fraction` of all hashes."""
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def fingerprint_of(*parts: str | bytes | int | float | None) -> str:
    """Return a hexadecimal hash of a sequence of values."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def not_blank(documents: Iterable[str]) -> Iterator[str]:
    """Leave out documents of nothing but white space: they hold no text to learn from."""
    return (document for document in documents if document.strip())


def _part(corpus: Corpus, fraction: float, *, held_out: bool, label: str) -> Corpus:
    def wanted(document: str) -> bool:
        return is_held_out(document, fraction) == held_out

    def documents() -> Iterator[str]:
        return filter(wanted, corpus.documents())

    name = corpus.name if not held_out else f"{corpus.name}, held-out part ({fraction:g})"
    fingerprint = fingerprint_of(corpus.fingerprint, label, fraction)
    if not isinstance(corpus, Stream):
        return Corpus(name=name, fingerprint=fingerprint, documents=documents)

    open_whole = corpus.reader

    def reader(position: dict[str, Any] | None) -> StreamReader:
        return _FilteredReader(open_whole(position), wanted)

    return Stream(name=name, fingerprint=fingerprint, documents=documents, reader=reader)


class _FilteredReader:
    """A reader that passes some of another's documents."""

    def __init__(self, whole: StreamReader, wanted: Callable[[str], bool]) -> None:
        self._whole = whole
        self._wanted = wanted

    def read(self, count: int) -> list[str]:
        documents: list[str] = []
        while missing := count - len(documents):
            more = self._whole.read(missing)
            documents += filter(self._wanted, more)
            if len(more) < missing:
                break
        return documents

    def position(self) -> dict[str, Any]:
        return self._whole.position()
