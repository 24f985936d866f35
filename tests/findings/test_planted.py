"""Planted faults of each kind are found, the right one first, and a sound model has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import esdtool
from esdtool.analysis.finding import Finding, Severity
from tests.findings.models import SHAPES, Tensors, healthy

LAYER = "model.layers.3"
QUERY = f"{LAYER}.self_attn.q_proj"
DOWN = f"{LAYER}.mlp.down_proj"


def findings(tensors: Tensors, **options: object) -> tuple[Finding, ...]:
    found = esdtool.analyze(tensors, jobs=1, **options).findings  # type: ignore[arg-type]
    assert found is not None
    return found


def test_a_sound_model_has_no_finding() -> None:
    assert findings(healthy()) == ()


def test_the_bundled_checkpoint_has_no_finding(bundled: Path) -> None:
    assert esdtool.analyze(bundled, jobs=1).findings == ()


def untrained_layer(tensors: Tensors, generator: torch.Generator) -> tuple[str, ...]:
    for name, shape in SHAPES.items():
        tensors[f"{LAYER}.{name}.weight"] = 0.02 * torch.randn(shape, generator=generator)
    return tuple(f"{LAYER}.{name}" for name in SHAPES)


def uniform_layer(tensors: Tensors, generator: torch.Generator) -> tuple[str, ...]:
    tensors[f"{DOWN}.weight"] = torch.rand(SHAPES["mlp.down_proj"], generator=generator) - 0.5
    return (DOWN,)


def huge_row(tensors: Tensors, _: torch.Generator) -> tuple[str, ...]:
    tensors[f"{QUERY}.weight"][17] *= 50
    return (QUERY,)


def large_column(tensors: Tensors, _: torch.Generator) -> tuple[str, ...]:
    tensors[f"{DOWN}.weight"][:, 5] *= 12
    return (DOWN,)


def duplicated_layer(tensors: Tensors, _: torch.Generator) -> tuple[str, ...]:
    for name in SHAPES:
        tensors[f"{LAYER}.{name}.weight"] = tensors[f"model.layers.5.{name}.weight"].clone()
    return tuple(f"model.layers.{layer}.{name}" for layer in (3, 5) for name in SHAPES)


def transposed_copy(tensors: Tensors, _: torch.Generator) -> tuple[str, ...]:
    other = f"{LAYER}.self_attn.k_proj"
    tensors[f"{QUERY}.weight"] = tensors[f"{other}.weight"].T.contiguous()
    return (QUERY, other)


def dead_rows(tensors: Tensors, _: torch.Generator) -> tuple[str, ...]:
    tensors[f"{QUERY}.weight"][[3, 40]] = 0
    tensors[f"{DOWN}.weight"][:, 7] *= 1e-9
    return (QUERY, DOWN)


def zero_matrix(tensors: Tensors, _: torch.Generator) -> tuple[str, ...]:
    tensors[f"{DOWN}.weight"].zero_()
    return (DOWN,)


def not_a_number(tensors: Tensors, _: torch.Generator) -> tuple[str, ...]:
    tensors[f"{QUERY}.weight"][1, 2] = torch.nan
    tensors[f"{DOWN}.weight"][1, 2] = torch.inf
    return (QUERY, DOWN)


def low_rank(tensors: Tensors, generator: torch.Generator) -> tuple[str, ...]:
    tensors[f"{QUERY}.weight"] = torch.randn(64, 20, generator=generator) @ torch.randn(20, 64, generator=generator)
    return (QUERY,)


def rank_one(tensors: Tensors, generator: torch.Generator) -> tuple[str, ...]:
    spike = torch.randn(64, 1, generator=generator) @ torch.randn(1, 64, generator=generator)
    tensors[f"{QUERY}.weight"] += 3 * spike
    return (QUERY,)


def scaled_layer(tensors: Tensors, _: torch.Generator) -> tuple[str, ...]:
    tensors[f"{DOWN}.weight"] *= 20
    return (DOWN,)


def one_element(tensors: Tensors, _: torch.Generator) -> tuple[str, ...]:
    tensors[f"{DOWN}.weight"][4, 9] = 40 * tensors[f"{DOWN}.weight"].std()
    return (DOWN,)


def beyond_float16(tensors: Tensors, _: torch.Generator) -> tuple[str, ...]:
    tensors[f"{DOWN}.weight"][0, 0] = 1e5
    return (DOWN,)


def large_outputs(tensors: Tensors, _: torch.Generator) -> tuple[str, ...]:
    for tensor in tensors.values():
        tensor *= 3e4
    return tuple(name.removesuffix(".weight") for name in tensors)


Plant = Callable[[Tensors, torch.Generator], tuple[str, ...]]

PLANTED: list[tuple[Plant, str, Severity]] = [
    (untrained_layer, "untrained", Severity.ERROR),
    (uniform_layer, "untrained", Severity.ERROR),
    (huge_row, "channel", Severity.WARNING),
    (large_column, "channel", Severity.INFO),
    (duplicated_layer, "duplicate", Severity.WARNING),
    (transposed_copy, "duplicate", Severity.INFO),
    (dead_rows, "dead", Severity.WARNING),
    (zero_matrix, "dead", Severity.WARNING),
    (not_a_number, "not-finite", Severity.ERROR),
    (low_rank, "rank", Severity.WARNING),
    (rank_one, "rank", Severity.WARNING),
    (scaled_layer, "outlier", Severity.WARNING),
    (one_element, "traps", Severity.INFO),
    (beyond_float16, "overflow", Severity.ERROR),
    (large_outputs, "overflow", Severity.WARNING),
]


@pytest.mark.parametrize(("plant", "rule", "severity"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_fault_is_found_first(plant: Plant, rule: str, severity: Severity) -> None:
    tensors = healthy()
    names = plant(tensors, torch.Generator().manual_seed(1))
    first, *_ = findings(tensors)
    assert (first.rule, first.severity) == (rule, severity)
    assert set(first.modules) == set(names)
    assert first.evidence
    assert {evidence.module for evidence in first.evidence} <= {*names, None}
    assert all((first.meaning, first.caveat, first.action))


def test_the_evidence_names_the_channel_and_its_share() -> None:
    tensors = healthy()
    tensors[f"{QUERY}.weight"][17] *= 50
    (evidence,) = findings(tensors)[0].evidence
    squares = tensors[f"{QUERY}.weight"].double().square()
    assert "row 17" in evidence.measure
    assert evidence.value == pytest.approx(float(squares[17].sum() / squares.sum()), rel=1e-6)
    assert evidence.expected == pytest.approx(1 / 64)


def test_a_model_that_was_never_trained_is_one_finding() -> None:
    generator = torch.Generator().manual_seed(0)
    found = findings({name: torch.randn(tensor.shape, generator=generator) for name, tensor in healthy().items()})
    assert [(finding.rule, finding.severity) for finding in found] == [("untrained", Severity.WARNING)]
    assert len(found[0].modules) == 56
    assert found[0].where == ("model.layers.{0-7}.{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,...} (56)",)


def test_an_unused_head_is_no_error() -> None:
    tensors = healthy()
    tensors["pooler.dense.weight"] = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    found = findings(tensors)
    assert [(finding.rule, finding.severity, finding.modules) for finding in found] == [
        ("untrained", Severity.INFO, ("pooler.dense",))
    ]


def test_a_channel_that_is_one_element_is_told_from_a_large_row() -> None:
    def measured(tensors: Tensors) -> list[str]:
        found = next(finding for finding in findings(tensors) if finding.rule == "channel")
        return [evidence.measure for evidence in found.evidence]

    tensors = healthy(layers=1)
    down = "model.layers.0.mlp.down_proj.weight"
    weight = tensors[down].float()
    alone, row = weight.clone(), weight.clone()
    alone[5, 6] = 2 * weight.norm()
    row[5] *= 40
    said = measured(tensors | {down: alone})
    assert {words.split(",")[0].rpartition(" in ")[2] for words in said} == {"row 5", "column 6"}
    assert all(words.endswith("almost all of it in one element") for words in said)
    assert all("one element" not in words for words in measured(tensors | {down: row}))


def test_orthogonal_matrices_are_told_apart_from_random_ones() -> None:
    tensors = healthy()
    tensors[f"{QUERY}.weight"] = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    found = findings(tensors)
    assert [(finding.rule, finding.severity, finding.modules) for finding in found] == [
        ("untrained", Severity.INFO, (QUERY,))
    ]


def test_rounding_of_a_quantised_matrix_and_of_a_difference() -> None:
    tensors = healthy(layers=1)
    name = "model.layers.0.self_attn.q_proj.weight"
    generator = torch.Generator().manual_seed(0)
    tensors[name] = (torch.randn(64, 30, generator=generator) @ torch.randn(30, 64, generator=generator)).bfloat16()
    by_rule = {finding.rule: finding for finding in findings(tensors)}
    assert by_rule["rounding"].severity is Severity.INFO
    assert by_rule["rounding"].modules == (name.removesuffix(".weight"),)
    # A checkpoint that was only stored in another format.
    base = {key: tensor.float() for key, tensor in healthy(layers=1).items()}
    stored = {key: tensor.bfloat16() for key, tensor in base.items()}
    (found,) = findings(stored, base=base)
    assert (found.rule, found.severity, len(found.modules)) == ("rounding", Severity.WARNING, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_low_rank_update_is_no_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {key: tensor.to(dtype) for key, tensor in healthy(layers=1).items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    rows, columns = base[name].shape
    update = torch.randn(rows, 1, generator=generator) @ torch.randn(1, columns, generator=generator)
    update *= 0.3 * base[name].float().norm() / update.norm()
    tuned = base | {name: (base[name].float() + update).to(dtype)}
    assert all(finding.severity is Severity.INFO for finding in findings(tuned, base=base))
    assert esdtool.analyze(tuned, base=base, jobs=1).observations[name.removesuffix(".weight")].storage_floor
