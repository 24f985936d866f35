"""`json`: the assignment file itself, which esdtool and any JSON parser read."""

from __future__ import annotations

from esdtool.assignment.allocation import VALUE_KEYS, Allocation
from esdtool.assignment.writer import WriteOptions, Writer


def _write(allocation: Allocation, options: WriteOptions) -> str:
    del options
    return allocation.to_json()


WRITER = Writer(carries=frozenset(VALUE_KEYS), write=_write, reader="esdtool and any JSON parser")
