"""Means over a model: each measure by its definition, and what has no value left out and counted."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import esdtool
from esdtool.analysis.document import Analysis
from esdtool.analysis.means import QUOTED
from esdtool.report.html.analysis_report import analysis_page
from esdtool.report.markdown import analysis_markdown
from esdtool.report.terminal.analysis import print_analysis

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def mixed() -> Tensors:
    """Two roles of different sizes, one module that is NaN and one that is zero."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (160, 64)}
    weights = {
        f"model.layers.{layer}.{name}.weight": torch.randn(size, generator=generator) * (1 + layer)
        for layer in range(3)
        for name, size in sizes.items()
    }
    weights["model.layers.1.self_attn.q_proj.weight"][3, 4] = torch.nan
    weights["model.layers.2.mlp.up_proj.weight"].zero_()
    return weights


def quoted_of(weight: torch.Tensor, alpha: float) -> dict[str, float]:
    """The measures of one matrix by their definitions; the soft rank and alpha have tests of their own."""
    eigenvalues = np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2
    return {
        "log_norm": np.log10(eigenvalues.sum()),
        "alpha_weighted": alpha * np.log10(eigenvalues.max()),
        "log_alpha_norm": np.log10((eigenvalues**alpha).sum()),
        "log_spectral_norm": np.log10(eigenvalues.max()),
        "stable_rank": eigenvalues.sum() / eigenvalues.max(),
    }


def test_means_are_those_of_the_definitions_over_the_modules_that_have_a_value(mixed: Tensors) -> None:
    analysis = esdtool.analyze(mixed)
    whole = {row.role: row.means for row in analysis.summary.by_role} | {None: analysis.summary.means}
    for role, means in whole.items():
        members = [module for module in analysis.modules if role in (None, module.role)]
        scored = [module for module in members if module.alpha is not None]
        assert tuple(means) == tuple(QUOTED)
        values = [quoted_of(mixed[module.parameter], module.alpha) for module in scored if module.alpha is not None]
        sizes = [mixed[module.parameter].numel() for module in scored]
        for name, mean in means.items():
            assert (mean.count, mean.left_out) == (len(scored), len(members) - len(scored))
            if name not in values[0]:
                continue
            column = [value[name] for value in values]
            assert mean.plain == pytest.approx(np.mean(column), rel=1e-9)
            assert mean.by_parameters == pytest.approx(np.average(column, weights=sizes), rel=1e-9)


def test_a_measure_that_no_module_has_is_null() -> None:
    weights = {f"layers.{layer}.up_proj.weight": torch.zeros(64, 64) for layer in range(2)}
    summary = esdtool.analyze(weights).summary
    assert all(
        (mean.plain, mean.by_parameters, mean.count, mean.left_out) == (None, None, 0, 2)
        for mean in summary.means.values()
    )
    assert summary.by_role == ()


BAD: dict[str, torch.Tensor] = {
    "nan": torch.full((64, 64), torch.nan),
    "zero": torch.zeros(64, 64),
    "rank_one": torch.outer(torch.arange(1.0, 65), torch.ones(64)),
    "row": torch.arange(1.0, 65)[None],
    "constant": torch.eye(64),
    "huge": torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e200,
}


@pytest.mark.parametrize("fit", ["hill", "ks", "bounded"])
@pytest.mark.parametrize("bad", [*BAD, None])
def test_means_of_bad_modules_are_finite_or_left_out(bad: str | None, fit: str) -> None:
    """Without and with a number in a block of a layer; and all bad modules together."""
    weights = {
        f"model.layers.{layer}.mlp.{name}_proj.weight": matrix
        for layer, (name, matrix) in enumerate(BAD.items())
        if bad in (name, None)
    } | {f"head_{name}.weight": matrix for name, matrix in BAD.items() if bad == name}
    analysis = esdtool.analyze(weights, fit=fit, min_eigs=2)
    summary = analysis.summary
    for means, total in [
        (summary.means, summary.num_modules),
        *((row.means, sum(row.role == module.role for module in analysis.modules)) for row in summary.by_role),
    ]:
        for mean in means.values():
            assert mean.count + mean.left_out == total
            assert (mean.plain is None) == (mean.by_parameters is None) == (mean.count == 0)
            assert mean.plain is None or np.isfinite([mean.plain, mean.by_parameters]).all()
    assert ("Means over the model" in analysis_page(analysis)) == (summary.num_scored > 0)
    assert not re.search(r"\b(nan|inf)\b *\|", analysis_markdown(analysis))


def test_every_output_shows_the_means_and_what_they_leave_out(
    mixed: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    analysis = esdtool.analyze(mixed)
    stable_rank = analysis.summary.means["stable_rank"]
    shown = f"{stable_rank.plain:.3f}", f"{stable_rank.by_parameters:.3f}"
    print_analysis(analysis)
    for written in (capsys.readouterr().out, analysis_markdown(analysis), analysis_page(analysis)):
        assert all(number in written for number in shown)
    of_role = analysis.summary.by_role[0].means["stable_rank"]
    for written in (analysis_markdown(analysis), analysis_page(analysis)):
        assert f"{of_role.plain:.3f} (2 of 3)" in written


def test_an_analysis_of_an_earlier_version_has_no_means(mixed: Tensors, tmp_path: Path) -> None:
    analysis = esdtool.analyze(mixed)
    old = analysis.model_copy(
        update={
            "summary": analysis.summary.model_copy(
                update={
                    "means": {},
                    "by_role": tuple(r.model_copy(update={"means": {}}) for r in analysis.summary.by_role),
                }
            )
        }
    )
    path = tmp_path / "old.json"
    path.write_text(old.to_json())
    read = Analysis.from_json(path)
    print_analysis(read)
    assert "means over" not in analysis_markdown(read)
    assert "Means over" not in analysis_page(read)
