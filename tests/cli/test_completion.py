"""What the shell is offered: keys that a configuration has, and modules that the checkpoint on the line has."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from esdtool.cli.completion import module_names, settings
from esdtool.train.config.loading import load_config
from tests.conftest import BUNDLED


def _context(**parameters: Any) -> Any:
    return SimpleNamespace(params=parameters, args=parameters.pop("args", []))


def test_settings_are_those_of_a_configuration() -> None:
    offered = {key.removesuffix("=") for key in settings("")}
    assert set(load_config(["examples/configs/quickstart.toml"], []).flat()) <= offered
    assert settings("weight_decay.pol") == ["weight_decay.policy="]
    assert "weight_decay.awd_scale=" in settings("weight_decay.a")  # of another policy
    assert settings("no.such") == []


@pytest.mark.parametrize("name", ["checkpoint", "sources", "args"])
def test_modules_are_those_of_the_checkpoint(name: str) -> None:
    source = str(BUNDLED) if name == "checkpoint" else [str(BUNDLED)]
    found = module_names(_context(**{name: source}), "model.layers.3.mlp")
    assert len(found) == 3
    assert all(re.fullmatch(expression, expression) for expression in found)


def test_what_cannot_be_read_gives_none(tmp_path: Any) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for source in (tmp_path / "broken.safetensors", "org/name", tmp_path / "gone"):
        assert module_names(_context(sources=[str(source)]), "") == []
    assert module_names(_context(), "") == []
