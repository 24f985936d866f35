"""Define what is noticed about a module's weights while they are in memory, beside its spectrum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from esdtool.analysis.task_vectors import TaskVectors
from esdtool.spectra.cache import SpectrumCache
from esdtool.spectra.elements import ElementStatistics, known_elements
from esdtool.spectra.spectrum import Spectrum


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The facts about a module that its findings rest on, and that the analysis file does not hold."""

    content: str
    """Hash of the matrices: equal weights have an equal one."""
    elements: ElementStatistics | None
    """Statistics of rows and columns; None where they are not those of the weight itself (a low-rank product), and
    where the elements are all zero or not finite."""
    storage_floor: float | None
    """Largest eigenvalue that the rounding of the stored weights alone would give; None without eigenvalues."""
    tasks: TaskVectors | None = None
    """What the parents of a merge changed in the module; None where they are not known."""


def observe(
    read: Callable[[], Sequence[torch.Tensor]],
    spectrum: Spectrum | None,
    *,
    content: str,
    is_product: bool,
    tasks: TaskVectors | None = None,
    cache: SpectrumCache | None = None,
) -> Observation:
    """Look at a module's matrices, unless the cache knows them.

    Args:
        read: gives the matrices, [rows, columns] of one shape, floating point.
        spectrum: their eigenvalues, if they were computed.
        content: `content_hash` of the matrices.
        is_product: whether they stand for a low-rank product that is larger than they are.
        tasks: what the parents of a merge changed in the module.
        cache: where statistics of elements are looked up and kept.
    """
    return Observation(
        content=content,
        elements=None if is_product else known_elements(read, cache=cache, content=content),
        storage_floor=_storage_floor(spectrum),
        tasks=tasks,
    )


def _storage_floor(spectrum: Spectrum | None) -> float | None:
    return None if spectrum is None or spectrum.exponent else spectrum.storage_floor
