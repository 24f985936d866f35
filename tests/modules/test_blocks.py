"""The block of a tensor is the number in the outermost container whose members repeat one structure."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import esdtool
from esdtool.checkpoint.base import TensorInfo
from esdtool.modules import select_modules
from esdtool.modules.blocks import find_blocks
from esdtool.names import module_path, place_of_block

C = 8
ATTENTION = {"att.W_query": (C, C), "att.W_key": (C, C), "att.out_proj": (C, C)}
INNER_SEQUENTIAL = {"ff.layers.0": (4 * C, C), "ff.layers.2": (C, 4 * C)}
NAMES = ("transformer_blocks", "double_blocks", "trf_blocks", "encoder_layers", "layer_stack", "layers", "h", "tower")


def stack(
    container: str, count: int, modules: Mapping[str, tuple[int, ...]], *, first: int = 0
) -> dict[str, tuple[int, ...]]:
    return {
        f"{container}.{index}.{module}.weight": shape
        for index in range(first, first + count)
        for module, shape in modules.items()
    }


def layers_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | None]:
    blocks = find_blocks(shapes.items())
    return {name: blocks.layer(name) for name in shapes}


@given(
    container=st.sampled_from(NAMES),
    prefix=st.sampled_from(("", "model.", "module.", "_orig_mod.module.", "model.diffusion_model.")),
    count=st.integers(2, 12),
    seed=st.integers(0, 100),
)
def test_any_container_that_repeats_numbers_the_blocks(container: str, prefix: str, count: int, seed: int) -> None:
    inside = stack(f"{prefix}{container}", count, ATTENTION | INNER_SEQUENTIAL)
    outside: dict[str, tuple[int, ...]] = {f"{prefix}tok_emb.weight": (40, C), f"{prefix}out_head.weight": (40, C)}
    names = list((inside | outside).items())
    random.Random(seed).shuffle(names)
    blocks = find_blocks(names)
    for name in inside:
        index = int(name.removeprefix(f"{prefix}{container}.").split(".")[0])
        assert blocks.layer(name) == index
        path = module_path(name)
        found = blocks.find(path)
        assert found is not None
        assert found[0] == place_of_block(path, index)
    assert [blocks.layer(name) for name in outside] == [None, None]


@pytest.mark.parametrize("container", ["layers", "h", "blocks"])
def test_a_single_block_is_told_by_its_name(container: str) -> None:
    assert set(layers_of(stack(container, 1, ATTENTION | INNER_SEQUENTIAL)).values()) == {0}


def test_a_sequential_is_no_container_of_blocks() -> None:
    assert set(layers_of(stack("trf_blocks", 1, ATTENTION | INNER_SEQUENTIAL)).values()) == {None}
    head: dict[str, tuple[int, ...]] = {"classifier.layers.0.weight": (C, C), "classifier.layers.3.weight": (2, C)}
    assert set(layers_of(head).values()) == {None}


def test_experts_and_heads_work_side_by_side() -> None:
    mixture = {"gate_proj": (C, C), "up_proj": (C, C)}
    assert set(layers_of(stack("tower.mlp.experts", 4, mixture)).values()) == {None}
    found = layers_of({**stack("tower.0.mlp.experts", 4, mixture), **stack("tower.1.mlp.experts", 4, mixture)})
    assert {name: int(name.split(".")[1]) for name in found} == found


def test_stages_of_a_pyramid_differ_in_depth_and_width() -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for stage, depth in enumerate((2, 2, 6, 2)):
        width = C * 2**stage
        shapes |= stack(f"pyramid.{stage}.units", depth, {"mixer": (width, width), "mlp": (4 * width, width)})
        if stage:
            shapes[f"pyramid.{stage}.merge.weight"] = (width, width // 2)
    assert layers_of(shapes) == {name: int(name.split(".")[1]) for name in shapes}


def test_siblings_named_with_their_number() -> None:
    units = {f"{unit}.conv{conv}": (C, C, 3, 3) for unit in (0, 1) for conv in (1, 2)}
    shapes = {f"layer{stage}.{unit}.weight": shape for stage in range(1, 5) for unit, shape in units.items()}
    shapes |= {"conv1.weight": (C, 3, 7, 7), "fc.weight": (C, C)}
    assert layers_of(shapes) == {name: int(name[5]) if name.startswith("layer") else None for name in shapes}


def test_a_container_that_repeats_elsewhere_names_a_single_block() -> None:
    # The middle of a UNet has one block where the way down has several.
    shapes = stack("down.attentions", 2, ATTENTION) | stack("mid.attentions", 1, ATTENTION)
    assert layers_of(shapes) == {name: int(name.split(".")[2]) for name in shapes}


def test_a_hostile_name_costs_no_more_than_its_length() -> None:
    name = ".".join(["0", "a"] * 10_000) + ".weight"
    assert find_blocks([(name, (C, C))]).layer(name) is None


@pytest.mark.parametrize("container", NAMES)
def test_modules_of_one_block_get_one_decay(container: str) -> None:
    torch.manual_seed(0)
    tensors = {
        f"{container}.{index}.attn.{leaf}.weight": torch.randn(64, 64)
        for index in range(3)
        for leaf in ("to_q", "to_k")
    }
    analysis = esdtool.analyze(tensors)
    assert {module.layer for module in analysis.modules} == {0, 1, 2}
    decays: dict[int | None, set[float]] = {}
    for entry in esdtool.assign(analysis, granularity="layer").parameters.values():
        decays.setdefault(entry.layer, set()).add(entry.weight_decay)
    assert [len(found) for found in decays.values()] == [1, 1, 1]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(64, 64), nn.Linear(64, 64)
        self.ff = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))})


def test_assign_and_the_live_schedule_see_the_same_blocks() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"trf_blocks": nn.ModuleList(Block() for _ in range(2))})
    assignment = esdtool.assign(esdtool.analyze(model))
    assert set(assignment.parameters) == {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    live = esdtool.AlphaDecay(model, torch.optim.AdamW(model.parameters()))
    assert set(live.last_decays) == set(assignment.parameters)
    assert {name: entry.layer for name, entry in live.assignment().parameters.items()} == {
        name: entry.layer for name, entry in assignment.parameters.items()
    }


def test_modules_stand_in_the_order_of_their_blocks(catalogue: Callable[..., list[TensorInfo]]) -> None:
    shapes = stack("trf_blocks", 11, ATTENTION | INNER_SEQUENTIAL)
    layers = [module.layer for module in select_modules(catalogue(shapes)).modules]
    assert layers == sorted(layers, key=lambda layer: -1 if layer is None else layer)
