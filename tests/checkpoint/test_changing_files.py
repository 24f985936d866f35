"""Files that are no regular files, and files that change before they are read: one line, never a wait or a signal."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from esdtool.checkpoint import open_checkpoint
from esdtool.checkpoint.stored_file import StoredFile
from esdtool.errors import CheckpointError
from tests.checkpoint.messages import message
from tests.checkpoint.samples import DATA, WRITERS

LAZY = sorted(set(WRITERS) - {"onnx"})
"""Containers of which elements are read after opening; an ONNX file is held in memory."""


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)  # the same content, size and time
    copy.replace(path)


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (shorten, "the file has become shorter"),
        (empty, "the file has become shorter"),
        (replace, "the file was replaced by another"),
        (touch, "the file was written to"),
        (Path.unlink, "No such file or directory"),
    ],
)
@pytest.mark.parametrize("container", LAZY)
def test_file_that_changes_after_opening(tmp_path, container, change, expected):
    path = WRITERS[container](tmp_path)
    checkpoint = open_checkpoint(path)
    name = next(iter(checkpoint.tensors))
    checkpoint.read(name)
    data = tmp_path / DATA.get(container, path.name)
    change(data)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(name)
    text = str(caught.value)
    assert data.name in text
    assert f"tensor {name!r}" in text
    assert expected in text
    assert "\n" not in text


@pytest.mark.parametrize("change", [shorten, replace, touch, Path.unlink])
def test_file_that_changes_during_a_read(tmp_path, change):
    path = WRITERS["safetensors"](tmp_path)
    file = StoredFile.at(path)

    def read() -> None:
        with file.open() as stream:
            stream.read(10)
            change(path)

    with pytest.raises(CheckpointError, match="was opened"):
        read()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("container", sorted(WRITERS))
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, container):
    path = WRITERS[container](tmp_path)
    data = tmp_path / DATA.get(container, path.name)
    data.unlink()
    os.mkfifo(data)
    assert "not a regular file" in message(tmp_path) or path == data
    if path == data:
        assert message(path).endswith((": neither a file nor a folder", ": not a regular file"))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", ".metadata"])
def test_links_to_devices(tmp_path, name):
    if name == "config.json":
        WRITERS["safetensors"](tmp_path)
    (tmp_path / name).symlink_to("/dev/zero")
    assert message(tmp_path) == f"{tmp_path / name}: cannot read: not a regular file"


def test_index_with_impossible_file_names(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for shard in ("a\\u0000b.safetensors", "x" * 5000 + ".safetensors"):
        index.write_text('{"weight_map": {"w": "' + shard + '"}}')
        assert message(tmp_path).startswith(f"{index}: 1 shard of 1 not in the folder: ")


def test_reads_stay_within_the_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    file = StoredFile.at(path)
    part = file.part(2, 5)
    assert part.read(1, 3).tobytes() == b"345"
    with part.open() as stream:
        assert (stream.read(), stream.seek(-2, os.SEEK_END), stream.read(10)) == (b"23456", 3, b"56")
    for start, count in ((0, 6), (5, 1), (-1, 2), (0, 2**62), (0, -1)):
        with pytest.raises(CheckpointError, match="outside of the file"):
            part.read(start, count)
    for start, size in ((4, 2), (-1, 1), (0, 2**70)):
        with pytest.raises(CheckpointError, match="outside of the file"):
            part.part(start, size)
