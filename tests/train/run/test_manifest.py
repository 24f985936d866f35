"""Checkpoints that something has changed since they were written, and manifests that say anything at all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esdtool.errors import CheckpointError
from esdtool.train.loop import train
from esdtool.train.run.manifest import MANIFEST, find_checkpoint, read_manifest

Config = Callable[..., Any]
Logs = Callable[[Path], tuple[list[dict[str, Any]], list[dict[str, Any]]]]


@pytest.fixture
def run(make_config: Config) -> Path:
    return train(make_config(schedule={"steps": 6}, checkpoint={"every": 3}), quiet=True).run


def test_one_flipped_bit_of_any_file_is_noticed(run: Path, make_config: Config, logs: Logs) -> None:
    newest = run / "checkpoints/step_000006"
    expected = logs(run)
    source = random.Random(0)
    for file in sorted(newest.iterdir()):
        if file.name == MANIFEST:
            continue
        whole = file.read_bytes()
        for _ in range(3):
            changed = bytearray(whole)
            changed[source.randrange(len(whole))] ^= 1 << source.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match=rf"{file.name}: .*changed since it was written") as caught:
                read_manifest(newest)
            assert "\n" not in str(caught.value)
            saved, remarks = find_checkpoint(run, "auto")
            assert saved is not None
            assert (saved.step, len(remarks)) == (3, 1)
        file.write_bytes(whole)
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    train(make_config(schedule={"steps": 6}, checkpoint={"every": 3}), resume="auto", quiet=True)
    assert logs(run) == expected


def test_a_checkpoint_without_checksums_still_opens(run: Path) -> None:
    path = run / "checkpoints/step_000003"
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["checksums"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert read_manifest(path).step == 3


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": "3"},
        {"step": 3.5},
        {"step": None},
        {"config": []},
        {"config": {"model": 3}},
        {"files": 3},
        {"files": {"../../metrics.jsonl": 5}},
        {"files": {"/dev/zero": 0}},
        {"files": {"model.safetensors": -1}},
        {"files": {"model.safetensors": 10**400}},
        {"checksums": {"../x": "0"}},
        {"checksums": 1},
        {"format": ["esdtool.train_checkpoint"]},
        {"version": "1"},
    ],
)
def test_a_manifest_of_anything_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    document: dict[str, Any] = {"format": "esdtool.train_checkpoint", "version": 1, "step": 3, "config": {}}
    (tmp_path / MANIFEST).write_text(json.dumps({**document, "files": {}, "checksums": {}} | change))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"step": ' + b"1" * 5000 + b"}"])
def test_a_manifest_that_is_no_json_object_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)
