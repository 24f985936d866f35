"""Analyse a checkpoint and say what was found: the whole of `esdtool.analyze`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

from esdtool.analysis import run
from esdtool.analysis.document import Analysis
from esdtool.findings.diagnosis import diagnose

_Arguments = ParamSpec("_Arguments")


def _diagnosed(function: Callable[_Arguments, Analysis]) -> Callable[_Arguments, Analysis]:
    @functools.wraps(function)
    def whole(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Analysis:
        return diagnose(function(*args, **kwargs))

    return whole


analyze = _diagnosed(run.analyze)
