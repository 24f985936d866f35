"""Live models and state dicts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from esdtool.checkpoint import from_model, from_state_dict
from esdtool.errors import CheckpointError


class Tiny(nn.Module):
    """Tied weights, a persistent and a transient buffer, and a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.ones(2), persistent=False)


class Config:
    def to_dict(self):
        return {"model_type": "tiny"}


def test_model_has_the_names_and_values_of_its_state_dict(assert_same):
    model = Tiny()
    checkpoint = from_model(model)
    assert_same(checkpoint, model.state_dict())
    assert list(checkpoint.tensors) == list(model.state_dict())
    assert (checkpoint.location, checkpoint.files, checkpoint.config) == ("memory", (), {})


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
        checkpoint_wrapper,
    ],
)
def test_wrappers_leave_no_trace_in_names_nor_hide_the_configuration(wrap, assert_same):
    model = Tiny()
    model.head = checkpoint_wrapper(nn.Linear(3, 5))
    expected = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in model.state_dict().items()}
    model.config = Config()
    checkpoint = from_model(wrap(model))
    assert_same(checkpoint, expected)
    assert checkpoint.model_type == "tiny"


def test_submodule_that_is_called_module_keeps_distinct_names():
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2))
    model.module = nn.Linear(2, 2, bias=False)
    assert set(from_model(model).tensors) == {"weight", "module.weight"}


def test_config_may_be_a_mapping():
    model = nn.Linear(2, 2)
    model.config = {"model_type": "x"}
    assert from_model(model).config == {"model_type": "x"}


def test_reads_are_live_and_free_of_gradients():
    model = nn.Linear(2, 2)
    checkpoint = from_model(model)
    with torch.no_grad():
        model.weight.fill_(3.0)
    read = checkpoint.read("weight")
    assert read.equal(torch.full((2, 2), 3.0))
    assert not read.requires_grad


def test_state_dict(tensors, assert_same):
    checkpoint = from_state_dict(tensors, config={"model_type": "x"}, location="epoch 3")
    assert_same(checkpoint, tensors)
    assert (checkpoint.location, checkpoint.model_type, checkpoint.notes) == ("epoch 3", "x", ())


def test_nested_state_dict():
    checkpoint = from_state_dict({"model": {"w": torch.ones(2)}, "epoch": 1})
    assert set(checkpoint.tensors) == {"w"}
    assert checkpoint.notes == ("memory: the tensors under the key 'model' are read",)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: from_state_dict({}), "memory: holds no tensors; is it the checkpoint's weight file?"),
        (lambda: from_model(nn.ReLU()), "memory: ReLU has no parameters"),
        (
            lambda: from_model(nn.Linear(2, 2, device="meta")).read("weight"),
            "memory: tensor 'weight': no data (meta device); load the weights first",
        ),
        (
            lambda: from_model(nn.ParameterDict({"_flat_param": torch.ones(4)})),
            "memory: _flat_param: FSDP1 keeps parameters flattened; analyse inside "
            "FullyShardedDataParallel.summon_full_params, or shard with fully_shard",
        ),
        (
            lambda: from_state_dict({"w": torch.ones(1)}).read("v"),
            "memory: no tensor 'v' among 1",
        ),
    ],
)
def test_refusals(build, expected):
    with pytest.raises(CheckpointError) as caught:
        build()
    assert str(caught.value) == expected


def test_parameter_that_zero3_has_taken_away():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.empty(0))
    model.weight.ds_id = 1
    with pytest.raises(CheckpointError, match="weight: sharded by DeepSpeed ZeRO-3; gather the parameters first"):
        from_model(model)


FULLY_SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from esdtool.checkpoint import from_model
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
expected = {name: value.clone() for name, value in model.state_dict().items()}
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
assert model[0].weight.to_local().shape != expected["0.weight"].shape
checkpoint = from_model(model)
assert list(checkpoint.tensors) == list(expected)
for name, value in expected.items():
    assert checkpoint.tensors[name].shape == tuple(value.shape)
    assert checkpoint.read(name).equal(value), name
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads must not meet Python's finalization
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs the gloo backend")
def test_sharded_parameters_are_gathered(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FULLY_SHARDED, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    outcomes = [(process.communicate(timeout=300)[1].decode(), process.returncode) for process in ranks]
    assert all(code == 0 for _, code in outcomes), outcomes
