"""Names that others chose steer no terminal, whatever command shows them."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from esdtool.__main__ import main
from tests.support.test_terminal import HARMFUL

EVIL = "\x1b]52;c;aGk=\x07\x1b[2J\u202e\x9b1m[bold]"


def weights(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(56, 64, generator=generator) for name in names}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a checkpoint with an evil name and evil names in it, of modules, roles, skipped tensors and the model."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"model{EVIL}"
    path.mkdir()
    tensors = weights(*(f"{EVIL}.layers.{n}.{EVIL}q_proj.weight" for n in (0, 1)), f"layers.0.mlp.{EVIL}.weight")
    save_file(tensors | {f"{EVIL}.bias": torch.zeros(3)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": EVIL}))
    return path


def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the program in this process, and return all that it printed on either stream."""
    monkeypatch.chdir(Path(os.environ["ESDTOOL_CACHE_DIR"]).parent)  # where a default output may lie
    monkeypatch.setattr(sys, "argv", ["esdtool", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (0, 1, 2, 3)
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return out + err


def harmless(text: str) -> None:
    found = HARMFUL.search(text)
    assert found is None, text[max(0, found.start() - 80) : found.end() + 20]


def test_analyses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for options in (
        (),
        ("--dry-run",),
        ("--sparklines", "--top", 2),
        ("--format", "markdown"),
        ("--fit", "ks", "--sort", "name"),
        ("--json", "-"),
        ("--include", EVIL.replace("[", r"\[")),
        ("--include", f"({EVIL}"),
        ("--html", tmp_path / f"{EVIL}.html"),
        ("--html", tmp_path / EVIL / "missing.html"),
        ("--base", folder / "model.safetensors"),
        (folder,),
        ("--spectrum", "slq"),
        ("--revision", EVIL),
        ("--device", EVIL),
        (f"--{EVIL}",),
    ):
        shown = run(monkeypatch, capfd, "analyze", folder, *options)
        harmless(shown)
    assert "\\x1b]52;c;aGk=\\x07\\x1b[2J\\u202e\\x9b1m[bold]" in run(monkeypatch, capfd, "analyze", folder)


def test_other_commands(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, capfd, "analyze", folder, "--json", tmp_path / "a.json", "--quiet")
    other = tmp_path / f"other{EVIL}.safetensors"
    save_file(weights(f"{EVIL}.layers.0.{EVIL}q_proj.weight", f"layers.7.{EVIL}.weight"), other)
    wd = tmp_path / f"wd{EVIL}.json"
    for arguments in (
        ("assign", folder, "--out", wd),
        ("assign",),
        ("assign", folder, "--names", "live"),
        ("assign", "--check", wd, "--model", other),
        ("assign", "--check", wd, "--model", folder),
        ("compare", folder, other),
        ("compare", tmp_path / "a.json", other, "--format", "markdown"),
        ("compare", folder, other, "--plots", tmp_path / f"plots{EVIL}"),
        ("plot", tmp_path / "a.json", wd, "--out", tmp_path / f"figures{EVIL}"),
        ("plot", folder, "--kind", "esd", "--out", tmp_path / f"figures{EVIL}"),
        ("plot", folder, "--kind", EVIL),
        ("plot", folder, "--module", EVIL),
        ("eval", folder, "--data", f"{tmp_path}/{EVIL}*.txt"),
        (EVIL,),
        ("train", f"missing{EVIL}.toml"),
    ):
        harmless(run(monkeypatch, capfd, *arguments))


def test_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    shards, missing = tmp_path / "shards", tmp_path / f"{EVIL}missing"
    shards.mkdir()
    index = {"weight_map": {f"a{EVIL}": f"{EVIL}.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / f"{EVIL}.bin").write_bytes(b"nothing")
    torch.save({EVIL: {EVIL: object}}, tmp_path / f"p{EVIL}.pt")
    header = json.dumps({EVIL: {"dtype": EVIL, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / f"s{EVIL}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    (tmp_path / f"{EVIL}.json").write_text(json.dumps({"format": "esdtool.analysis", "version": EVIL}))
    (tmp_path / f"wd{EVIL}.json").write_text(
        json.dumps({"format": "esdtool.weight_decay", "version": 1, "parameters": {EVIL: {"weight_decay": EVIL}}})
    )
    for path in (shards, missing, *sorted(tmp_path.glob("*.*"))):
        for command in ("analyze", "assign", "plot"):
            harmless(run(monkeypatch, capfd, command, path))


def test_training_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    quoted = json.dumps(EVIL)
    for text in (
        f"[run]\nname = {quoted}\n",
        f"{quoted} = 1\n",
        f"[{quoted}]\na = 1\n",
        f"[data]\nsource = {quoted}\n",
        f"[data]\nsource = 'files'\nfiles = [{quoted}]\n[schedule]\nsteps = 1\n[model]\npreset = 'llama-tiny'\n",
        f"[model]\npreset = {quoted}\n",
        f"[weight_decay]\npolicy = {quoted}\n",
        f"= {quoted}",
    ):
        config = tmp_path / f"{EVIL}.toml"
        config.write_text(text)
        for command in (("train", config, "--dry-run"), ("train", config, "--print-config"), ("sweep", config)):
            harmless(run(monkeypatch, capfd, *command))
        harmless(run(monkeypatch, capfd, "train", config, "--set", f"{EVIL}={EVIL}", "--dry-run"))


def test_on_a_terminal_with_progress(folder: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "esdtool", "analyze", str(folder), "--sparklines", "--no-cache"],
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(follower)
    printed = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        printed += piece
    process.wait(60)
    os.close(leader)
    text = printed.decode()
    assert process.returncode == 0
    # What rich sends itself: colours, and the lines of a bar that is drawn again.
    rest = re.sub(r"\x1b\[(\d+(;\d+)*)?m|\x1b\[\d*[AK]|\x1b\[2K|\x1b\[\?25[lh]|\r", "", text)
    harmless(rest)
    assert "\x1b]52" not in text
    assert "\x1b[2J" not in text
