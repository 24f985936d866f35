"""The ways in which a module is identified, from the surest to the least sure."""

from __future__ import annotations

from enum import StrEnum


class IdentifiedBy(StrEnum):
    """The evidence that a tensor is a certain matrix of the model."""

    FAMILY = "family"
    """A table of names whose family is established: by config.json, or by names that only this family has. What the
    user says of a tensor (`split`) counts as well."""
    MODEL = "model"
    """The model's own code: the parameter belongs to a linear layer or a convolution of it."""
    SHAPE = "shape"
    """Nothing but a name and a shape: another model may use the name for something else."""


PERHAPS_SEVERAL = "perhaps several projections in one; not split"
"""The note of a module that is scored whole, and whose shape is that of several projections side by side."""
