"""Ctrl-C while modules are imported: libraries that catch it must not go on half imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.checkpoint.remote_server import Fault
from tests.conftest import llama_tensors

SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException:
    pass
"""

PROGRAM = """
import os, signal, sys, time
from esdtool.__main__ import _notice_interrupts
_notice_interrupts()
{body}
print("went on")
"""


def run(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("body", ["import swallows", "def lazily():\n    import outer\nlazily()"])
def test_an_import_cannot_swallow_it(body: str, tmp_path: Path) -> None:
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    (tmp_path / "outer.py").write_text("import swallows\n")
    found = run(body, tmp_path)
    assert (found.returncode, found.stdout) == (130, "")
    assert found.stderr.strip() == "esdtool: interrupted"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_silent_server_does_not_hold_it_up(web_server, tmp_path: Path) -> None:
    save_file(llama_tensors(1), web_server.folder / "model.safetensors")
    location = f"{web_server.url}/model.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-m", "esdtool", "analyze", location, "--quiet"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Its header has come; of the tensors nothing ever does.
    while sum(method == "GET" for method, *_ in web_server.requests) < 2 and process.poll() is None:
        time.sleep(0.01)
    web_server.always = Fault(delay=30)
    while sum(method == "GET" for method, *_ in web_server.requests) < 4 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert (process.returncode, out, err.strip()) == (130, "", "esdtool: interrupted")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_elsewhere_it_is_raised_as_usual(tmp_path: Path) -> None:
    interrupt = "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)"
    body = f"try:\n{interrupt}\nexcept KeyboardInterrupt:\n    print('raised')"
    found = run(body, tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (0, "raised\nwent on\n", "")
