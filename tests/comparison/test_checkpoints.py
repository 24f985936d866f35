"""Checkpoints side by side: which modules meet, what has moved, and by how many standard errors."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import jsonschema
import pytest
import torch

import esdtool
from esdtool.checkpoint import from_state_dict
from esdtool.comparison.checkpoints import CheckpointComparison, compare_analyses, short_labels
from esdtool.errors import CheckpointError, UsageError
from esdtool.report.tables.comparison import comparison_rows, comparison_words, fold_compared

Tensors = dict[str, torch.Tensor]
MOVED = "model.layers.1.mlp.up_proj"


@pytest.fixture
def base(make_llama: Callable[..., Tensors]) -> Tensors:
    return make_llama(layers=2)


@pytest.fixture
def tuned(base: Tensors) -> Tensors:
    """The base with one matrix replaced by noise of the same shape."""
    noise = torch.randn(base[f"{MOVED}.weight"].shape, generator=torch.Generator().manual_seed(3))
    return base | {f"{MOVED}.weight": noise}


def _analysis(tensors: Tensors, location: str, **options: object) -> esdtool.Analysis:
    return esdtool.analyze(from_state_dict(tensors, location=location), **options)  # type: ignore[arg-type]


@pytest.fixture
def comparison(base: Tensors, tuned: Tensors) -> CheckpointComparison:
    return compare_analyses([_analysis(base, "run/old"), _analysis(tuned, "run/new")])


def test_the_numbers_are_those_of_the_analyses(comparison: CheckpointComparison, base: Tensors, tuned: Tensors) -> None:
    old, new = esdtool.analyze(base), esdtool.analyze(tuned)
    for row, before, after in zip(comparison.modules, old.modules, new.modules, strict=True):
        first, second = row.sides
        assert first is not None
        assert second is not None
        assert (row.name, row.role, row.layer, row.shape) == (before.name, before.role, before.layer, before.shape)
        assert (first.alpha, first.difference, first.significance) == (before.alpha, None, None)
        assert second.alpha == after.alpha
        assert second.difference == after.alpha - before.alpha
        error = math.sqrt(before.alpha_stderr**2 + after.alpha_stderr**2)
        assert second.significance == pytest.approx((after.alpha - before.alpha) / error)
        assert (second.mp_alpha, second.num_eigs) == (after.mp_alpha, after.num_eigs)
    summary = comparison.summary
    assert summary.mean_alphas == (old.summary.mean_alpha, new.summary.mean_alpha)
    assert summary.moved_most == (MOVED,)
    assert summary.num_significant == (0, 1)
    assert summary.num_compared == (14, 14)
    expected = fmean(b.alpha - a.alpha for a, b in zip(old.modules, new.modules, strict=True))
    assert summary.mean_differences == (None, pytest.approx(expected))
    up = next(row for row in summary.by_role if row.role == "up_proj")
    assert up.mean_alphas[1] == next(row.mean_alpha for row in new.summary.by_role if row.role == "up_proj")


def test_names_that_differ_in_their_prefixes_meet(base: Tensors) -> None:
    bare = {name.removeprefix("model."): weight for name, weight in base.items()}
    comparison = compare_analyses([_analysis(base, "a"), _analysis(bare, "b")])
    assert len(comparison.modules) == 14
    assert not comparison.unmatched
    assert comparison.modules[0].sides[1].name == "layers.0.self_attn.q_proj"  # type: ignore[union-attr]
    assert comparison.summary.moved_most == ()
    assert comparison_words(comparison) == "b: all 14 alphas equal those of a."


def test_transposed_matrices_meet(base: Tensors) -> None:
    # GPT-2's Conv1D stores the transpose of Linear.
    turned = {name: weight.T.contiguous() if "mlp" in name else weight for name, weight in base.items()}
    comparison = compare_analyses([_analysis(base, "a"), _analysis(turned, "b")])
    assert len(comparison.modules) == 14
    assert comparison.summary.num_significant == (0, 0)


def test_what_has_no_counterpart_is_listed(base: Tensors) -> None:
    resized = base | {"model.layers.0.mlp.up_proj.weight": torch.randn(180, 64)}
    del resized["model.layers.1.mlp.up_proj.weight"]
    resized["model.layers.7.mlp.up_proj.weight"] = torch.randn(172, 64)
    comparison = compare_analyses([_analysis(base, "old"), _analysis(resized, "new"), _analysis(base, "third")])
    found = {(row.checkpoint, row.name): row.reason for row in comparison.unmatched}
    assert found == {
        ("old", "model.layers.0.mlp.up_proj"): "shape 172x64, but 180x64 in new",
        ("old", "model.layers.1.mlp.up_proj"): "not in new",
        ("new", "model.layers.7.mlp.up_proj"): "not in old",
    }
    row = next(row for row in comparison.modules if row.name == "model.layers.1.mlp.up_proj")
    assert row.sides[1] is None
    assert row.sides[2] is not None
    assert row.sides[2].difference == 0
    assert comparison.summary.num_compared == (14, 12, 14)


def test_other_estimators_are_refused_and_other_settings_noted(base: Tensors) -> None:
    hill, ks = _analysis(base, "a"), _analysis(base, "b", fit="ks")
    with pytest.raises(UsageError, match="alpha is by hill in a, but by ks in b"):
        compare_analyses([hill, ks])
    with pytest.raises(UsageError, match="at least two"):
        compare_analyses([hill])
    shorter = _analysis(base, "c", k_fraction=0.3, exclude=["layers.1"])
    assert compare_analyses([hill, shorter]).notes == (
        "the analyses differ in k_fraction: 0.5, 0.3",
        "the analyses differ in exclude: none, layers.1",
    )
    # The fraction says nothing of an alpha by another estimator.
    assert compare_analyses([ks, _analysis(base, "d", fit="ks", k_fraction=0.3)]).notes == ()


def test_differences_from_a_base_are_no_weights(base: Tensors, tuned: Tensors) -> None:
    change = esdtool.analyze(tuned, base=base)
    assert "not comparable" in compare_analyses([esdtool.analyze(base), change]).notes[0]


def test_modules_without_an_alpha_have_no_difference(base: Tensors) -> None:
    broken = base | {f"{MOVED}.weight": torch.zeros(172, 64)}
    comparison = compare_analyses([_analysis(base, "a"), _analysis(broken, "b")])
    side = next(row for row in comparison.modules if row.name == MOVED).sides[1]
    assert side is not None
    assert (side.alpha, side.difference, side.significance) == (None, None, None)
    assert side.verdict == "all elements are zero"
    assert comparison.summary.num_compared == (14, 13)
    assert comparison_rows(comparison, sort="difference", top=None, experts="mean").rows[-1].name == MOVED


def test_json_and_csv(comparison: CheckpointComparison, tmp_path: Path) -> None:
    schema = json.loads(files("esdtool.schemas").joinpath("comparison.schema.json").read_text())
    jsonschema.validate(json.loads(comparison.to_json()), schema)
    (tmp_path / "c.json").write_text(comparison.to_json())
    assert CheckpointComparison.from_json(tmp_path / "c.json") == comparison
    rows = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert len(rows) == 28
    assert [row["checkpoint"] for row in rows[:2]] == ["run/old", "run/new"]
    moved = next(row for row in rows if row["module"] == MOVED and row["checkpoint"] == "run/new")
    assert float(moved["difference"]) == comparison.modules[12].sides[1].difference  # type: ignore[union-attr]
    (tmp_path / "other.json").write_text('{"format": "esdtool.analysis"}')
    with pytest.raises(CheckpointError, match="not an esdtool comparison of checkpoints"):
        CheckpointComparison.from_json(tmp_path / "other.json")


def test_experts_fold_to_the_mean_of_their_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def mixture(scale: float) -> Tensors:
        names = [f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(4)]
        return {name: torch.randn(96, 64, generator=generator) * torch.logspace(0, scale, 64) for name in names}

    comparison = compare_analyses([_analysis(mixture(-0.2), "a"), _analysis(mixture(-1.5), "b")])
    (row,) = fold_compared(comparison.modules)
    sides = [module.sides[1] for module in comparison.modules]
    assert row.name == "model.layers.0.mlp.experts.*.up_proj (4)"
    side = row.sides[1]
    assert side is not None
    assert side.difference == pytest.approx(fmean(each.difference for each in sides if each))
    # Errors of independent differences add in squares, so the mean of four is about twice as significant.
    errors = [each.difference / each.significance for each in sides if each]
    assert side.significance == pytest.approx(side.difference / (math.sqrt(sum(e**2 for e in errors)) / 4))
    assert comparison_rows(comparison, sort="order", top=None, experts="all").rows == comparison.modules


def test_words_count_the_directions(comparison: CheckpointComparison) -> None:
    words = comparison_words(comparison)
    assert words.startswith("new: alpha +")
    assert "1 differs by more than 2 standard errors (1 with a lighter tail), most: model.layers.1.mlp.up_proj" in words


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a/x", "b/x"], ["a/x", "b/x"]),
        (["org/one", "org/two@main"], ["one", "two@main"]),
        (["x", "y", "x"], ["x (1)", "y", "x (2)"]),
        (["/m/a/final/", "/m/b/final"], ["a/final", "b/final"]),
    ],
)
def test_labels_tell_checkpoints_apart(names: list[str], labels: list[str]) -> None:
    assert short_labels(names) == labels
