"""Eigenvalues of a symmetric matrix on the CPU by the fastest LAPACK at hand.

The rule (measured, see `benchmarks/spectra.py`):

- torch's own LAPACK (MKL in the x86 wheels) by default. On Intel CPUs it reduces to
  tridiagonal form in two stages by itself and is the fastest of all.
- On other x86 CPUs, where MKL runs slower code, OpenBLAS from the optional package
  `scipy-openblas32` (extra `fast`): `?syevd` below n = 2048, `?syevd_2stage` from there.
  scipy does not wrap the two-stage routine, so it is called through ctypes, after a
  self-test on a small matrix.

Both release the GIL, so a pool of threads scales.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

TWO_STAGE_FROM = 2048
"""Matrix order from which the two-stage reduction pays (measured: 1.0x at 1024, 1.3x at 2048, 1.6x at 4096)."""

_COLUMN_MAJOR = 102
_PREFIX = {np.dtype(np.float32): "s", np.dtype(np.float64): "d"}


def symmetric_eigenvalues(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Eigenvalues of a symmetric matrix [n, n] (float32 or float64), ascending, same dtype. `matrix` is overwritten.

    Raises:
        np.linalg.LinAlgError: if the solver does not converge.
    """
    if matrix.shape[0] == 0:
        return np.empty(0, matrix.dtype)
    library = _openblas()
    if library is not None:
        return _syevd(library, matrix, two_stage=matrix.shape[0] >= TWO_STAGE_FROM)
    try:
        eigenvalues: npt.NDArray[Any] = torch.linalg.eigvalsh(torch.from_numpy(matrix)).numpy()
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise np.linalg.LinAlgError(str(error)) from error
    return eigenvalues


def backend() -> str:
    """Name of the LAPACK in use: `openblas-2stage` or `torch`."""
    return "torch" if _openblas() is None else "openblas-2stage"


@cache
def _openblas() -> ctypes.CDLL | None:
    """OpenBLAS where it is installed, wins, and passes the self-test; else None."""
    if not torch.backends.mkl.is_available() or _is_intel():
        return None
    return load_openblas()


@cache
def load_openblas() -> ctypes.CDLL | None:
    """The library of `scipy-openblas32`, limited to one thread; None if it is absent or fails its self-test."""
    try:
        import scipy_openblas32

        path = Path(scipy_openblas32.get_lib_dir()) / scipy_openblas32.get_library(fullname=True)
        library = ctypes.CDLL(str(path))
        # Workers run one matrix each; OpenBLAS's eigensolvers lose by threading up to n ~ 2048 anyway.
        library.scipy_openblas_set_num_threads(1)
        for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-13)):
            sample = np.cos(np.arange(64 * 64, dtype=dtype)).reshape(64, 64)
            gram = sample @ sample.T
            expected = np.linalg.eigvalsh(gram)
            for two_stage in (False, True):
                if not np.allclose(
                    _syevd(library, gram.copy(), two_stage=two_stage), expected, atol=tolerance * expected[-1]
                ):
                    return None
    except (ImportError, AttributeError, OSError, np.linalg.LinAlgError):
        return None
    return library


def _syevd(library: ctypes.CDLL, matrix: npt.NDArray[Any], *, two_stage: bool) -> npt.NDArray[Any]:
    """LAPACKE_?syevd[_2stage], eigenvalues only; overwrites `matrix`."""
    # A symmetric matrix is its own transpose, so C order serves as Fortran order without a copy.
    matrix = np.ascontiguousarray(matrix)
    order = matrix.shape[0]
    eigenvalues = np.empty(order, matrix.dtype)
    name = f"scipy_LAPACKE_{_PREFIX[matrix.dtype]}syevd{'_2stage' if two_stage else ''}"
    info = getattr(library, name)(
        ctypes.c_int(_COLUMN_MAJOR),
        ctypes.c_char(b"N"),
        ctypes.c_char(b"L"),
        ctypes.c_int(order),
        matrix.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int(order),
        eigenvalues.ctypes.data_as(ctypes.c_void_p),
    )
    if info != 0:
        raise np.linalg.LinAlgError(f"{name} returned {info} for a matrix of order {order}")
    return eigenvalues


@cache
def _is_intel() -> bool:
    """Whether the CPU is Intel's, as far as the operating system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        return "GenuineIntel" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    return "intel" in platform.processor().lower()
