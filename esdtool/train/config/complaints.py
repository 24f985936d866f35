"""Explain what is wrong with a configuration, in one line that names the key, its value and its origin."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from esdtool.train.config.layers import Layers, section_choices
from esdtool.train.config.one_of import Choices, keys
from esdtool.train.config.train_config import TrainConfig

_WISH: Final = "Input should be "
"""What pydantic begins with where a value is of the wrong type or out of range."""


def first_complaint(error: ValidationError, layers: Layers, where: str) -> str:
    """Say in one line what is wrong. A misspelt key comes first: it explains the missing one.

    Args:
        error: what pydantic found.
        layers: what was validated.
        where: the files, for what has no place of its own.
    """
    found = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    details = found[0]
    location, choices, choice = _location(details)
    if details["type"] == "value_error":
        # Raised by a section's own check, which names its keys.
        return f"{where}: {details['ctx']['error']}"
    if details["type"] == "union_tag_invalid" and choices is not None:
        location = (*location, choices.selector)
        value = _shown(details["input"][choices.selector])
        text = f"{'.'.join(location)} is {value}, but should be {_either([repr(name) for name in choices.models])}"
    else:
        wishes = [each["msg"].removeprefix(_WISH) for each in found if _location(each)[0] == location]
        text = _complaint(location, details, choices, choice, _either(wishes))
    return f"{layers.origin(location) or where}: {text}"


def _location(details: ErrorDetails) -> tuple[tuple[str, ...], Choices | None, str | None]:
    """Return the keys down to a value, the choices of its section, and the one that was made."""
    raw = tuple(str(part) for part in details["loc"])
    choices = section_choices().get(raw[0]) if raw else None
    # Behind the section's name pydantic has the choice that it made.
    choice = raw[1] if choices is not None and len(raw) > 1 else None
    location = raw if choice is None else (raw[0], *raw[2:])
    # Behind a key that takes values of several types pydantic has the type that it tried.
    return (*location[:2], *(part for part in location[2:] if part.isdecimal())), choices, choice


def _complaint(
    location: tuple[str, ...], details: ErrorDetails, choices: Choices | None, choice: str | None, wish: str
) -> str:
    """Say what is wrong with a value that should be `wish`."""
    name = ".".join(location)
    value = details["input"]
    match details["type"]:
        case "extra_forbidden":
            return _unknown_key(location, choices, choice)
        case "missing":
            if choices is not None and len(location) > 1 and location[-1] not in choices.common:
                return f'{location[0]}.{choices.selector} = "{choice}" needs {name}'
            return f"{name} is needed" if len(location) > 1 else f"the section [{name}] is needed"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{name} must be a section [{name}], not {_shown(value)}"
        case _:
            return f"{name} is {_shown(value)}, but should be {wish}"


def _unknown_key(location: tuple[str, ...], choices: Choices | None, choice: str | None) -> str:
    if len(location) == 1:
        known = keys(TrainConfig)
        close = difflib.get_close_matches(location[0], known, n=1)
        sections = ", ".join(f"[{name}]" for name in known)
        return f"unknown section [{location[0]}]; " + (
            f"did you mean [{close[0]}]?" if close else f"there are {sections}"
        )
    section, key = location[0], location[-1]
    if choices is None or choice is None:
        annotation = TrainConfig.model_fields[section].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        known = keys(annotation)
        close = difflib.get_close_matches(key, known, n=1)
    else:
        if owners := choices.owners_of(key):
            selector = choices.selector
            return (
                f"{section}.{key} belongs to {section}.{selector} = {_either([_quoted(name) for name in owners])}, "
                f'but the {selector} is "{choice}"'
            )
        known = keys(choices.models[choice])
        everywhere = dict.fromkeys([*known, *(key for model in choices.models.values() for key in keys(model))])
        close = difflib.get_close_matches(key, everywhere, n=1)
    hint = f"did you mean {section}.{close[0]}?" if close else f"the keys of [{section}] are {', '.join(known)}"
    return f"unknown key {'.'.join(location)}; {hint}"


def _either(names: Sequence[str]) -> str:
    """Alternatives in words.

    >>> _either(["1", "2", "3"])
    '1, 2 or 3'
    """
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _quoted(text: str) -> str:
    return f'"{text}"'


def _shown(value: Any) -> str:
    """Return a value as TOML spells it, with its type where that is the point."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'the string "{value}"'
    if isinstance(value, dict):
        return "a table"
    return str(value)
