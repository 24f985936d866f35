"""Measures of a spectrum against numpy, scipy and planted matrices."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.optimize import brentq
from scipy.special import airy

import esdtool
from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.spectra.marchenko_pastur import mp_cumulative, mp_density, mp_edges
from esdtool.spectra.measure import MeasuredSpectrum, Number, all_quantities, load_measures, measure_spectrum
from esdtool.spectra.measures import MEASURE_NAMES
from esdtool.spectra.spectrum import compute_spectrum
from esdtool.spectra.tracy_widom import noise_ceiling

SHAPES = [(200, 200), (300, 120), (64, 640)]


def noise(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(*matrices: torch.Tensor, rank: int | None = None) -> dict[str, Number]:
    rows, columns = matrices[0].shape
    spectrum = compute_spectrum(matrices, "gram-float64")
    return measure_spectrum(
        MeasuredSpectrum(spectrum=spectrum, shape=(rows, columns), num_matrices=len(matrices), rank=rank)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_distribution_function_is_the_integral_of_the_density(shape: tuple[int, int]) -> None:
    low, high = mp_edges(*shape)
    points = np.linspace(low + 0.02 * (high - low), high, 5)
    for point, found in zip(points, mp_cumulative(points, *shape), strict=True):
        # x = t^2 takes the singularity of a square matrix's density away.
        expected, _ = quad(lambda t: 2 * t * mp_density([t * t], *shape)[0], np.sqrt(low), np.sqrt(point), limit=200)
        assert found == pytest.approx(expected, abs=1e-5)


def test_the_margin_is_the_tracy_widom_quantile() -> None:
    start = 8.0
    value, slope, _, _ = airy(start)

    def painleve(s: float, y: list[float]) -> list[float]:
        return [y[1], s * y[0] + 2 * y[0] ** 3, -y[4], -y[0], -(y[0] ** 2)]

    solution = solve_ivp(painleve, [start, 1], [value, slope, 0, 0, 0], rtol=1e-10, atol=1e-14, dense_output=True).sol
    quantile = brentq(lambda s: np.exp(-(solution(s)[2] + solution(s)[3]) / 2) - 0.999, 1, start)
    long, short = np.sqrt(300 - 1), np.sqrt(120)
    width = (long + short) * (1 / long + 1 / short) ** (1 / 3)
    assert noise_ceiling(120, 300) == noise_ceiling(300, 120)
    assert noise_ceiling(300, 120) == pytest.approx((long + short) ** 2 + quantile * width, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_noise_is_its_own_bulk(shape: tuple[int, int], scale: float) -> None:
    found = measured(scale * noise(*shape))
    assert found["mp_sigma"] == pytest.approx(scale, rel=0.02)
    assert (found["mp_bulk_min"], found["mp_bulk_max"]) == pytest.approx(
        [found["mp_sigma"] ** 2 * edge for edge in mp_edges(*shape)]
    )
    assert found["num_spikes"] == 0
    assert found["mp_softrank"] == pytest.approx(1, abs=0.06)
    assert found["mp_fit_distance"] < 0.05


def test_spikes_do_not_widen_the_bulk() -> None:
    left, right = noise(300, 6, 1), noise(240, 6, 2)
    # 6 spikes hold most of the energy: its edge would hide all but the largest.
    sizes = torch.tensor([30.0, 6.0, 5.0, 4.0, 4.0, 4.0], dtype=torch.float64)
    matrix = noise(300, 240) + (left * sizes / 10) @ right.T
    found = measured(matrix)
    assert found["num_spikes"] == 6
    assert found["mp_sigma"] == pytest.approx(1, rel=0.03)
    energy_edge = float(matrix.square().mean()) * mp_edges(300, 240)[1]
    assert (np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2 > energy_edge).sum() < 6
    assert found["mp_softrank"] < 0.02


def test_a_bulk_of_another_form_is_told() -> None:
    assert measured(noise(200, 300) * torch.logspace(-2, 2, 200, dtype=torch.float64)[:, None])["mp_fit_distance"] > 0.3


def test_there_is_no_bulk_without_a_lower_half() -> None:
    found = measured(noise(100, 30) @ noise(30, 150))
    names = [name for name in found if name.startswith("mp_")] + ["num_spikes", "condition"]
    assert [found[name] for name in names] == [None] * len(names)


def test_a_low_rank_update_has_no_random_matrix_to_compare_with() -> None:
    found = measured(noise(100, 16) @ noise(16, 150), rank=16)
    assert {found[name] for name in ("mp_sigma", "num_spikes", "mp_softrank", "spectrum_snr")} == {None}


def test_condition_is_numpys() -> None:
    assert measured(noise(90, 60))["condition"] == pytest.approx(np.linalg.cond(noise(90, 60).numpy()), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_score_of_spectrum(shape: tuple[int, int]) -> None:
    matrix = 0.02 * noise(*shape)
    singular = np.linalg.svd(matrix.numpy(), compute_uv=False)
    spread = (np.quantile(singular, 0.75) - np.quantile(singular, 0.25)) / 1.349
    threshold = spread * (1 + np.sqrt(min(shape) / max(shape)))
    rest = singular[singular <= threshold].sum()
    found = measured(matrix)
    if rest == 0:
        assert found["spectrum_snr"] is None
        assert found["spectrum_snr_random"] is None
    else:
        expected = singular[singular > threshold].sum() / rest / singular.max()
        assert found["spectrum_snr"] == pytest.approx(expected)
        assert found["spectrum_snr_random"] == pytest.approx(expected, rel=0.2)


def test_the_erg_gap_adds_logarithms() -> None:
    # A running product of these overflows, at the 100th of 1,200 eigenvalues.
    eigenvalues = np.sort(np.exp(np.random.default_rng(0).normal(0, 4, 1200)))
    spectrum = compute_spectrum([torch.from_numpy(np.diag(np.sqrt(eigenvalues)))], "gram-float64")
    found = measure_spectrum(MeasuredSpectrum(spectrum=spectrum, shape=(1200, 1200)))["erg_gap"]
    logs = np.cumsum(np.log(eigenvalues[::-1] / eigenvalues.mean()))
    top = logs.argmax()
    tail = esdtool.analyze({"a.layers.0.x.weight": torch.from_numpy(np.diag(np.sqrt(eigenvalues)))}, fit="ks").modules
    assert found == top + np.abs(logs[top:]).argmin() + 1 - tail[0].num_tail


def test_measures_do_not_depend_on_the_scale() -> None:
    for exponent in (-300, 300, 560):
        small, usual = (measured(noise(80, 120) * 2.0**power) for power in (exponent, 0))
        for name in ("num_spikes", "mp_softrank", "mp_fit_distance", "condition", "erg_gap"):
            assert small[name] == pytest.approx(usual[name], rel=1e-9)


def test_pooled_matrices_have_the_bulk_of_each() -> None:
    found = measured(*(noise(60, 100, seed) for seed in range(9)))
    assert found["mp_sigma"] == pytest.approx(1, rel=0.02)
    assert found["num_spikes"] == 0
    assert found["mp_fit_distance"] < 0.05


def test_quantities_are_keys_columns_and_part_of_the_schema(tmp_path) -> None:
    names = [quantity.name for quantity in all_quantities()]
    assert len(set(names)) == len(names)
    assert len(load_measures()) == len(MEASURE_NAMES)
    analysis = esdtool.analyze({"model.layers.0.mlp.up_proj.weight": noise(80, 120)})
    document = json.loads(analysis.to_json())
    properties = Analysis.model_json_schema(mode="serialization")["$defs"]["ModuleResult"]["properties"]
    header = analysis.to_csv().splitlines()[0].split(",")
    for quantity in all_quantities():
        assert quantity.name in document["modules"][0]
        assert quantity.formula in properties[quantity.name]["description"]
        assert quantity.name in header
        assert analysis.modules[0].measure(quantity.name) == getattr(analysis.modules[0], quantity.name)
    with pytest.raises(KeyError):
        analysis.modules[0].measure("alpha")
    # A file of before is read.
    old = {key: value for key, value in document["modules"][0].items() if key not in names}
    assert ModuleResult.model_validate(old).measure("mp_sigma") is None
