"""Limit what a file may ask for: one budget for every reader, checked before memory is allocated.

Files come from strangers, so that no number in one is believed before it has been compared with the bytes that are
there. The bounds are several times what the largest public checkpoints need.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from esdtool.errors import CheckpointError
from esdtool.support.words import visible

MIB = 2**20

JSON_BYTES = 48 * MIB
"""Length of a JSON file: a configuration, or an index, which takes 100 bytes a tensor."""

HEADER_BYTES = 100_000_000
"""Length of a header: the safetensors format's own limit."""

PICKLE_BYTES = 256 * MIB
"""Length of a pickle without its tensors: `.metadata` of two thousand ranks with a thousand tensors each."""

PROTOBUF_BYTES = 2**31
"""Length of an ONNX file: the limit of protobuf."""

ITEMS = 10_000_000
"""Entries of a header: pairs of metadata, words of a vocabulary."""

NODES = 1_000_000
"""Nodes and initialisers of an ONNX graph, functions inlined; objects of an HDF5 file."""

TENSORS = 2_000_000

SHARDS = 10_000
"""Files that an index names."""

NESTING = 200
"""Depth of nested objects in a header or a configuration."""

NAME_CHARACTERS = 4096

NAME_SEGMENTS = 100

NUMBER_DIGITS = 18
"""Digits of a number within a name."""

DIMENSIONS = 16

EXPANSION = 100
"""Bytes that one stored byte may become, where a container compresses, repeats or leaves out zeros."""

HEADER_EXPANSION = 30
"""The same for what is read into objects: a number in a pickle or in JSON takes many bytes once more."""

SMALL_BYTES = MIB
"""What may be taken whatever is stored, e.g. for a bias of zeros that was never written."""


_LONG_NUMBER = re.compile(rf"\d{{{NUMBER_DIGITS + 1}}}")


def check_expansion(what: str, wanted: int, stored: int, most: int = EXPANSION) -> None:
    """Refuse to make much of little.

    Args:
        what: file and tensor, for the message.
        wanted: bytes in memory.
        stored: bytes in the file.
        most: how many bytes a stored one may become.

    Raises:
        CheckpointError: if more than `most` times the stored bytes are wanted, and more than `SMALL_BYTES`.
    """
    if wanted > max(SMALL_BYTES, most * stored):
        raise CheckpointError(
            f"{what}: refused: {wanted} bytes of data from {stored} stored (at most {most} times as many are read)"
        )


def check_length(what: str, length: int, most: int) -> None:
    """Refuse a part of a file that is read whole if it is too long.

    Raises:
        CheckpointError: if `length` exceeds `most` bytes.
    """
    if length > most:
        raise CheckpointError(f"{what}: refused: {length} bytes, more than the {most} that are read of such a part")


def check_names(what: str, names: Collection[str]) -> None:
    """Refuse names that are too many, too long, too deep, or no text.

    Raises:
        CheckpointError: naming the first.
    """
    if len(names) > TENSORS:
        raise CheckpointError(f"{what}: refused: {len(names)} tensors, more than {TENSORS}")
    for name in names:
        if len(name) > NAME_CHARACTERS:
            raise CheckpointError(
                f"{what}: refused: a tensor's name of {len(name)} characters, more than {NAME_CHARACTERS}: "
                f"{shortened(name)}"
            )
        if name.count(".") >= NAME_SEGMENTS:
            raise CheckpointError(
                f"{what}: refused: a tensor's name of more than {NAME_SEGMENTS} segments: {shortened(name)}"
            )
        if _LONG_NUMBER.search(name):
            raise CheckpointError(
                f"{what}: refused: a tensor's name with a number of more than {NUMBER_DIGITS} digits: {shortened(name)}"
            )
        if not is_text(name):
            raise CheckpointError(f"{what}: refused: a tensor's name that is no Unicode text: {visible(name)}")


def check_shapes(what: str, shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse shapes that no tensor can have.

    Raises:
        CheckpointError: for negative sizes, too many dimensions, or sizes beyond 2^62.
    """
    for shape in shapes:
        if len(shape) > DIMENSIONS or not all(0 <= size < 2**62 for size in shape):
            raise CheckpointError(f"{what}: damaged: a tensor of shape {shortened(str(list(shape[: DIMENSIONS + 1])))}")


def is_text(text: str) -> bool:
    """Return whether a string can be written: it has no lone surrogates.

    >>> is_text("caf\u00e9"), is_text("\\ud800")
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(text: str, most: int = 120) -> str:
    """Return the beginning of a long text, for a message.

    >>> shortened("abcdef", 3)
    'abc...'
    """
    return visible(text if len(text) <= most else f"{text[:most]}...")
