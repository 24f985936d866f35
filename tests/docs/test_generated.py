"""The generated parts of the documentation are up to date, and figures in its text are right."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import esdtool
from tests.docs.pages import ROOT


def test_generated_parts_are_up_to_date() -> None:
    """If this fails: python docs/generate.py."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_a_stale_part_is_generated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    filled = importlib.import_module("generator.parts").filled
    name = "examples/trainers/read_with_json_only.py"
    page = f"before\n<!-- generated: script {name} -->\nold\n<!-- end -->\nafter\n"
    made = filled(page, where="page.md")
    assert (ROOT / name).read_text() in made
    assert "old" not in made
    assert filled(made, where="page.md") == made
    assert filled("no parts\n", where="page.md") == "no parts\n"
    with pytest.raises(SystemExit, match=r"page\.md: there is no missing\.py"):
        filled("<!-- generated: script missing.py -->\n<!-- end -->", where="page.md")
    with pytest.raises(SystemExit, match="nothing generates 'table none'"):
        filled("<!-- generated: table none -->\n<!-- end -->", where="page.md")


def test_figures_of_the_concepts_page(bundled: Path) -> None:
    text = (ROOT / "docs" / "concepts.md").read_text()
    rows = re.findall(
        r"^\| `(layers[\w.]+)` \| (\d+) x (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE
    )
    assert len(rows) == 4
    analysis = esdtool.analyze(bundled, fit=["hill", "ks"])
    modules = {module.name.removeprefix("model."): module for module in analysis.modules}
    for name, *shape, hill, null, ks in rows:
        module = modules[name]
        assert module.shape == tuple(map(int, shape))
        figures = (module.alphas["hill"], module.mp_alpha, module.alphas["ks"])
        assert [f"{figure:.2f}" for figure in figures] == [hill, null, ks]
    decays = esdtool.assign(analysis, fit="hill")
    sizes = [entry.shape[0] * entry.shape[1] for entry in decays.parameters.values() if entry.shape]
    mean = sum(size * decay for size, decay in zip(sizes, decays.decays.values(), strict=True)) / sum(sizes)
    assert f"it is {mean:.3f} at a base of 0.1" in text


def test_recorded_figures_in_the_text() -> None:
    """Where the README and the page on training speak of benchmarks, they say what the recorded results say."""

    def results(name: str) -> Any:
        return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())

    readme = " ".join((ROOT / "README.md").read_text().split())
    small, large = results("analyze-minilm"), results("large-7b")["rows"]
    took = {name: f"{row['seconds']:.2f} s" for name, row in small["rows"].items()}
    assert f"two cores take {took['esdtool']} ({took['esdtool --fast']} with `--fast`)" in readme
    assert f"a `svdvals` loop {took['svdvals']} and WeightWatcher 0.7.7 {took['weightwatcher']}" in readme
    assert f"agree to {small['agreement']['esdtool --fit ks / weightwatcher']['max']:.0e}" in readme
    whole, fast = large["esdtool"]["seconds"], large["esdtool --fast"]["seconds"]
    cached = large["esdtool --fit ks, from the cache"]["seconds"]
    assert f"take {whole:.0f} s, {fast:.0f} s with `--fast`, and {cached:.1f} s for another" in readme

    training = " ".join((ROOT / "docs" / "training.md").read_text().split())
    rows = results("refresh")["rows"]
    percent = {way: [100 * row["refresh"][way]["share"] for row in rows] for way in ("1 thread", "2 threads", "public")}
    one = [
        f"{share:.1f} % ({size})"
        for share, size in zip(percent["1 thread"], ("60M", "130M", "350M", "1B"), strict=True)
    ]
    assert f"{', '.join(one[:3])} and {one[3]} of the training time" in training
    two = [f"{share:.2g}" for share in percent["2 threads"]]
    assert f"on two threads to {', '.join(two[:3])} and {two[3]} %" in training
    public = [f"{share:.2g}" for share in percent["public"]]
    assert f"to {', '.join(public[:3])} and {public[3]} %, and with N ranks" in training


def test_the_page_on_use_repeats_the_figures_of_the_pages_that_it_cites() -> None:
    def text(name: str) -> str:
        return " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split())

    page = text("should-i-use-it")
    cited = {
        "study": ("272 thousand parameters", "17.5 tokens a parameter"),
        "training": ("0.9 % (60M)", "2.7 % (1B)"),
        "performance": ("0.8 %", "5.0 %", "every 20 steps", "0.26"),
        "concepts": ("0.216 at a base of 0.1",),
    }
    for name, figures in cited.items():
        for figure in figures:
            assert figure in page, figure
            assert figure in text(name), (name, figure)
