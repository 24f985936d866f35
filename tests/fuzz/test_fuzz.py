"""Mutated files end in an exit code and a line, and leave the machine alone: some seconds of it, with fixed seeds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.campaign import run
from tests.fuzz.formats import FORMATS
from tests.fuzz.sandbox import DECOY, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and fork")

INPUTS = 8


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    found = Sandbox()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import os; os.system('true')", "process: os.system"),
        ("import subprocess; subprocess.run(['true'])", "process: "),
        ("import socket; socket.create_connection(('localhost', 9))", "network: "),
        ("open('stray', 'w')", "writes 'stray'"),
        ("import os; os.open('stray', os.O_CREAT | os.O_RDWR)", "writes 'stray'"),
        ("import pathlib; pathlib.Path('../stray').mkdir()", "os.mkdir"),
        ("import os; os.symlink('/etc', 'tmp/link'); open('tmp/link/stray', 'a')", "writes 'tmp/link/stray'"),
        (f"import {DECOY}.run", f"imports {DECOY}"),
        ("import pickle; pickle.loads(b'cos\\nsystem\\n.')", "unpickles os.system"),
        ("x = bytearray(3 * 2**29)", "1.5 GiB"),
        ("x = bytearray(2**36)", "traceback"),
        ("while True: pass", " s"),
        ("import os; os.abort()", "exit -6"),
        ("raise SystemExit(1)", "0 lines of error"),
        ("print('\\x1b[2J')", "unprintable"),
        ("raise ValueError", "traceback"),
    ],
)
def test_the_sandbox_notices(sandbox: Sandbox, tmp_path: Path, code: str, fault: str) -> None:
    faults = sandbox.run(tmp_path, "--python", code).faults()
    assert any(fault in found for found in faults), faults


def test_the_sandbox_allows_what_is_asked_for(sandbox: Sandbox, tmp_path: Path) -> None:
    code = (
        "import os; open('out/a', 'w').close(); os.rename('out/a', 'out/b'); os.remove('out/b'); open(os.devnull, 'w')"
    )
    assert sandbox.run(tmp_path, "--python", code).faults() == []


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_handled(name: str, sandbox: Sandbox, tmp_path: Path) -> None:
    report = run(name, sandbox, tmp_path, inputs=INPUTS)
    assert report.mishandled == []
    assert report.inputs == INPUTS
