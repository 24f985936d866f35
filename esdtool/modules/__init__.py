"""Tensor names to weight modules: role, layer, and what is left out with its reason."""

from __future__ import annotations

from esdtool.modules.base import Selection, SkippedTensor, WeightModule
from esdtool.modules.selection import select_modules
from esdtool.names import canonical_name

__all__ = ["Selection", "SkippedTensor", "WeightModule", "canonical_name", "select_modules"]
