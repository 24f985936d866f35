"""Telling that an error means too little memory: only some libraries have an exception for it."""

from __future__ import annotations

import errno
import re

_WORDS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad[_ ]alloc"
    r"|std::bad_array_new_length|failed to map segment|can't start new thread|memory allocation",
    re.IGNORECASE,
)
"""What torch, safetensors, the dynamic linker and LAPACK bindings say."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Tell whether an error, or what it was raised from, means that memory did not suffice.

    >>> is_lack_of_memory(MemoryError()), is_lack_of_memory(ValueError("shape"))
    (True, False)
    """
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if isinstance(at, MemoryError) or (isinstance(at, OSError) and at.errno == errno.ENOMEM):
            return True
        if _WORDS.search(str(at)[:2000]):
            return True
        at = at.__cause__ or at.__context__
    return False
