"""Turn errors of libraries into errors of esdtool: one line that names the file and the tensor.

A library that meets arbitrary bytes fails in as many ways as it has lines, and reads lazily. So errors are caught
around every call of a reader, opening and reading, and whatever their type.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from esdtool.checkpoint.byte_source import AccessError
from esdtool.checkpoint.limits import shortened
from esdtool.errors import CheckpointError, EsdtoolError
from esdtool.support.words import one_line, visible

_REASON_CHARACTERS = 200
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")


@contextmanager
def one_line_errors(path: object, *, tensor: str | None = None, kind: str | None = None) -> Iterator[None]:
    """Turn what is raised inside into a `CheckpointError`; errors of esdtool pass.

    Args:
        path: the file, for the message.
        tensor: what is read of it; None: it is being opened.
        kind: what the file should be, e.g. `an ONNX file`.

    Raises:
        CheckpointError: for any `Exception`.
    """
    where = f"{visible(str(path))}: " + (f"tensor {tensor!r}: cannot read: " if tensor is not None else "")
    try:
        yield
    except AccessError as error:
        if tensor is None:
            raise
        raise CheckpointError(f"{visible(str(error.path))}: tensor {tensor!r}: cannot read: {error.why}") from error
    except CheckpointError as error:
        # Names of a file's content are in its messages.
        if visible(str(error)) != str(error):
            raise CheckpointError(visible(str(error))) from error
        raise
    except EsdtoolError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            why = "not enough memory; free some, or give --memory and fewer --jobs"
            raise CheckpointError(where + why) from error
        if isinstance(error, RecursionError):
            why = "nested too deeply"
        elif isinstance(error, OSError) and error.strerror:
            # The libraries' own OSErrors have no number, and speak of the file's content.
            raise CheckpointError(f"{where}{'' if tensor else 'cannot read: '}{error.strerror}") from error
        else:
            why = shortened(one_line(error), _REASON_CHARACTERS)
        if tensor is None:
            what = f"not {kind}, or damaged" if kind else "damaged"
            why = f"{what}: {why}; download or copy it again"
        raise CheckpointError(where + why) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of any library says that memory could not be had."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
