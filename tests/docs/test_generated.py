"""The generated parts of the documentation are up to date, and figures in its text are right."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import esdtool
from tests.docs.pages import ROOT


def test_generated_parts_are_up_to_date() -> None:
    """If this fails: python docs/generate.py."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_a_stale_part_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
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
