"""Several layers of a configuration put together: files, then the command line, then what a sweep adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from esdtool.support.words import listed
from esdtool.train.config.one_of import Choices, OneOf
from esdtool.train.config.train_config import TrainConfig

# Keys of which a later layer replaces all: choosing another model drops the earlier choice.
_ALTERNATIVES: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "model": (("preset", "config", "from"),),
    "tokenizer": (("name", "file", "train_vocab_size"),),
    "data": (("validation_fraction", "validation_files", "validation_split"),),
}


@cache
def section_choices() -> dict[str, Choices]:
    """Return the sections whose keys depend on a choice."""
    found = {}
    for name, info in TrainConfig.model_fields.items():
        mark = next((each for each in info.metadata if isinstance(each, OneOf)), None)
        if mark is not None:
            found[name] = mark.choices(info.annotation)
    return found


@dataclass(kw_only=True)
class Layers:
    """The merged keys of all layers, with the origin of each key."""

    document: dict[str, Any] = field(default_factory=dict)
    origins: dict[tuple[str, ...], str] = field(default_factory=dict)
    """The layer that gave each (section, key) and each (section,) last."""
    notes: list[str] = field(default_factory=list)
    """What was dropped because a later layer chose otherwise, one line for each section."""

    def add(self, parts: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Put one layer over the earlier ones.

        Args:
            parts: (where it came from, sections) of each part of the layer, e.g. of every `--set`.
        """
        earlier = {section: set(values) for section, values in self.document.items() if isinstance(values, dict)}
        for origin, sections in parts:
            for section, values in sections.items():
                self._put(section, values, origin)
        for section, choices in section_choices().items():
            selected = [(origin, part[section]) for origin, part in parts if isinstance(part.get(section), Mapping)]
            by = next((origin for origin, values in reversed(selected) if choices.selector in values), None)
            if by is not None:
                given = {key for _, values in selected for key in values}
                self._drop(section, choices, among=earlier.get(section, set()) - given, by=by)

    def drop_foreign(self) -> None:
        """Drop every key that belongs to another choice than its section's, without a note."""
        for section, choices in section_choices().items():
            if isinstance(values := self.document.get(section), dict):
                for key in choices.foreign(values):
                    del values[key]

    def origin(self, location: tuple[str, ...]) -> str | None:
        """Return the origin of a key, or else of its section."""
        return self.origins.get(location[:2]) or self.origins.get(location[:1])

    def _put(self, section: str, values: Any, origin: str) -> None:
        self.origins[(section,)] = origin
        if not isinstance(values, Mapping) or not isinstance(self.document.get(section, {}), dict):
            self.document[section] = values
            return
        table = self.document.setdefault(section, {})
        for group in _ALTERNATIVES.get(section, ()):
            if any(key in values for key in group):
                for key in group:
                    table.pop(key, None)
        for key, value in values.items():
            table[key] = value
            self.origins[section, key] = origin

    def _drop(self, section: str, choices: Choices, *, among: set[str], by: str) -> None:
        table = self.document[section]
        dropped = [key for key in choices.foreign(table) if key in among]
        for key in dropped:
            del table[key]
        if dropped:
            names = listed(f"{section}.{key}" for key in dropped)
            sources = " and ".join(dict.fromkeys(self.origins[section, key] for key in dropped))
            self.notes.append(
                f"{sources}: {names} left out: not of {section}.{choices.selector} = "
                f'"{table[choices.selector]}", which {by} chooses'
            )
