"""Bad input on disk: one line that names the file, the tensor and the remedy; nothing is run."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.messages import message

LOOKED_FOR = (
    "looked for model.safetensors, diffusion_pytorch_model.safetensors, adapter_model.safetensors, pytorch_model.bin, "
    "their .index.json, .metadata (torch.distributed.checkpoint), and any other .safetensors, .bin, .pt, .pth, "
    ".ckpt, .pt2, .pth.tar, .pt.tar, .gguf, .onnx, .keras, .h5, .hdf5 file"
)


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./org/name", "dir/model.safetensors", "bad name/x"])
def test_missing_path_that_cannot_be_a_hub_id(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message(name) == f"{name}: no such file or directory"


def test_missing_path_object(tmp_path):
    assert message(tmp_path / "x.pt") == f"{tmp_path / 'x.pt'}: no such file or directory"


def test_broken_link(tmp_path):
    (tmp_path / "x.pt").symlink_to("gone.pt")
    assert message(tmp_path / "x.pt") == f"{tmp_path / 'x.pt'}: a link to 'gone.pt', which does not exist"


def test_path_longer_than_the_system_allows():
    assert message("x" * 5000) == f"{'x' * 5000}: cannot read: File name too long"


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model.pt"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    assert message(tmp_path / name) == f"{tmp_path / name}: empty file; download or copy it again"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    expected = f"{tmp_path / name}: a Git LFS pointer, not the weights; run 'git lfs pull' in its repository"
    assert message(tmp_path) == expected


KNOWN = ".safetensors, .bin, .pt, .pth, .ckpt, .pt2, .pth.tar, .pt.tar, .gguf, .onnx, .keras, .h5, .hdf5"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.ggml", f".ggml files are not read; known are {KNOWN} and *.index.json"),
        ("x.txt", f"unknown format '.txt'; known are {KNOWN} and *.index.json"),
    ],
)
def test_unknown_formats(tmp_path, name, expected):
    (tmp_path / name).write_bytes(b"GGUF")
    assert message(tmp_path / name) == f"{tmp_path / name}: {expected}"


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"abc", "truncated: 3 bytes are too few for a safetensors header; download or copy it again"),
        (
            struct.pack("<Q", 2**60) + b"{}",
            "not a safetensors file: it claims a header of 1152921504606846976 bytes (limit 100000000)",
        ),
        (
            struct.pack("<Q", 500) + b'{"a": ',
            "truncated: its header takes 508 bytes but the file has 14; download or copy it again",
        ),
        (b"\x04" + b"\0" * 7 + b'{"\xff}', "not a safetensors file: its header is not UTF-8 text at byte 10"),
        (b"\x04" + b"\0" * 7 + b"{no}", "not a safetensors file: its header is not valid JSON"),
    ],
    ids=["short", "absurd length", "cut header", "not UTF-8", "not JSON"],
)
def test_broken_safetensors_header(tmp_path, content, expected):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert message(path) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        ({"w": F32}, 8, "truncated: its header promises {0} bytes but the file has {1}; download or copy it again"),
        ({"w": F32}, 20, "damaged: the file has {1} bytes but its header describes {0}; download or copy it again"),
        ({"w": F32 | {"shape": [3, 2]}}, 16, "damaged header: invalid shape, data type, or offset for tensor `w`"),
        ({"w": F32 | {"data_offsets": [4, 16]}}, 16, "damaged header: invalid offset for tensor `w`"),
    ],
    ids=["promises too much", "too long", "shape and bytes differ", "hole"],
)
def test_header_that_does_not_fit_its_data(tmp_path, raw_safetensors, header, data, expected):
    path = tmp_path / "model.safetensors"
    content = raw_safetensors(header, b"\0" * data)
    path.write_bytes(content)
    assert message(path) == f"{path}: {expected.format(len(content) - data + 16, len(content))}"


def test_truncated_safetensors_at_every_length(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file({"w": torch.ones(3, 3)}, whole)
    content = whole.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(1, len(content)):
        path.write_bytes(content[:length])
        assert message(path).startswith(f"{path}: truncated: ")


def test_unpickled_json_config(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    for content, expected in [
        (b'{"model_type": ', "not valid JSON: Expecting value at line 1, column 16"),
        (b"[1]", "not a JSON object, but a list"),
        (b'{"a": "\xff"}', "not valid JSON: not UTF-8 text at byte 7"),
    ]:
        config.write_bytes(content)
        assert message(tmp_path) == f"{config}: {expected}"


def index_with(write_shards, folder, tensors, change):
    """Write shards and change the index's content; returns the index's path."""
    index = write_shards(folder, tensors)
    content = json.loads(index.read_text())
    index.write_text(json.dumps(change(content)))
    return index


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        ('"x"', "not a JSON object, but a str"),
        ("{}", "not an index of shards: no object under the key 'weight_map'"),
        ('{"weight_map": []}', "not an index of shards: no object under the key 'weight_map'"),
        ('{"weight_map": {}}', "'weight_map' names no tensor"),
        ('{"weight_map": {"w": 3}}', "tensor 'w': the shard must be a file name, not 3"),
        (
            '{"weight_map": {"w": "shard.xyz"}}',
            "1 shard of 1 not in the folder: shard.xyz; download or copy the checkpoint again",
        ),
    ],
)
def test_broken_index(tmp_path, text, expected):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert message(tmp_path) == f"{index}: {expected}"


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "a/../../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "C:\\x.safetensors"],
)
def test_index_that_leaves_the_folder(tmp_path, tensors, write_shards, shard):
    folder = tmp_path / "model"
    save_file({"scale": torch.zeros(2)}, tmp_path / "x.safetensors")

    def point_outside(content):
        content["weight_map"]["scale"] = shard
        return content

    index = index_with(write_shards, folder, tensors, point_outside)
    expected = f"{index}: tensor 'scale': refused: shard {shard!r} lies outside the checkpoint's folder"
    assert message(folder) == expected


def test_missing_shards(tmp_path, tensors, write_shards):
    index = write_shards(tmp_path, tensors)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert message(tmp_path) == (
        f"{index}: 1 shard of 3 not in the folder: model-00002-of-00003.safetensors; "
        "download or copy the checkpoint again"
    )


def test_shard_without_a_tensor_that_the_index_lists(tmp_path, tensors, write_shards):
    def add(content):
        content["weight_map"]["ghost.weight"] = "model-00001-of-00003.safetensors"
        return content

    index = index_with(write_shards, tmp_path, tensors, add)
    assert message(tmp_path) == (
        f"{index}: tensor 'ghost.weight' should be in model-00001-of-00003.safetensors, but is not; "
        "index and shards do not fit together"
    )


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert message(tmp_path) == f"{tmp_path}: no weights: {LOOKED_FOR}"
    (tmp_path / "model.ggml").write_bytes(b"x")
    assert message(tmp_path) == (
        f"{tmp_path}: no weights: {LOOKED_FOR}; found model.ggml, of a format that is not read"
    )


def test_folder_whose_subfolders_have_weights(tmp_path):
    for name in ("step-2", "step-1"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.zeros(1)}, tmp_path / name / "model.safetensors")
    (tmp_path / "logs").mkdir()
    assert message(tmp_path) == (
        f"{tmp_path}: no weights: {LOOKED_FOR}; there are weights in its subfolders step-1, step-2"
    )


def test_several_files_and_no_index(tmp_path):
    for name in ("b.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(b"x")
    assert message(tmp_path) == (
        f"{tmp_path}: 2 weight files and no index that joins them: a.pt, b.safetensors; "
        "name one of them, or restore the .index.json"
    )


def test_lone_shard(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "model-00002-of-00003.safetensors")
    assert message(tmp_path) == (
        f"{tmp_path}: model-00002-of-00003.safetensors is one of 3 shards and there is no index; "
        "restore the others and the .index.json, or name this file to read it alone"
    )


def test_model_and_adapter_in_one_folder(tmp_path):
    for name in ("model.safetensors", "adapter_model.safetensors"):
        save_file({"w": torch.zeros(1)}, tmp_path / name)
    assert message(tmp_path) == (
        f"{tmp_path}: weights of different things: model.safetensors, adapter_model.safetensors; "
        "name one of these files"
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root and Windows read in spite of the mode")
@pytest.mark.parametrize("folder", [True, False])
def test_no_permission(tmp_path, folder):
    path = tmp_path / ("folder" if folder else "w.safetensors")
    path.mkdir() if folder else path.write_bytes(b"x")
    path.chmod(0)
    try:
        verb = "cannot list" if folder else "cannot read"
        assert message(path) == f"{path}: {verb}: Permission denied"
    finally:
        path.chmod(0o700)
