"""Good input on disk: every format gives the same tensors, lazily."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from esdtool.checkpoint import open_checkpoint
from esdtool.errors import CheckpointError, UsageError

CONFIG = {"model_type": "llama", "hidden_size": 4}


def test_safetensors_file(tmp_path, tensors, assert_same):
    save_file(tensors, tmp_path / "weights.safetensors")
    checkpoint = open_checkpoint(tmp_path / "weights.safetensors")
    assert_same(checkpoint, tensors)
    assert checkpoint.location == str(tmp_path / "weights.safetensors")
    assert checkpoint.files == ("weights.safetensors",)
    assert checkpoint.notes == ()
    assert checkpoint.revision is None


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "adapter_model.safetensors",
        "other.safetensors",
        "pytorch_model.bin",
        "adapter_model.bin",
        "best.pt",
        "best.PTH",
        "last.ckpt",
    ],
)
def test_folder_with_one_file(tmp_path, tensors, assert_same, name):
    save_file(tensors, tmp_path / name) if name.endswith("safetensors") else torch.save(tensors, tmp_path / name)
    for trainer_state in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth"):
        (tmp_path / trainer_state).write_bytes(b"not weights")
    checkpoint = open_checkpoint(str(tmp_path))
    assert_same(checkpoint, tensors)
    assert checkpoint.files == (name,)
    assert {info.file for info in checkpoint.tensors.values()} == {name}
    assert checkpoint.notes == ()


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards_equal_a_single_file(tmp_path, tensors, assert_same, write_shards, stem, suffix):
    index = write_shards(tmp_path, tensors, 3, stem, suffix)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for location in (tmp_path, index):
        checkpoint = open_checkpoint(location)
        assert_same(checkpoint, tensors)
        assert checkpoint.model_type == "llama"
        assert checkpoint.files == tuple(f"{stem}-{n:05d}-of-00003.{suffix}" for n in (1, 2, 3))
        assert checkpoint.tensors["scale"].file == json.loads(index.read_text())["weight_map"]["scale"]
        assert checkpoint.notes == ()


def test_shards_of_other_names_are_no_strangers(tmp_path, tensors, assert_same, write_shards):
    """What the index names is read, and what is read is not said to be left."""
    write_shards(tmp_path, tensors)
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    for number, shard in enumerate(sorted(set(document["weight_map"].values()))):
        (tmp_path / shard).rename(tmp_path / f"part_{number}.safetensors")
        renamed = {name: f"part_{number}.safetensors" for name, file in document["weight_map"].items() if file == shard}
        document["weight_map"] |= renamed
    index.write_text(json.dumps(document))
    save_file({"stray": torch.zeros(2)}, tmp_path / "other.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, tensors)
    assert checkpoint.notes == (f"{tmp_path}: model.safetensors.index.json is read; not read: other.safetensors",)


def test_index_and_not_the_wildcard_decides(tmp_path, tensors, assert_same, write_shards):
    write_shards(tmp_path, tensors)
    save_file({"stray": torch.zeros(2)}, tmp_path / "model-00004-of-00004.safetensors")
    save_file({"stray": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, tensors)
    assert checkpoint.notes == (
        f"{tmp_path}: model.safetensors.index.json is read; not read: consolidated.safetensors",
    )


def test_tensor_that_the_index_does_not_list_is_left_out_with_a_note(tmp_path, tensors, write_shards):
    index = write_shards(tmp_path, tensors)
    content = json.loads(index.read_text())
    del content["weight_map"]["scale"]
    index.write_text(json.dumps(content))
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors) - {"scale"}
    assert checkpoint.notes == (f"{index}: left out 1 tensor that the index does not list: scale",)


def test_shards_may_lie_in_a_subfolder_and_be_links(tmp_path, tensors, assert_same, write_shards):
    write_shards(tmp_path / "blobs", tensors)
    folder = tmp_path / "snapshot"
    (folder / "parts").mkdir(parents=True)
    content = json.loads((tmp_path / "blobs" / "model.safetensors.index.json").read_text())
    for shard in set(content["weight_map"].values()):
        (folder / "parts" / shard).symlink_to(tmp_path / "blobs" / shard)
    content["weight_map"] = {name: f"parts/{shard}" for name, shard in content["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    assert_same(open_checkpoint(folder), tensors)


def test_of_two_formats_safetensors_is_read(tmp_path, tensors, assert_same):
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, tensors)
    assert checkpoint.notes == (f"{tmp_path}: model.safetensors is read; not read: pytorch_model.bin",)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("new_format", [True, False])
def test_pickles_of_both_formats(tmp_path, tensors, assert_same, suffix, new_format):
    path = tmp_path / f"weights{suffix}"
    # torch's old format has no room for the newest dtypes.
    kept = tensors if new_format else {name: t for name, t in tensors.items() if "float8" not in name}
    torch.save(kept, path, _use_new_zipfile_serialization=new_format)
    checkpoint = open_checkpoint(path)
    assert_same(checkpoint, kept)
    assert checkpoint.notes == ()


def test_shared_and_strided_tensors(tmp_path, assert_same):
    weight = torch.arange(12.0).reshape(3, 4)
    tied = {"embed.weight": weight, "lm_head.weight": weight, "view.weight": weight.T, "row": weight[1]}
    torch.save(tied, tmp_path / "tied.pt")
    assert_same(open_checkpoint(tmp_path / "tied.pt"), tied)


def test_parameters_lose_their_gradient(tmp_path):
    torch.save({"w": torch.nn.Parameter(torch.ones(2, 2))}, tmp_path / "w.pt")
    assert not open_checkpoint(tmp_path / "w.pt").read("w").requires_grad


def test_sparse_tensor_is_read_dense(tmp_path):
    dense = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    torch.save({"w": dense.to_sparse()}, tmp_path / "w.pt")
    assert open_checkpoint(tmp_path / "w.pt").read("w").equal(dense)


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("model.safetensors", "config.json", CONFIG),
        ("model-00001-of-00002.safetensors", "config.json", CONFIG),
        ("adapter_model.safetensors", "adapter_config.json", CONFIG),
        ("adapter_model.safetensors", "config.json", {}),
        ("epoch3.safetensors", "config.json", {}),
    ],
)
def test_config_beside_a_file_counts_for_hugging_face_names_only(tmp_path, name, config, expected):
    save_file({"w": torch.zeros(2)}, tmp_path / name)
    (tmp_path / config).write_text(json.dumps(CONFIG))
    assert open_checkpoint(tmp_path / name).config == expected


def test_reads_are_thread_safe(tmp_path, tensors, assert_same, write_shards):
    write_shards(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(checkpoint.read, list(tensors) * 20))
    for name, tensor in zip(list(tensors) * 20, read, strict=True):
        assert tensor.reshape(-1).view(torch.uint8).equal(tensors[name].reshape(-1).view(torch.uint8))


def test_reading_one_tensor_opens_one_shard(tmp_path, tensors, write_shards):
    write_shards(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    keep = checkpoint.tensors["scale"].file
    for shard in checkpoint.files:
        if shard != keep:
            (tmp_path / shard).unlink()
    assert checkpoint.read("scale").equal(tensors["scale"])
    lost = next(info for info in checkpoint.tensors.values() if info.file != keep)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(lost.name)
    assert str(caught.value).startswith(f"{tmp_path / lost.file}: tensor {lost.name!r}: cannot read: ")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc, and needs sparse files")
def test_memory_stays_at_one_tensor(tmp_path, raw_safetensors, write_shards):
    """Eight tensors of 128 MB on holes of the disk: a process that reads two, one after the other, holds one."""
    side, count = 2**12 * 2**13, 8
    header = {
        f"w{i}": {"dtype": "F32", "shape": [2**12, 2**13], "data_offsets": [4 * side * i, 4 * side * (i + 1)]}
        for i in range(count)
    }
    path = tmp_path / "big.safetensors"
    path.write_bytes(raw_safetensors(header))
    os.truncate(path, path.stat().st_size + 4 * side * count)
    program = f"""
import torch
from esdtool.checkpoint import open_checkpoint

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

torch.zeros(1).sum()
open("/proc/self/clear_refs", "w").write("5")
before = peak()
checkpoint = open_checkpoint({str(path)!r})
opened = peak()
assert checkpoint.read("w3").sum() == 0
assert checkpoint.read("w6").sum() == 0
print(opened - before, peak() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    opened, read = map(float, run.stdout.split())
    assert opened < 64
    assert 100 < read < 2 * 128


def test_unknown_tensor_offers_the_nearest(tmp_path):
    save_file({"layers.0.fc.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "a.safetensors").read("layer.0.fc.weight")
    assert str(caught.value) == (
        f"{tmp_path / 'a.safetensors'}: no tensor 'layer.0.fc.weight' among 1; the nearest name is 'layers.0.fc.weight'"
    )


def test_revision_is_for_hub_ids_only(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError) as caught:
        open_checkpoint(tmp_path / "a.safetensors", revision="main")
    assert str(caught.value) == f"{tmp_path / 'a.safetensors'}: a path has no revision 'main'; that is for Hub ids"


def test_opening_needs_no_torch_at_import():
    program = "import sys, esdtool.checkpoint; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
