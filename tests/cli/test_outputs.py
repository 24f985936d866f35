"""Every output of every command: written as what the path is, refused where it would destroy something, announced."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from esdtool.cli import app
from esdtool.errors import EsdtoolError, OutputError, UsageError

Run = Callable[..., None]

ANALYZE = ("--json", "--csv", "--esd", "--html")
COMPARE = ("--json", "--csv", "--html")
OUTPUTS = [
    *(("analyze", option) for option in ANALYZE),
    *(("compare", option) for option in COMPARE),
    ("assign", "--out"),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint in a folder of its own, small enough for many analyses."""
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{n}.{role}.weight": torch.randn(56, 64, generator=generator) for n in (0, 1) for role in "qk"}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def run(command: str, source: Path, *options: object) -> None:
    """Run a command in this process on a checkpoint; `compare` gets it twice."""
    sources = [source, source] if command == "compare" else [source]
    app([command, *map(str, sources), *map(str, options)], standalone_mode=False)


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_each_file_is_announced_unless_quiet(
    command: str, option: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    run(command, model, option, target)
    assert f"esdtool: wrote {target}\n" in capsys.readouterr().err
    assert target.stat().st_size > 0
    run(command, model, option, target, "--quiet")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_a_fifo_receives_what_a_file_would_hold(command: str, option: str, model: Path, tmp_path: Path) -> None:
    run(command, model, option, tmp_path / "file", "--quiet")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    run(command, model, option, fifo, "--quiet")
    reader.join(10)
    expected = (tmp_path / "file").read_bytes()
    if option == "--esd":  # the library writes the metadata in any order
        assert {name: values.tolist() for name, values in load(received[0]).items()} == {
            name: values.tolist() for name, values in load(expected).items()
        }
    else:
        assert received == [expected]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_a_link_stays_and_its_target_is_replaced(command: str, option: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    target = tmp_path / "data" / "target"
    target.write_text("old")
    target.chmod(0o604)
    (tmp_path / "link").symlink_to(target)
    run(command, model, option, tmp_path / "link", "--quiet")
    assert (tmp_path / "link").is_symlink()
    assert target.read_bytes() != b"old"
    assert stat.S_IMODE(target.stat().st_mode) == 0o604
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["target"]


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_what_cannot_be_written_is_refused_before_the_work(
    command: str, option: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esdtool.analysis.run.run", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "missing" / "out")
    for name, reason in (
        ("folder", "it is a directory"),
        ("missing/out", "does not exist"),
        ("dangling", "does not exist"),
    ):
        with pytest.raises(OutputError, match=reason):
            run(command, model, option, tmp_path / name)


@pytest.mark.parametrize("command", ["analyze", "compare"])
def test_one_target_for_two_outputs(command: str, model: Path, tmp_path: Path) -> None:
    options = ANALYZE if command == "analyze" else COMPARE
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "same").symlink_to(tmp_path, target_is_directory=True)
    spellings = ("out", "./out", "same/out", "link")
    for first in options:
        for second in set(options) - {first}:
            for spelling in spellings:
                with pytest.raises(UsageError, match=f"{first} and {second} have one target|{second} and {first} have"):
                    run(command, model, first, tmp_path / "out", second, tmp_path / spelling)
    for stdout in ("-", "/dev/stdout", "/dev/fd/1"):
        with pytest.raises(UsageError, match="stdout"):
            run(command, model, "--json", "-", "--csv", stdout)
    assert not (tmp_path / "out").exists()


def test_a_device_takes_more_than_one_output(model: Path, tmp_path: Path) -> None:
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_text("")
    except OSError:
        pytest.skip("only root makes devices")
    run("analyze", model, "--json", null, "--csv", null, "--esd", null, "--html", null, "--quiet")
    assert stat.S_ISCHR(null.stat().st_mode)


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_a_checkpoint_is_not_replaced(command: str, option: str, model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("model.safetensors", "config.json"):
        (linked / name).symlink_to(model / name)
    (tmp_path / "link").symlink_to(weights)
    name, shard = "layers.0.q.weight", "model-00001-of-00001.safetensors"
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    save_file({name: load_file(weights)[name]}, sharded / shard)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: shard}}))
    (model / "tokenizer.json").write_text("{}")
    before = {path: path.read_bytes() for folder in (model, sharded) for path in folder.iterdir()}
    for source, target in (
        (weights, weights),
        (weights, tmp_path / "link"),
        (model, weights),
        (model, model / "config.json"),
        (model, model / "tokenizer.json"),
        (linked, weights),
        (linked, linked / "model.safetensors"),
        (tmp_path / "link", weights),
        (sharded / "model.safetensors.index.json", sharded / shard),
        (sharded, sharded / "model.safetensors.index.json"),
    ):
        with pytest.raises(UsageError, match=f"{option} .* would replace"):
            run(command, source, option, target)
    assert before == {path: path.read_bytes() for path in before}


def test_a_base_and_documents_are_not_replaced(model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    shutil.copy(model / "model.safetensors", base)
    document = tmp_path / "a.json"
    run("analyze", model, "--json", document, "--quiet")
    for arguments in (
        ("analyze", model, "--base", base, "--csv", base),
        ("assign", document, "--out", document),
        ("compare", document, "--html", document),
        ("eval", model, "--data", "stdlib", "--json", model / "model.safetensors"),
    ):
        with pytest.raises(UsageError, match="would replace"):
            run(*arguments)


def test_results_in_the_checkpoints_folder_may_be_replaced(model: Path) -> None:
    for _ in range(2):
        outputs = {"--json": "a.json", "--csv": "a.csv", "--esd": "esds.safetensors", "--html": "a.html"}
        run("analyze", model, "--quiet", *(part for option, name in outputs.items() for part in (option, model / name)))
        (model / "esds.safetensors").rename(model / "esds")  # another weight file would make the folder ambiguous
        run("assign", model / "a.json", "--out", model / "wd.json", "--quiet")
        (model / "esds").rename(model / "esds.safetensors")
        run("analyze", model / "model.safetensors", "--quiet", "--esd", model / "esds.safetensors")
        (model / "esds.safetensors").unlink()


@pytest.mark.slow
def test_stdout_by_its_path_is_stdout(model: Path, tmp_path: Path) -> None:
    found = {}
    for path in ("-", "/dev/stdout"):
        command = [sys.executable, "-m", "esdtool", "analyze", str(model), "--json", path]
        with (tmp_path / "out").open("wb") as stream:
            subprocess.run(command, stdout=stream, check=True, timeout=120)
        found[path] = (tmp_path / "out").read_text()
    assert found["-"] == found["/dev/stdout"]
    assert json.loads(found["-"])["format"] == "esdtool.analysis"


def test_errors_are_one_line_each(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EsdtoolError) as raised:
        run("analyze", model, "--json", tmp_path / "x", "--csv", tmp_path / "x")
    assert len(str(raised.value).splitlines()) == 1
    assert capsys.readouterr().out == ""
