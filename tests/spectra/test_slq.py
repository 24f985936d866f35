"""Estimated alphas: honest intervals, a refusal where there is no good estimate, and never in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits

import esdtool
from esdtool.analysis.budget import choose, keep_within
from esdtool.analysis.plan import make_plan
from esdtool.analysis.verdict import closing_words
from esdtool.errors import UsageError
from esdtool.report.html import analysis_page
from esdtool.report.tables.analysis import module_columns
from esdtool.spectra import lanczos, slq
from esdtool.spectra.estimators.hill import hill
from esdtool.spectra.marchenko_pastur import mp_quantiles
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.scoring import score_matrices
from esdtool.spectra.slq import estimate_from, estimate_tail
from tests.spectra.slq_coverage import KINDS, coverage

ORDER = 800


@pytest.fixture(autouse=True)
def small_matrices_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(slq, "SMALLEST", ORDER)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


def spiked(eigenvalues: np.ndarray, count: int, height: float) -> np.ndarray:
    found = eigenvalues.copy()
    found[-count:] *= np.geomspace(1.5, height, count)
    return found


LEVELS = (np.arange(ORDER) + 0.5) / ORDER
SPECTRA = {
    "square": np.array(mp_quantiles(ORDER, ORDER)),
    "long": np.array(mp_quantiles(ORDER, 3 * ORDER)),
    "spikes": spiked(np.array(mp_quantiles(ORDER, 2 * ORDER)), 60, 100),
    "power law 2": (1 - LEVELS) ** -1.0,
    "power law 3": (1 - LEVELS) ** -0.5,
    "lognormal": np.sort(np.exp(1.5 * np.random.default_rng(0).standard_normal(ORDER))),
    "of low rank": np.where(LEVELS < 0.3, 0.0, np.exp(LEVELS * 4)),
}


def simulated(eigenvalues: np.ndarray, seed: int, k_fraction: float = 0.5) -> slq.SlqEstimate | None:
    """The estimate for a matrix with these eigenvalues: it does not depend on the eigenvectors."""
    diagonal = torch.from_numpy(eigenvalues)[:, None]
    blocks = lanczos.block_lanczos(lambda q: (diagonal * q, q.T @ (diagonal * q)), eigenvalues.size, seed=seed)
    if blocks is None:
        return None
    return estimate_from(blocks, eigenvalues.size, float(eigenvalues.sum()), k_fraction=k_fraction)


@pytest.mark.parametrize("k_fraction", [0.5, 0.2])
def test_intervals_contain_the_exact_alpha(k_fraction: float) -> None:
    inside, errors = [], []
    for number, eigenvalues in enumerate(SPECTRA.values()):
        exact = hill(eigenvalues, k_fraction=k_fraction)
        for seed in range(3):
            # Not the same probes again: with them, the errors of similar spectra are alike.
            found = simulated(eigenvalues, 4 * number + seed, k_fraction)
            if found is not None:
                assert found.num_tail == exact.num_tail
                inside.append(found.alpha_ci[0] <= exact.alpha <= found.alpha_ci[1])
                errors.append(found.alpha / exact.alpha - 1)
    assert len(inside) >= 15  # an estimate, not a refusal
    assert np.mean(inside) >= 0.88  # 0.96 over many more seeds
    assert float(np.std(errors)) < 0.012
    assert abs(float(np.mean(errors))) < 0.006


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_hold_on_every_kind_of_spectrum(kind: str) -> None:
    """93 % of them at least, or no estimate: `python -m tests.spectra.slq_coverage` makes many more trials."""
    found = coverage(kind, 20)
    assert found.estimates - found.held <= max(1, 0.07 * found.estimates)
    if kind in ("random", "heavy-tailed", "decaying"):
        assert found.estimates >= 0.9 * found.trials  # an estimate, not a refusal
    if kind == "clustered":
        assert found.estimates <= 0.1 * found.trials


def test_what_is_computed_is_exact() -> None:
    eigenvalues = SPECTRA["spikes"]
    found = simulated(eigenvalues, 0)
    assert found is not None
    assert found.lambda_max == pytest.approx(eigenvalues[-1], rel=1e-10)
    assert 20 <= found.top.size < 200
    np.testing.assert_allclose(found.top[20:], eigenvalues[-found.top.size :][20:], rtol=1e-6)
    assert found.log_alpha_norm == pytest.approx(np.log10((eigenvalues**found.alpha).sum()), abs=1e-4)
    assert found.xmin == pytest.approx(eigenvalues[ORDER // 2], rel=0.05)
    assert found.lambda_median == pytest.approx(np.median(eigenvalues), rel=0.05)


@pytest.mark.parametrize("shape", [(900, 900), (900, 1500), (1500, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_against_a_float64_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    planted = torch.randn(shape[0], 40, generator=generator) @ torch.randn(40, shape[1], generator=generator)
    matrix = (torch.randn(shape, generator=generator) + planted / 4).to(dtype)
    eigenvalues = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    found = estimate_tail(matrix, scale=4.0)
    assert found is not None
    low, high = found.alpha_ci
    assert low <= hill(eigenvalues).alpha <= high
    assert high - low < 0.2
    assert found.total == pytest.approx(4 * eigenvalues.sum(), rel=1e-6)
    assert found.lambda_max == pytest.approx(4 * eigenvalues.max(), rel=1e-5)
    again = estimate_tail(matrix, scale=4.0)
    assert again is not None
    assert (again.alpha, again.alpha_ci) == (found.alpha, found.alpha_ci)


def test_no_estimate_where_it_could_not_be_trusted() -> None:
    low, high = np.array(mp_quantiles(ORDER // 2, 2 * ORDER)), 50 * np.array(mp_quantiles(ORDER // 2, 2 * ORDER))
    assert simulated(np.concatenate([low, high]), 0) is None  # the tail starts in a gap
    assert simulated(2 + 1e-6 * LEVELS, 0) is None  # as good as constant
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(900, 300, generator=generator) @ torch.randn(300, 900, generator=generator)
    half = torch.randn(900, 440, generator=generator) @ torch.randn(440, 900, generator=generator)
    for matrix in (thin, half, torch.eye(900), torch.randn(ORDER - 1, 2000)):
        assert estimate_tail(matrix) is None
    score = score_matrices([thin], ScoreOptions(spectrum="slq"))
    assert score.estimate is None  # the exact path has the word
    assert score.status.startswith("rank-deficient")


def weights(count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    large = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(900, 900, generator=generator) for i in range(count)}
    return large | {"model.layers.0.self_attn.q_proj.weight": torch.randn(100, 200, generator=generator)}


def test_an_analysis_says_what_is_estimated() -> None:
    found, exact = (esdtool.analyze(weights(), fit=["hill", "ks"], spectrum=path) for path in ("slq", "auto"))
    assert [module.spectrum for module in found.modules] == ["gram-float64", "slq", "slq", "slq"]
    assert found.modules[0] == exact.modules[0]
    assert "3 of 4 modules are estimated (slq): 95 % intervals of alpha up to ±0." in closing_words(found)
    assert "slq" not in closing_words(exact)
    assert set(found.esds) == {"model.layers.0.self_attn.q_proj"}
    for module, true in zip(found.modules[1:], exact.modules[1:], strict=True):
        assert module.alpha is not None
        assert true.alpha is not None
        assert module.alpha_ci is not None
        assert true.alpha_ci is None
        assert module.alpha != true.alpha
        assert module.alpha == pytest.approx(true.alpha, rel=0.03)
        assert module.alpha_stderr == pytest.approx((module.alpha - 1) / np.sqrt(450))
        assert module.alphas == {"hill": module.alpha, "ks": None}
        assert module.frobenius_norm == pytest.approx(true.frobenius_norm, rel=1e-6)
        assert module.stable_rank == pytest.approx(true.stable_rank, rel=1e-5)
        assert module.num_spikes == true.num_spikes
        assert module.mp_alpha == true.mp_alpha
        assert (module.lambda_min, module.entropy, module.matrix_rank, module.ks_distance) == (None,) * 4
    assert found.to_json() == esdtool.analyze(weights(), fit=["hill", "ks"], spectrum="slq", jobs=1).to_json()
    headings = [[column.heading for column in module_columns(each, narrow=True)] for each in (found, exact)]
    assert [heading.count("slq +-") for heading in headings] == [1, 0]
    assert [
        analysis_page(each).count('scope="col" class="n" data-kind="number">slq ±<') for each in (found, exact)
    ] == [1, 0]
    assert found.flat_rows()[1]["alpha_ci.low"] < found.modules[1].alpha < found.flat_rows()[1]["alpha_ci.high"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fit": ("ks", "hill")}, "by 'hill' only, not by 'ks'"),
        ({"k_fraction": 0.01}, r"k-fraction in \[0.1, 0.9\], not 0.01"),
    ],
)
def test_options_without_an_estimate(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ScoreOptions(spectrum="slq", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=words):
        keep_within(make_plan(weights(), ScoreOptions(**options)), 1.0)  # type: ignore[arg-type]


def test_as_few_as_a_budget_needs() -> None:
    exact, estimated = {"a": 8.0, "b": 4.0, "c": 4.0, "d": 1.0}, {"a": 2.0, "b": 5.0, "c": 1.0}
    assert choose(exact, estimated, 17.0, jobs=1) == ([], 17.0)
    assert choose(exact, estimated, 12.0, jobs=1) == (["a"], 11.0)
    assert choose(exact, estimated, 8.0, jobs=1) == (["a", "c"], 8.0)
    assert choose(exact, estimated, 1.0, jobs=1) == (["a", "c"], 8.0)  # b would take longer
    assert choose(exact, estimated, 9.0, jobs=2) == ([], 9.0)  # a and d, b and c
    assert choose(exact, estimated, 7.0, jobs=2) == (["a"], 6.0)


def test_a_budget_changes_nothing_while_it_suffices() -> None:
    plan = make_plan(weights(), ScoreOptions())
    assert keep_within(plan, 1e6) == (plan, None)
    with pytest.raises(UsageError, match="must be a positive number"):
        keep_within(plan, 0.0)


def test_a_budget_in_the_command_line(esdtool_cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_file({"model.layers.0.mlp.up_proj.weight": torch.randn(1600, 1600)}, tmp_path / "large.safetensors")
    out = tmp_path / "out.json"
    extra = ["--json", out, "--esd", tmp_path / "esd.safetensors", "--plots", tmp_path, "--html", tmp_path / "a.html"]
    done = esdtool_cli("analyze", tmp_path / "large.safetensors", "--no-cache", "--budget", "0.01", *extra)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 modules are estimated (slq)" in " ".join(done.stderr.split())
    assert "1 of 1 modules are estimated (slq): 95 % intervals" in " ".join(done.stdout.split())
    assert json.loads(out.read_text())["modules"][0]["spectrum"] == "slq"
    assert load_file(tmp_path / "esd.safetensors") == {}
