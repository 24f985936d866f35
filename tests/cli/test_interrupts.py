"""Ctrl-C while modules are imported: libraries that catch it must not go on half imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
def test_elsewhere_it_is_raised_as_usual(tmp_path: Path) -> None:
    interrupt = "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)"
    body = f"try:\n{interrupt}\nexcept KeyboardInterrupt:\n    print('raised')"
    found = run(body, tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (0, "raised\nwent on\n", "")
