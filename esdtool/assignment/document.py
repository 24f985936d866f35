"""The weight-decay assignment file, wd.json (format `esdtool.weight_decay`, version 1).

A flat map from canonical parameter name to decay, so that any trainer reads it with nothing but a JSON parser:

    import json

    decays = {name: entry["weight_decay"] for name, entry in json.load(open("wd.json"))["parameters"].items()}

Imports no torch. `esdtool.assignment.assign.assign` makes assignments, `esdtool.optim` applies them.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from esdtool.errors import AssignmentError
from esdtool.support.csv_text import csv_text
from esdtool.support.files import atomic_write_text
from esdtool.support.json_text import escaped
from esdtool.support.words import dimensions

FORMAT: Final = "esdtool.weight_decay"
VERSION: Final = 1

_RULE = re.compile(r"\s*ndim\s*(<=|>=|==|<|>)\s*(\d+)\s*")
_ONE_PER_LINE = ("parameters", "members", "left_out")


class Part(BaseModel):
    """Base of all parts: immutable, strict about types; unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)


class Origin(Part):
    """The checkpoint that the decays were derived from."""

    checkpoint: str = Field(description="Path or Hub id; 'memory' for a live model.")
    revision: str | None = Field(default=None, description="Commit of a Hub checkpoint.")
    model_type: str | None = Field(default=None, description="model_type of config.json, e.g. 'llama'.")


class Method(Part):
    """The settings by which scores became decays."""

    name: str = Field(description="'alphadecay' or 'uniform'.")
    score: str = Field(default="alpha", description="What the decays follow, e.g. 'alpha'.")
    fit: str | None = Field(default=None, description="Estimator of alpha, e.g. 'hill'.")
    assign: str | None = Field(default=None, description="'linear', 'sqrt', 'log2', 'sigmoid' or 'uniform'.")
    min_ratio: float | None = Field(default=None, ge=0, description="Smallest ratio; null unless linear.")
    max_ratio: float | None = Field(default=None, ge=0, description="Largest ratio; null unless linear.")
    granularity: str = Field(default="module", description="'module', 'layer' or 'role'.")
    normalize: bool = Field(default=False, description="Whether the parameter-weighted mean ratio was set to 1.")
    control: str = Field(
        default="none", description="For experiments, what was done with the decays: 'mean', 'shuffled' or 'reversed'."
    )


class DefaultRule(Part):
    """A decay for unlisted parameters of certain dimensions."""

    match: str = Field(description="Condition on the number of dimensions: 'ndim<2', also <=, ==, >=, >.")
    weight_decay: float = Field(ge=0, description="Decay of the unlisted parameters that match.")

    @field_validator("match")
    @classmethod
    def _known(cls, value: str) -> str:
        if not _RULE.fullmatch(value):
            raise ValueError(f"unknown rule {value!r}: a rule looks like 'ndim<2'")
        return value

    def matches(self, ndim: int) -> bool:
        """Return whether a parameter of `ndim` dimensions falls under the rule."""
        found = _RULE.fullmatch(self.match)
        assert found is not None
        operator, bound = found[1], int(found[2])
        outcomes = {"<": ndim < bound, "<=": ndim <= bound, "==": ndim == bound, ">=": ndim >= bound, ">": ndim > bound}
        return outcomes[operator]


class Default(Part):
    """The decay of parameters that are not listed: norms, biases, embeddings, heads."""

    unlisted: Literal["keep", "no-decay", "base"] | None = Field(
        default=None, description="What the writer chose in words; weight_decay says the same as a number."
    )
    weight_decay: float | None = Field(default=None, ge=0, description="Their decay; null: the trainer's own choice.")
    rules: tuple[DefaultRule, ...] = Field(default=(), description="Exceptions; the first that matches holds.")

    @classmethod
    def of(cls, unlisted: Literal["keep", "no-decay", "base"], base: float) -> Self:
        """Return the default of a choice: null for `keep`, 0 for `no-decay`, the base decay for `base`."""
        return cls(unlisted=unlisted, weight_decay={"keep": None, "no-decay": 0.0, "base": base}[unlisted])

    def decay(self, ndim: int) -> float | None:
        """Return the decay of an unlisted parameter of `ndim` dimensions; None leaves it to the trainer."""
        return next((rule.weight_decay for rule in self.rules if rule.matches(ndim)), self.weight_decay)


class Entry(Part):
    """One parameter's decay and where it comes from. Only `weight_decay` is required."""

    weight_decay: float = Field(ge=0, description="The decay to use.")
    ratio: float | None = Field(default=None, ge=0, description="weight_decay over the base decay.")
    alpha: float | None = Field(default=None, description="Tail exponent; null if the module has none.")
    score: float | None = Field(default=None, description="What the decay follows, where it is not alpha.")
    role: str | None = Field(default=None, description="Role in the block, e.g. 'q_proj'.")
    layer: int | None = Field(default=None, description="Index of the block; null outside a numbered stack.")
    shape: tuple[int, ...] | None = Field(default=None, description="Shape of the parameter.")
    note: str | None = Field(default=None, description="A remark, e.g. why the module has the base decay.")


class Members(Part):
    """A module whose decay contributes to the value of a fused parameter."""

    aggregate: str = Field(description="How the members' values became one, e.g. 'parameter-weighted mean'.")
    members: tuple[str, ...] = Field(alias="from", description="Names of the modules that the parameter holds.")

    @classmethod
    def of(cls, aggregate: str, members: tuple[str, ...]) -> Self:
        """Return the same from plain values, without the alias."""
        return cls.model_validate({"aggregate": aggregate, "from": members})


class Assignment(Part):
    """A weight decay for each listed parameter."""

    format: Literal["esdtool.weight_decay"] = FORMAT
    version: Literal[1] = VERSION
    created_by: str | None = Field(default=None, description="Program and version that wrote the file.")
    source: Origin | None = Field(default=None)
    base_weight_decay: float = Field(ge=0, description="What uniform weight decay would be; ratios refer to it.")
    optimizer: Literal["decoupled", "l2"] = Field(
        default="decoupled", description="Kind of decay that the numbers are for: AdamW's, or an L2 penalty as Adam's."
    )
    method: Method | None = Field(default=None)
    default: Default = Field(default=Default())
    parameters: dict[str, Entry] = Field(description="By canonical parameter name, in the model's natural order.")
    members: dict[str, Members] = Field(default_factory=dict, description="Fused parameters of `parameters`.")
    left_out: dict[str, str] = Field(
        default_factory=dict, description="Scored or scorable modules that are not assigned, each with the reason."
    )

    @property
    def decays(self) -> dict[str, float]:
        """The decay of each listed parameter by name."""
        return {name: entry.weight_decay for name, entry in self.parameters.items()}

    def with_base(self, base: float) -> Assignment:
        """Return the same ratios on another base decay.

        Raises:
            AssignmentError: if `base` is negative or not finite, or the file's own base is 0 and an entry has no ratio.
        """
        if not (math.isfinite(base) and base >= 0):
            raise AssignmentError(f"the base weight decay must be finite and not negative, not {base}")
        parameters = {
            name: entry.model_copy(update={"weight_decay": base * self._ratio(name, entry)})
            for name, entry in self.parameters.items()
        }
        return self.model_copy(
            update={"base_weight_decay": base, "parameters": parameters, "default": self._default_on(base)}
        )

    def to_json(self) -> str:
        """Return the file's text, one parameter a line; the same assignment gives the same bytes."""
        document = self.model_dump(mode="json", by_alias=True)
        for entry in document["parameters"].values():
            for key in ("score", "note"):
                if entry[key] is None:
                    del entry[key]
        return document_json(document, one_per_line=_ONE_PER_LINE)

    def save(self, path: str | Path) -> None:
        """Write wd.json, wholly or not at all.

        Raises:
            OutputError: if it cannot be written; what stood there before is intact.
        """
        atomic_write_text(path, self.to_json())

    def to_csv(self) -> str:
        """Return one line a parameter: parameter, weight_decay, ratio, alpha, score, role, layer, shape (2x3), note."""
        rows = [
            {
                "parameter": name,
                **entry.model_dump(),
                "shape": None if entry.shape is None else dimensions(entry.shape),
            }
            for name, entry in self.parameters.items()
        ]
        return csv_text(["parameter", *Entry.model_fields], rows)

    def to_torch_groups(self) -> str:
        """Parameter groups as JSON: a list of {"weight_decay": x, "params": [names]}, equal decays together."""
        groups: dict[float, list[str]] = {}
        for name, entry in self.parameters.items():
            groups.setdefault(entry.weight_decay, []).append(name)
        document = [{"weight_decay": decay, "params": names} for decay, names in groups.items()]
        return escaped(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)) + "\n"

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON Schema of the format, as a dictionary."""
        return cls.model_json_schema(by_alias=True, mode="validation")

    def _ratio(self, name: str, entry: Entry) -> float:
        if entry.ratio is not None:
            return entry.ratio
        if self.base_weight_decay == 0:
            raise AssignmentError(f"{name}: no ratio, and the file's base_weight_decay is 0: it fits no other base")
        return entry.weight_decay / self.base_weight_decay

    def _default_on(self, base: float) -> Default:
        """Return the default scaled to another base; decays of 0 stay 0."""

        def scaled(decay: float) -> float:
            if decay == 0:
                return 0.0
            if self.base_weight_decay == 0:
                raise AssignmentError("default: a decay that is not 0 on a base_weight_decay of 0 fits no other base")
            return base * (decay / self.base_weight_decay)

        default = self.default
        decay = base if default.unlisted == "base" else default.weight_decay and scaled(default.weight_decay)
        rules = tuple(rule.model_copy(update={"weight_decay": scaled(rule.weight_decay)}) for rule in default.rules)
        return default.model_copy(update={"weight_decay": decay, "rules": rules})


def document_json(document: dict[str, Any], *, one_per_line: tuple[str, ...]) -> str:
    """Write a document as JSON with one entry a line.

    Args:
        document: of plain values.
        one_per_line: keys of dictionaries whose entries stand on a line each; empty ones are left out, besides
            `parameters`.
    """
    parts = []
    for key, value in document.items():
        if key in one_per_line and not value:
            if key == "parameters":
                parts.append(' "parameters": {}')
        elif key in one_per_line:
            lines = ",\n".join(f"  {_compact(name)}: {_compact(item)}" for name, item in value.items())
            parts.append(f" {_compact(key)}: {{\n{lines}\n }}")
        else:
            parts.append(f" {_compact(key)}: {_compact(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _compact(value: object) -> str:
    return escaped(json.dumps(value, ensure_ascii=False, allow_nan=False))
