"""The messages that the page on troubleshooting quotes are messages of esdtool."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import esdtool
from esdtool.errors import EsdtoolError
from tests.docs.pages import ROOT, prose

PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTES = re.findall(r'\*\*"([^"]+)"\*\*', " ".join(prose(PAGE).split()))
# What stands for a name, a number or a shape: "..." on the page, a placeholder in the source.
VARIABLE = re.compile(r"\.\.\.|\d+(?:x\d+)*")


def literals() -> list[str]:
    """Every string of the package; the placeholders of an f-string become `...`."""
    found = []
    for path in sorted((ROOT / "esdtool").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


LITERALS = literals()


def is_said(quote: str) -> bool:
    """Whether one string of the package has the constant parts of a quoted message, and placeholders between them."""
    pattern = re.compile(re.escape("...").join(re.escape(part) for part in VARIABLE.split(quote)))
    return any(pattern.search(literal) for literal in LITERALS)


def test_quotes_are_found() -> None:
    assert len(QUOTES) > 12
    assert not is_said("too few eigenvectors: 32 < 50")
    assert not is_said("... is 512x512 in the model, 768x768 in the file")


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_in_the_source(quote: str) -> None:
    assert is_said(quote)


def test_every_extra_for_users_is_listed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = PAGE.read_text(encoding="utf-8").split("| extra |")[1]
    listed = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    # One that installs nothing is kept for its name alone.
    assert sorted(listed) == sorted({name for name, packages in extras.items() if packages} - {"test", "dev", "docs"})


def quoted(beginning: str) -> str:
    (quote,) = {quote for quote in QUOTES if quote.startswith(beginning)}
    return re.sub(r"\\\.\\\.\\\.|\d+", ".+", re.escape(quote))


def test_modules_without_an_alpha_say_what_the_page_quotes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(96, 20, generator=generator)
    state = {
        "layers.0.small.weight": torch.randn(32, 64, generator=generator),
        "layers.0.factored.weight": (factor @ factor.T) / 20,
        "layers.0.orthogonal.weight": torch.eye(96),
        "layers.0.broken.weight": torch.full((96, 96), torch.nan),
    }
    save_file(state, tmp_path / "model.safetensors")
    analysis = esdtool.analyze(tmp_path / "model.safetensors")
    status = {module.role: module.status for module in analysis.modules}
    for role, beginning in {
        "small": "too few",
        "factored": "rank-deficient",
        "orthogonal": "constant",
        "broken": "not finite",
    }.items():
        assert re.match(quoted(beginning), status[role]), (role, status[role])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_a_model_with_adapters_is_refused_as_the_page_quotes(bundled: Path, caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    with pytest.raises(EsdtoolError, match=quoted("the base of this model is frozen")):
        esdtool.AlphaDecay(model, optimizer, weight_decay=0.1)
    assignment = esdtool.assign(esdtool.analyze(bundled))
    for use in (esdtool.param_groups, lambda model, assignment: esdtool.apply(optimizer, assignment, model)):
        caplog.clear()
        use(model, assignment)
        assert re.search(quoted("parameters of the assignment are frozen"), caplog.text)
