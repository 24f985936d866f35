from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esdtool.modules import canonical_name
from esdtool.names import WRAPPERS, layer_index, module_name, module_path, order_key


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.fc1.weight", "layers.0.fc1.weight"),
        ("module.layers.0.fc1.weight", "layers.0.fc1.weight"),
        ("_orig_mod.module.layers.0._checkpoint_wrapped_module.fc1.weight", "layers.0.fc1.weight"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.fc1.weight", "layers.0.fc1.weight"),
        ("submodule.module_list.0.weight", "submodule.module_list.0.weight"),
        ("module", "module"),
    ],
)
def test_canonical_name_drops_whole_wrapper_segments(name: str, expected: str) -> None:
    assert canonical_name(name) == expected


@given(
    st.lists(st.sampled_from(["model", "layers", "0", "q_proj", "weight", "modules"]), min_size=1),
    st.lists(st.tuples(st.integers(0, 10), st.sampled_from(sorted(WRAPPERS)))),
)
def test_canonical_name_undoes_wrapping_at_any_depth(segments: list[str], wrappers: list[tuple[int, str]]) -> None:
    wrapped = list(segments)
    for position, wrapper in wrappers:
        wrapped.insert(min(position, len(wrapped)), wrapper)
    assert canonical_name(".".join(wrapped)) == ".".join(segments)


def test_canonical_name_undoes_torch_compile_and_data_parallel() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    wrapped = torch.nn.DataParallel(torch.compile(model, backend="eager"))
    assert [canonical_name(name) for name in wrapped.state_dict()] == list(model.state_dict())


@pytest.mark.parametrize(
    ("parameter", "module", "path"),
    [
        ("a.q_proj.weight", "a.q_proj", ("a", "q_proj")),
        ("a.kernel", "a.kernel", ("a", "kernel")),
        ("a.in_proj_weight", "a.in_proj_weight", ("a", "in_proj_weight")),
        ("weight", "weight", ("weight",)),
        ("module.a.weight.weight", "module.a.weight", ("a", "weight")),
        ("a.q_proj.base_layer.weight", "a.q_proj.base_layer", ("a", "q_proj")),
        ("score.modules_to_save.default.weight", "score.modules_to_save.default", ("score",)),
    ],
)
def test_module_of_a_parameter(parameter: str, module: str, path: tuple[str, ...]) -> None:
    assert module_name(parameter) == module
    assert module_path(parameter) == path


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("model.layers.17.self_attn.q_proj.weight", 17),
        ("transformer.h.3.attn.c_attn.weight", 3),
        ("encoder.block.4.layer.1.DenseReluDense.wi.weight", 4),
        ("bert.encoder.layer.11.output.dense.weight", 11),
        ("transformer.resblocks.2.mlp.c_fc.weight", 2),
        ("encoder.layers.encoder_layer_5.mlp.0.weight", 5),
        ("layers.0.weight", 0),
        ("module.layers.1.fc1.weight", 1),
        ("net.0.weight", None),
        ("lm_head.weight", None),
        ("experts.3.w1.weight", None),
        ("layers.weight", None),
        ("3.weight", None),
    ],
)
def test_layer_index(parameter: str, layer: int | None) -> None:
    assert layer_index(parameter) == layer


NATURAL_ORDER = [
    ("shared.weight", "embed_tokens"),
    ("encoder.conv1.weight", "conv1"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "q_proj"),
    ("encoder.block.0.layer.0.SelfAttention.k.weight", "k_proj"),
    ("encoder.block.0.layer.0.SelfAttention.v.weight", "v_proj"),
    ("encoder.block.0.layer.0.SelfAttention.o.weight", "o_proj"),
    ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "gate_proj"),
    ("encoder.block.0.layer.1.DenseReluDense.wi_1.weight", "up_proj"),
    ("encoder.block.0.layer.1.DenseReluDense.wo.weight", "down_proj"),
    ("encoder.block.2.layer.1.DenseReluDense.wo.weight", "down_proj"),
    ("encoder.block.10.layer.0.SelfAttention.q.weight", "q_proj"),
    ("decoder.block.0.layer.0.SelfAttention.o.weight", "o_proj"),
    ("decoder.block.0.layer.1.EncDecAttention.q.weight", "cross_q_proj"),
    ("decoder.block.0.layer.1.EncDecAttention.o.weight", "cross_o_proj"),
    ("decoder.block.0.layer.2.shared_expert.down_proj.weight", "down_proj"),
    ("decoder.block.0.layer.2.experts.0.gate_proj.weight", "gate_proj"),
    ("decoder.block.0.layer.2.experts.0.down_proj.weight", "down_proj"),
    ("decoder.block.0.layer.2.experts.2.gate_proj.weight", "gate_proj"),
    ("decoder.block.0.layer.2.experts.10.gate_proj.weight", "gate_proj"),
    ("decoder.block.0.layer.3.adapter.weight", "adapter"),
    ("decoder.final_layer_norm.weight", None),
    ("lm_head.weight", "lm_head"),
]


def test_natural_order() -> None:
    keys = [order_key(parameter, role) for parameter, role in NATURAL_ORDER]
    for earlier, later in itertools.pairwise(zip(keys, NATURAL_ORDER, strict=True)):
        assert earlier[0] < later[0], (earlier[1], later[1])
