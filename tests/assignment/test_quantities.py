"""Each quantity against published numbers, another solver, or the library that defines it; and what is refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from esdtool.analysis.document import Analysis
from esdtool.analysis.run import analyze
from esdtool.assignment.allocate import AllocateOptions, allocate
from esdtool.assignment.allocation import Allocation
from esdtool.assignment.assign_options import AssignOptions
from esdtool.assignment.quantities import QUANTITY_NAMES
from esdtool.assignment.quantities.bits import falling, sensitivity
from esdtool.assignment.quantities.lora_rank import allocate_ranks
from esdtool.assignment.quantities.sparsity import sparsities
from esdtool.assignment.quantities.train_layers import signal_to_noise
from esdtool.assignment.quantity import checked_settings
from esdtool.assignment.rounding import rounded_rows, rounding_errors
from esdtool.assignment.spending import spend
from esdtool.errors import CheckpointError, UsageError
from tests.conftest import llama_tensors

FITS = ("hill", "fix-finger-legacy", "hill-classic")

# Mean alphas of the 32 blocks of LLaMA-7B, from data/llama-7b-hf/alpha_peak.npy of haiquanlu/AlphaPruning @ 5f0e984.
LLAMA_7B = [
    *(2.622161, 2.889890, 2.968962, 2.964461, 3.089984, 3.063815, 2.960608, 2.745569),
    *(2.775207, 2.608615, 2.716712, 2.729706, 2.784302, 2.851670, 2.896570, 3.176652),
    *(3.123034, 3.446092, 3.871534, 3.606035, 3.894475, 4.065989, 3.755078, 3.714630),
    *(3.994079, 4.220435, 4.102447, 4.160386, 3.850811, 4.093433, 4.160116, 3.537446),
]
LLAMA_7B_SIZES = [4 * 4096**2 + 3 * 4096 * 11008] * 32


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyze(llama_tensors(4), fit=FITS, cache=False)


def made(analysis: Analysis, *quantities: str, **values: dict[str, Any]) -> Allocation:
    by_name = {name.replace("_", "-"): found for name, found in values.items()}
    options = AllocateOptions.of(quantities, by_name, decays=AssignOptions())
    return allocate(analysis, options).allocation


def size(allocation: Allocation, name: str) -> int:
    return math.prod(allocation.parameters[name].shape or ())


# Sparsity: AlphaPruning.


@pytest.mark.parametrize(
    ("eps", "first", "largest", "last"),
    [
        (0.2, [0.5704, 0.6176, 0.6315, 0.6307, 0.6529, 0.6482, 0.6301, 0.5922, 0.5974, 0.5680], 0.852052, 0.7317),
        (0.3, [0.5042, 0.5755, 0.5966, 0.5954], 0.929726, 0.7479),
    ],
)
def test_alpha_pruning_of_llama_7b(eps: float, first: list[float], largest: float, last: float) -> None:
    found = sparsities(LLAMA_7B, LLAMA_7B_SIZES, target=0.7, eps=eps)
    assert found[: len(first)] == pytest.approx(first, abs=1e-4)
    assert max(found) == found[25] == pytest.approx(largest, abs=1e-5)
    assert found[-1] == pytest.approx(last, abs=1e-4)
    assert np.mean(found) == pytest.approx(0.7, abs=1e-12)


weights = st.lists(st.tuples(st.floats(1.01, 20), st.integers(1, 10**6)), min_size=1, max_size=12)


@given(weights, st.floats(0.01, 0.95), st.floats(0, 1), st.floats(0.95, 1))
@example([(2.0, 1), (1.5, 2)], 0.5, 1.0, 1.0)
def test_the_target_is_exact_and_no_sparsity_above_the_cap(
    units: list[tuple[float, int]], target: float, eps: float, cap: float
) -> None:
    alphas, sizes = zip(*units, strict=True)
    found = np.array(sparsities(alphas, sizes, target=target, eps=eps, cap=cap))
    assert (found >= 0).all()
    assert (found <= cap * (1 + 1e-12)).all()
    assert np.average(found, weights=sizes) == pytest.approx(target, rel=1e-9)
    order = np.argsort(alphas)
    assert (np.diff(found[order]) >= -1e-9).all()  # a lighter tail is pruned no less


def test_sparsity_per_block_role_and_module(analysis: Analysis) -> None:
    blocks = made(analysis, "sparsity", sparsity={"target": 0.5})
    by_layer: dict[int | None, set[float]] = {}
    for name, value in blocks.values("sparsity").items():
        by_layer.setdefault(blocks.parameters[name].layer, set()).add(value)
    assert [len(values) for values in by_layer.values()] == [1] * 4
    roles = made(analysis, "sparsity", sparsity={"target": 0.5, "by": "role"})
    assert len(set(roles.values("sparsity").values())) == 7
    for allocation in (blocks, roles, made(analysis, "sparsity", sparsity={"target": 0.5, "by": "module"})):
        values = allocation.values("sparsity")
        mean = np.average(list(values.values()), weights=[size(allocation, name) for name in values])
        assert mean == pytest.approx(0.5, abs=1e-12)


# Bits: AlphaQ.


def allocate_bits(factors: Any, sizes: Any, *, choices: list[int], budget: float, error: str = "variance") -> list[int]:
    ladder = sorted(choices)
    costs = [[factor * each for each in falling(ladder, error)] for factor in factors]
    return spend(costs, sizes, ladder=ladder, budget=budget)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_equal_sizes_cost_no_more_than_the_integer_program(seed: int) -> None:
    """The public code solves this program by PuLP; scipy's solver stands for it here."""
    random = np.random.default_rng(seed)
    alphas, variances = random.uniform(1.5, 6, 24), random.lognormal(-8, 1, 24)
    median = float(np.median(alphas))
    factors = [sensitivity(a, median, v, 1.0) for a, v in zip(alphas, variances, strict=True)]
    choices, budget = np.array([2, 3, 4]), 3.25
    costs = np.outer(factors, 4.0**-choices).ravel()
    one_each = np.kron(np.eye(24), np.ones(3))
    total = np.tile(choices, 24)[None]
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(total, -np.inf, budget * 24)]
    solved = milp(costs, constraints=constraints, integrality=np.ones(72), bounds=Bounds(0, 1))
    found = allocate_bits(factors, [1] * 24, choices=[2, 3, 4], budget=budget)
    cost = sum(factor * 4.0**-bits for factor, bits in zip(factors, found, strict=True))
    assert sum(found) <= budget * 24
    assert cost <= solved.fun * (1 + 1e-6)


def test_agrees_with_the_integer_program_in_nearly_every_matrix() -> None:
    """The published table has 3,086 rows, alphas of 2 to 6 and gamma 10, and a budget of 3.5: a restatement of it."""
    random = np.random.default_rng(7)
    alphas, variances = random.normal(3.5, 0.4, 600), random.lognormal(-8, 0.3, 600)
    factors = np.array(
        [sensitivity(a, float(np.median(alphas)), v, 10.0) for a, v in zip(alphas, variances, strict=True)]
    )
    found = np.array(allocate_bits(list(factors), [1] * 600, choices=[2, 3, 4], budget=3.5))
    # By Lagrange's multiplier: a bit is bought where it saves more than a price, and the price uses up the budget.
    prices = np.sort(np.concatenate([factors * (4.0**-b - 4.0 ** -(b + 1)) for b in (2, 3)]))[::-1]
    price = prices[int(3.5 * 600) - 2 * 600 - 1]
    expected = 2 + sum((factors * (4.0**-b - 4.0 ** -(b + 1)) >= price).astype(int) for b in (2, 3))
    assert np.mean(found == expected) >= 0.995
    assert found.sum() == 3.5 * 600


@given(weights, st.floats(2, 8), st.sampled_from(["variance", "step"]))
def test_the_mean_width_is_within_the_budget(units: list[tuple[float, int]], budget: float, error: Any) -> None:
    factors, sizes = zip(*units, strict=True)
    found = allocate_bits(factors, sizes, choices=[8, 2, 4, 3], budget=budget, error=error)
    assert set(found) <= {2, 3, 4, 8}
    assert np.average(found, weights=sizes) <= budget * (1 + 1e-9)


def test_bits_of_a_model_are_within_the_budget_by_weights(analysis: Analysis) -> None:
    allocation = made(analysis, "bits", bits={"choices": "2,3,4", "budget": "3.1", "gamma": 4})
    bits = allocation.values("bits")
    assert set(bits.values()) <= {2, 3, 4}
    assert 3.0 < np.average(list(bits.values()), weights=[size(allocation, name) for name in bits]) <= 3.1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_errors_are_those_of_the_nearest_levels(bits: int) -> None:
    rows = torch.randn(6, 40, generator=torch.Generator().manual_seed(bits)).bfloat16()
    rows[2] = 0
    expected = []
    for row in rows.double().numpy():
        levels = np.abs(row).max() * np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)) / (2 ** (bits - 1) - 1)
        expected.append(np.abs(row[:, None] - levels).min(axis=1) ** 2)
    assert rounding_errors(rows.split(4), [bits]) == pytest.approx([np.mean(expected)], rel=1e-5)
    assert len(rounded_rows(rows[:1].float(), bits).unique()) <= 2**bits - 1


def test_bits_by_what_rounding_changes(tmp_path: Path) -> None:
    """With one huge element in each row, few bits leave nothing of the others: more of them help as little."""
    tensors = llama_tensors(2)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][:, 0] += 40 * tensors[name].std()
    save_file(tensors, tmp_path / "model.safetensors")
    found = analyze(tmp_path, fit=FITS, cache=False)
    choices = {"choices": "2,3,4", "budget": 3.0, "gamma": 0}
    by_variance = made(found, "bits", bits=choices).values("bits")
    assert by_variance[name] == 4
    choices["error"] = "rounding"
    bits = made(found, "bits", bits=choices).values("bits")
    assert bits[name] == 2 < max(bits.values())
    # No exchange of a step of one matrix for a step of another would cost less.
    errors = {other: dict(zip((2, 3, 4), rounding_errors([tensors[other]], [2, 3, 4]), strict=True)) for other in bits}
    for up, down in itertools.permutations(bits, 2):
        if tensors[up].numel() == tensors[down].numel() and bits[up] < 4 and bits[down] > 2:
            gained = errors[up][int(bits[up])] - errors[up][int(bits[up]) + 1]
            lost = errors[down][int(bits[down]) - 1] - errors[down][int(bits[down])]
            assert gained <= lost * (1 + 1e-6)
    save_file({name: tensors[name][:8].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not the tensor that was analysed|no such"):
        made(found, "bits", bits=choices)


def test_weights_of_a_model_in_memory_cannot_be_read_again(analysis: Analysis) -> None:
    with pytest.raises(UsageError, match=r"analysed in memory.*save"):
        made(analysis, "bits", bits={"error": "rounding"})


# LoRA: ranks and targets.


@given(weights, st.floats(0, 1), st.integers(0, 2))
def test_ranks_add_up_and_keep_their_bounds(units: list[tuple[float, int]], share: float, least: int) -> None:
    alphas, most = zip(*[(alpha, least + number % 64) for alpha, number in units], strict=True)
    total = round(least * len(most) + share * (sum(most) - least * len(most)))
    found = allocate_ranks(alphas, total=total, least=[least] * len(most), most=most)
    assert sum(found) == total
    assert all(least <= rank <= high for rank, high in zip(found, most, strict=True))


def test_ranks_are_the_rule_to_within_one() -> None:
    """AlphaLoRA's shares, T alpha^beta / sum alpha^beta, where no bound is in the way."""
    alphas = np.linspace(2, 6, 32)
    shares = 160 * alphas**2.5 / (alphas**2.5).sum()
    found = allocate_ranks(list(alphas**2.5), total=160, least=[0] * 32, most=[99] * 32)
    assert np.abs(found - shares).max() < 1


def test_mean_rank_of_a_model(analysis: Analysis) -> None:
    ranks = made(analysis, "lora-rank", lora_rank={"budget": 6}).values("rank")
    assert sum(ranks.values()) == 6 * 28
    assert min(ranks.values()) >= 1


def test_targets_are_those_of_peft() -> None:
    pytest.importorskip("peft")
    from peft.helpers import KappaTuneSelector

    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList()
    for width in (60, 64, 72, 90, 128):
        block = nn.Module()
        block.q_proj, block.o_proj = nn.Linear(64, width, bias=False), nn.Linear(width, 64, bias=False)
        model.layers.append(block)
    expected = KappaTuneSelector(model, show_progress=False).get_best_targets(top_p=0.3)
    chosen = made(analyze(model, cache=False), "lora-targets", lora_targets={"target": 0.3}).values("lora_target")
    assert sorted(name.removesuffix(".weight") for name, is_target in chosen.items() if is_target) == sorted(expected)


# Layers to train: Spectrum.


def spectrum_score(weight: torch.Tensor) -> float:
    """The formula of QuixiAI/spectrum @ 0ed1756 in its own terms: singular values in float32 and torch's quantiles."""
    values = torch.linalg.svdvals(weight)
    sigma = (torch.quantile(values, 0.75) - torch.quantile(values, 0.25)) / 1.349
    rows, columns = weight.shape
    threshold = sigma * math.sqrt((1 + math.sqrt(min(rows, columns) / max(rows, columns))) ** 2)
    signal, rest = values[values > threshold].sum(), values[values <= threshold]
    return float(signal / (rest.sum() if len(rest) else 1.0) / values[0])


@pytest.mark.parametrize("shape", [(64, 64), (64, 172), (100, 400)])
def test_signal_to_noise(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -1, shape[1])
    found = signal_to_noise(torch.linalg.svdvals(weight.double()).numpy() ** 2, shape)
    assert found == pytest.approx(spectrum_score(weight), rel=1e-4)


def test_the_best_half_of_each_type_is_trained(analysis: Analysis) -> None:
    allocation = made(analysis, "train-layers")
    weights = llama_tensors(4)
    for role in ("q_proj", "down_proj"):
        names = [name for name in weights if name.endswith(f"{role}.weight")]
        best = sorted(names, key=lambda name: -spectrum_score(weights[name]))[:2]
        assert {name for name in names if allocation.values("train")[name]} == set(best)
    assert allocation.values("train")["model.embed_tokens.weight"] is True
    assert allocation.values("train")["lm_head.weight"] is True


def test_a_random_matrix_has_no_signal_of_its_own() -> None:
    weights = {
        f"layers.{n}.up_proj.weight": torch.randn(300, 310, generator=torch.Generator().manual_seed(n)) for n in (0, 1)
    }
    scores = made(analyze(weights, cache=False), "train-layers", train_layers={"null": "random"}).parameters
    plain = made(analyze(weights, cache=False), "train-layers").parameters
    for name, entry in scores.items():
        assert abs(entry.details["train"].score or 0) < 0.2 * (plain[name].details["train"].score or 0)


# Learning rates, and what all quantities share.


def test_llr_of_a_model(analysis: Analysis) -> None:
    ratios = made(analysis, "learning-rate").values("lr_ratio")
    alphas = {module.parameter: module.alpha or 0 for module in analysis.modules}
    low, high = min(alphas.values()), max(alphas.values())
    for name, alpha in alphas.items():
        assert ratios[name] == pytest.approx(np.interp(alpha, [low, high], [1, 5]), rel=1e-12)
    assert ratios["model.embed_tokens.weight"] == ratios["lm_head.weight"] == 5
    assert not any("norm" in name for name in ratios)


@pytest.mark.parametrize("control", ["mean", "shuffled", "reversed"])
def test_controls_keep_the_budget(analysis: Analysis, control: str) -> None:
    plain, other = (
        made(
            analysis, "sparsity", "learning-rate", sparsity={"control": c, "by": "module"}, learning_rate={"control": c}
        )
        for c in ("none", control)
    )
    for key in ("sparsity", "lr_ratio"):
        before, after = plain.values(key), other.values(key)
        assert list(before.values()) != list(after.values())
        if key == "sparsity" or control == "mean":
            sizes = [size(plain, name) for name in before]
            means = [np.average(list(values.values()), weights=sizes) for values in (before, after)]
            assert means[0] == pytest.approx(means[1], rel=1e-12)
        if control == "mean":
            assert len(set(after.values())) == 1
        elif key == "lr_ratio":
            assert sorted(after.values()) == sorted(before.values())


def test_normalized_learning_rates(analysis: Analysis) -> None:
    allocation = made(analysis, "learning-rate", learning_rate={"normalize": True})
    ratios = allocation.values("lr_ratio")
    assert np.average(list(ratios.values()), weights=[size(allocation, name) for name in ratios]) == pytest.approx(1)


def test_equal_alphas_are_uniform() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weights = {f"model.layers.{n}.self_attn.q_proj.weight": weight.clone() for n in range(3)}
    allocation = made(
        analyze(weights, fit=FITS, cache=False), "learning-rate", "sparsity", "bits", "lora-rank", bits={"budget": 3}
    )
    assert set(allocation.values("lr_ratio").values()) == {1.0}
    assert list(allocation.values("sparsity").values()) == pytest.approx([0.7] * 3, rel=1e-15)
    assert set(allocation.values("bits").values()) == {3}
    assert set(allocation.values("rank").values()) == {8}


def test_an_unscored_matrix_takes_the_uniform_value() -> None:
    weights = llama_tensors()
    weights["model.layers.0.self_attn.q_proj.weight"].zero_()
    allocation = made(analyze(weights, fit=FITS, cache=False), "learning-rate", "sparsity", "bits")
    entry = allocation.parameters["model.layers.0.self_attn.q_proj.weight"]
    assert (entry.lr_ratio, entry.sparsity, entry.bits) == (1.0, 0.7, 3)
    assert "all elements are zero" in str(entry.details["sparsity"].source)


@pytest.mark.parametrize(
    ("quantity", "values", "message"),
    [
        ("learning-rate", {"map": "nonsense"}, "learning-rate.map: .*'llr'"),
        ("learning-rate", {"map": "tempbalance-sqrt", "min_ratio": 2}, "tempbalance-sqrt has neither"),
        ("learning-rate", {"min_ratio": 6}, "6.0 is more than max-ratio 5"),
        ("sparsity", {"target": 0}, "sparsity.target: .*greater than 0"),
        ("sparsity", {"target": 1}, "sparsity.target: .*less than 1"),
        ("sparsity", {"target": 0.995}, "target 0.995 is above the cap 0.99"),
        ("sparsity", {"eps": -1}, "sparsity.eps"),
        ("sparsity", {"nonsense": 1}, "sparsity has no setting 'nonsense'; choose from .*target"),
        ("bits", {"budget": 1.5}, "budget 1.5 is not between the smallest and largest choice, 2 and 8"),
        ("bits", {"budget": 9}, "budget 9 is not between"),
        ("bits", {"choices": "2,2"}, "different whole numbers"),
        ("bits", {"choices": "two"}, "bits.choices"),
        ("bits", {"choices": "1,2", "error": "step", "budget": 1.5}, "at least 2 bits"),
        ("bits", {"choices": "1,2", "error": "rounding", "budget": 1.5}, "at least 2 bits"),
        ("bits", {"error": "nonsense"}, "bits.error"),
        ("lora-rank", {"budget": 0.5}, "below min_rank 1"),
        ("lora-rank", {"budget": 65}, "mean rank of 65 is more than the matrices allow"),
        ("lora-targets", {"target": 0}, "lora-targets.target"),
        ("lora-targets", {"control": "mean"}, "lora-targets.control"),
        ("train-layers", {"target": 1.5}, "train-layers.target"),
    ],
)
def test_bad_settings(analysis: Analysis, quantity: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made(analysis, quantity, **{quantity.replace("-", "_"): values})


def test_unknown_quantity(analysis: Analysis) -> None:
    with pytest.raises(UsageError, match="unknown quantity 'nonsense'; choose from weight-decay, bits"):
        made(analysis, "nonsense")
    with pytest.raises(UsageError, match="settings are given for bits, which is not asked for"):
        made(analysis, "sparsity", bits={"budget": 3})


def test_what_an_analysis_lacks_is_named(analysis: Analysis) -> None:
    with pytest.raises(UsageError, match=r"no fit 'farms-fix-finger'.*--fit farms-fix-finger"):
        made(analysis, "sparsity", sparsity={"fit": "farms-fix-finger"})
    with pytest.raises(UsageError, match="whole spectra"):
        made(Analysis.model_validate(analysis.model_dump()), "train-layers")


def test_adapters_are_refused() -> None:
    factors = {}
    for name, shape in (("lora_A", (8, 64)), ("lora_B", (64, 8))):
        factors[f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight"] = torch.randn(shape)
    with pytest.raises(UsageError, match=r"an adapter has no sparsity of its own.*merged in"):
        made(analyze(factors, fit=FITS, cache=False), "sparsity")


@pytest.mark.parametrize("name", [name for name in QUANTITY_NAMES if name != "weight-decay"])
def test_published_defaults_are_valid(name: str) -> None:
    assert checked_settings(name, {}).model_dump()
