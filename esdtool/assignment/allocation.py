"""The assignment file with several quantities (format `esdtool.weight_decay`, version 2).

A flat map from canonical parameter name to values, of which each is optional:

    import json

    entries = json.load(open("assignment.json"))["parameters"]
    ratios = {name: entry["lr_ratio"] for name, entry in entries.items() if "lr_ratio" in entry}

A reader of version 1 refuses the file by its version. `esdtool assign` writes version 1 wherever only weight decay is
asked for, and `Allocation.decays` is the weight decays as such a document.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from esdtool.assignment.document import (
    FORMAT,
    Assignment,
    Default,
    Entry,
    Members,
    Method,
    Origin,
    Part,
    document_json,
)
from esdtool.errors import AssignmentError
from esdtool.support.files import atomic_write_text

ALLOCATION_VERSION: Final = 2

VALUE_KEYS: Final = ("weight_decay", "lr_ratio", "sparsity", "bits", "rank", "lora_target", "train")
"""The values that a parameter can have, in the order of the file."""


class ValueDetail(Part):
    """The origin of one value of a parameter."""

    ratio: float | None = Field(default=None, description="The value over what a uniform assignment would give.")
    score: float | None = Field(default=None, description="What the value follows, e.g. an alpha.")
    source: str | None = Field(default=None, description="Where the value comes from, in words.")


class ParameterValues(Part):
    """The values of one parameter. Keys of quantities that were not asked for are absent."""

    weight_decay: float | None = Field(default=None, ge=0, description="The decay to use.")
    lr_ratio: float | None = Field(default=None, ge=0, description="Learning rate over that of the schedule.")
    sparsity: float | None = Field(default=None, ge=0, le=1, description="Share of the weights to prune.")
    bits: int | None = Field(default=None, ge=1, description="Bits per weight.")
    rank: int | None = Field(default=None, ge=0, description="Rank of a LoRA adapter.")
    lora_target: bool | None = Field(default=None, description="Whether to adapt it with LoRA.")
    train: bool | None = Field(default=None, description="Whether to train it, or freeze it.")
    alpha: float | None = Field(default=None, description="Tail exponent that the weight decay follows.")
    details: dict[str, ValueDetail] = Field(default_factory=dict, description="By key of the value: its origin.")
    role: str | None = Field(default=None, description="Role in the block, e.g. 'q_proj'.")
    layer: int | None = Field(default=None, description="Index of the block; null outside a numbered stack.")
    shape: tuple[int, ...] | None = Field(default=None, description="Shape of the parameter.")
    note: str | None = Field(default=None, description="A remark, e.g. why the module has the base decay.")


class QuantityRecord(Part):
    """The settings by which the values of one quantity were made."""

    key: str = Field(description="Key of the values in `parameters`.")
    method: str = Field(description="Name of the method.")
    source: str | None = Field(default=None, description="Where the method is published.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Every setting, as `--set` takes it.")


class Allocation(Part):
    """Values of several quantities for each listed parameter."""

    format: Literal["esdtool.weight_decay"] = FORMAT
    version: Literal[2] = ALLOCATION_VERSION
    created_by: str | None = Field(default=None, description="Program and version that wrote the file.")
    source: Origin | None = Field(default=None)
    base_weight_decay: float | None = Field(
        default=None, ge=0, description="What uniform weight decay would be; null without weight decays."
    )
    optimizer: Literal["decoupled", "l2"] = Field(
        default="decoupled", description="Kind of decay that the numbers are for: AdamW's, or an L2 penalty as Adam's."
    )
    method: Method | None = Field(default=None, description="How the weight decays were made.")
    default: Default = Field(default=Default(), description="The weight decay of parameters that have none here.")
    quantities: dict[str, QuantityRecord] = Field(description="What was asked for, by the name that `--for` takes.")
    parameters: dict[str, ParameterValues] = Field(description="By canonical parameter name.")
    members: dict[str, Members] = Field(default_factory=dict, description="Fused parameters of `parameters`.")
    left_out: dict[str, str] = Field(
        default_factory=dict, description="Scored or scorable modules that have no value, each with the reason."
    )

    def values(self, key: str) -> dict[str, Any]:
        """Return the values of one key by parameter, without the parameters that have none."""
        found = {name: getattr(entry, key) for name, entry in self.parameters.items()}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of which there are values."""
        return tuple(key for key in VALUE_KEYS if self.values(key))

    @property
    def decays(self) -> Assignment | None:
        """The weight decays as a document of version 1; None if there are none."""
        decays = self.values("weight_decay")
        if not decays or self.base_weight_decay is None:
            return None
        return Assignment(
            created_by=self.created_by,
            source=self.source,
            base_weight_decay=self.base_weight_decay,
            optimizer=self.optimizer,
            method=self.method,
            default=self.default,
            parameters={name: self._entry(name) for name in decays},
            members={name: members for name, members in self.members.items() if name in decays},
            left_out=self.left_out,
        )

    @property
    def rates(self) -> Assignment | None:
        """The ratios of learning rates as if they were weight decays on a base of 1; None if there are none."""
        ratios = self.values("lr_ratio")
        if not ratios:
            return None
        entries = {name: (ratio, self.parameters[name]) for name, ratio in ratios.items()}
        return Assignment(
            base_weight_decay=1.0,
            parameters={
                name: Entry(weight_decay=ratio, ratio=ratio, role=entry.role, layer=entry.layer, shape=entry.shape)
                for name, (ratio, entry) in entries.items()
            },
            members={name: members for name, members in self.members.items() if name in ratios},
        )

    def with_base(self, base: float) -> Allocation:
        """Return the same ratios of weight decay on another base decay; everything else stays.

        Raises:
            AssignmentError: if there are no weight decays, or as for `Assignment.with_base`.
        """
        decays = self.decays
        if decays is None:
            raise AssignmentError("the file holds no weight decays: there is no base to change")
        other = decays.with_base(base)
        parameters = {
            name: entry.model_copy(update={"weight_decay": other.parameters[name].weight_decay})
            if name in other.parameters
            else entry
            for name, entry in self.parameters.items()
        }
        return self.model_copy(update={"base_weight_decay": base, "default": other.default, "parameters": parameters})

    def to_json(self) -> str:
        """Return the file's text, one parameter a line; the same allocation gives the same bytes."""
        document = self.model_dump(mode="json", by_alias=True)
        absent = (*VALUE_KEYS, "alpha", "note")
        for entry in document["parameters"].values():
            for key in absent:
                if entry[key] is None:
                    del entry[key]
        return document_json(document, one_per_line=("quantities", "parameters", "members", "left_out"))

    def save(self, path: str | Path) -> None:
        """Write the file, completely or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        atomic_write_text(path, self.to_json())

    def _entry(self, name: str) -> Entry:
        values = self.parameters[name]
        detail = values.details.get("weight_decay", ValueDetail())
        assert values.weight_decay is not None
        return Entry(
            weight_decay=values.weight_decay,
            ratio=detail.ratio,
            alpha=values.alpha,
            score=detail.score,
            role=values.role,
            layer=values.layer,
            shape=values.shape,
            note=values.note,
        )
