"""Every example in a docstring runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import esdtool

MODULES = [name for _, name, _ in pkgutil.walk_packages(esdtool.__path__, "esdtool.") if not name.endswith(".__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
