"""torch.distributed.checkpoint folders, written by torch's own writer."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from esdtool.checkpoint import open_checkpoint
from esdtool.errors import CheckpointError


def save(state_dict, folder: Path, files: int = 1) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "torch.distributed is unavailable": on purpose
        writer = dcp.FileSystemWriter(folder, thread_count=files)
        dcp.save(state_dict, storage_writer=writer, no_dist=True)


@pytest.fixture
def training_state():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 5}


@pytest.mark.parametrize("files", [1, 3])
def test_bare_state_dict(tmp_path, tensors, assert_same, files):
    save(tensors, tmp_path, files)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, tensors)
    assert len(checkpoint.files) == files
    assert all(name.endswith(".distcp") for name in checkpoint.files)
    assert checkpoint.model_type == "llama"
    assert checkpoint.notes == ()
    assert_same(open_checkpoint(tmp_path / ".metadata"), tensors)


def test_the_models_tensors_are_taken_and_the_optimizers_left_out(tmp_path, training_state, assert_same):
    save(training_state, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, training_state["model"])
    assert checkpoint.notes == (
        f"{tmp_path}: the tensors under the key 'model' are read",
        f"{tmp_path}: left out: 'optimizer'",
    )


def test_nested_application_state(tmp_path, training_state, assert_same):
    save({"app": training_state}, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, training_state["model"])
    assert checkpoint.notes == (
        f"{tmp_path}: the tensors under the key 'app.model' are read",
        f"{tmp_path}: left out: 'app.optimizer'",
    )


def test_model_at_the_top_beside_an_optimizer(tmp_path, training_state, assert_same):
    save(training_state["model"] | {"optimizer": training_state["optimizer"]}, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, training_state["model"])
    assert checkpoint.notes == (f"{tmp_path}: left out: 'optimizer'",)


class ShardPlanner(DefaultSavePlanner):
    """Hands out one rank's parts of tensors that no rank holds whole."""

    def __init__(self, parts) -> None:
        super().__init__()
        self.parts = parts

    def resolve_data(self, item):
        return self.parts[item.index.fqn, tuple(item.index.offset)]


def save_as_ranks(ranks, whole, folder: Path) -> None:
    """What `dcp.save` does when each rank holds some parts, in one process and through torch's own writer.

    `ranks`: for each rank {(name, offset): part}; `whole`: {name: full tensor}.
    """
    writer = FileSystemWriter(folder)
    plans = []
    for parts in ranks:
        items = [
            WriteItem(
                index=MetadataIndex(name, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(offset), sizes=part.size()),
                    properties=TensorProperties.create_from_tensor(part),
                    size=whole[name].size(),
                ),
            )
            for (name, offset), part in parts.items()
        ]
        plans.append(SavePlan(items, planner_data={name: ("model", name) for name in whole}))
    writer.set_up_storage_writer(is_coordinator=True)
    planner = ShardPlanner({})
    planner.set_up_planner({}, is_coordinator=True)
    plans, metadata = planner.create_global_plan(plans)
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    results = [writer.write_data(plan, ShardPlanner(parts)).wait() for plan, parts in zip(plans, ranks, strict=True)]
    writer.finish(metadata, results)


@pytest.fixture
def sharded_folder(tmp_path):
    full = torch.arange(35.0).reshape(7, 5)
    ranks = [
        {("rows", (0, 0)): full[:4].clone(), ("columns", (0, 0)): full[:, :3].clone()},
        {("rows", (4, 0)): full[4:].clone(), ("columns", (0, 3)): full[:, 3:].clone()},
    ]
    save_as_ranks(ranks, {"rows": full, "columns": full}, tmp_path / "sharded")
    return tmp_path / "sharded"


def test_tensors_spread_over_ranks_are_joined(sharded_folder, assert_same):
    full = torch.arange(35.0).reshape(7, 5)
    checkpoint = open_checkpoint(sharded_folder)
    assert_same(checkpoint, {"rows": full, "columns": full})
    assert checkpoint.files == ("__0_0.distcp", "__1_0.distcp")
    assert checkpoint.tensors["rows"].file == "__0_0.distcp, __1_0.distcp"


def test_missing_rank(sharded_folder):
    (sharded_folder / "__1_0.distcp").unlink()
    assert refusal(sharded_folder) == (
        f"{sharded_folder / '.metadata'}: 1 of 2 files are not in the folder: __1_0.distcp; "
        "copy the checkpoint again, with every rank's files"
    )


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite_metadata(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_part_that_was_never_saved(tmp_path):
    save({"w": torch.ones(4, 3)}, tmp_path)
    rewrite_metadata(tmp_path, lambda metadata: metadata.state_dict_metadata["w"].chunks.clear())
    assert refusal(tmp_path) == (
        f"{tmp_path / '.metadata'}: tensor 'w': only 0 of 12 elements were saved; the checkpoint is incomplete"
    )


def test_record_without_its_fields(tmp_path):
    save({"w": torch.ones(4, 3)}, tmp_path)
    rewrite_metadata(tmp_path, lambda metadata: delattr(metadata.state_dict_metadata["w"], "chunks"))
    assert refusal(tmp_path) == (
        f"{tmp_path / '.metadata'}: not the metadata of torch.distributed.checkpoint, or damaged: "
        "'TensorStorageMetadata' object has no attribute 'chunks'"
    )


def test_file_outside_the_folder(tmp_path):
    save({"w": torch.ones(4, 3)}, tmp_path)

    def point_outside(metadata):
        for stored in metadata.storage_data.values():
            stored.relative_path = "../x.distcp"

    rewrite_metadata(tmp_path, point_outside)
    assert refusal(tmp_path) == (
        f"{tmp_path / '.metadata'}: tensor 'w': refused: file '../x.distcp' lies outside the checkpoint's folder"
    )


class MakesFolder:
    """Pickles to a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_metadata_with_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was-run"
    save({"w": torch.ones(4, 3)}, tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(MakesFolder(marker)))
    assert refusal(tmp_path) == (
        f"{tmp_path / '.metadata'}: refused: its pickle calls code ({os.mkdir.__module__}.mkdir), which is never run"
    )
    assert not marker.exists()


def test_data_with_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was-run"
    save({"w": torch.ones(4, 3)}, tmp_path)
    data = tmp_path / "__0_0.distcp"
    torch.save(MakesFolder(marker), data)
    rewrite_metadata(
        tmp_path,
        lambda metadata: [setattr(s, "length", data.stat().st_size) for s in metadata.storage_data.values()],
    )
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("w")
    assert str(caught.value).startswith(f"{tmp_path}: tensor 'w' in __0_0.distcp: cannot read: ")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"\x80\x04garbage", b"hello", pickle.dumps({"a": 1})])
def test_metadata_of_another_program(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / '.metadata'}: not the metadata of torch.distributed.checkpoint")


def test_only_an_optimizer(tmp_path, training_state):
    save({"optimizer": training_state["optimizer"]}, tmp_path)
    assert refusal(tmp_path) == (
        f"{tmp_path}: holds no tensors of a model, only 'optimizer'; is it the checkpoint's weight file?"
    )


def test_safetensors_beside_it_win(tmp_path, tensors, write_shards, assert_same):
    save({"other": torch.ones(2)}, tmp_path)
    write_shards(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, tensors)
    assert checkpoint.notes == (f"{tmp_path}: model.safetensors.index.json is read; not read: .metadata",)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
