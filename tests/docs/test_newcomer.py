"""The tutorial as a newcomer follows it: each of its commands and its Python, in order, in an empty folder.

The installation itself is only looked at here: `.ci/run` installs from nothing as its first step.
"""

from __future__ import annotations

import json
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.docs.pages import ROOT, blocks, commands, run_python

INSTALLATION = ("python3 -m venv .venv", "source .venv/bin/activate", "pip install -e '.[train]'")


def make_model(folder: Path) -> None:
    """The newcomer's own checkpoint: a small GPT-2, with fused projections that the bundled one does not have."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder)


def run(words: list[str], folder: Path) -> None:
    run_python(words, folder, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))


@pytest.mark.slow
def test_from_a_clone_to_wd_json(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    make_model(tmp_path / "path" / "to" / "your-model")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "train" in extras
    installed: list[str] = []
    python: list[str] = []
    for block in blocks("tutorial.md"):
        if block.language == "python":
            python.append(block.text)
        elif block.language == "console":
            for command in commands(block.text):
                words = shlex.split(command)
                if words[0] == "esdtool":
                    run(["-m", *words], tmp_path)
                else:
                    installed.append(command)
    assert tuple(installed) == INSTALLATION
    assert len(python) == 2
    run(["-c", "".join(python)], tmp_path)  # as one session; importing transformers takes seconds

    decays = json.loads((tmp_path / "wd.json").read_text())["parameters"]
    weights = load_file(tmp_path / "path" / "to" / "your-model" / "model.safetensors")
    assert len(decays) == 8  # c_attn, c_proj, c_fc, c_proj of two blocks
    assert all(list(weights[name].shape) == entry["shape"] for name, entry in decays.items())
    run(["-m", "esdtool", "assign", "--check", "wd.json", "--model", "path/to/your-model"], tmp_path)

    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert list((tmp_path / "figures").rglob("*.png"))
    lines = (tmp_path / "runs" / "first" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 20
