"""Verdicts are decided on numbers and types; their words are made last."""

from __future__ import annotations

import pytest

from esdtool.analysis.document import Analysis, Settings, Source, Summary
from esdtool.analysis.module_record import ModuleResult
from esdtool.analysis.verdict import Verdict, conclude, verdict, verdict_words


def module(name: str = "layers.0.q_proj", **values: object) -> ModuleResult:
    known = {
        "name": name,
        "parameter": f"{name}.weight",
        "role": "q_proj",
        "layer": 0,
        "shape": (64, 64),
        "dtype": "float32",
        "num_eigs": 64,
    }
    return ModuleResult.model_validate(known | values)


@pytest.mark.parametrize(
    ("values", "fit", "expected", "words"),
    [
        ({"alpha": 2.0, "alpha_stderr": 0.1, "mp_alpha": 2.5}, "hill", Verdict.HEAVY_TAILED, "heavy-tailed"),
        ({"alpha": 2.4, "alpha_stderr": 0.1, "mp_alpha": 2.5}, "hill", Verdict.LIKE_RANDOM, "like random"),
        ({"alpha": 2.8, "alpha_stderr": 0.1, "mp_alpha": 2.5}, "farms", Verdict.LIGHTER_THAN_RANDOM, None),
        ({"alpha": 1.9, "alpha_stderr": 0.1, "mp_alpha": 2.5}, "ks", Verdict.OVER_TRAINED, "over-trained"),
        ({"alpha": 6.1}, "powerlaw", Verdict.UNDER_TRAINED, "under-trained"),
        ({"alpha": 3.0}, "ks", Verdict.HEAVY_TAILED, "heavy-tailed"),
        ({"alpha": 3.0}, "hill", Verdict.NO_NULL, ""),
        ({"alpha": 1.2, "rank": 8}, "ks", Verdict.LOW_RANK, "of rank 8"),
        ({"status": "all elements are zero"}, "hill", Verdict.NOT_SCORED, "all elements are zero"),
    ],
)
def test_verdicts(values: dict[str, object], fit: str, expected: Verdict, words: str | None) -> None:
    found = module(**values)
    assert verdict(found, fit) is expected
    assert verdict_words(found, fit) == (expected.value if words is None else words)


def test_a_name_cannot_pass_for_a_part_of_the_conclusion() -> None:
    names = ["a Heaviest tails: b", "c"]
    modules = tuple(
        module(name, alpha=alpha, alpha_stderr=0.1, mp_alpha=2.5) for name, alpha in zip(names, (2.0, 3.0), strict=True)
    )
    analysis = Analysis(
        created_by="test",
        source=Source(checkpoint="m"),
        settings=Settings(fit=("hill",), k_fraction=0.5, min_eigs=50, spectrum="auto", fast=False),
        modules=modules,
        summary=Summary(
            num_modules=2,
            num_scored=2,
            num_skipped=0,
            mean_alpha=2.5,
            most_heavy_tailed=(names[0], "no such module"),
            least_heavy_tailed=(names[1],),
        ),
    )
    conclusion = conclude(analysis)
    assert conclusion.opening == "Mean alpha 2.50 over 2 modules (1 heavy-tailed, 1 lighter than random)."
    assert conclusion.heaviest == ((names[0], 2.0),)
    assert conclusion.text.endswith("Heaviest tails: a Heaviest tails: b (2.00). Lightest: c (3.00).")
