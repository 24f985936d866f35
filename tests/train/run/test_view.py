"""What a user sees: a bar that moves at every step on a terminal, lines elsewhere, and Ctrl-C acknowledged at once."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from esdtool.train.run import view
from esdtool.train.run.view import PlainView


def on_a_terminal(command: list[str], stop_at: str = "") -> tuple[str, int]:
    """Everything that a command writes to a terminal, and its exit code; Ctrl-C is sent when a text appears."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command, stderr=follower, stdout=subprocess.DEVNULL, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(follower)
    said = b""
    stopped = not stop_at
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux's end of a terminal
            break
        if not part:
            break
        said += part
        if not stopped and stop_at.encode() in said:
            stopped = True
            process.send_signal(signal.SIGINT)
    os.close(leader)
    return said.decode(errors="replace"), process.wait(timeout=60)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_shows_phases_a_moving_bar_and_the_end(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(
        schedule={"steps": 60}, logging={"every": 50, "tensorboard": True}, eval={"every": 30, "average": 0.1}
    )
    said, code = on_a_terminal([sys.executable, "-m", "esdtool", "train", str(config)])
    assert code == 0, said
    text = plain(said)
    for phase in ("training the tokenizer", "60/60", "ETA 0:00:00"):
        assert phase in text, text
    shown = {int(step) for step in re.findall(r"(\d+)/60", text)}
    assert len(shown - {1, 50, 60}) >= 1, shown  # between two lines of metrics, too
    assert f"tensorboard --logdir {tmp_path / 'run'}" in text
    assert "the mean of the weights over the last 6 steps has a perplexity of" in text
    assert "Traceback" not in text


def test_ctrl_c_is_acknowledged_at_once(write_config: Callable[..., Path]) -> None:
    config = write_config(schedule={"steps": 5000}, checkpoint={"every": 5000}, eval={"every": 5000})
    said, code = on_a_terminal([sys.executable, "-m", "esdtool", "train", str(config)], stop_at="tokens/s")
    text = plain(said)
    assert code == 130
    assert "SIGINT: saving a checkpoint after this step; once more to end at once" in text
    assert text.index("once more") < text.index("go on with --resume auto")


def test_a_phase_is_a_line_only_if_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(view, "_LONG_PHASE", 0.05)
    shown = PlainView(10)
    shown.phase("short")
    shown.phase("long")
    time.sleep(0.5)
    shown.step(1)
    shown.phase("another")
    shown.close()
    time.sleep(0.2)
    assert capsys.readouterr().err == "esdtool: long ...\n"
