"""Tensor names to weight modules: role, layer, and what is left out with its reason."""

from __future__ import annotations

from esdtool.modules.base import Selection, WeightModule
from esdtool.modules.identification import IdentifiedBy
from esdtool.modules.selection import select_modules
from esdtool.modules.skipped import SkipKind, SkippedTensor
from esdtool.names import canonical_name

__all__ = ["IdentifiedBy", "Selection", "SkipKind", "SkippedTensor", "WeightModule", "canonical_name", "select_modules"]
