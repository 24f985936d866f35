"""Gram matrices and symmetric eigenvalues through the OpenBLAS that numpy or scipy has brought along.

numpy's and scipy's wheels carry an OpenBLAS with all of LAPACK, of which they expose a part only: the reduction to
tridiagonal form in two stages, first to a band, then by chasing bulges, has no wrapper. Its first stage is matrix
products, so that it wins on large matrices. The routines are called through ctypes, which releases the GIL, after a
self-test.

Symmetric matrices here are C-contiguous in their rows, the rows may lie further apart than they are long, and only the
upper triangle is read and written. Calling LAPACK without the detour by a full matrix saves the copy of one triangle
to the other that numpy's product makes (a fifth to a half of its time).

The two-stage algorithm is that of Haidar, Ltaief and Dongarra (SC 2011), as LAPACK 3.7 and later have it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

Matrix = npt.NDArray[Any]

_LETTER = {np.dtype(np.float32): "s", np.dtype(np.float64): "d"}
_TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-13}
"""Largest error of the self-test, as a share of the largest eigenvalue."""

_SPELLINGS = (
    ("scipy_", "_64_", ctypes.c_int64),
    ("scipy_", "_", ctypes.c_int),
    ("", "_64_", ctypes.c_int64),
    ("", "_", ctypes.c_int),
)
"""Prefix and suffix of a routine's symbol, and the integers it takes: the wheels' builds first, then a system's own."""

_CACHE_LINE = 64
"""Bytes."""

_QUERY = -1
"""A workspace size that asks for the right one."""


class OpenBlas:
    """The routines of one OpenBLAS library.

    Args:
        library: the loaded library.

    Raises:
        AttributeError: if it lacks one of the routines.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        spelling = next(
            (spelling for spelling in _SPELLINGS if hasattr(library, f"{spelling[0]}dsytrd_sy2sb{spelling[1]}")),
            _SPELLINGS[-1],
        )
        self._prefix, self._suffix = spelling[:2]
        self._integer: Any = spelling[2]
        for name in ("syrk", "sytrd", "sytrd_sy2sb", "sytrd_sb2st", "sterf"):
            for letter in _LETTER.values():
                self._routine(letter + name)

    def add_gram(self, block: Matrix, gram: Matrix, *, first: bool) -> None:
        """Add `block @ block.T` to the upper triangle of a symmetric matrix (`?syrk`).

        Args:
            block: [n, k] float32 or float64, in any layout; one with a unit stride is not copied.
            gram: [n, n] of the same dtype, with rows of a unit stride; its upper triangle is overwritten.
            first: whether the product replaces what is there.
        """
        itemsize = block.itemsize
        if block.strides[1] == itemsize and block.strides[0] >= block.shape[1] * itemsize:
            stored, between = b"T", block.strides[0]  # column by column, this is the transpose
        elif block.strides[0] == itemsize and block.strides[1] >= block.shape[0] * itemsize:
            stored, between = b"N", block.strides[1]
        else:
            block = np.ascontiguousarray(block)
            stored, between = b"T", block.strides[0]
        one, factor = np.ones(1, block.dtype), np.full(1, 0.0 if first else 1.0, block.dtype)
        leading = max(between // itemsize, 1)
        call = [b"L", stored, *block.shape, one, block, leading, factor, gram, leading_dimension(gram)]
        self._call(_LETTER[block.dtype] + "syrk", *call, status=False)

    def one_stage(self, matrix: Matrix) -> Matrix:
        """Compute all eigenvalues by the direct reduction to tridiagonal form (`?sytrd`, `?sterf`).

        Args:
            matrix: [n, n] float32 or float64, symmetric, with rows of a unit stride; its upper triangle is overwritten.

        Returns:
            [n], ascending, of the same dtype.

        Raises:
            numpy.linalg.LinAlgError: if the iteration on the tridiagonal form does not converge.
        """
        order, letter = matrix.shape[0], _LETTER[matrix.dtype]
        diagonal, beside, reflectors = (np.empty(order, matrix.dtype) for _ in range(3))
        call = [b"L", order, matrix, leading_dimension(matrix), diagonal, beside, reflectors]
        work = np.empty(1, matrix.dtype)
        self._call(letter + "sytrd", *call, work, _QUERY)
        work = np.empty(max(int(work[0]), 1), matrix.dtype)
        self._call(letter + "sytrd", *call, work, work.size)
        return self._tridiagonal(diagonal, beside)

    def two_stage(self, matrix: Matrix, *, band: int) -> Matrix:
        """Compute all eigenvalues by way of a band matrix (`?sytrd_sy2sb`, `?sytrd_sb2st`, `?sterf`).

        Args:
            matrix: [n, n] float32 or float64, symmetric, with rows of a unit stride; its upper triangle is overwritten.
            band: off-diagonals of the band, below n.

        Returns:
            [n], ascending, of the same dtype.

        Raises:
            numpy.linalg.LinAlgError: if the iteration on the tridiagonal form does not converge.
        """
        order, letter, dtype = matrix.shape[0], _LETTER[matrix.dtype], matrix.dtype
        banded = np.zeros((order, band + 1), dtype)  # LAPACK's band storage, column by column
        reflectors = np.empty(max(order - band, 1), dtype)
        call = [b"L", order, band, matrix, leading_dimension(matrix), banded, band + 1, reflectors]
        work = np.empty(1, dtype)
        self._call(letter + "sytrd_sy2sb", *call, work, _QUERY)
        work = np.empty(max(int(work[0]), 1), dtype)
        self._call(letter + "sytrd_sy2sb", *call, work, work.size)
        return self.of_band(banded)

    def of_band(self, banded: Matrix) -> Matrix:
        """Compute all eigenvalues of a symmetric band matrix, by chasing bulges (`?sytrd_sb2st`, `?sterf`).

        Args:
            banded: [n, band + 1] float32 or float64, C-contiguous, `banded[j, i]` the element in row j + i and column
                j (LAPACK's storage of a lower band, column by column); it is overwritten.

        Returns:
            [n], ascending, of the same dtype.

        Raises:
            numpy.linalg.LinAlgError: if the iteration on the tridiagonal form does not converge.
        """
        (order, width), letter, dtype = banded.shape, _LETTER[banded.dtype], banded.dtype
        band = width - 1
        diagonal, beside = np.empty(order, dtype), np.empty(order, dtype)
        call = [b"Y", b"N", b"L", order, band, banded, band + 1, diagonal, beside]
        chased, work = np.empty(1, dtype), np.empty(1, dtype)
        self._call(letter + "sytrd_sb2st", *call, chased, _QUERY, work, _QUERY)
        chased, work = (np.empty(max(int(size[0]), 1), dtype) for size in (chased, work))
        self._call(letter + "sytrd_sb2st", *call, chased, chased.size, work, work.size)
        return self._tridiagonal(diagonal, beside)

    def passes_self_test(self) -> bool:
        """Tell whether every routine finds the eigenvalues of a small matrix, in float32 and in float64."""
        for dtype, tolerance in _TOLERANCE.items():
            sample = np.cos(np.arange(48.0 * 48)).reshape(48, 48).astype(dtype)
            gram = symmetric_buffer(48, sample.dtype)
            self.add_gram(sample[:, :20], gram, first=True)
            self.add_gram(sample[:, 20:], gram, first=False)
            if not np.allclose(np.triu(gram), np.triu(sample @ sample.T), rtol=0, atol=1e3 * tolerance):
                return False
            gram = sample @ sample.T
            expected = np.linalg.eigvalsh(gram.astype(np.float64))
            try:
                found = [self.one_stage(gram.copy()), self.two_stage(gram.copy(), band=8)]
            except np.linalg.LinAlgError:
                return False
            if not all(np.allclose(each, expected, rtol=0, atol=tolerance * expected[-1]) for each in found):
                return False
        return True

    def _tridiagonal(self, diagonal: Matrix, beside: Matrix) -> Matrix:
        """Replace the diagonal of a tridiagonal matrix by its eigenvalues."""
        self._call(_LETTER[diagonal.dtype] + "sterf", diagonal.size, diagonal, beside)
        return diagonal

    def _routine(self, name: str) -> Any:
        return getattr(self._library, f"{self._prefix}{name}{self._suffix}")

    def _call(self, name: str, *arguments: bytes | int | Matrix, status: bool = True) -> None:
        """Call a Fortran routine: everything by reference, the status at the end, then the lengths of the letters."""
        found = self._integer(0)
        passed: list[Any] = []
        for argument in arguments:
            if isinstance(argument, bytes):
                passed.append(ctypes.c_char_p(argument))
            elif isinstance(argument, int):
                passed.append(ctypes.byref(self._integer(argument)))
            else:
                passed.append(argument.ctypes.data_as(ctypes.c_void_p))
        letters = sum(isinstance(argument, bytes) for argument in arguments)
        routine = self._routine(name)
        routine.restype = None
        routine(*passed, *([ctypes.byref(found)] if status else []), *[ctypes.c_size_t(1)] * letters)
        if found.value != 0:
            raise np.linalg.LinAlgError(f"LAPACK's {name} returned {found.value}")


def symmetric_buffer(order: int, dtype: npt.DTypeLike) -> Matrix:
    """Make an uninitialised symmetric matrix whose rows do not compete for the same places in the caches.

    Rows at distances of a power of two do: padding them takes 5 to 15 % from the time of the reduction.

    Returns:
        [n, n], a view of a buffer with longer rows.
    """
    dtype = np.dtype(dtype)
    line = _CACHE_LINE // dtype.itemsize
    padded = -(-order // line) * line
    if padded * dtype.itemsize % (8 * _CACHE_LINE) == 0:
        padded += line
    return np.empty((order, padded), dtype)[:, :order]


def leading_dimension(matrix: Matrix) -> int:
    """Return the distance between the rows of a matrix, in elements.

    Raises:
        ValueError: if the elements of a row are not beside one another.
    """
    if matrix.shape[0] > 1 and matrix.strides[1] != matrix.itemsize:
        raise ValueError("the rows of the matrix have no unit stride")
    between: int = matrix.strides[0] // matrix.itemsize
    return max(between, int(matrix.shape[1]), 1)


@cache
def find_openblas() -> OpenBlas | None:
    """Return the OpenBLAS that numpy uses, or else scipy's, if it has the routines and passes its self-test."""
    for path in _libraries():
        try:
            found = OpenBlas(ctypes.CDLL(path))
            if found.passes_self_test():
                return found
        except (OSError, AttributeError):
            continue
    return None


def _libraries() -> Iterator[str]:
    """List the OpenBLAS libraries of this process: numpy's, which is loaded, and only if it does not do, scipy's."""
    known = set(_loaded())
    yield from sorted(known)
    try:
        import scipy.linalg  # noqa: F401 - for the library that it loads
    except ImportError:
        return
    yield from sorted(set(_loaded()) - known)


def _loaded() -> Iterable[str]:
    return [info["filepath"] for info in ThreadpoolController().info() if info["internal_api"] == "openblas"]
