"""The first look at a file: what can be told before its format matters."""

from __future__ import annotations

from pathlib import Path

from esdtool.errors import CheckpointError

_LFS_POINTER = b"version https://git-lfs."


def read_head(path: Path) -> bytes:
    """The first 64 bytes of a weight file.

    Raises:
        CheckpointError: if the file cannot be read, is empty, or is a Git LFS pointer.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path}: empty file; download or copy it again")
    if head.startswith(_LFS_POINTER):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run 'git lfs pull' in its repository")
    return head
