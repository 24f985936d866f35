"""Read assignment files of both versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from esdtool.assignment.allocation import ALLOCATION_VERSION, Allocation
from esdtool.assignment.document import FORMAT, VERSION, Assignment
from esdtool.errors import AssignmentError
from esdtool.support.json_text import JsonTextError, parse_json
from esdtool.support.words import listed

_KINDS: Final[dict[int, type[Assignment] | type[Allocation]]] = {VERSION: Assignment, ALLOCATION_VERSION: Allocation}


def load_assignment(path: str | Path) -> Assignment:
    """Read the weight decays of an assignment file, wd.json.

    Args:
        path: a file of version 1, or one of version 2 that holds weight decays; its other quantities are not read.

    Raises:
        AssignmentError: if the file is missing, no JSON, of another format or version, names a parameter twice, holds
            no weight decays, or holds a value that is negative, not finite or of the wrong type; the message names the
            entry.
    """
    return parse_assignment(_text(path), where=str(path))


def parse_assignment(text: str, *, where: str = "assignment") -> Assignment:
    """Read the weight decays from the text of an assignment file.

    Args:
        text: what the file holds.
        where: what opens the messages of errors, such as the file's path.

    Raises:
        AssignmentError: as for `load_assignment`.
    """
    document = _parsed(text, where=where)
    if isinstance(document, Assignment):
        return document
    decays = document.decays
    if decays is None:
        raise AssignmentError(
            f"{where}: holds no weight decays, only {listed(document.quantities, most=9)}; "
            "make it with --for weight-decay"
        )
    return decays


def load_allocation(path: str | Path) -> Assignment | Allocation:
    """Read everything that an assignment file of either version holds.

    Raises:
        AssignmentError: as for `load_assignment`, but a file without weight decays is fine.
    """
    return _parsed(_text(path), where=str(path))


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Put the path of a file before what is wrong with its values on a model; anything but a path is not named.

    Raises:
        AssignmentError: the error of the block, with the path.
    """
    try:
        yield
    except AssignmentError as error:
        if not isinstance(source, str | PathLike) or str(error).startswith(str(source)):
            raise
        raise AssignmentError(f"{source}: {error}") from error


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise AssignmentError(f"{path}: cannot read the assignment: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AssignmentError(f"{path}: cannot read the assignment: not UTF-8 text") from error


def _parsed(text: str, *, where: str) -> Assignment | Allocation:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise AssignmentError(f"{where}: {key!r} appears twice")
            found[key] = value
        return found

    try:
        document = parse_json(text, object_pairs_hook=pairs)
    except JsonTextError as error:
        raise AssignmentError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise AssignmentError(f'{where}: not a weight-decay assignment (no "format": "{FORMAT}")')
    version = document.get("version")
    kind = None if isinstance(version, bool) or not isinstance(version, int) else _KINDS.get(version)
    if kind is None:
        raise AssignmentError(
            f"{where}: version {version!r} is not supported: this esdtool reads version {VERSION} and "
            f"{ALLOCATION_VERSION}"
        )
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise AssignmentError(f"{where}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    """Return the first of pydantic's findings with the path to the entry."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    where = f"{path[1]}: {'.'.join(path[2:])}" if path[:1] == ["parameters"] and len(path) > 1 else ".".join(path)
    message = first["msg"].removeprefix("Value error, ")
    return f"{where.removesuffix(': ') or 'document'}: {message[:1].lower()}{message[1:]}"
