"""The schedule: when it refreshes, what it writes, what it leaves alone, and that a resumed run is the same run."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from esdtool.analysis.run import analyze
from esdtool.assignment.assign import assign
from esdtool.assignment.reading import parse_assignment
from esdtool.errors import AssignmentError, NothingToAnalyzeError, UsageError
from esdtool.optim import AlphaDecay, live_scores
from esdtool.spectra.options import ScoreOptions


@pytest.fixture
def model(tiny: ModuleType) -> nn.Module:
    return tiny.build()


def _in_groups(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: group["weight_decay"]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _update(tiny: ModuleType, model: nn.Module, optimizer: Any, schedule: AlphaDecay, step: int) -> float:
    loss = tiny.loss(model, step)
    loss.backward()
    schedule.step()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _hill(weight: torch.Tensor) -> float:
    """Alpha by numpy's SVD in float64."""
    eigenvalues = np.sort(np.linalg.svd(weight.detach().double().numpy(), compute_uv=False) ** 2)
    tail = eigenvalues[eigenvalues.size // 2 :]
    return float(1 + tail.size / np.log(tail / tail[0]).sum())


def test_the_initial_weights_set_the_first_decays(model: nn.Module, tiny: ModuleType) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.3)
    schedule = AlphaDecay(model, optimizer, weight_decay=0.05)
    parameters = dict(model.named_parameters())
    alphas = np.array([_hill(parameters[name]) for name in tiny.assigned()])
    expected = 0.05 * np.interp(alphas, [alphas.min(), alphas.max()], [0.67, 5.0])
    assert list(schedule.last_decays) == tiny.assigned()
    np.testing.assert_allclose(list(schedule.last_alphas.values()), alphas, rtol=1e-5)
    np.testing.assert_allclose(list(schedule.last_decays.values()), expected, rtol=1e-5)
    in_groups = _in_groups(model, optimizer)
    assert {name: in_groups.pop(name) for name in tiny.assigned()} == schedule.last_decays
    assert set(in_groups.values()) == {0.3}  # unlisted keep the optimizer's
    assert all(type(group["weight_decay"]) is float for group in optimizer.param_groups)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"optimizer": "adam"},
    {"assign": "sqrt"},
    {"assign": "log2", "granularity": "layer"},
    {"assign": "sigmoid"},
    {"score": "stable_rank", "granularity": "role"},
    {"score": "alpha_weighted", "normalize": True},
    {"min_ratio": 0.5, "max_ratio": 2.0, "fit": "ks"},
    {"exclude": (r"layers\.0\.self_attn\.q_proj",), "unlisted": "no-decay"},
    {"include": ("mlp", "lm_head"), "unlisted": "base"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_decays_as_the_static_assignment(options: dict[str, Any], model: nn.Module) -> None:
    """`esdtool assign` on the saved weights and AlphaDecay on the live ones are one method."""
    analysed = {key: options[key] for key in ("fit", "include") if key in options}
    static = assign(analyze(model, **analysed), **options)
    kind = torch.optim.Adam if options.get("optimizer") == "adam" else torch.optim.AdamW
    live = {key: value for key, value in options.items() if key != "optimizer"}
    optimizer = kind(model.parameters(), weight_decay=0.01)
    schedule = AlphaDecay(model, optimizer, **live)
    assert schedule.last_decays == static.decays
    in_groups = _in_groups(model, optimizer)
    for name, decay in in_groups.items():
        default = static.default.weight_decay
        assert decay == static.decays.get(name, 0.01 if default is None else default)

    written = parse_assignment(schedule.assignment().to_json())
    assert written.parameters == static.parameters
    assert (written.optimizer, written.method, written.default) == (static.optimizer, static.method, static.default)


@pytest.mark.parametrize(
    ("interval", "initial", "refreshes"),
    [
        (1, True, [1, 2, 3, 4, 5, 6, 7]),
        (3, True, [3, 6]),
        (3, False, [3, 6]),
        (7, True, [7]),
        (8, True, []),
    ],
)
def test_when_it_refreshes(
    interval: int,
    initial: bool,
    refreshes: list[int],
    tiny: ModuleType,
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The published loop: with `update_step` finished updates, refresh if (update_step + 1) % interval == 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    calls: list[int] = []
    original = AlphaDecay.refresh
    monkeypatch.setattr(AlphaDecay, "refresh", lambda self: (calls.append(self.update_step), original(self)))
    schedule = AlphaDecay(model, optimizer, interval=interval, initial=initial)
    assert calls == ([0] if initial else [])
    if not initial:
        assert set(schedule.last_decays.values()) == {0.1}
        assert set(schedule.last_notes.values()) == {"base decay: not computed yet"}
    published = []
    for update_step in range(7):
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        before = schedule.last_decays
        _update(tiny, model, optimizer, schedule, update_step)
        if (update_step + 1) % interval == 0:
            published.append(update_step + 1)
            # from the weights before this update, and in force for it
            for name, alpha in schedule.last_alphas.items():
                assert alpha == pytest.approx(_hill(weights[name]), rel=1e-5)
        else:
            assert schedule.last_decays == before
    assert [call for call in calls if call] == published == refreshes
    assert schedule.update_step == 7


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"amsgrad": True, "foreach": False}], ids=str
)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_resumed_run_is_the_same_run(kind: Any, options: dict[str, Any], tiny: ModuleType) -> None:
    """Stopped after 5 of 9 updates, resumed in new objects: losses, weights, moments and decays bit for bit."""
    if kind is torch.optim.SGD:
        options = {key: value for key, value in options.items() if key != "amsgrad"} | {"momentum": 0.9}

    def start() -> tuple[nn.Module, Any, AlphaDecay, Any]:
        model = tiny.build()
        optimizer = kind(model.parameters(), lr=1e-2, **options)
        schedule = AlphaDecay(model, optimizer, interval=2)
        return model, optimizer, schedule, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)

    def train(parts: tuple[nn.Module, Any, AlphaDecay, Any], steps: range) -> list[Any]:
        model, optimizer, schedule, rates = parts
        seen = []
        for step in steps:
            seen.append((_update(tiny, model, optimizer, schedule, step), schedule.last_decays))
            rates.step()
        return seen

    straight = start()
    expected = train(straight, range(9))
    stopped = start()
    train(stopped, range(5))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in stopped], file)
    file.seek(0)
    resumed = start()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert resumed[2].last_decays == stopped[2].last_decays
    assert resumed[2].last_alphas == stopped[2].last_alphas
    assert resumed[2].update_step == 5
    assert train(resumed, range(5, 9)) == expected[5:]
    for one, other in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)
        for key, value in straight[1].state[one].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed[1].state[other][key]))
    assert _in_groups(straight[0], straight[1]) == _in_groups(resumed[0], resumed[1])


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_the_order_of_loading_does_not_matter(optimizer_first: bool, tiny: ModuleType, model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = AlphaDecay(model, optimizer, weight_decay=0.1, interval=100)
    old = optimizer.state_dict()
    state = {**schedule.state_dict(), "bases": dict.fromkeys(tiny.assigned(), 0.4)}
    for turn in (0, 1):
        if (turn == 0) == optimizer_first:
            optimizer.load_state_dict(old)
        else:
            schedule.load_state_dict(state)
    schedule.step()
    in_groups = _in_groups(model, optimizer)
    assert {name: in_groups[name] for name in tiny.assigned()} == schedule.last_decays
    assert max(schedule.last_decays.values()) == pytest.approx(2.0)


def test_states_that_do_not_fit(tiny: ModuleType, model: nn.Module) -> None:
    schedule = AlphaDecay(model, torch.optim.AdamW(model.parameters()))
    larger = tiny.build(layers=3)
    other = AlphaDecay(larger, torch.optim.AdamW(larger.parameters())).state_dict()
    with pytest.raises(AssignmentError, match=r"layers.2.mlp.down_proj.weight is in the state but not the model"):
        schedule.load_state_dict(other)
    with pytest.raises(AssignmentError, match="version 7 is not supported"):
        schedule.load_state_dict({**schedule.state_dict(), "version": 7})


def test_splitting_in_the_middle_keeps_the_state(tiny: ModuleType) -> None:
    """Decays of ratio 1 everywhere change nothing, so a split must not either."""
    plain, managed = tiny.build(), tiny.build()
    one = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    two = torch.optim.AdamW(managed.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = None
    for step in range(6):
        if step == 3:
            schedule = AlphaDecay(managed, two, weight_decay=0.1, interval=2, assign="uniform")
        tiny.loss(plain, step).backward()
        one.step()
        one.zero_grad()
        if schedule is None:
            tiny.loss(managed, step).backward()
            two.step()
            two.zero_grad()
        else:
            _update(tiny, managed, two, schedule, step)
    for first, second in zip(plain.parameters(), managed.parameters(), strict=True):
        assert torch.equal(first, second)


def test_unscored_modules_keep_the_base_until_they_can_be_scored(model: nn.Module, tiny: ModuleType) -> None:
    zero, broken, *_ = tiny.assigned()
    parameters = dict(model.named_parameters())
    original = parameters[broken].detach().clone()
    with torch.no_grad():
        parameters[zero].zero_()
        parameters[broken][0, 0] = float("nan")
    schedule = AlphaDecay(model, torch.optim.AdamW(model.parameters()), interval=1)
    assert schedule.last_notes == {
        zero: "base decay: all elements are zero",
        broken: "base decay: not finite: contains NaN or infinity",
    }
    assert schedule.last_decays[zero] == schedule.last_decays[broken] == 0.1
    assert schedule.last_alphas[zero] is None
    assert schedule.assignment().parameters[zero].note == "base decay: all elements are zero"
    assert (min(schedule.last_decays.values()), max(schedule.last_decays.values())) == (0.067, 0.5)
    state = schedule.state_dict()
    with torch.no_grad():
        parameters[broken].copy_(original)
    schedule.step()
    assert set(schedule.last_notes) == {zero}
    schedule.load_state_dict(state)
    assert set(schedule.last_notes) == {zero, broken}


def test_which_parameters_it_rules(tiny: ModuleType, model: nn.Module) -> None:
    first, second, *rest = tiny.assigned()
    parameters = dict(model.named_parameters())
    parameters[first].requires_grad_(False)
    held = [parameter for name, parameter in parameters.items() if name != second]
    schedule = AlphaDecay(model, torch.optim.AdamW(held))
    assert list(schedule.last_decays) == rest
    assert schedule.skipped == {first: "frozen: requires_grad is False", second: "in no optimizer"}
    assert schedule.assignment().left_out == schedule.skipped


def test_tied_modules_are_scored_once(tiny: ModuleType) -> None:
    model = tiny.build(tied=True)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = AlphaDecay(model, optimizer)
    assert set(schedule.last_decays) == {name for name in tiny.assigned() if ".1.mlp" not in name}
    assert set(schedule.skipped.values()) == {
        f"tied to model.layers.0.mlp.{role}_proj.weight" for role in ("gate", "up", "down")
    }
    _update(tiny, model, optimizer, schedule, 0)


def test_wrapped_models(model: nn.Module, tiny: ModuleType) -> None:
    compiled = torch.compile(nn.ModuleDict({"module": model}), backend="eager")
    schedule = AlphaDecay(compiled, torch.optim.AdamW(compiled.parameters()))
    assert list(schedule.last_decays) == tiny.assigned()


def test_muon_beside_adamw_with_their_own_bases(tiny: ModuleType, model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    in_muon = [name for name in tiny.assigned() if "mlp" in name]
    muon = torch.optim.Muon([parameters[name] for name in in_muon], lr=1e-2, weight_decay=0.2)
    others = [parameter for name, parameter in parameters.items() if name not in in_muon]
    adamw = torch.optim.AdamW(others, lr=1e-2, weight_decay=0.01)
    schedule = AlphaDecay(model, [muon, adamw], weight_decay=None, interval=2)
    uniform = tiny.build()
    ratios = AlphaDecay(uniform, torch.optim.AdamW(uniform.parameters()), weight_decay=1.0).last_decays
    for name, ratio in ratios.items():
        assert schedule.last_decays[name] == (0.2 if name in in_muon else 0.01) * ratio
    assert _in_groups(model, muon, adamw)["lm_head.weight"] == 0.01
    for step in range(4):
        tiny.loss(model, step).backward()
        schedule.step()
        muon.step()
        adamw.step()
    assert schedule.update_step == 4

    fresh = tiny.build()
    parameters = dict(fresh.named_parameters())
    pair = [
        torch.optim.Muon([parameters[name] for name in in_muon]),
        torch.optim.AdamW([parameter for name, parameter in parameters.items() if name not in in_muon]),
    ]
    listed = AlphaDecay(fresh, pair, weight_decay=[0.2, 0.01])
    assert listed.last_decays == {name: (0.2 if name in in_muon else 0.01) * ratio for name, ratio in ratios.items()}
    with pytest.raises(UsageError, match="1 base weight decays for 2 optimizers"):
        AlphaDecay(fresh, pair, weight_decay=[0.2])


def test_the_published_ratio_follows_the_kind_of_decay(tiny: ModuleType) -> None:
    def largest(make: Callable[[Any], Any], **options: Any) -> float:
        model = tiny.build()
        return max(AlphaDecay(model, make(model), weight_decay=1.0, **options).last_decays.values())

    assert largest(lambda model: torch.optim.AdamW(model.parameters())) == 5.0
    assert largest(lambda model: torch.optim.Adam(model.parameters())) == 3.0
    assert largest(lambda model: torch.optim.NAdam(model.parameters(), decoupled_weight_decay=True)) == 5.0
    assert largest(lambda model: torch.optim.Adam(model.parameters(), decoupled_weight_decay=True)) == 5.0
    assert largest(lambda model: torch.optim.SGD(model.parameters(), lr=0.1)) == 5.0

    def mixed(model: Any) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(model.model.layers[0].parameters()),
            torch.optim.AdamW(model.model.layers[1].parameters()),
        ]

    with pytest.raises(UsageError, match="give max_ratio"):
        largest(mixed)
    assert largest(mixed, max_ratio=4.0) == 4.0


def test_gradient_norms(tiny: ModuleType, model: nn.Module) -> None:
    """AdaDecay module by module: the sigmoid of standardised gradient norms inside each layer."""
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = AlphaDecay(model, optimizer, interval=1, score="gradient_norm", assign="sigmoid")
    assert set(schedule.last_decays.values()) == {0.1}
    tiny.loss(model, 0).backward()
    norms = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters() if parameter.ndim == 2}
    schedule.step()
    for layer in range(2):
        names = [name for name in tiny.assigned() if f".{layer}." in name]
        scores = np.array([norms[name] for name in names])
        expected = 0.2 / (1 + np.exp(-4 * (scores - scores.mean()) / scores.std()))
        np.testing.assert_allclose([schedule.last_decays[name] for name in names], expected, rtol=1e-4)
    assert set(schedule.last_alphas.values()) == {None}
    optimizer.zero_grad()
    schedule.step()
    assert set(schedule.last_notes.values()) == {"base decay: no gradient"}


def test_the_number_of_threads_does_not_matter(model: nn.Module) -> None:
    decays = [AlphaDecay(model, torch.optim.AdamW(model.parameters()), jobs=jobs).last_decays for jobs in (1, 2, 5)]
    assert decays[0] == decays[1] == decays[2]


def test_a_failing_solver_is_not_hidden(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr(live_scores, "score_matrices", broken)
    threads = torch.get_num_threads()
    with pytest.raises(MemoryError):
        AlphaDecay(model, torch.optim.AdamW(model.parameters()))
    assert torch.get_num_threads() == threads


REJECTED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"interval": 0}, UsageError, "interval must be a whole number of updates, at least 1, not 0"),
    ({"interval": 2.5}, UsageError, "interval must be"),
    ({"jobs": 0}, UsageError, "jobs must be at least 1"),
    ({"min_ratio": 2.0, "max_ratio": 1.0}, UsageError, "more than max-ratio"),
    ({"fit": "best"}, UsageError, "unknown fit 'best'"),
    ({"score": "beauty"}, UsageError, "unknown score 'beauty'"),
    ({"assign": "cubic"}, UsageError, "unknown assignment"),
    ({"unlisted": "some"}, UsageError, "unknown choice"),
    ({"compute": "nobody"}, UsageError, "unknown compute 'nobody'"),
    ({"weight_decay": -1.0}, UsageError, "not negative"),
    ({"weight_decay": float("nan")}, UsageError, "finite"),
    ({"include": ("nowhere",)}, UsageError, "'nowhere' matches no"),
    ({"exclude": ("proj",)}, NothingToAnalyzeError, "no weight matrix that AlphaDecay could assign"),
    ({"split": False}, AssignmentError, "must not be split"),
]


@pytest.mark.parametrize(("options", "error", "message"), REJECTED, ids=str)
def test_rejected(options: dict[str, Any], error: type[Exception], message: str, model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(error, match=message):
        AlphaDecay(model, optimizer, **options)
    assert len(optimizer.param_groups) == 1


def test_models_that_cannot_be_ruled(tiny: ModuleType, model: nn.Module) -> None:
    with torch.device("meta"):
        empty = tiny.TinyLlama()
    with pytest.raises(AssignmentError, match="no data"):
        AlphaDecay(empty, torch.optim.AdamW(empty.parameters()))
    with pytest.raises(AssignmentError, match="none of the model's parameters"):
        AlphaDecay(model, torch.optim.AdamW(tiny.build().parameters()))
    small = nn.Sequential(nn.Linear(4, 4))
    assert set(AlphaDecay(small, torch.optim.AdamW(small.parameters())).last_notes.values()) == {
        "base decay: too few eigenvalues: 4 < 50"
    }
    options = ScoreOptions(min_eigs=4)
    assert AlphaDecay(small, torch.optim.AdamW(small.parameters()), fit=options).last_notes == {}


def test_groups_that_were_merged_since(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = AlphaDecay(model, optimizer)
    optimizer.param_groups[:] = torch.optim.AdamW(model.parameters()).param_groups
    with pytest.raises(AssignmentError, match="groups have been changed"):
        schedule.step()


def test_a_parameter_that_left_the_optimizer_is_an_error(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = AlphaDecay(model, optimizer)
    group = next(
        group
        for group in optimizer.param_groups
        if group["params"][0] is model.get_parameter(next(iter(schedule.last_decays)))
    )
    group["params"] = [nn.Parameter(group["params"][0].detach().clone())]
    with pytest.raises(AssignmentError, match="no longer in the optimizer"):
        schedule.step()


def test_a_fused_parameter_takes_the_mean_of_its_modules() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(64, 192), nn.Linear(64, 64)

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Block()}) for _ in range(2))

    vit = Vit()
    optimizer = torch.optim.AdamW(vit.parameters())
    schedule = AlphaDecay(vit, optimizer)
    leaves = [f"blocks.{block}.attn.{leaf}.weight" for block in range(2) for leaf in ("qkv", "proj")]
    assert list(schedule.last_decays) == leaves
    alphas = [_hill(part) for part in vit.get_parameter(leaves[0]).detach().chunk(3)]
    assert schedule.last_alphas[leaves[0]] == pytest.approx(np.mean(alphas), rel=1e-4)
    from_file = assign(analyze(vit))
    assert from_file.decays == pytest.approx(schedule.last_decays)
    live = schedule.assignment()
    assert live.members == from_file.members
    assert live.members[leaves[2]].members == tuple(f"blocks.1.attn.{role}_proj" for role in "qkv")
    assert live.parameters[leaves[0]].shape == (192, 64)
    assert {group["weight_decay"] for group in optimizer.param_groups} >= set(schedule.last_decays.values())
