"""The user's choice of what is scored, as one object that travels from the command line to the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from esdtool.modules.splitting import SplitRequest, as_requests


@dataclass(frozen=True, kw_only=True)
class ModuleChoice:
    """The modules of a checkpoint that are scored, and the cuts of fused tensors; see `select_modules`."""

    include: tuple[str, ...] = ()
    """Regular expressions on names of parameters and modules; with any, exactly the matching modules are scored."""
    exclude: tuple[str, ...] = ()
    """Regular expressions on the same names: what is not scored. They prevail over `include`."""
    split_fused: bool = True
    """False keeps fused projections in one module."""
    split: tuple[SplitRequest, ...] = ()
    """How tensors are split that no known family tells."""
    sample_layers: int | None = None
    """Number of layers, evenly by depth, whose modules are scored; None: all layers."""

    @classmethod
    def of(
        cls,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        split_fused: bool = True,
        split: Sequence[str | SplitRequest] = (),
        sample_layers: int | None = None,
    ) -> Self:
        """Make a choice from what a user gives.

        Raises:
            UsageError: if a split is not of the form REGEX=LAYOUT.
        """
        return cls(
            include=tuple(include),
            exclude=tuple(exclude),
            split_fused=split_fused,
            split=as_requests(split),
            sample_layers=sample_layers,
        )

    @property
    def of_all(self) -> Self:
        """The same choice without `include`, `exclude` and `sample_layers`, for the base of a difference."""
        return replace(self, include=(), exclude=(), sample_layers=None)
