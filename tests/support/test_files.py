"""Files are written wholly or not at all."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from esdtool.errors import OutputError
from esdtool.support.files import atomic_write, atomic_write_text, cache_directory, default_mode


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("good")

    def fail_half_way() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert target.read_text() == "good"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.json"
    target.write_text("good")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"out\.json: cannot write: No space left"):
        atomic_write_text(target, "new")
    assert target.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [target]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write: No such file or directory"):
        atomic_write_text(tmp_path / "missing" / "out.json", "text")


def test_modes_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "new", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    (tmp_path / "old").write_text("")
    (tmp_path / "old").chmod(0o604)
    atomic_write_text(tmp_path / "old", "text")
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o604


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESDTOOL_CACHE_DIR", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("ESDTOOL_CACHE_DIR")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_directory() == Path("/x/esdtool")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_directory() == Path("/h/.cache/esdtool")


def test_the_umask_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other threads may make files at any moment, and must never see another umask than the process's own.
    before = os.umask(0o077)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail(f"umask({mask:o})"))
    try:
        atomic_write_text(tmp_path / "out", "text")
        assert default_mode(tmp_path) == 0o600
    finally:
        monkeypatch.undo()
        assert os.umask(before) == 0o077
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_new_files_have_the_mode_that_open_gives(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "plain").write_text("")
        atomic_write_text(tmp_path / "ours", "")
        save_file({"a": np.ones(2)}, tmp_path / "private.safetensors")
        with atomic_write(tmp_path / "ours.safetensors") as temporary:
            save_file({"a": np.ones(2)}, temporary)
        found = default_mode(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["ours"] == modes["ours.safetensors"] == modes["plain"] == found == 0o666 & ~mask


def test_a_replaced_file_keeps_its_mode_and_group(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    os.chown(target, -1, 4321 if os.getuid() == 0 else os.getgroups()[-1])
    target.chmod(0o4640)
    before = target.stat()
    atomic_write_text(target, "new")
    after = target.stat()
    assert target.read_text() == "new"
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_symbolic_link_leads_to_what_is_replaced(tmp_path: Path) -> None:
    folder, links = tmp_path / "data", tmp_path / "links"
    folder.mkdir()
    links.mkdir()
    (folder / "old.json").write_text("old")
    for name, leads_to in (("near", "../data/old.json"), ("far", "near"), ("new", folder / "new.json")):
        (links / name).symlink_to(leads_to)
    written: list[Path] = []
    for name in ("near", "far", "new"):
        with atomic_write(links / name) as temporary:
            written.append(temporary.parent)
            temporary.write_text(name)
    assert set(written) == {folder}  # a rename is atomic within one file system only
    assert all((links / name).is_symlink() for name in ("near", "far", "new"))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"old.json": "far", "new.json": "new"}


def test_links_in_a_circle_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to-folder").symlink_to("folder")
    for name, reason in (("a", "circle"), ("folder", "it is a directory"), ("to-folder", "it is a directory")):
        with pytest.raises(OutputError, match=f"{name}: cannot write: .*{reason}"):
            atomic_write_text(tmp_path / name, "text")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "folder", "to-folder"}


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_fifo_is_written_to(through_a_link: bool, tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    atomic_write_text(link if through_a_link else fifo, "text" * 50_000)  # more than a pipe holds
    reader.join(10)
    assert received == [b"text" * 50_000]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert link.is_symlink()


def test_a_device_is_written_to(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        device.write_text("")
    except OSError:
        pytest.skip("only root makes devices")
    atomic_write_text(device, "text")
    assert stat.S_ISCHR(device.stat().st_mode)
    full = tmp_path / "full"
    os.mknod(full, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
    with pytest.raises(OutputError, match="full: cannot write: No space left on device"):
        atomic_write_text(full, "text")
    assert stat.S_ISCHR(full.stat().st_mode)


def test_a_block_device_is_refused(tmp_path: Path) -> None:
    device = tmp_path / "disk"
    try:
        os.mknod(device, 0o600 | stat.S_IFBLK, os.makedev(7, 250))
    except OSError:
        pytest.skip("only root makes devices")
    with pytest.raises(OutputError, match="disk: cannot write: it is a block device"):
        atomic_write_text(device, "text")
    assert stat.S_ISBLK(device.stat().st_mode)


def test_descriptors_are_written_where_they_stand(tmp_path: Path) -> None:
    # The shell's `> out` is one open file: what is written goes on from where it is, and the file stays the same one.
    script = (
        "import sys; from esdtool.support.files import atomic_write_text as write;"
        "print('before'); write(sys.argv[1], 'written\\n'); print('after')"
    )
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to("/dev/stdout")
    for path in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", str(tmp_path / "link")):
        with out.open("wb") as stream:
            inode = os.fstat(stream.fileno()).st_ino
            subprocess.run([sys.executable, "-c", script, path], stdout=stream, check=True)
        assert (out.read_text(), out.stat().st_ino) == ("before\nwritten\nafter\n", inode), path
    found = subprocess.run([sys.executable, "-c", script, "/dev/stdout"], stdout=subprocess.PIPE, check=True)
    assert found.stdout == b"before\nwritten\nafter\n"


def test_a_disk_that_is_full_for_a_library(tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"good")

    def write(limit: int) -> None:
        """Fail as on a full disk: no file may be longer than `limit` bytes."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with atomic_write(target) as temporary:
                save_file({"a": np.ones(10_000)}, temporary)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.raises(OutputError, match=r"out\.safetensors: cannot write: .*File too large") as raised:
        write(4096)
    assert len(str(raised.value).splitlines()) == 1
    assert target.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [target]
    write(resource.RLIM_INFINITY)
    assert load_file(target)["a"].sum() == 10_000


def test_text_that_has_no_bytes_is_spelled_out(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "out.json", '["caf\udce9"]')
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == ["caf\udce9"]


def test_long_names_are_written(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    atomic_write_text(target, "text")
    assert target.read_text() == "text"
