"""The tiny model, and jobs of several gloo processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny_model.py."""
    spec = importlib.util.spec_from_file_location("tiny_model", HERE / "tiny_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What each rank of a job of n processes printed; every n runs once."""
    finished: dict[int, list[dict[str, Any]]] = {}

    def run(size: int) -> list[dict[str, Any]]:
        if size not in finished:
            rendezvous = tmp_path_factory.mktemp("job") / "rendezvous"
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            processes = [
                subprocess.Popen(
                    [sys.executable, str(HERE / "rank_process.py"), str(rendezvous), str(rank), str(size)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for rank in range(size)
            ]
            try:
                outputs = [process.communicate(timeout=300) for process in processes]
            finally:
                for process in processes:
                    process.kill()
            for process, (_, errors) in zip(processes, outputs, strict=True):
                assert process.returncode == 0, errors
            finished[size] = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
        return finished[size]

    return run
