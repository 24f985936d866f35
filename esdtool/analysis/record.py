"""Define the base of all parts of the analysis file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of all parts: immutable, unknown keys of newer minor writers are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
