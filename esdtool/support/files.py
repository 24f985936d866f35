"""Writing files so that a failure never leaves half of one, and the per-user cache directory."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from esdtool.errors import OutputError
from esdtool.support.words import one_line


@contextmanager
def atomic_write(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and put the finished file in the target's place at the end.

    If the body raises, the temporary file is removed and the target stays as it was. What the target is decides how
    it is written:

    - A missing or regular file is replaced by a rename, and keeps its mode, its group and, where that is allowed, its
      owner.
    - Of a symbolic link, the file that it leads to is replaced, in the folder where that file is.
    - A FIFO, a character device (`/dev/null`) and an open descriptor (`/dev/stdout`, `/dev/fd/63`) are written to.
    - A folder and a block device are refused.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "out.txt"
    >>> with atomic_write(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'

    Raises:
        OutputError: if the target cannot be written: a missing folder, a full disk, a folder in its place.
    """
    target = Path(target)
    try:
        writer = _stream_write(target) if is_stream(target) else _replace(target)
        with writer as temporary:
            yield temporary
    except OutputError:
        raise
    except write_failures() as error:
        _cannot_write(target, error)


def atomic_write_text(target: str | Path, text: str) -> None:
    """Replace a text file (UTF-8) by `text`, wholly or not at all; targets and errors are those of `atomic_write`.

    Lone surrogates, which UTF-8 has no bytes for, are spelled out (`\\ud800`, which JSON reads as that character).
    """
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def naming_the_file(path: str | Path) -> Iterator[None]:
    """Turn a failure to write into an `OutputError` that names the file, for files that grow line by line.

    Raises:
        OutputError: if the body fails as a writer fails.
    """
    try:
        yield
    except OutputError:
        raise
    except write_failures() as error:
        _cannot_write(Path(path), error)


def write_failures(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """List the exceptions by which writers say that a disk is full or a file cannot be written.

    `safetensors` has an exception of its own, which is neither an OSError nor a RuntimeError. `torch.save` raises a
    bare RuntimeError, which is not among these: whoever calls it adds it.

    Args:
        more: exceptions that the writers at hand raise besides.
    """
    # A library that was never imported has raised nothing.
    own = getattr(sys.modules.get("safetensors"), "SafetensorError", None)
    return (OSError, *more) if own is None else (OSError, own, *more)


def default_mode(folder: str | Path) -> int:
    """Find the mode that a new file in a folder gets, by the process's umask and the folder's access control list.

    The umask is not read: on POSIX that means to set it for a moment, which other threads would see.

    Raises:
        OSError: if the folder takes no files.
    """
    probe = _new_file(Path(folder))
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()


def is_stream(path: str | Path) -> bool:
    """Tell whether a path is written to rather than replaced: a descriptor, a FIFO, a character device or a socket."""
    if descriptor_of(path) is not None:
        return True
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def descriptor_of(path: str | Path) -> int | None:
    """Return the descriptor of this process that a path such as `/dev/stdout` or `/dev/fd/63` leads to, or None.

    Opened by its path, a redirected descriptor would begin at the start of the file once more, and a rename would put
    another file in its place; the descriptor itself is where the shell wants the bytes.
    """
    step = Path(path)
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(step.parent)
        if step.name.isdecimal() and folder in ("/dev/fd", f"/proc/{os.getpid()}/fd"):
            return int(step.name)
        try:
            step = step.parent / step.readlink()
        except OSError:  # no link
            return None
    return None


_MOST_LINKS = 40
"""Links that are followed, as many as Linux follows."""


def cache_directory() -> Path:
    """Return the directory for what may be deleted at any time: `ESDTOOL_CACHE_DIR`, or the platform's usual place."""
    import platformdirs  # most commands need no cache

    return Path(os.environ.get("ESDTOOL_CACHE_DIR") or platformdirs.user_cache_dir("esdtool", appauthor=False))


def publish_once(target: Path, text: str) -> None:
    """Write a file that no process has written yet: of several at the same time, the first one's stays.

    Raises:
        OSError: if it cannot be written, FileExistsError among them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _new_file(target.parent)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, target)  # unlike a rename, it fails where the target exists
    finally:
        temporary.unlink()


@contextmanager
def _replace(target: Path) -> Iterator[Path]:
    """Write a file beside the one that the target's links lead to, and rename it onto that one."""
    real = Path(os.path.realpath(target, strict=False))
    if real.is_symlink():
        raise OutputError(f"{target}: cannot write: its symbolic links lead in a circle")
    try:
        old = real.stat()
    except FileNotFoundError:
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        kind = "a directory" if stat.S_ISDIR(old.st_mode) else "a block device"
        raise OutputError(f"{target}: cannot write: it is {kind}")
    temporary = _new_file(real.parent)
    try:
        # Taken now: some libraries replace the file by a private one of their own.
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        if old is not None:
            _give_owner(temporary, old)
            mode = stat.S_IMODE(old.st_mode)
        temporary.chmod(mode)
        temporary.replace(real)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def _stream_write(target: Path) -> Iterator[Path]:
    """Collect the bytes in a temporary file and copy them to a descriptor, FIFO or device at the end."""
    descriptor = descriptor_of(target)
    with tempfile.TemporaryDirectory(prefix="esdtool-") as folder:
        temporary = Path(folder) / "output"
        temporary.touch()
        yield temporary
        if descriptor is not None:
            sys.stdout.flush()  # what was said before comes before
        # Neither O_CREAT nor O_TRUNC: what is written to must be there already.
        opened = os.dup(descriptor) if descriptor is not None else os.open(target, os.O_WRONLY)
        with os.fdopen(opened, "wb") as stream, temporary.open("rb") as source:
            shutil.copyfileobj(source, stream)


def _new_file(folder: Path) -> Path:
    """Make an empty file of a new name, with the mode that `open` gives (`tempfile` makes private ones)."""
    while True:
        path = folder / f".esdtool-{secrets.token_hex(8)}.tmp"
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            continue
        return path


def _give_owner(path: Path, like: os.stat_result) -> None:
    """Give a file the group, and where that is allowed the owner, of another."""
    if not hasattr(os, "chown"):
        return
    for owner, group in ((-1, like.st_gid), (like.st_uid, -1)):
        with suppress(OSError):  # only root gives files away, and only members give them to a group
            os.chown(path, owner, group)


def _cannot_write(target: Path, error: Exception) -> NoReturn:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    raise OutputError(f"{target}: cannot write: {reason}") from error
