"""Files of version 2: what is written is read again, by the readers of weight decays too; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from esdtool.analysis.run import analyze
from esdtool.assignment import Allocation, load_allocation, load_assignment
from esdtool.assignment.allocate import AllocateOptions, allocate
from esdtool.assignment.assign import assign
from esdtool.assignment.assign_options import AssignOptions
from esdtool.errors import AssignmentError
from tests.conftest import llama_tensors


@pytest.fixture(scope="module")
def analysis() -> Any:
    return analyze(llama_tensors(), fit=("hill", "hill-classic"), cache=False)


@pytest.fixture(scope="module")
def whole(analysis: Any) -> Allocation:
    options = AllocateOptions.of(
        ["weight-decay", "learning-rate", "bits", "lora-targets", "train-layers"], {}, decays=AssignOptions()
    )
    return allocate(analysis, options).allocation


def test_round_trip(whole: Allocation, tmp_path: Path) -> None:
    path = tmp_path / "assignment.json"
    path.write_text(whole.to_json())
    assert load_allocation(path) == whole
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("esdtool.weight_decay", 2)
    entry = document["parameters"]["model.layers.0.mlp.up_proj.weight"]
    assert {"weight_decay", "lr_ratio", "bits", "lora_target", "train"} <= set(entry)
    assert "sparsity" not in entry  # what was not asked for is absent
    assert set(document["parameters"]["lm_head.weight"]) >= {"lr_ratio", "train"}


def test_weight_decays_are_those_of_version_1(whole: Allocation, analysis: Any, tmp_path: Path) -> None:
    path = tmp_path / "assignment.json"
    path.write_text(whole.to_json())
    expected = assign(analysis)
    read = load_assignment(path)
    assert read.decays == expected.decays
    assert read.method == expected.method
    assert read.with_base(0.2).decays == expected.with_base(0.2).decays == whole.with_base(0.2).values("weight_decay")


def test_no_weight_decays_is_said(whole: Allocation, tmp_path: Path) -> None:
    path = tmp_path / "assignment.json"
    entries = {name: entry.model_copy(update={"weight_decay": None}) for name, entry in whole.parameters.items()}
    path.write_text(whole.model_copy(update={"parameters": entries, "base_weight_decay": None}).to_json())
    with pytest.raises(AssignmentError, match=r"holds no weight decays, only .*learning-rate.*--for weight-decay"):
        load_assignment(path)
    assert isinstance(load_allocation(path), Allocation)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr_ratio", -1),
        ("sparsity", 1.5),
        ("bits", 0),
        ("bits", 2.5),
        ("rank", -1),
        ("train", "yes"),
        ("lr_ratio", "x"),
    ],
)
def test_bad_values_name_the_entry(whole: Allocation, tmp_path: Path, key: str, value: object) -> None:
    document = json.loads(whole.to_json())
    document["parameters"]["lm_head.weight"][key] = value
    path = tmp_path / "assignment.json"
    path.write_text(json.dumps(document))
    with pytest.raises(AssignmentError, match=rf"lm_head\.weight: {key}: "):
        load_allocation(path)
