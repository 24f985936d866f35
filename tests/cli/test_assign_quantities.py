"""`esdtool assign --for` as a user types it: several quantities, formats, options that hold for them, refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from esdtool.cli import app
from esdtool.errors import EsdtoolError, UsageError
from tests.conftest import llama_tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_file(llama_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture
def assign(model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command on the model, and return what it wrote to stdout."""

    def run(*arguments: str, source: str | None = None) -> Any:
        command = ["assign", source or str(model), "--out", "-", "--device", "cpu", *arguments]
        app(command, prog_name="esdtool", standalone_mode=False)
        written = capsys.readouterr().out
        return json.loads(written) if written.startswith(("{", "[")) else written

    return run


def test_several_quantities_in_one_file(assign: Callable[..., Any]) -> None:
    document = assign("--for", "weight-decay", "--for", "learning-rate", "--for", "sparsity", "--target", "0.5")
    assert document["version"] == 2
    assert set(document["quantities"]) == {"weight-decay", "learning-rate", "sparsity"}
    assert document["quantities"]["sparsity"]["settings"]["target"] == 0.5
    entry = document["parameters"]["model.layers.0.self_attn.q_proj.weight"]
    assert {"weight_decay", "lr_ratio", "sparsity"} <= set(entry)


def test_weight_decay_alone_is_version_1(assign: Callable[..., Any]) -> None:
    assert assign("--for", "weight-decay") == assign()
    assert assign()["version"] == 1


def test_shared_options_hold_for_all_and_set_counts_more(assign: Callable[..., Any]) -> None:
    both = ["--for", "weight-decay", "--for", "learning-rate", "--min-ratio", "0.5"]
    document = assign(*both, "--set", "learning-rate.max-ratio=2")
    entries = document["parameters"].values()
    ratios = [entry["details"]["weight_decay"]["ratio"] for entry in entries if "weight_decay" in entry]
    assert min(ratios) == 0.5
    rates = [entry["lr_ratio"] for entry in entries]
    assert (min(rates), max(rates)) == (0.5, 2.0)


def test_a_control_holds_for_weight_decay_too(assign: Callable[..., Any]) -> None:
    plain, shuffled = assign(), assign("--control", "shuffled")
    assert (plain["method"]["control"], shuffled["method"]["control"]) == ("none", "shuffled")
    decays = [[entry["weight_decay"] for entry in found["parameters"].values()] for found in (plain, shuffled)]
    assert decays[0] != decays[1]
    assert sorted(decays[0]) == sorted(decays[1])
    both = assign("--for", "weight-decay", "--for", "learning-rate", "--control", "shuffled")
    names = shuffled["parameters"]
    assert [both["parameters"][name]["weight_decay"] for name in names] == decays[1]


def test_tempbalance(assign: Callable[..., Any]) -> None:
    entries = assign("--for", "learning-rate", "--map", "tempbalance")["parameters"]
    rates = [entry["lr_ratio"] for entry in entries.values()]
    assert (min(rates), max(rates)) == (0.5, 1.5)
    assert "lm_head.weight" not in entries


def test_formats(assign: Callable[..., Any]) -> None:
    assert "target_modules" in assign("--for", "lora-rank", "--format", "peft")
    text = assign("--for", "learning-rate", "--format", "fairseq2", "--learning-rate", "0.001")
    assert text.startswith("# esdtool ")
    assert assign("--format", "nemo").count("wd_mult") == 14  # weight decays alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--for", "nonsense"], "unknown quantity 'nonsense'; choose from weight-decay"),
        (["--for", "sparsity", "--target", "0"], "sparsity.target"),
        (["--for", "sparsity", "--target", "1"], "sparsity.target"),
        (["--for", "bits", "--budget", "1"], "budget 1 is not between"),
        (["--for", "learning-rate", "--map", "nonsense"], "learning-rate.map"),
        (["--for", "sparsity", "--map", "llr"], "--map is no setting of sparsity"),
        (["--for", "sparsity", "--optimizer", "adam"], "--optimizer is no setting of sparsity"),
        (["--control", "nonsense"], "unknown control 'nonsense'"),
        (["--map", "llr"], "--map is no setting of weight-decay"),
        (["--for", "sparsity", "--set", "eps=0.2"], "QUANTITY.NAME=VALUE"),
        (["--for", "sparsity", "--set", "bits.budget=3"], "'bits' was not asked for; add --for bits"),
        (["--for", "sparsity", "--include", "nonsense"], "--include 'nonsense' matches no"),
        (["--for", "sparsity", "--fit", "nonsense"], "unknown fit 'nonsense'"),
        (["--for", "sparsity", "--names", "live"], "--names live is for weight decays alone"),
        (["--for", "bits", "--format", "peft"], "the format peft cannot carry bits; choose from csv, json, llama"),
        (["--for", "learning-rate", "--format", "fairseq2", "--learning-rate", "-1"], "must be above 0, not -1"),
        (["--for", "learning-rate", "--learning-rate", "1"], "only for formats with absolute rates: axolotl, fairseq2"),
        (["--learning-rate", "1"], "only for formats with absolute rates: axolotl, fairseq2"),
    ],
)
def test_refusals(assign: Callable[..., Any], arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        assign(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format", "axolotl"],
        ["--for", "bits", "--format", "peft"],
        ["--for", "learning-rate", "--format", "axolotl"],
    ],
)
def test_a_format_is_refused_before_the_spectra(
    arguments: list[str], assign: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["esdtool.cli.assign"], "_analysis", lambda *_, **__: pytest.fail("computed spectra")
    )
    with pytest.raises(UsageError, match=f"{arguments[-1]} (cannot carry|reads absolute)"):
        assign(*arguments)


def test_what_is_said_of_weight_decays_is_said_beside_others_too(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for quantities in (["--min-ratio", "4"], ["--min-ratio", "4", "--for", "weight-decay", "--for", "lora-targets"]):
        app(["assign", str(model), *quantities], prog_name="esdtool", standalone_mode=False)
        said.append([line for line in capsys.readouterr().err.splitlines() if "warning: " in line])
    assert said[0]
    assert said[1] == said[0]


def test_choices_are_counted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["assign", str(model), "--for", "lora-targets"], prog_name="esdtool", standalone_mode=False)
    assert "lora_target: 2 of 14 parameters" in capsys.readouterr().out


def test_an_analysis_file_lacks_whole_spectra(assign: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "analysis.json"
    app(["analyze", str(model), "--json", str(path), "--quiet"], prog_name="esdtool", standalone_mode=False)
    with pytest.raises(EsdtoolError, match="give the checkpoint"):
        assign("--for", "train-layers", source=str(path))
    with pytest.raises(EsdtoolError, match="no fit 'fix-finger-legacy'"):
        assign("--for", "sparsity", source=str(path))
    assert assign("--for", "lora-targets", source=str(path))["quantities"].keys() == {"lora-targets"}
