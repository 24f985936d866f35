"""The fastest of several ways to the same numbers, found by a trial and kept for this machine.

A decision is kept in the user's cache directory. All processes that share this directory use the same one, since the
last digits of eigenvalues depend on the solver.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from esdtool.support.files import cache_directory, publish_once

Name = TypeVar("Name", bound=str)

_ADVANTAGE = 0.95
"""Share of the first candidate's time that another may take at most to be preferred."""


@dataclass(frozen=True, kw_only=True)
class Question(Generic[Name]):
    """A choice to be made once for a machine, and how its answer is found again."""

    folder: str
    """Where decisions of this kind are kept, in the cache directory."""
    file: str
    """Name that tells the question from others of its kind, with the machine in it."""
    candidates: Sequence[Name]
    """The ways to choose from; the first is taken unless another is clearly faster."""
    described: Mapping[str, Any]
    """What is written beside the decision, for those who read it."""


_decided: dict[tuple[str, str, str], str] = {}
_deciding = threading.Lock()


def decide(question: Question[Name], trial: Callable[[], Mapping[Name, float]]) -> Name:
    """Recall the answer to a question; the first thread that asks makes the trial while the others wait.

    Args:
        question: what is decided.
        trial: times each candidate, in seconds; infinity for one that fails.

    Returns:
        One of the candidates.
    """
    directory = cache_directory()
    key = (str(directory), question.folder, question.file)
    if key not in _decided:
        with _deciding:
            if key not in _decided:
                _decided[key] = _decision(question, trial, directory)
    return next(name for name in question.candidates if name == _decided[key])


def _decision(question: Question[Name], trial: Callable[[], Mapping[Name, float]], directory: Path) -> Name:
    """Read the decision, or make it by a trial and keep it for this machine."""
    path = directory / question.folder / f"{question.file}.json"
    known = _read(path, question)
    if known is not None:
        return known
    seconds, first = trial(), question.candidates[0]
    fastest = min(question.candidates, key=lambda name: seconds[name])
    chosen = fastest if seconds[fastest] < _ADVANTAGE * seconds[first] else first
    document = {"solver": chosen, "seconds": dict(seconds), **question.described}
    # Without a place to keep it, the decision holds for this process.
    with suppress(OSError):
        publish_once(path, json.dumps(document, indent=1) + "\n")
    # Another process may have been faster: then its decision holds for all.
    return _read(path, question) or chosen


def _read(path: Path, question: Question[Name]) -> Name | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["solver"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return next((name for name in question.candidates if name == found), None)
