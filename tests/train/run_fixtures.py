"""A model of 150,000 parameters, a text with structure, and readers of what a run writes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VOCABULARY = 300


@pytest.fixture
def text(tmp_path: Path) -> str:
    """The glob of a small text that is far from random words: half of each sentence follows from the other half."""
    source = random.Random(0)
    nouns = ["cat", "dog", "bird", "fish", "horse", "mouse", "goat", "sheep"]
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(60):
        lines = []
        for _ in range(20 + index % 7):
            noun = source.choice(nouns)
            lines.append(f"the {noun} sees the {noun} and the {noun} runs home.")
        (folder / f"{index:02}.txt").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "*.txt")


@pytest.fixture
def model_config(tmp_path: Path) -> str:
    """config.json of a LLaMA whose matrices have 64 eigenvalues."""
    document = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return str(path)


@pytest.fixture
def document(tmp_path: Path, text: str, model_config: str) -> Callable[..., dict[str, dict[str, Any]]]:
    """Makes the nested dictionary of a run of 12 steps; sections replace or add keys."""

    def make(name: str = "run", **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
        made: dict[str, dict[str, Any]] = {
            "model": {"config": model_config},
            "data": {"source": "files", "files": [text], "validation_fraction": 0.1},
            "tokenizer": {"train_vocab_size": VOCABULARY},
            "batch": {"global_size": 4, "micro_size": 2, "sequence_length": 32},
            "optimizer": {"lr": 3e-3},
            "schedule": {"steps": 12, "warmup_steps": 2},
            "weight_decay": {"interval": 5},
            "eval": {"every": 4, "tokens": 500},
            "checkpoint": {"every": 5, "keep": 20},
            "logging": {"every": 2, "tensorboard": False},
            "run": {"dir": str(tmp_path / name), "device": "cpu", "threads": 1},
        }
        for section, values in sections.items():
            made[section] = dict(values) if section in ("model", "tokenizer") else made.get(section, {}) | values
        chosen = made["weight_decay"]
        if chosen.get("policy") in ("uniform", "none", "file") and "interval" not in sections["weight_decay"]:
            del chosen["interval"]  # of the policies that have one
        return made

    return make


@pytest.fixture
def make_config(document: Callable[..., dict[str, dict[str, Any]]]) -> Callable[..., Any]:
    """`document` as a resolved configuration."""
    from esdtool.train.config.loading import config_from_mapping

    return lambda name="run", **sections: config_from_mapping(document(name, **sections))


@pytest.fixture
def write_config(tmp_path: Path, make_config: Callable[..., Any]) -> Callable[..., Path]:
    """The configuration as a TOML file."""
    from esdtool.train.config.loading import to_toml

    def write(name: str = "run", **sections: dict[str, Any]) -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(to_toml(make_config(name, **sections)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def logs() -> Callable[[Path], tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Lines of metrics.jsonl and decay.jsonl, without what is a matter of the clock."""

    def read(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        def lines(name: str) -> list[dict[str, Any]]:
            found = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
            return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds")} for line in found]

        return lines("metrics.jsonl"), lines("decay.jsonl")

    return read
