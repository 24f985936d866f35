"""JSON that anyone may have written, and JSON that anyone may read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from esdtool.support.words import visible

if TYPE_CHECKING:
    from pydantic import BaseModel


class JsonTextError(ValueError):
    """A text that is no JSON, or JSON beyond what Python reads; the message is one line."""


def parse_json(text: str | bytes, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read a JSON text: UTF-8, -16 or -32 if it is bytes.

    >>> parse_json('{"a": [1]}')
    {'a': [1]}
    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    esdtool.support.json_text.JsonTextError: nested too deeply

    Args:
        text: the document.
        object_pairs_hook: what makes an object of its pairs, as of `json.loads`.

    Raises:
        JsonTextError: if it is no JSON, is nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except json.JSONDecodeError as error:
        raise JsonTextError(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise JsonTextError(f"not UTF-8 text at byte {error.start}") from error
    except RecursionError as error:
        raise JsonTextError("nested too deeply") from error
    except ValueError as error:  # Python converts no numbers of more than 4300 digits
        raise JsonTextError("a number has too many digits") from error


def model_json(model: BaseModel, *, indent: int = 1) -> str:
    """Write a pydantic model as indented JSON with a final newline; the same model gives the same text.

    Characters that could steer a terminal or that UTF-8 has no bytes for are written as escapes, which every reader
    of JSON undoes.
    """
    try:
        text = model.model_dump_json(indent=indent)
    except ValueError:  # pydantic writes no lone surrogates, which names in bytes that are no UTF-8 become
        text = json.dumps(model.model_dump(mode="json"), indent=indent, ensure_ascii=False, allow_nan=False)
    return escaped(text) + "\n"


def escaped(text: str) -> str:
    r"""Write every invisible character of a JSON text as an escape; the document stays the same.

    >>> escaped('["\x9b2J", "\u202e", "\U000e0001"]')
    '["\\u009b2J", "\\u202e", "\\udb40\\udc01"]'
    """
    if text.isascii() and "\x7f" not in text:
        return text
    return _UNUSUAL.sub(lambda found: found[0] if visible(found[0]) == found[0] else _escape(found[0]), text)


_UNUSUAL = re.compile(r"[^\x00-\x7e]")
"""What may be invisible: control characters below a space stand between the values, or are escapes already."""


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[place : place + 2].hex()}" for place in range(0, len(units), 2))
