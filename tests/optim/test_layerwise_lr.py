"""Layer-wise learning rates: which ratios, when, for which parameters; together with AlphaDecay; and exact resumes."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from esdtool.analysis.run import analyze
from esdtool.assignment.allocate import AllocateOptions, allocate
from esdtool.assignment.allocation import Allocation
from esdtool.assignment.assign_options import AssignOptions
from esdtool.assignment.reading import load_allocation
from esdtool.errors import AssignmentError, NothingToAnalyzeError, UsageError
from esdtool.optim import AlphaDecay, LayerwiseLR, live_scores, param_groups

ENDS = ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.fixture
def model(tiny: ModuleType) -> nn.Module:
    return tiny.build()


@pytest.fixture
def spectra(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each spectrum that is computed."""
    computed: list[str] = []
    original = live_scores.score_matrices

    def counting(*arguments: Any, **keywords: Any) -> Any:
        computed.append("spectrum")
        return original(*arguments, **keywords)

    monkeypatch.setattr(live_scores, "score_matrices", counting)
    return computed


def _adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **options})


def _expected(alphas: dict[str, float | None], low: float = 1.0, high: float = 5.0) -> dict[str, float]:
    """Numpy's straight line from the smallest alpha to the largest; the ends at the top."""
    values = np.array(list(alphas.values()), dtype=float)
    ratios = np.interp(values, [values.min(), values.max()], [low, high])
    return dict(zip(alphas, ratios.tolist(), strict=True)) | dict.fromkeys(ENDS, high)


def test_the_ratios_of_llr(tiny: ModuleType, model: nn.Module) -> None:
    optimizer = _adamw(model)
    schedule = LayerwiseLR(model, optimizer, 1000, glide=0)
    assert list(schedule.last_alphas) == tiny.assigned()
    assert schedule.last_ratios == pytest.approx(_expected(schedule.last_alphas))
    assert schedule.last_rates == pytest.approx({name: 1e-2 * ratio for name, ratio in schedule.last_ratios.items()})
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}


def test_the_ratios_as_a_file(tiny: ModuleType, model: nn.Module, tmp_path: Path) -> None:
    """What `assign --for learning-rate` writes for the same weights, and param_groups reads."""
    schedule = LayerwiseLR(model, _adamw(model), 1000, glide=50)
    schedule.assignment().save(tmp_path / "rates.json")
    file = load_allocation(tmp_path / "rates.json")
    assert isinstance(file, Allocation)
    assert file.values("lr_ratio") == schedule.target_ratios
    options = AllocateOptions.of(["learning-rate"], {}, decays=AssignOptions())
    of_weights = allocate(analyze(model), options).allocation
    assert of_weights.values("lr_ratio") == pytest.approx(schedule.target_ratios)
    for name, entry in of_weights.parameters.items():
        assert (entry.role, entry.layer, entry.shape) == (
            "output-head" if name == ENDS[1] else "token-embedding" if name == ENDS[0] else file.parameters[name].role,
            file.parameters[name].layer,
            file.parameters[name].shape,
        )
        assert file.parameters[name].details["lr_ratio"].score == pytest.approx(entry.details["lr_ratio"].score)
    held = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in param_groups(model, tmp_path / "rates.json", lr=0.1):
        for parameter in group["params"]:
            ratio = schedule.target_ratios.get(held[id(parameter)], 1.0)
            assert group.get("lr", 0.1) == pytest.approx(0.1 * ratio)


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [({"min_ratio": 0.5, "max_ratio": 1.5, "ends": False}, 0.5, 1.5), ({"max_ratio": 3.0, "ends": False}, 1.0, 3.0)],
    ids=["TempBalance", "llr-3"],
)
def test_other_ratios(options: dict[str, Any], low: float, high: float, model: nn.Module) -> None:
    schedule = LayerwiseLR(model, _adamw(model), fraction=1, glide=0, **options)
    expected = _expected(schedule.last_alphas, low, high)
    assert schedule.last_ratios == pytest.approx({name: expected[name] for name in schedule.last_alphas})


def test_the_controls(tiny: ModuleType, model: nn.Module) -> None:
    def ratios(**options: Any) -> dict[str, float]:
        fresh = tiny.build()
        return LayerwiseLR(fresh, _adamw(fresh), 100, glide=0, **options).last_ratios

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def mean(found: dict[str, float]) -> float:
        return float(np.average(list(found.values()), weights=[sizes[name] for name in found]))

    method = ratios()
    assert list(ratios(control="mean").values()) == pytest.approx([mean(method)] * len(method))
    assert mean(ratios(normalize=True)) == pytest.approx(1.0)
    shuffled, backwards = ratios(control="shuffled"), ratios(control="reversed")
    assert sorted(shuffled.values()) == sorted(backwards.values()) == sorted(method.values())
    assert shuffled != method
    assert backwards[min(method, key=method.__getitem__)] == 5.0


def test_a_tied_embedding_has_one_ratio_and_all_equal_alphas_have_1(tiny: ModuleType) -> None:
    tied = tiny.build(tied=True)
    schedule = LayerwiseLR(tied, _adamw(tied), 100, glide=0)
    assert [name for name in schedule.last_ratios if name not in tiny.assigned()] == ENDS[:1]
    same = tiny.build()
    with torch.no_grad():
        for name, parameter in same.named_parameters():
            if name in tiny.assigned():
                parameter.zero_()
                parameter[:64, :64] = torch.diag(torch.logspace(0, -1, 64))
    alike = LayerwiseLR(same, _adamw(same), 100, glide=0)
    assert set(alike.last_ratios.values()) == {1.0}


def _run(
    tiny: ModuleType, steps: int, *, start: Any = None, first: int = 0, kind: Any = None, **options: Any
) -> tuple[list[Any], list[Any]]:
    """Ratios in force, losses and decays at each update under cosine annealing, which is recursive; and the parts."""
    model = tiny.build()
    optimizer = (kind or _adamw)(model)
    decay = AlphaDecay(model, optimizer, weight_decay=0.1, interval=4)
    rates = LayerwiseLR(model, optimizer, 20, **{"interval": 2, "glide": 4, "fraction": 0.3, "share": decay, **options})
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    parts = [model, optimizer, decay, rates, scheduler]
    if start is not None:
        for part, state in zip(parts, start, strict=True):
            part.load_state_dict(state)
    seen = []
    for step in range(first, steps):
        loss = tiny.loss(model, step)
        loss.backward()
        decay.step()
        rates.step()
        seen.append((rates.last_ratios, rates.last_rates, decay.last_decays, float(loss.detach())))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return seen, parts


def test_a_line_to_each_target_and_none_after_the_first_fifth(tiny: ModuleType) -> None:
    """Looks at updates 2, 4 and 6 (0.3 of 20): each begins a line of 4 updates where the one before has come to."""
    seen, (*_, schedule, _) = _run(tiny, 12)
    ratios = [each[0] for each in seen]
    names = list(ratios[0])
    table = np.array([[row[name] for name in names] for row in ratios])
    differences = np.diff(np.vstack([np.ones(len(names)), table]), axis=0)
    # Straight within a line: updates 2 and 3, 4 and 5, 6 to 9; still afterwards.
    np.testing.assert_allclose(differences[1], differences[2], atol=1e-12)
    np.testing.assert_allclose(differences[3], differences[4], atol=1e-12)
    for later in (6, 7, 8):
        np.testing.assert_allclose(differences[5], differences[later], atol=1e-12)
    assert not differences[9:].any()
    assert abs(differences[5]).max() > 1e-3
    assert ratios[-1] == schedule.target_ratios == pytest.approx(_expected(schedule.last_alphas))
    # Half-way, the ratio is the mean of where the line began and where it leads.
    np.testing.assert_allclose(table[6], (table[4] + table[8]) / 2)


def test_frozen_ratios_are_a_static_run(tiny: ModuleType) -> None:
    """Everything after the last look is what groups with fixed multiples of the learning rate would do."""
    _, (model, optimizer, _, schedule, _) = _run(tiny, 6, glide=0)
    copy = tiny.build()
    copy.load_state_dict(model.state_dict())
    ratios = schedule.last_ratios
    groups = [
        {"params": [parameter], "lr": 3e-3 * ratios.get(name, 1.0), "weight_decay": 0.0}
        for name, parameter in copy.named_parameters()
    ]
    static = torch.optim.AdamW(groups)
    parameters = dict(model.named_parameters())
    for name, parameter in copy.named_parameters():
        static.state[parameter] = {key: value.clone() for key, value in optimizer.state[parameters[name]].items()}
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 3e-3, 0.0
    for step in range(6, 9):
        for each, one in ((model, optimizer), (copy, static)):
            tiny.loss(each, step).backward()
            if each is model:
                schedule.step()
            one.step()
            one.zero_grad()
    for name, parameter in copy.named_parameters():
        assert torch.equal(parameter, parameters[name])


def _tensor_rate(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), foreach=False)


@pytest.mark.parametrize("stop", [1, 3, 5, 7, 10])
@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("kind", [None, _tensor_rate], ids=["float", "tensor"])
def test_a_resumed_run_is_the_same_run(stop: int, delay: int, kind: Any, tiny: ModuleType) -> None:
    """Stopped before, in and after a line; losses, weights, moments, ratios and decays bit for bit."""
    whole, straight = _run(tiny, 11, delay=delay, kind=kind)
    before, stopped = _run(tiny, stop, delay=delay, kind=kind)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in stopped], file)
    file.seek(0)
    after, resumed = _run(tiny, 11, delay=delay, kind=kind, first=stop, start=torch.load(file, weights_only=True))
    assert before + after == whole
    for one, other in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)
        for key, value in straight[1].state[one].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed[1].state[other][key]))


@pytest.mark.parametrize("delay", [0, 1])
def test_both_together_cost_one_set_of_spectra(delay: int, tiny: ModuleType, spectra: list[str]) -> None:
    """AlphaDecay looks at updates 0, 4, 8 and LayerwiseLR at 0, 2, 4, 6: five different ones."""
    together, _ = _run(tiny, 9, delay=delay)
    assert len(spectra) == 5 * len(tiny.assigned())
    spectra.clear()
    alone, _ = _run(tiny, 9, delay=delay, share=None)
    assert len(spectra) == 7 * len(tiny.assigned())
    assert together == alone


def test_what_is_measured_anew(tiny: ModuleType, model: nn.Module, spectra: list[str]) -> None:
    optimizer, count = _adamw(model), len(tiny.assigned())
    decay = AlphaDecay(model, optimizer, initial=False)
    rates = LayerwiseLR(model, optimizer, 100, share=decay)
    assert len(spectra) == count
    rates.refresh()
    assert len(spectra) == 2 * count  # asked for again
    decay.refresh()
    assert len(spectra) == 2 * count
    assert decay.last_alphas == rates.last_alphas
    with torch.no_grad():
        model.get_parameter(tiny.assigned()[0]).mul_(2.0)
    LayerwiseLR(model, _adamw(model), 100, share=decay)
    assert len(spectra) == 3 * count  # other weights
    LayerwiseLR(model, _adamw(model), 100, share=decay, fit="ks")
    assert len(spectra) == 4 * count  # another estimator


def test_muon_beside_adamw(tiny: ModuleType, model: nn.Module) -> None:
    """Each ratio multiplies the rate of the optimizer that holds the parameter: the embedding's is AdamW's times s2."""
    parameters = dict(model.named_parameters())
    muon = torch.optim.Muon([parameters[name] for name in tiny.assigned()], lr=2e-2)
    adamw = torch.optim.AdamW([each for name, each in parameters.items() if name not in tiny.assigned()], lr=3e-3)
    schedule = LayerwiseLR(model, [muon, adamw], 100, glide=0)
    rates = schedule.last_rates
    assert [rates[name] for name in ENDS] == pytest.approx([5 * 3e-3] * 2)
    for name in tiny.assigned():
        assert rates[name] == pytest.approx(2e-2 * schedule.last_ratios[name])
    tiny.loss(model, 0).backward()
    schedule.step()
    muon.step()
    adamw.step()
    assert {group["lr"] for group in muon.param_groups} == {2e-2}


def test_it_can_begin_again_and_end(tiny: ModuleType) -> None:
    _, (model, optimizer, _, schedule, _) = _run(tiny, 5)
    schedule.restart()
    assert set(schedule.last_ratios.values()) == {1.0}
    tiny.loss(model, 0).backward()
    schedule.step()
    assert schedule.last_ratios[ENDS[0]] == 2.0
    schedule.close()
    LayerwiseLR(model, optimizer, 100)


def test_modules_without_a_score_step_as_the_scheduler_says(tiny: ModuleType, model: nn.Module) -> None:
    zero = tiny.assigned()[0]
    with torch.no_grad():
        model.get_parameter(zero).zero_()
    schedule = LayerwiseLR(model, _adamw(model), 100, glide=0)
    assert schedule.last_notes == {zero: "ratio 1: all elements are zero"}
    assert schedule.last_ratios[zero] == 1.0


REJECTED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_updates": None}, UsageError, "num_updates is needed"),
    ({"num_updates": 0}, UsageError, "num_updates must be a whole number of updates, at least 1, not 0"),
    ({"glide": -1}, UsageError, "glide must be a whole number"),
    ({"fraction": 0}, UsageError, "fraction must be above 0 and at most 1, not 0"),
    ({"fraction": 1.5}, UsageError, "fraction must be above 0"),
    ({"interval": 0}, UsageError, "interval must be"),
    ({"min_ratio": 6.0}, UsageError, "more than max-ratio"),
    ({"control": "none at all"}, UsageError, "unknown control"),
    ({"exclude": ("proj",)}, NothingToAnalyzeError, "no weight matrix that LayerwiseLR could assign"),
    ({"split": False}, AssignmentError, "need different learning rates but share a group of AdamW, which must not"),
]


@pytest.mark.parametrize(("options", "error", "message"), REJECTED, ids=str)
def test_rejected(options: dict[str, Any], error: type[Exception], message: str, model: nn.Module) -> None:
    optimizer = _adamw(model)
    with pytest.raises(error, match=message):
        LayerwiseLR(model, optimizer, **{"num_updates": 100, **options})
    assert len(optimizer.param_groups) == 1
    LayerwiseLR(model, optimizer, 100)  # what was refused has left no hook behind


def test_exchanged_arguments_and_foreign_states(tiny: ModuleType, model: nn.Module) -> None:
    optimizer = _adamw(model)
    for kind in (LayerwiseLR, AlphaDecay):
        with pytest.raises(AssignmentError, match=rf"exchanged: it is {kind.name}\(model, optimizer\)"):
            kind(optimizer, model)
    schedule = LayerwiseLR(model, optimizer, 100)
    other = tiny.build(layers=3)
    state = LayerwiseLR(other, _adamw(other), 100).state_dict()
    with pytest.raises(AssignmentError, match=r"the LayerwiseLR state is of other modules: model\.layers\.2"):
        schedule.load_state_dict(state)
    torch.optim.lr_scheduler.ExponentialLR(other_optimizer := _adamw(other), 0.9)
    with pytest.raises(AssignmentError, match="apply the learning rates before the scheduler is built"):
        LayerwiseLR(other, other_optimizer, 100)
