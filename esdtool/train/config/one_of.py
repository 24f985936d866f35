"""Sections whose keys depend on a choice: one model for each choice, told apart by one key.

Which key belongs to which choice is said nowhere but in the models: messages, layers of files, grids of sweeps and the
reference ask them by `keys_of` and `owners_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from esdtool.train.config.section import Section


@dataclass(frozen=True)
class OneOf:
    """The mark of such a section: `Annotated[First | Second, OneOf("name", default="first")]`.

    >>> from typing import Annotated, Literal
    >>> from pydantic import create_model
    >>> First = create_model("First", __base__=Section, name=(Literal["first"], "first"))
    >>> Second = create_model("Second", __base__=Section, name=(Literal["second"], ...), speed=(int, 1))
    >>> choices_of(Annotated[First | Second, OneOf("name", default="first")]).owners_of("speed")
    ('second',)
    """

    selector: str
    """The key that tells the choices apart."""
    default: str
    """The choice where that key is not given."""
    models: Callable[[], Mapping[str, type[Section]]] | None = None
    """The models by choice, where the annotation does not list them."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Build a union for pydantic that checks the selector first, so that errors concern only the chosen model."""
        models = self.choices(source).models
        return core_schema.tagged_union_schema(
            {name: handler.generate_schema(model) for name, model in models.items()}, discriminator=self._chosen
        )

    def choices(self, annotation: Any) -> Choices:
        """Return the choices of a section annotated with this mark; `annotation` is the union."""
        if self.models is not None:
            return Choices(selector=self.selector, default=self.default, models=self.models())
        models = {get_args(model.model_fields[self.selector].annotation)[0]: model for model in get_args(annotation)}
        return Choices(selector=self.selector, default=self.default, models=models)

    def _chosen(self, value: Any) -> str:
        if isinstance(value, Mapping):
            return str(value.get(self.selector, self.default))
        return str(getattr(value, self.selector, self.default))


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The models of a section, by the value of its selector."""

    selector: str
    default: str
    models: Mapping[str, type[Section]]

    @cached_property
    def common(self) -> frozenset[str]:
        """Keys that every choice has."""
        return frozenset.intersection(*map(self.keys_of, self.models))

    def keys_of(self, choice: str) -> frozenset[str]:
        """Keys that a choice has."""
        return frozenset(keys(self.models[choice]))

    def owners_of(self, key: str) -> tuple[str, ...]:
        """Return the choices that have a key, in order; none for a key that there is not."""
        return tuple(choice for choice in self.models if key in self.keys_of(choice))

    def chosen(self, values: Mapping[str, Any]) -> str | None:
        """Return the choice that a section's values make, or None if there is no such choice."""
        found = values.get(self.selector, self.default)
        return found if isinstance(found, str) and found in self.models else None

    def foreign(self, values: Mapping[str, Any]) -> list[str]:
        """Return the keys among a section's values that belong to other choices only."""
        choice = self.chosen(values)
        if choice is None:
            return []
        return [key for key in values if key not in self.keys_of(choice) and self.owners_of(key)]


def choices_of(annotation: Any) -> Choices:
    """Return the choices of an annotation such as `DataSettings`."""
    union, mark = get_args(annotation)
    assert isinstance(mark, OneOf)
    return mark.choices(union)


def keys(model: type[BaseModel]) -> list[str]:
    """Return the keys of a section as TOML spells them."""
    return [field.alias or name for name, field in model.model_fields.items()]
