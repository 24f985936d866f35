"""The formulas against numpy, and the whole chain from weights to decays against an SVD in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esdtool.analysis.document import Analysis, Settings, SkippedResult, Source, Summary
from esdtool.analysis.module_record import ModuleResult
from esdtool.analysis.run import analyze
from esdtool.assignment.assign import assign
from esdtool.assignment.rule import PUBLISHED_RATIOS, DecayRule, decay_ratios
from esdtool.assignment.scope import in_blocks
from esdtool.errors import NothingToAnalyzeError, UsageError
from esdtool.optim import AlphaDecay

ALPHAS = [1.2, 1.9, 2.4, 2.5, 3.7, 5.0]
LAYERS = [0, 0, 0, 1, 1, 1]

# Independent forms of the formulas, in numpy.
ORACLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda a: np.interp(a, [a.min(), a.max()], [0.67, 5.0]),
    "sqrt": lambda a: np.sqrt(a) / np.mean(np.sqrt(a)),
    "log2": lambda a: np.log(a) / np.mean(np.log(a)),
    "uniform": np.ones_like,
}

alphas = st.lists(st.floats(min_value=1.01, max_value=50), min_size=2, max_size=30).filter(
    lambda values: max(values) - min(values) > 1e-6
)


@given(alphas)
@pytest.mark.parametrize("name", ORACLES)
def test_formulas(name: str, scores: list[float]) -> None:
    expected = ORACLES[name](np.array(scores))
    np.testing.assert_allclose(decay_ratios(scores, assign=name), expected, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]


@given(alphas)
def test_sigmoid_standardises_inside_each_layer(scores: list[float]) -> None:
    layers = [index % 3 for index in range(len(scores))]
    expected = np.empty(len(scores))
    for layer in set(layers):
        inside = np.array(layers) == layer
        group = np.array(scores)[inside]
        expected[inside] = 1 + np.tanh(2 * (group - group.mean()) / (group.std() + 1e-8))
    np.testing.assert_allclose(decay_ratios(scores, assign="sigmoid", layers=layers), expected, rtol=1e-6, atol=1e-7)


@given(alphas, st.randoms())
@pytest.mark.parametrize("name", ["linear", "sqrt", "log2"])
def test_order_of_modules_does_not_matter(name: Any, scores: list[float], random: Any) -> None:
    order = list(range(len(scores)))
    random.shuffle(order)
    ratios = decay_ratios(scores, assign=name)
    assert decay_ratios([scores[index] for index in order], assign=name) == [ratios[index] for index in order]


@given(alphas)
@pytest.mark.parametrize("name", ["linear", "sqrt", "log2"])
def test_heavier_tail_means_weaker_decay(name: Any, scores: list[float]) -> None:
    ordered = decay_ratios(sorted(scores), assign=name)
    assert all(first <= second + 1e-12 for first, second in itertools.pairwise(ordered))


def test_linear_reaches_both_ratios_exactly() -> None:
    ratios = decay_ratios(ALPHAS, min_ratio=0.67, max_ratio=5.0)
    assert (ratios[0], ratios[-1]) == (0.67, 5.0)


@pytest.mark.parametrize("name", ["linear", "sqrt", "log2", "uniform", "sigmoid"])
@pytest.mark.parametrize("scores", [[], [2.5], [2.5, 2.5, 2.5], [2.5, math.nextafter(2.5, 3)]])
def test_equal_scores_keep_the_base(name: Any, scores: list[float]) -> None:
    ratios = decay_ratios(scores, assign=name, layers=[0] * len(scores))
    assert ratios == pytest.approx([1.0] * len(scores), abs=1e-6)


REJECTED_SCORES: list[tuple[dict[str, Any], list[float], type[Exception], str]] = [
    ({"assign": "cubic"}, ALPHAS, UsageError, "choose from linear"),
    ({"min_ratio": 3.0, "max_ratio": 1.0}, ALPHAS, UsageError, "more than max-ratio"),
    ({"min_ratio": -1.0}, ALPHAS, UsageError, "not negative"),
    ({"max_ratio": math.inf}, ALPHAS, UsageError, "finite"),
    ({"assign": "sqrt"}, [-0.1, 2.0], UsageError, "at least 0"),
    ({"assign": "sqrt"}, [0.0, 0.0], UsageError, "one of them above"),
    ({"assign": "log2"}, [0.9, 2.0], UsageError, "at least 1"),
    ({"assign": "log2"}, [1.0, 1.0], UsageError, "one of them above"),
    ({"assign": "sigmoid"}, ALPHAS, ValueError, "layers"),
    ({}, [1.0, math.nan], ValueError, "finite"),
    ({}, [1.0, math.inf], ValueError, "finite"),
]


@pytest.mark.parametrize(("options", "scores", "error", "message"), REJECTED_SCORES)
def test_rejected_scores(options: dict[str, Any], scores: list[float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decay_ratios(scores, **options)


def _rule_ratios(rule: DecayRule, scores: list[float | None], sizes: list[int] | None = None) -> list[float]:
    return rule.ratios(scores, layers=LAYERS, roles=["q", "k", "v", "q", "k", "v"], sizes=sizes or [1] * len(scores))


def test_granularity_takes_the_mean_of_each_group() -> None:
    by_layer = _rule_ratios(DecayRule(granularity="layer"), list(ALPHAS))
    assert by_layer == pytest.approx([0.67] * 3 + [5.0] * 3)
    by_role = _rule_ratios(DecayRule(granularity="role", assign="sqrt"), list(ALPHAS))
    means = np.array([1.85, 2.8, 3.7])
    assert by_role == pytest.approx(list(np.sqrt(means) / np.sqrt(means).mean()) * 2)


def test_a_group_of_equal_scores_has_exactly_their_mean() -> None:
    # 0.1 + 0.1 + 0.1 over 3 is not 0.1: groups of different sizes would differ by one unit in the last place.
    rule = DecayRule(granularity="role")
    ratios = rule.ratios([1.1] * 4, layers=[0] * 4, roles=["q", "q", "q", "k"], sizes=[1] * 4)
    assert ratios == [1.0] * 4


def test_normalize_keeps_the_parameter_weighted_mean() -> None:
    sizes = [10, 20, 30, 40, 50, 60]
    plain = _rule_ratios(DecayRule(), list(ALPHAS), sizes)
    ratios = _rule_ratios(DecayRule(normalize=True), list(ALPHAS), sizes)
    assert np.average(ratios, weights=sizes) == pytest.approx(1.0, rel=1e-12)
    assert np.allclose(np.array(ratios) / ratios[0], np.array(plain) / plain[0])


def test_controls_keep_the_decays_and_lose_the_order() -> None:
    scores, sizes = [3.0, 2.0, 4.0, 2.5, 3.5], [10, 20, 30, 40, 50]
    rest: dict[str, Any] = {"layers": [0] * 5, "roles": ["q"] * 5, "sizes": sizes}
    method = DecayRule().ratios(scores, **rest)
    assert DecayRule(control="reversed").ratios(scores, **rest) == [method[i] for i in (0, 2, 1, 4, 3)]
    total = sum(ratio * size for ratio, size in zip(method, sizes, strict=True))
    assert DecayRule(control="mean").ratios(scores, **rest) == pytest.approx([total / sum(sizes)] * 5)
    dealt = [DecayRule(control="shuffled", control_seed=seed).ratios(scores, **rest) for seed in range(20)]
    assert all(sorted(ratios) == sorted(method) for ratios in dealt)
    assert len(set(map(tuple, dealt))) > 10
    # The same hand again at the next refresh, whatever the scores are then: a module keeps its place in the order.
    again = DecayRule(control="shuffled", control_seed=3).ratios([9.0, 8.0, 10.0, 8.5, 9.5], **rest)
    assert again == pytest.approx(dealt[3])


def test_controls_leave_unscored_modules_alone() -> None:
    rest: dict[str, Any] = {"layers": [0] * 3, "roles": ["q"] * 3, "sizes": [1, 1, 1]}
    for control in ("mean", "shuffled", "reversed"):
        assert DecayRule(control=control).ratios([2.0, None, 4.0], **rest)[1] == 1.0
        assert DecayRule(control=control).ratios([None] * 3, **rest) == [1.0] * 3


def test_unscored_modules_have_the_base_and_take_no_part() -> None:
    with_hole = _rule_ratios(DecayRule(normalize=True), [1.2, None, 2.4, 2.5, 3.7, None])
    assert (with_hole[1], with_hole[5]) == (1.0, 1.0)
    rule = DecayRule(normalize=True)
    alone = rule.ratios([1.2, 2.4, 2.5, 3.7], layers=[0, 0, 1, 1], roles=["q"] * 4, sizes=[1] * 4)
    assert [with_hole[index] for index in (0, 2, 3, 4)] == alone


REJECTED_RULES: list[tuple[dict[str, Any], str]] = [
    ({"assign": "cubic"}, "unknown assignment 'cubic'"),
    ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
    ({"granularity": "head"}, "unknown granularity 'head'"),
    ({"min_ratio": 2.0, "max_ratio": 1.0}, "min-ratio 2.0 is more than max-ratio 1.0"),
    ({"min_ratio": 5.5}, "more than max-ratio 5.0"),
    ({"min_ratio": 4.0, "optimizer": "adam"}, "more than max-ratio 3.0"),
    ({"assign": "sqrt", "max_ratio": 2.0}, "belong to the linear assignment"),
    ({"assign": "sigmoid", "granularity": "layer"}, "sigmoid compares the modules of a layer"),
]


@pytest.mark.parametrize(("options", "message"), REJECTED_RULES)
def test_rejected_rules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DecayRule(**options)


def test_all_zero_ratios_cannot_be_normalized() -> None:
    with pytest.raises(UsageError, match="cannot normalize"):
        _rule_ratios(DecayRule(min_ratio=0, max_ratio=0, normalize=True), list(ALPHAS))


def test_blocks_come_first() -> None:
    assert in_blocks([None, 3]) == [False, True]
    assert in_blocks([]) == []


# --- assign -----------------------------------------------------------------------------------------------------


def _oracle_alphas(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Hill alphas of the blocks' matrices by numpy's SVD in float64."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and ".layers." in name:
            eigenvalues = np.sort(np.linalg.svd(tensor.double().numpy(), compute_uv=False) ** 2)
            tail = eigenvalues[eigenvalues.size // 2 :]
            found[name] = 1 + tail.size / np.log(tail / tail[0]).sum()
    return found


@pytest.mark.parametrize("name", ["linear", "sqrt", "log2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exclude", [(), (r"layers\.0\.self_attn\.q_proj",)])
def test_decays_of_a_llama(
    name: Any, dtype: torch.dtype, exclude: tuple[str, ...], make_llama: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """Excluding the first q_proj is what the public code does: minimum and maximum are over the rest."""
    tensors = make_llama(dtype=dtype)
    assignment = assign(analyze(tensors), assign=name, weight_decay=0.05, exclude=exclude)
    oracle = _oracle_alphas(tensors)
    if exclude:
        excluded = "model.layers.0.self_attn.q_proj.weight"
        del oracle[excluded]
        assert excluded in assignment.left_out
    expected = 0.05 * ORACLES[name](np.array(list(oracle.values())))
    assert set(assignment.parameters) == set(oracle)
    np.testing.assert_allclose([assignment.decays[key] for key in oracle], expected, rtol=1e-5)


def _module(name: str, alpha: float | None, layer: int | None = 0, **fields: Any) -> ModuleResult:
    numbers: dict[str, Any] = {"alpha": alpha, "alphas": {"hill": alpha, "ks": None if alpha is None else alpha + 1}}
    return ModuleResult(
        name=name,
        parameter=f"{name}.weight",
        role=name.rpartition(".")[2],
        layer=layer,
        shape=(64, 64),
        dtype="float32",
        num_eigs=64,
        **({} if alpha is None else numbers),
        **({"status": "all elements are zero"} if alpha is None else {}),
        **fields,
    )


def _analysis(*modules: ModuleResult, fit: tuple[str, ...] = ("hill", "ks")) -> Analysis:
    skipped = SkippedResult(name="lm_head.weight", shape=(100, 64), dtype="float32", reason="language-model head")
    return Analysis(
        created_by="test",
        source=Source(checkpoint="ckpt", revision="abc", model_type="llama"),
        settings=Settings(fit=fit, k_fraction=0.5, min_eigs=50, spectrum="auto", fast=False),
        modules=modules,
        skipped=(skipped,),
        summary=Summary(num_modules=len(modules), num_scored=0, num_skipped=1),
    )


Q, K, V = (f"model.layers.0.self_attn.{role}" for role in ("q_proj", "k_proj", "v_proj"))


def test_published_ratios() -> None:
    assert PUBLISHED_RATIOS == {"adamw": (0.67, 5.0), "adam": (0.67, 3.0)}
    analysis = _analysis(_module(Q, 2.0), _module(K, 4.0))
    adamw, adam = assign(analysis), assign(analysis, optimizer="adam", weight_decay=1e-5)
    assert list(adamw.decays.values()) == pytest.approx([0.067, 0.5])
    assert list(adam.decays.values()) == pytest.approx([0.67e-5, 3e-5])
    assert (adamw.optimizer, adam.optimizer) == ("decoupled", "l2")
    assert (adamw.source.checkpoint, adamw.source.revision) == ("ckpt", "abc")  # type: ignore[union-attr]


def test_degenerate_modules_have_the_base_and_the_file_says_so() -> None:
    assignment = assign(_analysis(_module(Q, 2.0), _module(K, None), _module(V, 3.0)))
    entry = assignment.parameters[f"{K}.weight"]
    assert (entry.weight_decay, entry.ratio, entry.alpha) == (0.1, 1.0, None)
    assert entry.note == "base decay: all elements are zero"
    assert assignment.parameters[f"{V}.weight"].ratio == 5.0


def test_the_note_of_a_fused_parameter_is_true_of_its_decay() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"self_attn": nn.MultiheadAttention(64, 4, bias=False)}) for _ in range(2)
    )
    name = "layers.0.self_attn.in_proj_weight"
    with torch.no_grad():
        model.get_parameter(name)[64:128] **= 3
        model.get_parameter(name)[128:] = 0
    entry = assign(analyze(model)).parameters[name]
    assert entry.weight_decay != 0.1
    assert entry.note == (
        f"decay {entry.weight_decay:.4g} (base 0.1) is a mean in which what is not scored counts as the base: "
        "layers.0.self_attn.v_proj: all elements are zero"
    )
    live = AlphaDecay(model, torch.optim.AdamW(model.parameters()))
    assert live.last_notes == {name: entry.note}
    with torch.no_grad():
        model.get_parameter(name).zero_()
    live.refresh()
    assert live.last_notes == {name: "base decay: all elements are zero"}
    assert live.last_decays[name] == 0.1


@pytest.mark.parametrize("weight_decay", [1e308, 1.7e308])
def test_a_decay_that_no_number_holds_is_refused(weight_decay: float) -> None:
    with pytest.raises(UsageError, match="more than a number can hold"):
        assign(_analysis(_module(Q, 2.0), _module(K, 4.0)), weight_decay=weight_decay)


@pytest.mark.parametrize("function", ["linear", "sqrt", "log2", "sigmoid"])
def test_a_score_beyond_use_has_the_base_decay(function: Any) -> None:
    assignment = assign(_analysis(_module(Q, 2.0), _module(K, 1e308), _module(V, 3.0)), assign=function)
    entry = assignment.parameters[f"{K}.weight"]
    assert (entry.weight_decay, entry.note) == (0.1, "base decay: alpha 1e+308 is beyond 1e+100")


def test_equal_alphas_and_a_base_of_zero() -> None:
    equal = assign(_analysis(_module(Q, 2.0), _module(K, 2.0)))
    assert set(equal.decays.values()) == {0.1}
    zero = assign(_analysis(_module(Q, 2.0), _module(K, 3.0)), weight_decay=0.0)
    assert set(zero.decays.values()) == {0.0}
    assert [entry.ratio for entry in zero.parameters.values()] == [0.67, 5.0]


def test_another_fit() -> None:
    modules = _module(Q, 2.0), _module(K, 3.0), _module(V, 4.0).model_copy(update={"alphas": {"hill": 4.0, "ks": None}})
    assignment = assign(_analysis(*modules), fit="ks")
    assert [entry.alpha for entry in assignment.parameters.values()] == [3.0, 4.0, None]
    assert assignment.parameters[f"{V}.weight"].note == "base decay: no alpha by this estimator"
    with pytest.raises(UsageError, match="holds no fit 'farms', only hill, ks; analyse again with --fit farms"):
        assign(_analysis(*modules), fit="farms")


@pytest.mark.parametrize("score", ["stable_rank", "frobenius_norm", "spectral_norm", "alpha_weighted"])
def test_scores_other_than_alpha(score: Any, make_llama: Callable[..., dict[str, torch.Tensor]]) -> None:
    tensors = make_llama()
    assignment = assign(analyze(tensors), score=score)
    oracle = {}
    for name, alpha in _oracle_alphas(tensors).items():
        values = np.linalg.svd(tensors[name].double().numpy(), compute_uv=False)
        oracle[name] = {
            "stable_rank": (values**2).sum() / values[0] ** 2,
            "frobenius_norm": np.sqrt((values**2).sum()),
            "spectral_norm": values[0],
            "alpha_weighted": alpha * np.log10(values[0] ** 2),
        }[score]
    expected = 0.1 * ORACLES["linear"](np.array(list(oracle.values())))
    np.testing.assert_allclose([assignment.decays[name] for name in oracle], expected, rtol=1e-5)
    first = next(iter(oracle))
    assert assignment.parameters[first].score == pytest.approx(oracle[first], rel=1e-5)


def test_modules_outside_blocks_are_left_out_unless_named() -> None:
    analysis = _analysis(_module(Q, 2.0), _module(K, 3.0), _module("pooler.dense", 9.0, layer=None))
    plain = assign(analysis)
    assert list(plain.decays.values()) == pytest.approx([0.067, 0.5])
    assert plain.left_out["pooler.dense.weight"].startswith("outside the numbered blocks")
    named = assign(analysis, include=("layers", "pooler"))
    assert list(named.parameters)[-1] == "pooler.dense.weight"
    unnumbered = assign(_analysis(_module("fc1", 2.0, layer=None), _module("fc2", 3.0, layer=None)))
    assert list(unnumbered.decays.values()) == pytest.approx([0.067, 0.5])


@pytest.mark.parametrize(("unlisted", "decay"), [("keep", None), ("no-decay", 0.0), ("base", 0.1)])
def test_what_is_not_listed_is_explicit(unlisted: Any, decay: float | None) -> None:
    assignment = assign(_analysis(_module(Q, 2.0), _module(K, 3.0)), unlisted=unlisted)
    assert (assignment.default.unlisted, assignment.default.weight_decay) == (unlisted, decay)


def test_names_lose_the_segments_of_wrappers() -> None:
    assignment = assign(_analysis(_module(f"_orig_mod.module.{Q}", 2.0), _module(f"_orig_mod.module.{K}", 3.0)))
    assert list(assignment.parameters) == [f"{Q}.weight", f"{K}.weight"]


REJECTED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"include": ("nowhere",)}, UsageError, "^include 'nowhere' matches no analysed parameter; names look like"),
    ({"include": ("lm_head",)}, UsageError, "^include 'lm_head' matches no analysed parameter"),
    ({"exclude": ("nowhere",)}, UsageError, "^exclude 'nowhere' matches no analysed parameter"),
    ({"exclude": ("(",)}, UsageError, r"^exclude '\(' is not a regular expression"),
    ({"exclude": ("q_proj", "k_proj")}, NothingToAnalyzeError, "no module is left"),
    ({"min_ratio": 2.0, "max_ratio": 1.0}, UsageError, "more than max-ratio"),
    ({"weight_decay": -0.1}, UsageError, "not negative"),
    ({"weight_decay": math.nan}, UsageError, "finite"),
    ({"score": "beauty"}, UsageError, "unknown score 'beauty'"),
    ({"unlisted": "some"}, UsageError, "unknown choice"),
    ({"assign": "log2", "score": "stable_rank"}, NothingToAnalyzeError, "no module was scored"),
]


@pytest.mark.parametrize(("options", "error", "message"), REJECTED)
def test_rejected(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        assign(_analysis(_module(Q, 2.0), _module(K, 3.0)), **options)


def test_nothing_scored() -> None:
    with pytest.raises(NothingToAnalyzeError, match=r"ckpt: no module was scored.*q_proj: base decay: all elements"):
        assign(_analysis(_module(Q, None)))


def test_excluding_a_skipped_tensor_is_no_error() -> None:
    assert len(assign(_analysis(_module(Q, 2.0), _module(K, 3.0)), exclude=("lm_head",)).parameters) == 2
