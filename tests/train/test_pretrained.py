"""Checkpoints of strangers as the start of a run or of `esdtool eval`: none of their code runs, and nobody is asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esdtool.errors import ConfigError
from esdtool.train.pretrained import load_fast_tokenizer, read_architecture

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkpoint(bundled: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(bundled, folder)
    return folder


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def bring_code(folder: Path, mark: Path, name: str, **values: Any) -> None:
    """Let a JSON file of the checkpoint ask for a class of a Python file that leaves a mark when it runs."""
    code = "from transformers import *\n" + "\n".join(f"class {kind}: pass" for kind in ("C", "M", "T"))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').write('ran')\n{code}\n")
    edit(folder / name, **values)


CODE: dict[str, tuple[str, dict[str, Any]]] = {
    "config": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}),
    "known config": ("config.json", {"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}),
    "model": ("config.json", {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "own.M"}}),
    "tokenizer": ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", None]}}),
}


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        *(pytest.param(kind, "eval", marks=[pytest.mark.slow] if kind != "config" else []) for kind in CODE),
        ("config", "from"),
        ("known config", "config"),
        ("tokenizer", "tokenizer"),
    ],
)
def test_code_of_a_checkpoint_never_runs(
    kind: str, command: str, checkpoint: Path, text: str, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    name, values = CODE[kind]
    bring_code(checkpoint, mark, name, **values)
    words: list[object] = ["eval", checkpoint, "--data", text, "--tokens", 500, "--sequence-length", 32]
    if command != "eval":
        settings = {
            "from": {"model": {"from": str(checkpoint)}, "tokenizer": {}},
            "config": {"model": {"config": str(checkpoint)}},
            "tokenizer": {"model": {"preset": "llama-1m"}, "tokenizer": {"file": str(checkpoint)}},
        }
        words = ["train", write_config(**settings[command]), "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "esdtool", *map(str, words)],
        input="y\ny\ny\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not mark.exists()
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1, done.stderr
        assert "Python code of its own" in done.stderr
        assert "trust_remote_code" not in done.stderr
    else:  # transformers has a class of its own for it
        assert kind != "config"


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**30},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"model_type": "mixtral", "num_local_experts": 10**9},
        {"model_type": "gpt2", "n_layer": 10**9},
        {"model_type": "qwen2", "num_hidden_layers": 10**9},  # its configuration alone would list every layer
    ],
)
def test_a_model_without_end_is_refused_at_once(values: dict[str, Any], checkpoint: Path) -> None:
    edit(checkpoint / "config.json", **values)
    with pytest.raises(ConfigError, match=r"asks for \w+ = 10+: at most 10,000"):
        read_architecture(str(checkpoint), "model.from x")


def test_eval_of_a_billion_layers_ends_with_a_line(checkpoint: Path, text: str, esdtool_cli: Cli) -> None:
    edit(checkpoint / "config.json", num_hidden_layers=10**9)
    result = esdtool_cli("eval", checkpoint, "--data", text)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "num_hidden_layers = 1000000000" in result.stderr


BAD = [b"", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b"null"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", BAD)
def test_damaged_files_are_one_line(name: str, content: bytes, checkpoint: Path) -> None:
    (checkpoint / name).write_bytes(content)
    try:
        read_architecture(str(checkpoint), "model.from x")
        load_fast_tokenizer(str(checkpoint), "model.from x")
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:  # without its settings, a tokenizer.json is as good as ever
        assert name == "tokenizer_config.json"


def test_ordinary_counts_are_no_sizes(bundled: Path) -> None:
    document = json.loads((bundled / "config.json").read_text())
    assert read_architecture(str(bundled), "x").num_hidden_layers == document["num_hidden_layers"]
