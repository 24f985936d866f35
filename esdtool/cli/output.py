"""What the subcommands share: outputs checked before the work, progress and remarks on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from esdtool.errors import CheckpointError, OutputError, UsageError
from esdtool.support.files import atomic_write, atomic_write_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from esdtool.analysis.document import Analysis
    from esdtool.modules import WeightModule

STDOUT = "-"


def check_outputs(*paths: str | None) -> bool:
    """Refuse outputs that could not be written, before hours of work. Returns whether stdout carries data.

    Raises:
        UsageError: if two outputs are asked for on stdout.
        OutputError: if a target's folder is missing or not writable, or the target is a folder.
    """
    given = [path for path in paths if path is not None]
    if given.count(STDOUT) > 1:
        raise UsageError("only one output can go to stdout (-)")
    for name in given:
        if name == STDOUT:
            continue
        target = Path(name)
        if target.is_dir():
            raise OutputError(f"{target}: cannot write: it is a directory")
        if not target.parent.is_dir():
            raise OutputError(f"{target}: cannot write: the directory {target.parent} does not exist")
        if not os.access(target.parent, os.W_OK):
            raise OutputError(f"{target}: cannot write: permission denied")
    return STDOUT in given


def check_folder(folder: str | Path | None) -> None:
    """Make a folder for figures before hours of work, or find out that it cannot be made.

    Raises:
        OutputError: if it cannot be made or written to.
    """
    if folder is None:
        return
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot make the folder: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path}: cannot write: permission denied")


def write_text(path: str, text: str) -> None:
    """Write to a file, wholly or not at all, or to stdout."""
    if path == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        atomic_write_text(path, text)


def write_esds(path: str, analysis: Analysis) -> None:
    """Save the eigenvalues of each module by its name, float64, ascending, as safetensors."""
    from safetensors.numpy import save, save_file

    metadata = {"format": "esdtool.esd", "created_by": analysis.created_by}
    esds = dict(sorted(analysis.esds.items()))
    if path == STDOUT:
        sys.stdout.buffer.write(save(esds, metadata=metadata))
        sys.stdout.flush()
        return
    with atomic_write(path) as temporary:
        save_file(esds, temporary, metadata=metadata)


def read_esds(path: str) -> dict[str, npt.NDArray[np.float64]]:
    """Eigenvalues of each module by its name, as `write_esds` saved them.

    Raises:
        CheckpointError: if the file cannot be read or is another one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("format") != "esdtool.esd":
                raise CheckpointError(f"{path}: not written by 'esdtool analyze --esd'")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read the eigenvalues: {error}") from error


def note(text: str, *, quiet: bool = False) -> None:
    """A remark for the user, on stderr."""
    if not quiet:
        print(f"esdtool: {text}", file=sys.stderr)


@contextmanager
def progress_bar(total: float, *, quiet: bool) -> Iterator[Callable[[WeightModule, float], None] | None]:
    """A bar on stderr that advances by predicted cost; nothing if stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("spectra", total=total)
        yield lambda module, cost: progress.update(task, advance=cost, description=module.name)
