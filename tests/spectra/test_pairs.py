"""Measures of two versions of a matrix against numpy's SVD, and planted changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esdtool.errors import UsageError
from esdtool.spectra.matrix_pair import MatrixPair
from esdtool.spectra.measure import Number
from esdtool.spectra.options import PairOptions
from esdtool.spectra.pair_measure import all_pair_quantities, load_pair_measures, measure_pair
from esdtool.spectra.pairs import PAIR_MEASURE_NAMES

SHAPES = [(40, 40), (30, 90), (90, 30)]
VECTORS = [name for name in (q.name for q in all_pair_quantities()) if name.startswith(("overlap_", "angle_"))]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(noise(size, size, seed=seed)).Q


def measured(base: torch.Tensor, other: torch.Tensor, **options: float) -> dict[str, Number]:
    pair = MatrixPair(base=base, other=other, options=PairOptions(distances=True, **options))  # type: ignore[arg-type]
    found = measure_pair(pair)
    assert found is not None
    return found


def spiked(base: torch.Tensor, size: float, seed: int = 5) -> torch.Tensor:
    """Add a rank-one update in a direction of its own, `size` times as large as the base."""
    left, right = noise(base.shape[0], 1, seed=seed), noise(1, base.shape[1], seed=seed + 1)
    return base + size * torch.linalg.matrix_norm(base, 2) * left / left.norm() @ right / right.norm()


def test_every_file_is_a_measure() -> None:
    assert PAIR_MEASURE_NAMES == ("cka", "frobenius", "intruders", "subspaces")
    names = [quantity.name for quantity in all_pair_quantities()]
    assert len(set(names)) == len(names)
    assert all(quantity.source and not quantity.formula.endswith(".") for quantity in all_pair_quantities())
    assert any(measure.is_cheap for measure in load_pair_measures())


@pytest.mark.parametrize("shape", SHAPES)
def test_everything_is_what_numpy_gives(shape: tuple[int, int]) -> None:
    base, other = noise(*shape), noise(*shape) + 0.3 * noise(*shape, seed=1)
    found = measured(base, other)
    a, b = base.numpy(), other.numpy()
    assert found["relative_distance"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
    for name, first, second in (("cka_left", a, b), ("cka_right", a.T, b.T)):
        cross, own = np.linalg.norm(first.T @ second) ** 2, np.linalg.norm(first.T @ first)
        assert found[name] == pytest.approx(cross / own / np.linalg.norm(second.T @ second), rel=1e-12)
    (ua, s, va), (ub, _, vb) = (np.linalg.svd(matrix, full_matrices=False) for matrix in (a, b))
    shares = s**2 / (s**2).sum()
    effective = round(np.exp(-(shares * np.log(shares)).sum()))
    assert found["overlap_rank"] == effective
    for label, k in (("1", 1), ("4", 4), ("16", 16), ("effective", effective)):
        for side, first, second in (("left", ua, ub), ("right", va.T, vb.T)):
            cosines = np.linalg.svd(first[:, :k].T @ second[:, :k], compute_uv=False)
            assert found[f"overlap_{side}_{label}"] == pytest.approx((cosines**2).mean(), abs=1e-9)
            assert found[f"angle_{side}_{label}"] == pytest.approx(np.degrees(np.arccos(cosines[-1])), abs=1e-4)
    similarity = np.abs(ua.T @ ub[:, :10]).max(axis=0)
    assert found["least_similarity"] == pytest.approx(similarity.min(), abs=1e-9)
    assert found["num_intruders"] == (similarity < 0.5).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_rotations_of_both_matrices_change_nothing(shape: tuple[int, int]) -> None:
    base, other = noise(*shape), spiked(noise(*shape), 1.5)
    left, right = orthogonal(shape[0], 7), orthogonal(shape[1], 8)
    one, two = measured(base, other), measured(left @ base @ right, left @ other @ right)
    assert two == {name: pytest.approx(value, abs=1e-6, rel=1e-6) for name, value in one.items()}


def test_one_side_rotated_keeps_the_other() -> None:
    base = noise(30, 50)
    found = measured(base, base @ orthogonal(50, 3))
    assert found["cka_left"] == pytest.approx(1)
    assert found["overlap_left_4"] == pytest.approx(1)
    assert found["num_intruders"] == 0
    assert found["cka_right"] < 0.9  # type: ignore[operator]
    assert found["overlap_right_4"] < 0.5  # type: ignore[operator]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_is_equal_to_itself(shape: tuple[int, int]) -> None:
    base = noise(*shape)
    found = measured(base, base.clone())
    assert found["relative_distance"] == 0
    assert found["num_intruders"] == 0
    assert found["first_intruder"] is None
    for name in ("cka_left", "cka_right", "least_similarity", "overlap_left_16", "overlap_right_effective"):
        assert found[name] == pytest.approx(1, abs=1e-12)
    assert found["angle_right_16"] == pytest.approx(0, abs=1e-4)


# In few dimensions any direction resembles one of so many by chance.
@pytest.mark.parametrize("shape", [(120, 120), (100, 240), (240, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_intruders_are_found_and_small_changes_are_none(shape: tuple[int, int], dtype: torch.dtype) -> None:
    # Singular values with gaps, as trained matrices have at the top: without them any change mixes neighbours.
    spread = noise(*shape) * torch.logspace(0, -2, shape[1], dtype=torch.float64)
    base = spread.to(dtype)
    small = (spread + 1e-3 * spread.abs().mean() * noise(*shape, seed=2)).to(dtype)
    assert measured(base, small)["num_intruders"] == 0
    for count in (1, 2, 3):
        tuned = spread
        for number in range(count):
            tuned = spiked(tuned, 2.0, seed=20 + 2 * number)
        found = measured(base, tuned.to(dtype))
        assert (found["num_intruders"], found["first_intruder"]) == (count, 1)


def test_threshold_and_number_of_vectors() -> None:
    base, tuned = torch.diag(torch.arange(60.0, 0, -1)), torch.diag(torch.arange(60.0, 0, -1))
    # The largest vector of the tuned matrix lies between two of the base.
    tuned[:2, :2] = 70 * torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert measured(base, tuned, intruder_similarity=0.70)["num_intruders"] == 0
    assert measured(base, tuned, intruder_similarity=0.71)["num_intruders"] == 1
    assert measured(base, tuned, intruder_vectors=1)["least_similarity"] == pytest.approx(0.5**0.5)
    unlike = measured(noise(50, 50), noise(50, 50, seed=1), intruder_vectors=200)
    assert unlike["num_intruders"] == 50  # there are no more


def test_equal_singular_values_define_no_space() -> None:
    base = orthogonal(40, 1)
    found = measured(base, base + 1e-4 * noise(40, 40))
    assert [found[name] for name in ("overlap_left_1", "angle_left_4", "overlap_right_16")] == [None] * 3
    assert found["overlap_left_effective"] == pytest.approx(1)  # of all 40
    # Vectors of the tuned matrix lie in the space that the base's equal ones span.
    assert (found["num_intruders"], found["least_similarity"]) == (0, pytest.approx(1))


def test_low_rank_and_zero() -> None:
    base = noise(30, 2) @ noise(2, 40, seed=1)
    found = measured(base, base + noise(30, 1, seed=2) @ noise(1, 40, seed=3) * 3)
    assert found["overlap_left_1"] is not None
    assert [found["overlap_left_4"], found["overlap_right_16"]] == [None, None]
    assert found["num_intruders"] == 1  # directions in which the base is zero resemble nothing
    zero = torch.zeros(30, 40)
    assert all(measured(zero, base)[name] is None for name in ("relative_distance", "cka_left", "overlap_left_1"))
    assert measured(zero, base)["num_intruders"] == 2
    gone = measured(base, zero)
    assert (gone["relative_distance"], gone["num_intruders"], gone["cka_right"]) == (1, None, None)
    assert measured(zero, zero)["relative_distance"] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_have_no_distance(bad: float) -> None:
    broken = noise(10, 10)
    broken[3, 4] = bad
    assert measure_pair(MatrixPair(base=noise(10, 10), other=broken)) is None
    assert measure_pair(MatrixPair(base=broken, other=noise(10, 10)), cheap_only=True) is None


@pytest.mark.parametrize("scale", [1e-160, 1e155])
def test_sizes_whose_squares_float64_does_not_hold(scale: float) -> None:
    base, other = noise(20, 30), noise(20, 30, seed=1)
    one, two = measured(base, other), measured(base * scale, other * scale)
    assert two == {name: pytest.approx(value, abs=1e-6, rel=1e-9) for name, value in one.items()}


def test_without_vectors_only_the_cheap_is_measured() -> None:
    found = measure_pair(MatrixPair(base=noise(9, 9), other=2 * noise(9, 9)), cheap_only=True)
    assert found is not None
    assert {name for name, value in found.items() if value is not None} == {"relative_distance"}
    assert found["relative_distance"] == pytest.approx(1)


def test_one_by_n() -> None:
    found = measured(noise(1, 30), -noise(1, 30))
    assert (found["overlap_left_1"], found["overlap_right_1"], found["num_intruders"]) == (1, pytest.approx(1), 0)
    assert found["overlap_left_4"] is None


@pytest.mark.parametrize(
    ("options", "words"), [({"intruder_vectors": 0}, "at least 1"), ({"intruder_similarity": 1.5}, r"in \(0, 1\]")]
)
def test_numbers_that_mean_nothing_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PairOptions(**options)  # type: ignore[arg-type]
