"""Which tensors of a saved tree are the model's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esdtool.checkpoint.state_dict import model_tensors
from esdtool.errors import CheckpointError

W, V, SCALAR = torch.ones(2, 2), torch.zeros(3), torch.tensor(5.0)
ADAM = {"state": {0: {"exp_avg": W}}, "param_groups": [{"lr": 0.1}]}


def pick(tree):
    return model_tensors(tree, lambda value: isinstance(value, torch.Tensor), file="f")


CASES = [
    ({"a": W, "b.c": V}, {"a", "b.c"}, None, []),
    ({"model": {"a": W}, "epoch": 3}, {"a"}, "model", []),
    ({"state_dict": {"a": W}, "optimizer_states": [ADAM]}, {"a"}, "state_dict", ["optimizer_states"]),
    ({"model_state": {"a": W}, "step": SCALAR}, {"a"}, "model_state", ["step"]),
    ({"model_state_dict": {"a": W}, "optimizer_state_dict": ADAM}, {"a"}, "model_state_dict", ["optimizer_state_dict"]),
    ({"module": {"a": W}, "lr_scheduler": {"x": V}}, {"a"}, "module", ["lr_scheduler"]),
    ({"model": {"a": W}, "ema": {"a": V}}, {"a"}, "model", ["ema"]),
    ({"ema": {"a": W}, "opt": ADAM}, {"a"}, "ema", ["opt"]),
    ({"generator": {"a": W}, "step": SCALAR}, {"a"}, "generator", ["step"]),
    ({"model": {"state_dict": {"a": W}}}, {"a"}, "model.state_dict", []),
    ({"app": {"model": {"a": W}, "optim": ADAM}}, {"a"}, "app.model", ["app.optim"]),
    # Two modules' state dicts: neither is a wrapper.
    ({"encoder": {"a": W}, "decoder": {"a": V}}, {"encoder.a", "decoder.a"}, None, []),
    # Below the top, `model` beside a head is a module's name.
    ({"state_dict": {"model": {"a": W}, "head": {"b": V}}}, {"model.a", "head.b"}, "state_dict", []),
    # A flat model beside an average of it, and beside an optimizer that was flattened by its owner.
    ({"a": W, "optimizer": ADAM}, {"a"}, None, ["optimizer"]),
    ({"a": W, "optimizer.state.a.exp_avg": W}, {"a"}, None, ["optimizer.state.a.exp_avg"]),
    ({"layers": [{"w": W}, {"w": V}], "head": W}, {"layers.0.w", "layers.1.w", "head"}, None, []),
]


@pytest.mark.parametrize(("tree", "names", "key", "left_out"), CASES)
def test_choice(tree, names, key, left_out):
    found = pick(tree)
    assert set(found.tensors) == names
    notes = [f"f: the tensors under the key {key!r} are read"] if key else []
    notes += [f"f: left out: {', '.join(map(repr, left_out))}"] if left_out else []
    assert list(found.notes) == notes


def test_long_list_of_what_is_left_out_is_cut():
    found = pick({"model": {"a": W}} | {f"b{i}": W for i in range(10)})
    shown = ", ".join(f"'b{i}'" for i in range(8))
    assert found.notes[1] == f"f: left out: {shown} and 2 more"


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({}, "f: holds no tensors; is it the checkpoint's weight file?"),
        ([1, "x"], "f: holds no tensors; is it the checkpoint's weight file?"),
        (7, "f: holds no tensors; is it the checkpoint's weight file?"),
        (W, "f: holds one bare tensor without a name; save it as {name: tensor}"),
        ({"a.b": W, "a": {"b": V}, "c": W}, "f: two tensors have the name 'a.b' once nested names are joined"),
    ],
)
def test_refusals(tree, expected):
    with pytest.raises(CheckpointError) as caught:
        pick(tree)
    assert str(caught.value) == expected


def test_structure_that_contains_itself():
    tree = {"w": W, "list": [V]}
    tree["list"].append(tree)
    assert set(pick(tree).tensors) == {"w", "list.0"}
    loop = {"optimizer": ADAM}
    loop["model"] = loop
    with pytest.raises(CheckpointError, match="f: keys nested more than 32 deep; a structure that contains itself"):
        pick({"model": loop})


def test_structure_nested_without_end():
    tree = [W]
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(CheckpointError, match="holds no tensors"):
        pick({"model": tree})


NAMES = st.text("abcdefgh", min_size=1, max_size=3)
TREES = st.recursive(
    st.integers(1, 5).map(torch.zeros), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=4)
)


@given(st.dictionaries(NAMES, TREES, min_size=2, max_size=4).filter(lambda tree: len(tree) > 1), st.booleans())
def test_without_keys_of_trainers_no_tensor_is_lost_in_silence(tree, wrapped):
    """Every tensor object is read or its branch is named as left out."""
    found = pick({"model": tree} if wrapped else tree)

    def leaves(node):
        return [node] if isinstance(node, torch.Tensor) else [leaf for child in node.values() for leaf in leaves(child)]

    read = {id(tensor) for tensor in found.tensors.values()}
    lost = [leaf for leaf in leaves(tree) if id(leaf) not in read]
    assert not lost or "left out" in found.notes[-1]
