"""Correlation traps by the law, against shuffles by numpy and planted elements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

import esdtool
from esdtool.errors import UsageError
from esdtool.spectra import traps as module_of_traps
from esdtool.spectra.cache import SpectrumCache, content_hash
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.tracy_widom import noise_ceiling
from esdtool.spectra.traps import drawn_traps, find_traps, known_traps

SHAPES = [(256, 512), (300, 300), (512, 96)]


def noise(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def spikes_after_a_shuffle(matrix: np.ndarray, seed: int) -> np.ndarray:
    """The eigenvalues of a shuffled copy above the noise of variance 1, by numpy."""
    shuffled = np.random.default_rng(seed).permutation(matrix.reshape(-1)).reshape(matrix.shape)
    eigenvalues = np.linalg.svd(shuffled, compute_uv=False) ** 2
    return eigenvalues[eigenvalues > noise_ceiling(*matrix.shape)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("planted", [[], [2.0], [-9.0], [3.0, -4.0, 5.0, 7.0]])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_law_says_what_a_shuffle_shows(shape: tuple[int, int], planted: list[float], size: float) -> None:
    matrix = noise(shape)
    for position, strength in enumerate(planted):
        matrix[11 * position, 7 * position] = strength * matrix.size**0.25
    shown = np.sort(spikes_after_a_shuffle(matrix, 1))[::-1]
    found = find_traps([torch.from_numpy(size * matrix)])
    assert found.count == found.from_elements == shown.size == len(planted)
    assert [element.eigenvalue / size**2 for element in found.elements] == pytest.approx(shown, rel=0.1)
    assert {(element.row, element.column) for element in found.elements} == {
        (11 * position, 7 * position) for position in range(len(planted))
    }
    assert all(element.value == size * matrix[element.row, element.column] for element in found.elements)
    assert drawn_traps([torch.from_numpy(size * matrix)], seed=0, name="a") == len(planted)


def test_the_mean_makes_one() -> None:
    matrix = noise((256, 512)) + 0.2
    found = find_traps([torch.from_numpy(matrix)])
    assert (found.from_mean, found.from_elements) == (1, 0)
    assert spikes_after_a_shuffle(matrix, 0).size == drawn_traps([torch.from_numpy(matrix)], seed=0, name="a") == 1


def test_one_outlier_does_not_hide_another() -> None:
    matrix = noise((200, 300))
    matrix[3, 4], matrix[5, 6] = 1e6, 60  # the variance of all elements is 1.7e7
    found = find_traps([torch.from_numpy(matrix)])
    assert [(element.row, element.column) for element in found.elements] == [(3, 4), (5, 6)]


def test_the_rows_and_columns_that_hold_them_are_named() -> None:
    matrix = noise((200, 300))
    matrix[:9, 17] = 100.0
    matrix[40, 20:22] = -120.0
    found = find_traps([torch.from_numpy(matrix)])
    assert found.from_elements == 11
    assert (found.columns[0].index, found.columns[0].count) == (17, 9)
    assert (found.rows[0].index, found.rows[0].count) == (40, 2)
    assert len(found.elements) == 10
    assert len(found.rows) == 5


def test_weights_of_any_scale_and_dtype() -> None:
    matrix = torch.from_numpy(noise((80, 120)))
    matrix[1, 2] = 100.0
    for factor in (2.0**-500, 1.0, 2.0**500):
        found = find_traps([factor * matrix])
        assert [(element.row, element.value / factor) for element in found.elements] == [(1, 100.0)]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert find_traps([matrix.to(dtype)]).from_elements == 1


@pytest.mark.parametrize("matrix", [torch.ones(60, 50), torch.full((1, 70), 0.1), torch.diag(torch.ones(1))])
def test_equal_elements_have_no_noise_to_exceed(matrix: torch.Tensor) -> None:
    assert find_traps([matrix]).count == 0


def test_results_are_kept_and_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.from_numpy(noise((80, 120)))
    matrix[1, 2] = 100.0
    cache = SpectrumCache(folder=tmp_path, limit=2**20)

    def found() -> object:
        return known_traps(lambda: [matrix], scale=1.0, cache=cache, content=content_hash([matrix]))

    first = found()
    assert first == find_traps([matrix])
    (entry,) = tmp_path.rglob("*.facts")
    with monkeypatch.context() as patch:
        patch.setattr(module_of_traps, "find_traps", None)
        assert found() == first
    entry.write_bytes(entry.read_bytes().replace(b"100.0", b"900.0"))
    assert found() == first
    with monkeypatch.context() as patch:
        patch.setattr(module_of_traps, "VERSION", module_of_traps.VERSION + 1)
        patch.setattr(module_of_traps, "find_traps", lambda *_, **__: find_traps([-matrix]))
        assert found() != first


def test_an_analysis_has_them() -> None:
    matrix = torch.from_numpy(noise((80, 120)))
    matrix[1, 2] = 100.0
    weights = {"model.layers.0.mlp.up_proj.weight": matrix, "model.layers.1.mlp.up_proj.weight": matrix.flip(0) * 2}
    weights["model.layers.2.mlp.up_proj.weight"] = torch.from_numpy(noise((80, 120), 1))
    found = esdtool.analyze(weights)
    assert [module.num_traps for module in found.modules] == [1, 1, 0]
    assert {module.num_traps_drawn for module in found.modules} == {None}
    assert found.modules[1].traps.elements[0].row == 78
    assert found.modules[2].traps is None
    drawn = [esdtool.analyze(weights, traps="shuffle", seed=4, jobs=jobs) for jobs in (1, 2)]
    assert [module.num_traps_drawn for module in drawn[0].modules] == [1, 1, 0]
    assert drawn[0].to_json() == drawn[1].to_json()
    assert (drawn[0].settings.traps, drawn[0].settings.seed) == ("shuffle", 4)
    header = drawn[0].to_csv().splitlines()[0].split(",")
    assert "num_traps" in header
    assert "traps" not in header


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="unknown traps 'x'; choose from law, shuffle"):
        ScoreOptions(traps="x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="seed must be in"):
        ScoreOptions(seed=-1)


def test_the_threads_of_blas_do_not_matter() -> None:
    matrix = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    matrix[3, 4] = 60.0
    found = []
    for threads in (1, 2):
        with threadpool_limits(limits=threads, user_api="blas"):
            found.append(find_traps([matrix]))
    assert found[0] == found[1]
    assert found[0].elements
