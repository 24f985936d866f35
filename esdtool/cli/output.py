"""Share output between the subcommands: outputs that are announced, remarks and progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from esdtool.checkpoint.remote.traffic import FETCHED
from esdtool.cli.targets import STDOUT
from esdtool.errors import CheckpointError
from esdtool.support.files import atomic_write, atomic_write_text, is_stream
from esdtool.support.sizes import format_size
from esdtool.support.terminal import new_console, remark, write_data
from esdtool.support.words import visible

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from esdtool.analysis.document import Analysis
    from esdtool.modules import WeightModule


def write_text(path: str, text: str, *, quiet: bool) -> None:
    """Write to stdout, or to a file, wholly or not at all, and say so.

    Raises:
        OutputError: if the file cannot be written; what stood there before is intact.
    """
    if path == STDOUT:
        write_data(text)
        return
    atomic_write_text(path, text)
    wrote(path, quiet=quiet)


def write_esds(path: str, analysis: Analysis, *, quiet: bool) -> None:
    """Save the eigenvalues of each module by its name, float64, ascending, as safetensors.

    Raises:
        OutputError: if the file cannot be written; what stood there before is intact.
    """
    from safetensors.numpy import save, save_file

    metadata = {"format": "esdtool.esd", "created_by": analysis.created_by}
    esds = dict(sorted(analysis.esds.items()))
    if path == STDOUT:
        sys.stdout.buffer.write(save(esds, metadata=metadata))
        sys.stdout.flush()
        return
    with atomic_write(path) as temporary:
        save_file(esds, temporary, metadata=metadata)
    wrote(path, quiet=quiet)


def read_esds(path: str) -> dict[str, npt.NDArray[np.float64]]:
    """Read the eigenvalues of each module by its name, as `write_esds` saved them.

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
    """Make a remark for the user, on stderr."""
    if not quiet:
        remark(text)


def wrote(path: str | Path, *, quiet: bool) -> None:
    """Announce a file that was written; a device or a pipe is none."""
    if not is_stream(path):
        note(f"wrote {path}", quiet=quiet)


@contextmanager
def progress_bar(total: float, *, quiet: bool) -> Iterator[Callable[[WeightModule, float], None] | None]:
    """Show a bar on stderr that advances by predicted cost; nothing if stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from rich.text import Text

    class FetchedColumn(ProgressColumn):
        """Show what has come from remote stores; nothing where nothing has."""

        def render(self, task: Task) -> Text:  # noqa: ARG002 - the same for all
            return Text(f"fetched {format_size(FETCHED.bytes)}" if FETCHED.bytes else "")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        Remaining(),
        FetchedColumn(),
    )
    with Progress(*columns, console=new_console(stderr=True), transient=True) as progress:
        task = progress.add_task("spectra", total=total)
        yield lambda module, cost: progress.update(task, advance=cost, description=visible(module.name))
