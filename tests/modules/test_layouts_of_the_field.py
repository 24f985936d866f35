"""Layouts that libraries have: no spectrum is scored that no model applies, and no matrix is lost without a word."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esdtool.errors import UsageError
from esdtool.modules import IdentifiedBy, SkipKind
from tests.modules.generator import (
    CONTAINERS,
    PREFIXES,
    Case,
    Sizes,
    Weights,
    attention_block,
    by_group,
    choose,
    in_turn,
    judge,
    same,
    side_by_side,
    sizes,
    spectrum,
)

SEEDS = st.integers(0, 2**16)
fast = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LLAMA = {"out": "self_attn.o_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


# Families that a configuration or a name establishes: everything is scored, and rightly.


@fast
@given(sizes(), SEEDS, PREFIXES, st.booleans())
def test_separate_projections(size: Sizes, seed: int, prefix: str, configured: bool) -> None:
    weights, case = Weights(seed), Case(config={"model_type": "llama"} | size.config if configured else {})
    for block in range(2):
        where = f"layers.{block}."
        for role, part in zip("qkv", size.query_key_value(weights), strict=True):
            case.linear(f"{where}self_attn.{role}_proj.weight", part)
        attention_block(case, weights, size, where, LLAMA)
    selection = judge(case.under(prefix))
    assert {module.identified_by for module in selection.modules} == {IdentifiedBy.FAMILY}


@fast
@given(sizes(), SEEDS, PREFIXES, st.sampled_from(["phi3", "glm4"]))
def test_contiguous_with_grouped_queries(size: Sizes, seed: int, prefix: str, model_type: str) -> None:
    weights, case = Weights(seed), Case(config={"model_type": model_type} | size.config)
    parts = size.query_key_value(weights)
    case.linear("layers.0.self_attn.qkv_proj.weight", *parts, whole=side_by_side(parts))
    gate, up = weights(size.mlp, size.hidden), weights(size.mlp, size.hidden)
    case.linear("layers.0.mlp.gate_up_proj.weight", gate, up, whole=side_by_side((gate, up)))
    attention_block(case, weights, size, "layers.0.", {name: LLAMA[name] for name in ("out", "down")})
    judge(case.under(prefix))


@fast
@given(sizes(grouped=False), SEEDS, PREFIXES, st.sampled_from(["gpt_neox", "bloom", "persimmon"]), st.booleans())
def test_head_by_head(size: Sizes, seed: int, prefix: str, model_type: str, configured: bool) -> None:
    weights, case = Weights(seed), Case(config={"model_type": model_type} | size.config if configured else {})
    parts = size.query_key_value(weights)
    name = "layers.0.attention.query_key_value.weight"
    case.linear(name, *parts, whole=by_group(parts, size.heads), sure=configured)
    case.linear("layers.0.mlp.dense_4h_to_h.weight", weights(size.hidden, size.mlp))
    selection = judge(case.under(prefix))
    if not configured:
        (entry,) = selection.skipped
        assert entry.kind is SkipKind.SEVERAL_MATRICES
        assert "--split" in entry.reason


GROUPED = {
    "internlm2": "model.layers.0.attention.wqkv.weight",
    "megatron_core": "decoder.layers.0.self_attention.linear_qkv.weight",
    "litgpt": "transformer.h.0.attn.attn.weight",
}


@fast
@given(sizes(), SEEDS, PREFIXES, st.sampled_from(sorted(GROUPED)), st.booleans())
def test_group_by_group(size: Sizes, seed: int, prefix: str, model_type: str, configured: bool) -> None:
    """InternLM2, Megatron-Core and litgpt's first years: without the counts of heads the tensor is refused."""
    weights, case = Weights(seed), Case(config={"model_type": model_type} | size.config if configured else {})
    parts = size.query_key_value(weights)
    case.linear(GROUPED[model_type], *parts, whole=by_group(parts, size.groups), sure=configured)
    selection = judge(case.under(prefix))
    assert bool(selection.skipped) != configured


@fast
@given(sizes(grouped=False), SEEDS, PREFIXES, st.sampled_from(["transformers.{}.self_attn", "self_attn.{}"]))
def test_rows_in_turn(size: Sizes, seed: int, prefix: str, place: str) -> None:
    """LightGlue, by the name that only it has; in the names of its repository and in those of its files."""
    weights, case = Weights(seed), Case()
    for block in range(2):
        attention = place.format(block)
        parts = size.query_key_value(weights)
        case.linear(f"{attention}.Wqkv.weight", *parts, whole=in_turn(parts))
        case.linear(f"{attention.replace('self', 'cross')}.to_qk.weight", weights(size.hidden, size.hidden))
    judge(case.under(prefix))


@fast
@given(sizes(grouped=False), SEEDS, PREFIXES)
def test_gpt2_stores_columns(size: Sizes, seed: int, prefix: str) -> None:
    weights, case = Weights(seed), Case()
    parts = size.query_key_value(weights)
    case.linear("h.0.attn.c_attn.weight", *(part.T for part in parts), whole=side_by_side(parts).T)
    case.linear("h.0.attn.c_proj.weight", weights(size.hidden, size.hidden))
    judge(case.under(prefix))


@fast
@given(sizes(grouped=False), SEEDS, PREFIXES, st.integers(5, 30))
def test_parallel_blocks(size: Sizes, seed: int, prefix: str, mlp: int) -> None:
    """Flux: one matrix gives queries, keys, values and the MLP's first activations; two streams have `qkv` each."""
    weights, case = Weights(seed), Case()
    parts = (*size.query_key_value(weights), weights(mlp, size.hidden))
    case.linear("single_blocks.0.linear1.weight", *parts, whole=side_by_side(parts))
    case.linear("single_blocks.0.linear2.weight", weights(size.hidden, size.hidden + mlp))
    for stream in ("img", "txt"):
        parts = size.query_key_value(weights)
        case.linear(f"double_blocks.0.{stream}_attn.qkv.weight", *parts, whole=side_by_side(parts))
        case.linear(f"double_blocks.0.{stream}_mlp.0.weight", weights(mlp, size.hidden))
        case.linear(f"double_blocks.0.{stream}_mlp.2.weight", weights(size.hidden, mlp))
    case.other("final_layer.linear.weight", weights(9, size.hidden))
    judge(case.under(prefix))


@fast
@given(st.integers(1, 6), st.integers(2, 9), st.integers(2, 9), SEEDS, PREFIXES, st.sampled_from("fioz"))
def test_heads_on_the_diagonal(heads: int, rows: int, columns: int, seed: int, prefix: str, gate: str) -> None:
    """xLSTM: a matrix for each head, no kernel positions."""
    weights, case = Weights(seed), Case()
    name = f"xlstm_block_stack.blocks.1.xlstm.{gate}gate.weight"
    case.tensors[name] = weights(heads, rows, columns)
    case.applied.append((name, list(case.tensors[name])))
    case.linear("xlstm_block_stack.blocks.1.xlstm.proj_up.weight", weights(24, 12))
    case.must_score.add(name)
    if max(heads, rows, columns) == heads * rows * columns:
        return  # a vector
    judge(case.under(prefix))


# Names that several libraries have for several layouts: never cut at a guess.

WAYS = {
    "thirds": lambda parts, size: side_by_side(parts),
    "per-head": lambda parts, size: by_group(parts, size.heads),
    "interleaved": lambda parts, size: in_turn(parts),
}
FUSED_NAMES = ("Wqkv", "qkv", "to_qkv", "query_key_value", "wqkv", "linear_qkv", "c_attn", "qkv_proj", "in_proj")


@fast
@given(
    sizes(grouped=False),
    SEEDS,
    PREFIXES,
    CONTAINERS,
    st.sampled_from(FUSED_NAMES),
    st.sampled_from(sorted(WAYS)),
    st.sampled_from(["attention", "mixer.attn", "self_attention", "core"]),
)
def test_an_unknown_model_is_not_cut(
    size: Sizes, seed: int, prefix: str, container: str, name: str, way: str, parent: str
) -> None:
    weights, case = Weights(seed), Case()
    parts = size.query_key_value(weights)
    tensor = f"{container}.0.{parent}.{name}.weight"
    case.linear(tensor, *parts, whole=WAYS[way](parts, size), sure=False)
    case.linear(f"{container}.0.{parent}.out.weight", weights(size.hidden, size.hidden), sure=False)
    selection = judge(case.under(prefix))
    assert all(module.view is None for module in selection.modules)


@fast
@given(sizes(grouped=False), SEEDS, PREFIXES, CONTAINERS, st.sampled_from(["joint", "all3", "attn_in", "mix"]))
def test_a_suspicious_shape_is_marked(size: Sizes, seed: int, prefix: str, container: str, name: str) -> None:
    weights, case = Weights(seed), Case()
    parts = size.query_key_value(weights)
    case.linear(f"{container}.0.mod.{name}.weight", *parts, whole=side_by_side(parts), sure=False)
    selection = judge(case.under(prefix))
    (module,) = selection.modules
    assert (module.identified_by, module.note) == (
        IdentifiedBy.SHAPE,
        "perhaps several projections in one; not split",
    )


# What the user says


@fast
@given(sizes(), SEEDS, PREFIXES, CONTAINERS, st.sampled_from(["thirds", "per-head", "interleaved"]))
def test_the_user_says_how(size: Sizes, seed: int, prefix: str, container: str, way: str) -> None:
    weights, case = Weights(seed), Case()
    parts = size.query_key_value(weights)
    grouped = size.heads != size.groups
    if way == "interleaved":
        parts = tuple(weights(size.hidden, size.hidden) for _ in range(3))
        text, whole = "interleaved", in_turn(parts)
    elif way == "thirds":
        text = f"thirds:{size.heads}/{size.groups}" if grouped else "thirds"
        whole = side_by_side(parts)
    else:
        text = f"per-head:{size.heads}/{size.groups}" if grouped else f"per-head:{size.heads}"
        whole = by_group(parts, size.groups)
    name = f"{container}.0.mod.joint.weight"
    case.linear(name, *parts, whole=whole)
    selection = judge(case.under(prefix), split=[f"joint={text}"])
    assert sorted(module.role for module in selection.modules) == ["k_proj", "q_proj", "v_proj"]
    assert {module.identified_by for module in selection.modules} == {IdentifiedBy.FAMILY}


@fast
@given(st.integers(3, 20), st.integers(3, 20), SEEDS, st.sampled_from(["gate-up", "up-gate", "gate-up-interleaved"]))
def test_the_user_says_how_an_mlp_lies(inner: int, hidden: int, seed: int, way: str) -> None:
    weights, case = Weights(seed), Case()
    parts = (weights(inner, hidden), weights(inner, hidden))
    whole = in_turn(parts) if way == "gate-up-interleaved" else side_by_side(parts)
    case.linear("stack.0.wide.weight", *parts, whole=whole)
    selection, spectrum_of = choose(case, split=[f"wide={way}"])
    order = ("up_proj", "gate_proj") if way == "up-gate" else ("gate_proj", "up_proj")
    found = {module.role: spectrum_of(module) for module in selection.modules}
    assert all(same(found[role], spectrum([part])) for role, part in zip(order, parts, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("joint", "write REGEX=LAYOUT"),
        ("=thirds", "write REGEX=LAYOUT"),
        ("joint=quarters", "no layout 'quarters'; there are thirds"),
        ("joint=per-head", "no layout 'per-head'"),
        ("joint=per-head:0", "no layout 'per-head:0'"),
        ("other=thirds", "matches no tensor name"),
        ("(=thirds", "is not a regular expression"),
        ("bias=thirds", "matches no matrix; joint.bias: 1-D"),
        ("joint=per-head:7", "does not fit 7 heads"),
        ("joint=thirds:4/3", "does not fit 4 heads"),
    ],
)
def test_what_the_user_says_is_checked(text: str, message: str) -> None:
    case = Case(tensors={"joint.weight": np.ones((24, 8), np.float32), "joint.bias": np.ones(24, np.float32)})
    with pytest.raises(UsageError) as caught:
        choose(case, split=[text])
    assert message in str(caught.value)


# Tensors that belong to others

OFFSETS = st.sampled_from(["scales/biases", "scale/zero"])
HEADS = st.sampled_from(["fc", "classifier.6", "head", "classifier.1", "last_linear"])
KERNELS = st.sampled_from(["conv", "net.0", "w_1"])


@fast
@given(
    st.integers(2, 6), st.sampled_from([8, 16, 32]), SEEDS, PREFIXES, st.sampled_from(["scales/biases", "scale/zero"])
)
def test_groups_of_codes(rows: int, group: int, seed: int, prefix: str, names: str) -> None:
    """MLX and its like: codes with a scale and an offset for each group of columns."""
    weights, case = Weights(seed), Case()
    scale, offset = names.split("/")
    columns = 4 * group
    case.tensors["layers.0.mlp.up_proj.weight"] = np.zeros((8 * rows, columns // 8), np.uint32)
    case.must_skip.add("layers.0.mlp.up_proj.weight")
    case.other(f"layers.0.mlp.up_proj.{scale}", weights(8 * rows, columns // group))
    case.other(f"layers.0.mlp.up_proj.{offset}", weights(8 * rows, columns // group))
    case.linear("layers.0.mlp.down_proj.weight", weights(columns, 8 * rows))
    judge(case.under(prefix))


TABLES = {
    "a codebook by its name": ["quantizer.quantizers.0.codebook.weight", "vq.codebook", "rvq.0._codebook.embed"],
    "a codebook of VQ-VAE": ["quantizer.rvq_first.vq.layers.0._codebook.embedding_sum", "vq_layer._codebook.embed_avg"],
    "RWKV": ["blocks.0.att.time_decay", "blocks.0.att.time_faaaa", "blocks.0.att.r_k", "blocks.0.att.time_maa_k"],
    "a front end": ["mel.mel_scale.fb", "frontend.mel_basis", "logmel_extractor.melW", "erb_fb", "mfcc.dct_mat"],
    "another front end": ["fbank.filterbank", "spec.cqt_kernels_real", "preprocessor.featurizer.fb", "df.erb_inv_fb"],
    "rotary tables": ["layers.0.attn.rope.cos_cached", "freqs_cis", "rotary.sin_cached", "layers.0.attn.freqs_cos"],
    "masks": ["layers.0.attn.tril", "layers.0.attn.mask", "attn_mask"],
    "value embeddings": ["value_embeds.0.weight", "value_embeds.1.weight"],
    "calibration": ["layers.0.fc.input_quantizer._amax", "layers.0.fc.activation_post_process.min_val"],
    "an optimizer's state": ["optimizer.state.0.exp_avg", "state.layers.0.fc.weight.exp_avg_sq", "x.momentum_buffer"],
    "speech heads": ["ctc.ctc_lo.weight", "ctc_lin.w.weight", "ctc_head.weight"],
    "language heads": ["out_head.weight", "final_layer.linear.weight"],
}


@pytest.mark.parametrize("kind", TABLES)
@fast
@given(SEEDS, PREFIXES, st.tuples(st.integers(2, 40), st.integers(2, 40)))
def test_tables_are_no_matrices(kind: str, seed: int, prefix: str, shape: tuple[int, int]) -> None:
    weights, case = Weights(seed), Case()
    for name in TABLES[kind]:
        case.other(name, weights(*shape))
    case.linear("layers.0.self_attn.q_proj.weight", weights(16, 24))
    judge(case.under(prefix))


AVERAGES = {
    "LitEma": lambda name: "model_ema." + name.removeprefix("model.").replace(".", ""),
    "a prefix": lambda name: f"ema.{name}",
    "a wrapper": lambda name: f"ema_model.module.{name}",
    "another prefix": lambda name: f"module_ema.{name}",
    "shadow": lambda name: f"shadow_params.{name}",
    "a suffix": lambda name: f"{name}_ema",
}


@pytest.mark.parametrize("way", AVERAGES)
@fast
@given(SEEDS, st.integers(1, 3))
def test_moving_averages_are_copies(way: str, seed: int, blocks: int) -> None:
    weights, case = Weights(seed), Case()
    for block in range(blocks):
        for leaf in ("to_q", "to_k"):
            name = f"model.diffusion_model.transformer_blocks.{block}.attn1.{leaf}.weight"
            case.linear(name, weights(16, 12))
            case.other(AVERAGES[way](name), weights(16, 12))
    selection = judge(case)
    copies = [entry for entry in selection.skipped if entry.kind is SkipKind.COPY]
    assert len(copies) == len(case.must_skip)
    assert all("moving average of model.diffusion_model" in entry.reason for entry in copies)


def test_a_moving_average_alone_is_the_model() -> None:
    weights, case = Weights(0), Case()
    for block in range(3):
        case.linear(f"ema_model.layers.{block}.self_attn.q_proj.weight", weights(16, 12))
    judge(case)


@fast
@given(SEEDS, st.integers(1, 5), st.sampled_from(["A/B", "adapter.in/adapter.out", "first/second"]))
def test_low_rank_factors_under_any_name(seed: int, rank: int, names: str) -> None:
    """Factors [rank, in] and [out, rank] below the weight that they update are no matrices of their own."""
    weights, case = Weights(seed), Case()
    first, second = names.split("/")
    case.linear("layers.0.self_attn.q_proj.weight", weights(16, 24))
    case.other(f"layers.0.self_attn.q_proj.{first}.weight", weights(rank, 24))
    case.other(f"layers.0.self_attn.q_proj.{second}.weight", weights(16, rank))
    judge(case)


# Heads, patches, kernels


@fast
@given(
    SEEDS, PREFIXES, st.integers(2, 30), st.sampled_from(["fc", "classifier.6", "head", "classifier.1", "last_linear"])
)
def test_heads_at_the_end_of_a_network(seed: int, prefix: str, classes: int, head: str) -> None:
    weights, case = Weights(seed), Case()
    kernel = weights(16, 8, 3, 3)
    case.tensors["layer2.0.conv1.weight"] = kernel
    case.applied.append(("layer2.0.conv1.weight", [kernel[:, :, x, y] for x in range(3) for y in range(3)]))
    if head == "classifier.6":
        case.linear("classifier.0.weight", weights(20, 16), sure=False)
    case.other(f"{head}.weight", weights(classes, 24))
    judge(case.under(prefix))


@fast
@given(SEEDS, PREFIXES, st.sampled_from([8, 14, 16, 32]), st.sampled_from(["visual.conv1", "conv_proj", "stem.proj"]))
def test_patches_of_pixels(seed: int, prefix: str, patch: int, name: str) -> None:
    weights, case = Weights(seed), Case()
    case.other(f"{name}.weight", weights(12, 3, patch, patch))
    case.linear("visual.transformer.resblocks.0.mlp.c_fc.weight", weights(24, 12), sure=False)
    judge(case.under(prefix))


@fast
@given(SEEDS, st.integers(2, 6), st.integers(17, 40), st.integers(17, 40), CONTAINERS)
def test_a_stack_is_not_taken_for_a_kernel(seed: int, count: int, rows: int, columns: int, container: str) -> None:
    weights, case = Weights(seed), Case()
    name = f"{container}.0.mix.weight"
    case.tensors[name] = weights(count, rows, columns)
    case.applied += [(name, [matrix]) for matrix in case.tensors[name]]
    selection = judge(case)
    assert [entry.kind for entry in selection.skipped] == [SkipKind.UNKNOWN_LAYOUT]


@fast
@given(
    SEEDS,
    st.integers(9, 20),
    st.integers(9, 20),
    st.sampled_from([1, 3, 5, 7]),
    st.sampled_from(["conv", "net.0", "w_1"]),
)
def test_a_kernel_is_a_kernel(seed: int, out: int, channels: int, length: int, name: str) -> None:
    weights, case = Weights(seed), Case()
    kernel = weights(out, channels, length)
    case.tensors[f"encoder.{name}.weight"] = kernel
    case.applied.append((f"encoder.{name}.weight", [kernel[:, :, position] for position in range(length)]))
    (module,) = judge(case).modules
    assert module.kind == "conv"
