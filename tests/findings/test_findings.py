"""Findings of a whole analysis: many modules stay short, bad ones do no harm, and files and exit codes carry them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

import esdtool
from esdtool.analysis.finding import Severity
from esdtool.cli import app
from esdtool.findings import diagnose
from esdtool.report.html import analysis_page
from esdtool.report.markdown import analysis_markdown
from esdtool.report.terminal.analysis import print_analysis
from esdtool.spectra.scoring import NOT_FINITE
from tests.findings.models import analysis_of, healthy, module
from tests.report.html_reader import read_page


@pytest.fixture(scope="module")
def faulty() -> esdtool.Analysis:
    """A model with an untrained layer and a row of huge weights."""
    tensors = healthy()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if ".layers.3." in name:
            tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
    tensors["model.layers.6.self_attn.k_proj.weight"][3] *= 50
    return esdtool.analyze(tensors, jobs=1)


def shown(analysis: esdtool.Analysis) -> str:
    stream = io.StringIO()
    print_analysis(analysis, console=Console(file=stream, width=160, highlight=False))
    return stream.getvalue()


def test_2000_broken_modules_are_one_short_finding() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(20) for expert in range(100)]
    analysis = diagnose(analysis_of([module(name, status=NOT_FINITE) for name in names]))
    (finding,) = analysis.findings or ()
    assert finding.modules == tuple(names)
    assert finding.where == ("model.layers.{0-19}.mlp.experts.{0-99}.up_proj (2000)",)
    assert finding.severity is Severity.ERROR
    text = shown(analysis).split("module ")[0]
    assert len(text.splitlines()) < 20
    assert len(analysis_markdown(analysis).split("No module could")[0]) < 2500


def test_no_modules_and_old_files_have_no_findings(tmp_path: Path) -> None:
    assert diagnose(analysis_of([])).findings == ()
    old = analysis_of([module("a", alpha=3.0)])
    assert old.findings is None
    document = json.loads(old.to_json())
    del document["findings"]
    (tmp_path / "old.json").write_text(json.dumps(document))
    read = esdtool.Analysis.from_json(tmp_path / "old.json")
    assert read.findings is None
    assert not shown(read).startswith("Findings")
    assert "Findings" not in analysis_page(read).split("</style>")[1]


def test_a_model_without_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    found = esdtool.analyze({"table.weight": torch.randn(64, 64, generator=generator)}).findings
    assert found is not None
    assert [finding.rule for finding in found] == ["untrained"]


def test_findings_from_the_cache_look_at_no_element_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = healthy(2)
    tensors["model.layers.1.mlp.down_proj.weight"][4, 9] = 40 * tensors["model.layers.1.mlp.down_proj.weight"].std()
    tensors["model.layers.0.self_attn.q_proj.weight"][3] = torch.nan
    tensors["model.layers.0.self_attn.k_proj.weight"][3] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    first = esdtool.analyze(tmp_path)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("the elements are looked at again")

    monkeypatch.setattr("esdtool.spectra.elements.element_statistics", again)
    monkeypatch.setattr("esdtool.spectra.traps.find_traps", again)
    monkeypatch.setattr("esdtool.spectra.scoring.compute_spectrum", again)
    second = esdtool.analyze(tmp_path)
    assert {finding.rule for finding in first.findings or ()} >= {"not-finite", "traps", "dead"}
    assert second.findings == first.findings
    assert second.to_json() == first.to_json()


def test_the_file_keeps_the_findings(faulty: esdtool.Analysis, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(faulty.to_json())
    read = esdtool.Analysis.from_json(tmp_path / "a.json")
    assert read.findings == faulty.findings
    assert diagnose(read).findings == faulty.findings
    first = json.loads(faulty.to_json())["findings"][0]
    assert (first["rule"], first["severity"]) == ("untrained", "error")


def test_all_reports_begin_with_the_findings(faulty: esdtool.Analysis) -> None:
    assert faulty.findings is not None
    assert [finding.rule for finding in faulty.findings] == ["untrained", "channel"]
    terminal = shown(faulty)
    assert terminal.startswith("Findings: 1 error, 1 warning\nERROR untrained: ")
    markdown = analysis_markdown(faulty)
    assert markdown.startswith("**Findings: 1 error, 1 warning**")
    main = read_page(analysis_page(faulty)).one("main")
    (listed,) = main.all("div", class_="findings")
    assert main.text.index(listed.text) < main.text.index("Mean alpha")
    severities = [span.text for span in listed.all("span") if "severity" in str(span.attributes.get("class"))]
    assert severities == ["error", "warning"]
    for finding in faulty.findings:
        for text in (finding.title, finding.meaning, finding.caveat, finding.action):
            assert text in listed.text
            assert text.split()[0] in terminal
        assert finding.rule in markdown


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    name = "</script><b>\x1b[31m@octocat"
    found = diagnose(analysis_of([module(name, status=NOT_FINITE)], checkpoint="a b; rm -r $HOME"))
    page = analysis_page(found)
    assert "<b>\x1b" not in page
    assert "\x1b" not in shown(found)
    command = esdtool.analyze({"$(id).weight": torch.eye(64)}).findings
    assert command is not None
    assert command[0].command is not None
    assert "'^\\$\\(id\\)$'" in command[0].command


def test_the_verdict_is_a_distance_that_compares_across_shapes(faulty: esdtool.Analysis) -> None:
    from esdtool.analysis.verdict import verdict_words

    words = [verdict_words(found, "hill") for found in faulty.modules]
    assert all(" %" in text for text in words)
    assert len(set(words)) > 10
    untrained = [found.null_distance for found in faulty.modules if found.layer == 3]
    others = [found.null_distance for found in faulty.modules if found.layer != 3]
    assert max(untrained) < 0.03 < 0.2 < min(others)  # type: ignore[type-var]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    tensors = healthy(layers=1)
    tensors["model.layers.0.self_attn.k_proj.weight"][3] *= 50
    save_file(tensors, tmp_path / "model.safetensors")

    def invoke(*words: str) -> Any:
        return CliRunner().invoke(app, ["analyze", str(tmp_path / "model.safetensors"), "--quiet", *words])

    return invoke


def test_fail_on_a_severity(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run().exit_code == 0
    assert run("--fail-on", "error").exit_code == 0
    target = tmp_path / "a.json"
    failed = run("--fail-on", "warning", "--json", str(target))
    assert failed.exception.exit_code == 4
    assert "channel (model.layers.0.self_attn.k_proj)" in str(failed.exception)
    assert json.loads(target.read_text())["findings"]  # written all the same
    assert run("--fail-on", "sometimes").exit_code == 2


def test_the_exit_code_of_the_process(esdtool_cli: Callable[..., Any], run: Callable[..., Any], tmp_path: Path) -> None:
    result = esdtool_cli("analyze", tmp_path / "model.safetensors", "--quiet", "--fail-on", "warning")
    assert (result.returncode, result.stdout) == (4, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("esdtool: error: ")
