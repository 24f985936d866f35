"""What every test of training needs: no network, a cache of its own, and small configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that no other test has written to."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ESDTOOL_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def settings() -> Callable[..., Any]:
    """Makes a configuration from sections, on top of a small valid one."""
    from esdtool.train.config.loading import config_from_mapping

    def make(**sections: dict[str, Any]) -> Any:
        document: dict[str, dict[str, Any]] = {
            "model": {"preset": "llama-1m"},
            "tokenizer": {"train_vocab_size": 300},
            "batch": {"global_size": 8, "micro_size": 2, "sequence_length": 16},
            "schedule": {"steps": 10},
            "eval": {"tokens": 200},
        }
        for name, values in sections.items():
            replaced = name in ("model", "tokenizer")
            document[name] = dict(values) if replaced else {**document.get(name, {}), **values}
        return config_from_mapping(document)

    return make


@pytest.fixture
def words() -> Callable[[int], list[str]]:
    """Documents that differ from each other, of a few to a few dozen words."""

    def make(count: int) -> list[str]:
        return [" ".join(f"word{index}x{word % 7}" for word in range(3 + index % 29)) for index in range(count)]

    return make
