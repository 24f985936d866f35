"""Define a form in which others read an assignment: the form of every file in `esdtool.assignment.formats`."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from esdtool.assignment import formats
from esdtool.assignment.allocation import Allocation, ParameterValues, QuantityRecord, ValueDetail
from esdtool.assignment.document import Assignment
from esdtool.errors import UsageError
from esdtool.support.words import visible

Key = TypeVar("Key", bound=Hashable)

_WORDS = {
    "weight_decay": "weight decays",
    "lr_ratio": "learning rates",
    "sparsity": "sparsities",
    "bits": "bits",
    "rank": "ranks",
    "lora_target": "LoRA targets",
    "train": "what to train",
}


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """Everything that a writer must know besides the values."""

    command: str = "esdtool assign"
    """The command that made the file, for its comment line."""
    learning_rate: float | None = None
    """The learning rate of the schedule, for readers of absolute rates."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A form in which others read an assignment."""

    carries: frozenset[str]
    """The keys of `VALUE_KEYS` that its reader understands."""
    write: Callable[[Allocation, WriteOptions], str]
    """Return the text of the file."""
    reader: str
    """Who reads it, in a few words."""
    why_not: str = ""
    """Why its reader knows nothing else, for the message."""
    absolute: bool = False
    """Whether it holds learning rates themselves, not multiples of the schedule's."""


@functools.cache
def load_writer(name: str) -> Writer:
    """Import a writer by its name, one of `FORMAT_NAMES`."""
    writer: Writer = importlib.import_module(f"{formats.__name__}.{name.replace('-', '_')}").WRITER
    return writer


def write_as(name: str, document: Assignment | Allocation, options: WriteOptions) -> str:
    """Return an assignment in the form that a tool reads.

    Args:
        name: the form, one of `FORMAT_NAMES`.
        document: what to write; weight decays alone are fine.
        options: what the writer must know besides.

    Raises:
        UsageError: for an unknown form, or if its reader does not understand one of the quantities; the message names
            both.
    """
    allocation = allocation_of(document) if isinstance(document, Assignment) else document
    check_format(name, allocation.keys, options)
    return load_writer(name).write(allocation, options)


def check_format(name: str, keys: Sequence[str], options: WriteOptions) -> None:
    """Refuse what a form cannot hold; before the spectra are computed, which may take hours.

    Args:
        name: the form.
        keys: the values to write, of `VALUE_KEYS`.
        options: what the writer will be told.

    Raises:
        UsageError: as for `write_as`, and for a learning rate that is missing or not above 0.
    """
    if name not in formats.FORMAT_NAMES:
        raise UsageError(f"unknown format {name!r}; choose from {', '.join(formats.FORMAT_NAMES)}")
    writer = load_writer(name)
    strangers = [key for key in keys if key not in writer.carries]
    if strangers:
        able = [other for other in formats.FORMAT_NAMES if set(keys) <= load_writer(other).carries]
        why = f": {writer.why_not}" if writer.why_not else ""
        raise UsageError(f"the format {name} cannot carry {_WORDS[strangers[0]]}{why}; choose from {', '.join(able)}")
    if options.learning_rate is not None and options.learning_rate <= 0:
        raise UsageError(f"the learning rate of the schedule must be above 0, not {options.learning_rate:g}")
    if writer.absolute and "lr_ratio" in keys:
        needed_learning_rate(options, name)


def allocation_of(assignment: Assignment) -> Allocation:
    """Return weight decays as a document of version 2."""
    return Allocation(
        created_by=assignment.created_by,
        source=assignment.source,
        base_weight_decay=assignment.base_weight_decay,
        optimizer=assignment.optimizer,
        method=assignment.method,
        default=assignment.default,
        quantities={"weight-decay": QuantityRecord(key="weight_decay", method="AlphaDecay")},
        parameters={
            name: ParameterValues(
                weight_decay=entry.weight_decay,
                alpha=entry.alpha,
                details={"weight_decay": ValueDetail(ratio=entry.ratio, score=entry.score)},
                role=entry.role,
                layer=entry.layer,
                shape=entry.shape,
                note=entry.note,
            )
            for name, entry in assignment.parameters.items()
        },
        members=assignment.members,
        left_out=assignment.left_out,
    )


def comment(options: WriteOptions, mark: str = "#") -> str:
    """Return the line that tells which command made the file."""
    return f"{mark} {visible(options.command)}\n"


def collapsed(values: Mapping[str, Key]) -> dict[Key, list[str]]:
    """List the names of each distinct value, in the order of first appearance.

    >>> collapsed({"a": 1, "b": 2, "c": 1})
    {1: ['a', 'c'], 2: ['b']}
    """
    found: dict[Key, list[str]] = defaultdict(list)
    for name, value in values.items():
        found[value].append(name)
    return dict(found)


def anchored(names: Iterable[str]) -> str:
    """Return a regular expression that matches exactly these names, however it is searched.

    >>> anchored(["a.b"]), anchored(["a.0", "b"])
    ('^a\\\\.b$', '^(?:a\\\\.0|b)$')
    """
    escaped = [re.sub(r"([^A-Za-z0-9_/-])", r"\\\1", name) for name in names]
    return f"^{escaped[0]}$" if len(escaped) == 1 else f"^(?:{'|'.join(escaped)})$"


def unfrozen(name: str) -> str:
    """Return a pattern of exactly this name for `unfrozen_parameters`: its readers escape dots, and only those.

    >>> unfrozen("a.b(c)")
    '^a.b\\\\(c\\\\)$'
    """
    return "^" + re.sub(r"([^A-Za-z0-9_/.-])", r"\\\1", name) + "$"


def quoted(text: str) -> str:
    """Return text as a scalar that YAML, JSON and Python read alike."""
    return json.dumps(text)


def number(value: float) -> str:
    """Return a number that every YAML reader takes for one: version 1.1 asks for a point before an exponent.

    >>> number(1e-07), number(0.5)
    ('1.0e-07', '0.5')
    """
    digits, exponent, power = repr(float(value)).partition("e")
    return f"{digits}.0e{power}" if exponent and "." not in digits else repr(float(value))


def multipliers(allocation: Allocation) -> dict[str, tuple[float | None, float | None]]:
    """Return (learning rate over the schedule's, weight decay over the base) by parameter; None: the reader's own.

    A parameter with a learning rate alone, such as the embedding, has the weight decay of `unlisted_multiplier`.

    Raises:
        UsageError: if a weight decay has no ratio.
    """
    found = {}
    unlisted = unlisted_multiplier(allocation)
    for name, entry in allocation.parameters.items():
        ratio = unlisted if entry.lr_ratio is not None else None
        if entry.weight_decay is not None:
            detail = entry.details.get("weight_decay", ValueDetail())
            ratio = detail.ratio
            if ratio is None and not allocation.base_weight_decay:
                raise UsageError(f"{name}: no ratio, and the base weight decay is 0: it is no multiple of it")
            if ratio is None:
                assert allocation.base_weight_decay is not None
                ratio = entry.weight_decay / allocation.base_weight_decay
        if entry.lr_ratio is not None or ratio is not None:
            found[name] = (entry.lr_ratio, ratio)
    return found


def unlisted_multiplier(allocation: Allocation) -> float | None:
    """Return the weight decay of parameters that have none in the file, over the base; None leaves it to the reader."""
    decay, base = allocation.default.weight_decay, allocation.base_weight_decay
    if decay is None or not base:
        return decay
    return decay / base


def needed_learning_rate(options: WriteOptions, reader: str) -> float:
    """Return the learning rate, which a reader of absolute rates needs.

    Raises:
        UsageError: without it.
    """
    if options.learning_rate is None:
        raise UsageError(f"{reader} reads absolute learning rates: give that of the schedule with --learning-rate")
    return options.learning_rate
