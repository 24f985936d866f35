"""Attention heads: each part and each product against numpy's singular values of what the model itself computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import esdtool
from esdtool.analysis import heads as module_of_heads
from esdtool.analysis.document import Analysis
from esdtool.analysis.head_result import HeadResult
from esdtool.checkpoint import from_state_dict
from esdtool.cli import app
from esdtool.errors import UsageError
from esdtool.modules import select_modules
from esdtool.modules.attention import find_attention
from esdtool.report.html import analysis_page
from esdtool.report.markdown import analysis_markdown
from esdtool.spectra.product_null import product_quantiles

EXAMPLE = Path(__file__).parents[2] / "examples" / "checkpoints" / "stdlib-llama"
HIDDEN, WIDTH = 96, 16

Matrices = dict[str, np.ndarray]
"""Of one attention, [outputs, inputs] each: q, k, v, o."""


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    # Heavy-tailed, so that every head has a spectrum of its own.
    return np.random.default_rng(seed).standard_t(4, size=shape).astype(np.float32)


def attention(heads: int, shared: int, *, seed: int = 0) -> Matrices:
    shapes = {"q": (heads * WIDTH, HIDDEN), "k": (shared * WIDTH, HIDDEN), "v": (shared * WIDTH, HIDDEN)}
    shapes["o"] = (HIDDEN, heads * WIDTH)
    return {part: noise(*shape, seed=seed + position) for position, (part, shape) in enumerate(shapes.items())}


def expected_spectra(matrices: Matrices, heads: int, shared: int) -> dict[tuple[str, int], np.ndarray]:
    """The eigenvalues of each part and each product, formed as they are."""
    parts = {
        "q_proj": np.split(matrices["q"], heads),
        "k_proj": np.split(matrices["k"], shared),
        "v_proj": np.split(matrices["v"], shared),
        "o_proj": np.split(matrices["o"], heads, axis=1),
    }
    used = [head // (heads // shared) for head in range(heads)]
    parts["qk"] = [parts["q_proj"][head].T.astype(np.float64) @ parts["k_proj"][used[head]] for head in range(heads)]
    parts["vo"] = [parts["o_proj"][head].astype(np.float64) @ parts["v_proj"][used[head]] for head in range(heads)]
    return {
        (role, head): np.sort(np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2)[-WIDTH:]
        for role, members in parts.items()
        for head, matrix in enumerate(members)
    }


def check(found: tuple[HeadResult, ...], matrices: Matrices, heads: int, shared: int) -> None:
    expected = expected_spectra(matrices, heads, shared)
    assert {(head.role, head.head) for head in found} == set(expected)
    assert len(found) == len(expected)
    for head in found:
        eigenvalues = expected[head.role, head.head]
        assert (head.status, head.num_eigs) == ("ok", WIDTH)
        assert head.alpha == pytest.approx(esdtool.hill(eigenvalues).alpha, rel=1e-9)
        assert head.lambda_max == pytest.approx(eigenvalues[-1])
        assert head.frobenius_norm == pytest.approx(np.sqrt(eigenvalues.sum()))
        assert head.stable_rank == pytest.approx(eigenvalues.sum() / eigenvalues[-1])
        is_product = head.role in ("qk", "vo")
        assert head.shape == ((HIDDEN, HIDDEN) if is_product else (WIDTH, HIDDEN))
        assert len(head.modules) == 1 + is_product
        own = head.head if head.role in ("k_proj", "v_proj") else head.head // (heads // shared)
        assert head.key_value_head == own


def analysed(weights: Mapping[str, np.ndarray], config: dict[str, Any], **options: Any) -> Analysis:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(matrix)) for name, matrix in weights.items()}
    return esdtool.analyze(from_state_dict(tensors, config=config), per_head=True, min_eigs=2, **options)


def llama(matrices: Matrices, layer: int = 0) -> dict[str, np.ndarray]:
    return {f"model.layers.{layer}.self_attn.{part}_proj.weight": matrix for part, matrix in matrices.items()}


def config_of(heads: int, shared: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": heads, "num_key_value_heads": shared, "head_dim": WIDTH}
    return {"model_type": "llama"} | sizes | more


@pytest.mark.parametrize(("heads", "shared"), [(6, 6), (8, 2), (4, 1)])
def test_heads_and_grouped_queries(heads: int, shared: int) -> None:
    matrices = attention(heads, shared)
    analysis = analysed(llama(matrices), config_of(heads, shared))
    check(analysis.heads, matrices, heads, shared)
    assert analysis.heads[0].name == "model.layers.0.self_attn.q_proj.heads.0"
    assert analysis.heads[-1].name == f"model.layers.0.self_attn.heads.{heads - 1}.vo"
    assert {head.attention for head in analysis.heads} == {"model.layers.0.self_attn"}
    assert len({head.name for head in analysis.heads}) == len(analysis.heads)


def test_gpt2_stores_them_transposed_and_in_one() -> None:
    matrices = attention(6, 6)
    weights = {
        "h.0.attn.c_attn.weight": np.concatenate([matrices[part].T for part in "qkv"], axis=1),
        "h.0.attn.c_proj.weight": matrices["o"].T,
    }
    analysis = analysed(weights, {"model_type": "gpt2", "n_embd": HIDDEN, "n_head": 6})
    check(analysis.heads, matrices, 6, 6)


def test_gpt2_cross_attention_is_transposed_too() -> None:
    # The queries stand alone and are square: only the keys beside them tell.
    matrices = attention(6, 6)
    weights = {
        "h.0.crossattention.q_attn.weight": matrices["q"].T,
        "h.0.crossattention.c_attn.weight": np.concatenate([matrices[part].T for part in "kv"], axis=1),
        "h.0.crossattention.c_proj.weight": matrices["o"].T,
    }
    analysis = analysed(weights, {"model_type": "gpt2", "n_embd": HIDDEN, "n_head": 6})
    found = (head.model_copy(update={"role": head.role.removeprefix("cross_")}) for head in analysis.heads)
    check(tuple(found), matrices, 6, 6)


def test_neox_stores_them_head_by_head() -> None:
    matrices = attention(6, 6)
    parts = [np.split(matrices[part], 6) for part in "qkv"]
    weights = {
        "gpt_neox.layers.0.attention.query_key_value.weight": np.concatenate(
            [matrix for head in zip(*parts, strict=True) for matrix in head]
        ),
        "gpt_neox.layers.0.attention.dense.weight": matrices["o"],
    }
    analysis = analysed(weights, {"model_type": "gpt_neox", "hidden_size": HIDDEN, "num_attention_heads": 6})
    check(analysis.heads, matrices, 6, 6)


def test_internlm2_stores_them_group_by_group() -> None:
    matrices = attention(8, 2)
    groups = [np.split(matrices[part], 2) for part in "qkv"]
    weights = {
        "model.layers.0.attention.wqkv.weight": np.concatenate(
            [matrix for group in zip(*groups, strict=True) for matrix in group]
        ),
        "model.layers.0.attention.wo.weight": matrices["o"],
    }
    analysis = analysed(weights, config_of(8, 2, model_type="internlm2"))
    check(analysis.heads, matrices, 8, 2)


def test_self_and_cross_attention_of_one_layer_are_two_blocks() -> None:
    own, cross = attention(6, 6), attention(6, 6, seed=10)
    names = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
    weights = {f"encoder.layer.0.attention.{names[part]}.weight": matrix for part, matrix in own.items()}
    weights |= {f"encoder.layer.0.crossattention.{names[part]}.weight": matrix for part, matrix in cross.items()}
    found = analysed(weights, {"model_type": "bert", "hidden_size": HIDDEN, "num_attention_heads": 6}).heads
    first = tuple(head for head in found if head.attention == "encoder.layer.0.attention")
    check(first, own, 6, 6)
    second = [head for head in found if head.attention == "encoder.layer.0.crossattention"]
    assert len(first) + len(second) == len(found)
    check(tuple(head.model_copy(update={"role": head.role.removeprefix("cross_")}) for head in second), cross, 6, 6)


def test_a_decoder_with_heads_of_its_own() -> None:
    encoder, decoder = attention(6, 6), attention(3, 3, seed=4)
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    weights = {
        f"model.{tower}.layers.0.self_attn.{names[part]}.weight": matrix
        for tower, matrices in (("encoder", encoder), ("decoder", decoder))
        for part, matrix in matrices.items()
    }
    config = {"model_type": "bart", "encoder_attention_heads": 6, "decoder_attention_heads": 3, "head_dim": WIDTH}
    found = analysed(weights, config).heads
    check(tuple(head for head in found if "decoder" in head.attention), decoder, 3, 3)
    check(tuple(head for head in found if "encoder" in head.attention), encoder, 6, 6)


def test_the_bundled_checkpoint() -> None:
    analysis = esdtool.analyze(EXAMPLE, per_head=True, cache=False, include=[r"layers\.2\.self_attn"])
    weights = load_file(EXAMPLE / "model.safetensors")
    q, k, v, o = (
        weights[f"model.layers.2.self_attn.{part}_proj.weight"].double().numpy() for part in ("q", "k", "v", "o")
    )
    found = {head.name.removeprefix("model.layers.2.self_attn."): head for head in analysis.heads}
    assert len(found) == 6 * 6
    for head in range(6):
        rows = slice(32 * head, 32 * (head + 1))
        for name, matrix in (
            (f"q_proj.heads.{head}", q[rows]),
            (f"o_proj.heads.{head}", o[:, rows]),
            (f"heads.{head}.qk", q[rows].T @ k[rows]),
            (f"heads.{head}.vo", o[:, rows] @ v[rows]),
        ):
            eigenvalues = np.sort(np.linalg.svd(matrix, compute_uv=False) ** 2)[-32:]
            assert found[name].alpha == pytest.approx(esdtool.hill(eigenvalues).alpha, rel=1e-9)
    # Trained heads have heavier tails than untrained ones.
    assert all(head.alpha < head.mp_alpha for head in analysis.heads)


@pytest.mark.parametrize("shape", [(16, 96, 96), (24, 50, 200)])
def test_the_null_of_products_is_that_of_random_factors(shape: tuple[int, int, int]) -> None:
    width, rows, columns = shape
    generator = np.random.default_rng(5)
    drawn = [
        np.linalg.svd(generator.normal(size=(rows, width)) @ generator.normal(size=(width, columns)), compute_uv=False)[
            :width
        ]
        ** 2
        for _ in range(200)
    ]
    expected = np.sort(np.mean(drawn, axis=0))
    assert product_quantiles(width, rows, columns) == pytest.approx(expected, rel=0.15)
    assert product_quantiles(width, width - 1, columns) is None


def test_untrained_heads_are_near_their_null() -> None:
    generator = np.random.default_rng(1)
    weights = {
        name: generator.normal(size=matrix.shape).astype(np.float32) for name, matrix in llama(attention(6, 6)).items()
    }
    for head in analysed(weights, config_of(6, 6)).heads:
        assert abs(head.alpha - head.mp_alpha) < 4 * head.alpha_stderr
        assert head.null_distance < 0.12


def test_heads_change_nothing_else() -> None:
    matrices = attention(8, 2)
    tensors = {name: torch.from_numpy(matrix) for name, matrix in llama(matrices).items()}
    checkpoint = from_state_dict(tensors, config=config_of(8, 2))
    plain, asked = (esdtool.analyze(checkpoint, per_head=per_head) for per_head in (False, True))
    assert (asked.modules, asked.summary, asked.findings) == (plain.modules, plain.summary, plain.findings)
    assert (plain.heads, plain.settings.per_head, asked.settings.per_head) == ((), False, True)
    assert asked.to_json() == esdtool.analyze(checkpoint, per_head=True, jobs=2).to_json()
    assert Analysis.model_validate(json.loads(asked.to_json())).heads == asked.heads
    weight_decays = [esdtool.assign(analysis, weight_decay=0.1).to_json() for analysis in (plain, asked)]
    assert weight_decays[0] == weight_decays[1]


def test_the_csv_has_heads_below_the_modules() -> None:
    analysis = analysed(llama(attention(8, 2)), config_of(8, 2))
    rows = analysis.flat_rows()
    assert [set(row) for row in rows] == [set(rows[0])] * len(rows)
    assert [row["head"] for row in rows[:4]] == [None] * 4
    assert [row["name"] for row in rows[4:]] == [head.name for head in analysis.heads]
    assert rows[5]["alphas.hill"] == rows[5]["alpha"] == analysis.heads[1].alpha
    assert len(analysis.to_csv().splitlines()) == 1 + len(rows)
    assert "head" not in esdtool.analyze(EXAMPLE, include=["layers.0.*q_proj"]).flat_rows()[0]


def test_results_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESDTOOL_CACHE_DIR", str(tmp_path / "cache"))
    tensors = {name: torch.from_numpy(matrix) for name, matrix in llama(attention(8, 2)).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of(8, 2)))
    first = esdtool.analyze(tmp_path, per_head=True)
    with monkeypatch.context() as patch:
        patch.setattr(module_of_heads, "_heads", None)
        assert esdtool.analyze(tmp_path, per_head=True).heads == first.heads
        with pytest.raises(TypeError):
            esdtool.analyze(tmp_path, per_head=True, k_fraction=0.3)
    (tmp_path / "config.json").write_text(json.dumps(config_of(4, 1, head_dim=2 * WIDTH)))
    assert {head.shape[0] for head in esdtool.analyze(tmp_path, per_head=True).heads} == {2 * WIDTH, HIDDEN}


def test_bad_weights_are_named_and_spoil_no_other_head() -> None:
    matrices = attention(6, 6)
    matrices["q"][WIDTH + 1, 3] = np.nan
    matrices["v"][:WIDTH] = 0
    matrices["k"][2 * WIDTH : 3 * WIDTH] = np.outer(noise(WIDTH), noise(HIDDEN, seed=1))
    analysis = analysed(llama(matrices), config_of(6, 6))
    status = {(head.role, head.head): head.status for head in analysis.heads if not head.ok}
    for place, words in {
        ("q_proj", 1): "not finite",
        ("qk", 1): "not finite",
        ("v_proj", 0): "all elements are zero",
        ("vo", 0): "all elements are zero",
        ("k_proj", 2): "rank-deficient",
        ("qk", 2): "rank-deficient",
    }.items():
        assert words in status.pop(place)
    assert status == {}
    assert "6 parts of heads not scored" in analysis_markdown(analysis)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 7}, r"the 128 rows of .*q_proj \[128x96\] are not 7 heads of 16, as config.json says"),
        ({"head_dim": 12}, "the 128 rows of .* are not 8 heads of 12"),
        ({"num_attention_heads": None}, "config.json does not tell the number of its heads"),
        ({"kv_lora_rank": 8}, "multi-head latent attention"),
    ],
)
def test_heads_that_are_not_known_are_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"--per-head: model.layers.0.self_attn: .*{words}") as caught:
        analysed(llama(attention(8, 2)), config_of(8, 2) | changes)
    assert "\n" not in str(caught.value)


def test_keys_that_no_group_of_queries_can_share() -> None:
    matrices = attention(8, 2)
    matrices["k"] = noise(3 * WIDTH, HIDDEN)
    with pytest.raises(UsageError, match=r"k_proj \[48x96\] are not heads of 16 that 8 heads of queries can share"):
        analysed(llama(matrices), config_of(8, 2))


def test_one_block_that_is_not_known_leaves_the_others() -> None:
    good, bad = attention(6, 6), attention(6, 6, seed=9)
    bad["q"] = noise(5 * WIDTH, HIDDEN)
    analysis = analysed(llama(good) | llama(bad, layer=1), config_of(6, 6))
    check(analysis.heads, good, 6, 6)
    (left_out,) = analysis.heads_left_out
    assert left_out.name == "model.layers.1.self_attn"
    assert "80 rows" in left_out.reason


def test_projections_that_are_not_analysed_have_no_products() -> None:
    analysis = analysed(llama(attention(8, 2)), config_of(8, 2), include=["q_proj|v_proj|o_proj"])
    assert {head.role for head in analysis.heads} == {"q_proj", "v_proj", "o_proj", "vo"}


def test_what_has_no_heads_is_refused(tmp_path: Path) -> None:
    weights = llama(attention(8, 2))
    with pytest.raises(
        UsageError, match=r"--per-head needs the number of attention heads: put the model's config.json"
    ):
        analysed(weights, {})
    mlp = {"model.layers.0.mlp.up_proj.weight": noise(64, HIDDEN)}
    with pytest.raises(UsageError, match="none of the modules is a q, k, v or o projection"):
        analysed(mlp, config_of(8, 2))
    tensors = {name: torch.from_numpy(matrix) for name, matrix in weights.items()}
    with pytest.raises(UsageError, match="--per-head is for the weights of a model, not for differences"):
        analysed(weights, config_of(8, 2), base=tensors)


def test_the_tower_of_a_module_says_how_many_heads_it_has() -> None:
    text, vision = attention(8, 2), attention(6, 6, seed=3)
    weights = {f"language_model.{name}": matrix for name, matrix in llama(text).items()}
    weights |= {
        f"vision_tower.encoder.layers.0.self_attn.{part}_proj.weight": matrix for part, matrix in vision.items()
    }
    config = {"text_config": config_of(8, 2), "vision_config": {"hidden_size": HIDDEN, "num_attention_heads": 6}}
    tensors = from_state_dict({name: torch.from_numpy(matrix) for name, matrix in weights.items()}).tensors.values()
    found, left_out = find_attention(select_modules(tensors, config=config).modules, config)
    assert left_out == ()
    assert sorted((block.heads, block.key_value_heads) for block in found) == [(6, 6), (8, 2)]


def test_the_reports(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    options = ["--per-head", "--html", str(page), "--include", r"layers\.[01]\.self_attn", "--no-cache"]
    shown = CliRunner().invoke(app, ["analyze", str(EXAMPLE), *options])
    assert shown.exit_code == 0
    analysis = esdtool.analyze(EXAMPLE, per_head=True, include=[r"layers\.[01]\.self_attn"], cache=False)
    alphas = sorted(head.alpha for head in analysis.heads if head.layer == 1 and head.role == "qk")
    cell = f"{alphas[0]:.2f} {(alphas[2] + alphas[3]) / 2:.2f} {alphas[-1]:.2f}"
    for text in (shown.stdout, analysis_markdown(analysis), page.read_text(encoding="utf-8")):
        assert cell in text
        assert "Untrained: q_proj" in text
    assert "Attention heads" not in analysis_page(esdtool.analyze(EXAMPLE, include=["layers.0.*q_proj"]))
