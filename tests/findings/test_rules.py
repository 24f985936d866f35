"""Rules on analyses made by hand: limits, errors of measurement, and chance among many modules."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import scipy.stats

from esdtool.analysis.finding import Severity
from esdtool.analysis.module_record import ModuleResult
from esdtool.findings.case import Case
from esdtool.findings.grouping import grouped
from esdtool.findings.rule import Found
from esdtool.findings.rules import load_rules
from tests.findings.models import analysis_of, module


def find(rule: str, modules: Iterable[ModuleResult], **esds: np.ndarray) -> list[Found]:
    analysis = analysis_of(list(modules)).with_esds(esds)
    return list(load_rules()[rule].find(Case(analysis=analysis)))


def ks(name: str, alpha: float, error: float) -> ModuleResult:
    fit = {"alpha": alpha, "alpha_stderr": error, "xmin": 1.0, "num_tail": 30, "ks_distance": 0.1}
    return module(name, alpha=alpha, alpha_stderr=error, fits={"ks": fit})


def test_limits_of_ks_need_more_than_the_error_of_alpha() -> None:
    found = find("ks-limits", [ks("a", 1.5, 0.02), ks("b", 1.95, 0.1), ks("c", 4.0, 0.1), ks("d", 8.0, 0.3)])
    assert [(what.modules, what.severity) for what in found] == [(("a",), Severity.INFO), (("d",), Severity.INFO)]
    assert found[0].evidence[0].uncertainty == 0.02
    assert (
        find(
            "ks-limits",
            [module("a", alpha=1.5, fits={"hill": {"alpha": 1.5, "alpha_stderr": 0.01, "xmin": 1.0, "num_tail": 30}})],
        )
        == []
    )


def trapped(name: str, *eigenvalues: float | None, from_mean: int = 0) -> ModuleResult:
    """A module whose largest eigenvalue is 100, with an element at each of these places of a shuffled copy."""
    elements = [{"row": row, "column": 3, "value": 9.0, "eigenvalue": place} for row, place in enumerate(eigenvalues)]
    traps = {"from_elements": len(elements), "from_mean": from_mean, "elements": elements}
    return module(name, lambda_max=100.0, num_traps=len(elements) + from_mean, traps=traps)


def test_traps_count_where_an_element_makes_half_of_the_largest_eigenvalue() -> None:
    modules = [
        trapped("half", 50.0, 20.0),
        trapped("less", 49.0),
        trapped("of_no_size", None),
        trapped("of_the_mean", from_mean=1),
        module("none", lambda_max=100.0, num_traps=0),
        trapped("of_an_update", 90.0).model_copy(update={"rank": 8}),
        trapped("of_a_kernel", 90.0).model_copy(update={"shape": (8, 8, 3, 3)}),
    ]
    (found,) = find("traps", modules)
    assert found.modules == ("half",)
    (evidence,) = found.evidence
    assert evidence.value == 0.5
    assert "[0, 3] = 9" in evidence.measure
    assert "2 such elements" in evidence.measure
    (alone,) = find("traps", [trapped("alone", 50.0)])
    assert "1 such element)" in alone.evidence[0].measure


def test_traps_of_2000_modules_are_one_finding_with_the_clearest_three() -> None:
    modules = [trapped(f"layers.{number}.up_proj", 51 + 0.01 * number) for number in range(2000)]
    (found,) = find("traps", modules)
    assert len(found.modules) == 2000
    assert [evidence.module for evidence in found.evidence] == [
        f"layers.{1999 - number}.up_proj" for number in range(3)
    ]
    assert grouped(sorted(found.modules, key=lambda name: int(name.split(".")[1]))) == (
        "layers.{0-1999}.up_proj (2000)",
    )


@pytest.mark.parametrize("count", [1, 35, 2000])
def test_chance_is_shared_among_all_modules(count: int) -> None:
    case = Case(analysis=analysis_of([ks(f"layers.{i}", 4.0, 0.1) for i in range(count)]))
    limit = scipy.stats.norm.isf(0.01 / 2 / count)
    assert case.critical_z == pytest.approx(limit, rel=1e-9)
    others = [ks(f"layers.{i}", 4.0, 0.1) for i in range(1, count)]
    for excess, is_found in ((1.001, True), (0.999, False)):
        assert bool(find("ks-limits", [ks("x", 2 - 0.1 * limit * excess, 0.1), *others])) is is_found


def test_an_update_along_one_direction() -> None:
    names = {"spike": [0.1] * 7 + [20.0], "broad": [1.0] * 7 + [2.0], "tiny": [0.0, 1.0]}
    esds = {name: np.array(values) for name, values in names.items()}
    (found,) = find(
        "lora-spike", [module(name, rank=len(values), num_eigs=len(values)) for name, values in names.items()], **esds
    )
    assert (found.severity, found.modules) == (Severity.INFO, ("spike",))
    assert found.evidence[1].value == pytest.approx(20 / 20.7)


def depths(values: Iterable[float]) -> list[ModuleResult]:
    return [
        module(f"layers.{i}.q_proj", layer=i, alpha=3.0, log_norm=value, log_spectral_norm=0.0, stable_rank=9.0)
        for i, value in enumerate(values)
    ]


def test_a_trend_over_depth_is_no_outlier_and_a_step_of_one_layer_is() -> None:
    generator = np.random.default_rng(0)
    trend = np.linspace(0, 3, 24) + 0.05 * generator.standard_normal(24)
    assert find("outlier", depths(trend)) == []
    step = trend.copy()
    step[12:] += 1.5  # two halves of a model
    assert find("outlier", depths(step)) == []
    trend[7] += 1.0
    (found,) = find("outlier", depths(trend))
    assert found.modules == ("layers.7.q_proj",)
    assert found.evidence[0].expected == pytest.approx(np.median(trend[[5, 6, 8, 9]]))
    assert find("outlier", depths(trend[5:10])) == []  # too few layers to say


def test_names_that_differ_in_numbers_share_a_line() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in (0, 1, 2, 5) for expert in range(4)]
    assert grouped([*names, "head"]) == ("model.layers.{0-2,5}.mlp.experts.{0-3}.up_proj (16)", "head")
    assert grouped(["a.1", "a.1.b"]) == ("a.1", "a.1.b")
    assert grouped([f"x.{2 * i}" for i in range(50)]) == ("x.{0,2,4,6,8,...} (50)",)
    assert grouped([]) == ()
    layer = [f"model.layers.7.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert grouped([*layer, "model.layers.8.q_proj"]) == (
        "model.layers.{7-8}.q_proj (2)",
        "model.layers.7.k_proj",
        "model.layers.7.v_proj",
    )
    assert grouped(layer) == ("model.layers.7.{q_proj,k_proj,v_proj} (3)",)


def test_every_rule_says_all_that_a_reader_needs() -> None:
    rules = load_rules()
    assert {"untrained", "duplicate", "dead", "rank", "rounding", "outlier", "traps", "ks-limits", "channel"} <= set(
        rules
    )
    assert {"lora-spike", "overflow", "not-finite"} <= set(rules)
    for name, rule in rules.items():
        for text in (rule.evidence, rule.meaning, rule.caveat, rule.action):
            assert text.endswith("."), name
        assert rule.sources
        assert rule.after <= set(rules)
