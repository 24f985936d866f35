"""SpectralMonitor: the numbers of `analyze`, when they come, what they cost, and where they are written."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import esdtool
from esdtool.errors import AssignmentError, NothingToAnalyzeError, UsageError
from esdtool.optim import JsonLinesWriter, TensorBoardWriter, time_share
from esdtool.optim.monitor_writers import WandbWriter


def trained(tiny: ModuleType, model: nn.Module, monitor: Any, steps: int) -> list[dict[str, float] | None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(steps):
        tiny.loss(model, step).backward()
        found.append(monitor.step())
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_numbers_are_those_of_analyze_under_flat_names(tiny: ModuleType) -> None:
    model = tiny.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monitor = esdtool.SpectralMonitor(model, every=1, measures=("alpha", "stable_rank"))
    found = monitor.step()
    analysis = esdtool.analyze(model)
    assert found is not None
    for measure in ("alpha", "stable_rank"):
        modules = {module.name: getattr(module, measure) for module in analysis.scored}
        for name, value in modules.items():
            assert found[f"{measure}/module/{name}"] == pytest.approx(value, rel=1e-9)
        for role in ("q_proj", "down_proj"):
            mean = fmean(value for name, value in modules.items() if name.endswith(role))
            assert found[f"{measure}/role/{role}"] == pytest.approx(mean, rel=1e-9)
        mean = fmean(value for name, value in modules.items() if ".layers.1." in name)
        assert found[f"{measure}/layer/1"] == pytest.approx(mean, rel=1e-9)
        assert found[f"{measure}/mean"] == pytest.approx(fmean(modules.values()), rel=1e-9)
    assert {name.split("/")[0] for name in found} == {"alpha", "stable_rank"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("delay", "due"), [(0, [2, 4, 6]), (1, [3, 5])])
def test_measures_every_so_many_updates_with_or_without_delay(tiny: ModuleType, delay: int, due: list[int]) -> None:
    model = tiny.build(layers=1)
    weights = []
    model.register_forward_pre_hook(lambda model, _: weights.append(model.model.layers[0].mlp.up_proj.weight.clone()))
    monitor = esdtool.SpectralMonitor(model, every=2, delay=delay, include=["up_proj"])
    found = trained(tiny, model, monitor, 6)
    assert [step for step, numbers in enumerate(found, start=1) if numbers is not None] == due
    for step in due:
        spectrum = torch.linalg.svdvals(weights[step - delay - 1].detach().double())
        numbers = found[step - 1]
        assert numbers is not None
        assert numbers["spectral_norm/mean"] == pytest.approx(float(spectrum[0]), rel=1e-6)
    assert monitor.last_reading is not None
    assert monitor.last_reading.weights_step == due[-1] - delay - 1
    monitor.close()


def test_the_first_call_measures_if_asked_and_a_loaded_monitor_goes_on_counting(tiny: ModuleType) -> None:
    model = tiny.build(layers=1)
    monitor = esdtool.SpectralMonitor(model, every=3, initial=True, levels=("mean",))
    found = [monitor.step() for _ in range(4)]
    assert [numbers is not None for numbers in found] == [True, False, True, False]
    assert found[0] is not None
    assert set(found[0]) == {f"{measure}/mean" for measure in monitor.measures}
    again = esdtool.SpectralMonitor(model, every=3, initial=True)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert [again.step() is not None for _ in range(2)] == [False, True]
    with pytest.raises(AssignmentError, match="version"):
        again.load_state_dict({"version": 99})


def test_shares_spectra_with_alpha_decay(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from esdtool.optim import live_scores

    calls: list[str] = []
    original = live_scores.score_matrices

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append("score")
        return original(*arguments, **options)

    monkeypatch.setattr(live_scores, "score_matrices", counted)
    model = tiny.build(layers=1)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = esdtool.AlphaDecay(model, optimizer, 0.1, interval=1)
    monitor = esdtool.SpectralMonitor(model, every=1, share=schedule)
    calls.clear()
    schedule.step()
    numbers = monitor.step()
    assert len(calls) == len(schedule.last_alphas)
    assert numbers is not None
    assert {f"alpha/module/{name.removesuffix('.weight')}": alpha for name, alpha in schedule.last_alphas.items()} == {
        name: value for name, value in numbers.items() if name.startswith("alpha/module/")
    }


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_never_takes_more_than_its_share_of_the_time(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    from esdtool.optim import live_scores

    now = [0.0]
    monkeypatch.setattr(time_share.time, "perf_counter", lambda: now[0])
    original = live_scores.score_matrices

    def slow(*arguments: Any, **options: Any) -> Any:
        now[0] += 0.5
        return original(*arguments, **options)

    monkeypatch.setattr(live_scores, "score_matrices", slow)
    model = tiny.build(layers=1)
    monitor = esdtool.SpectralMonitor(model, every=1, max_seconds_share=share, include=["q_proj"], jobs=1)
    taken = []
    for _ in range(300):
        now[0] += 1.0
        taken.append(monitor.step() is not None)
        if taken[-1]:
            assert monitor.seconds_share <= share
    assert sum(taken) >= share * 300 / 0.5 / 2 - 2
    assert sum(taken) < 300


def test_writers_get_the_scalars_and_one_that_fails_is_warned_of_once(tiny: ModuleType, tmp_path: Path) -> None:
    calls: list[tuple[dict[str, float], int]] = []
    logged: list[dict[str, float]] = []

    class Run:
        def log(self, values: dict[str, float]) -> None:
            logged.append(values)

    def fails(values: dict[str, float], step: int) -> None:
        raise ConnectionError("no network")

    model = tiny.build(layers=1)
    writers = [
        TensorBoardWriter(tmp_path / "board"),
        fails,
        lambda values, step: calls.append((values, step)),
        WandbWriter(Run()),
    ]
    with SummaryWriter(str(tmp_path / "own")) as own:
        monitor = esdtool.SpectralMonitor(model, every=1, writers=[*writers, TensorBoardWriter(own)])
        with pytest.warns(RuntimeWarning, match=r"FunctionWriter failed and training goes on: .*no network"):
            monitor.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            numbers = monitor.step()
        monitor.close()
    assert numbers is not None
    expected = {f"train/{name}": value for name, value in numbers.items()}
    assert calls[-1] == (expected, 2)
    assert logged[-1] == {**expected, "train/spectra_step": 2}
    for folder in ("board", "own"):
        assert read_board(tmp_path / folder)[2] == pytest.approx(expected, rel=1e-6)


def read_board(folder: Path) -> dict[int, dict[str, float]]:
    """The scalars of a TensorBoard folder by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault(event.step, {})[tag] = event.value
    return found


def test_json_lines_are_whole_and_go_on_after_a_resume(tiny: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "spectra.jsonl"
    model = tiny.build(layers=1)
    monitor = esdtool.SpectralMonitor(model, every=1, measures=("stable_rank",), writers=[JsonLinesWriter(path)])
    monitor.step()
    monitor.step()
    again = esdtool.SpectralMonitor(model, every=1, writers=[JsonLinesWriter(path)])
    again.load_state_dict({**monitor.state_dict(), "update_step": 1})
    again.step()
    for each in (monitor, again):
        each.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("step", line.get("format")) for line in lines] == [
        "esdtool.monitor", 1, 2, "esdtool.monitor", 2,
    ]  # fmt: skip
    assert lines[3]["start_step"] == 1
    first = lines[1]["modules"]["model.layers.0.mlp.up_proj"]
    assert monitor.last_reading is not None
    numbers = monitor.last_reading.scores["model.layers.0.mlp.up_proj"].numbers
    assert first["stable_rank"] == pytest.approx(numbers["stable_rank"])
    assert "alpha" in first
    assert "spectral_norm" not in first


def lora(model: nn.Module, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=24, target_modules=["q_proj", "v_proj"], **options))


def test_updates_of_lora_are_followed_under_the_names_of_their_weights(tiny: ModuleType) -> None:
    model = lora(tiny.build(layers=1))
    monitor = esdtool.SpectralMonitor(model, every=1)
    assert monitor.step() == {}
    assert set(monitor.last_notes) == {f"model.layers.0.self_attn.{role}" for role in ("q_proj", "v_proj")}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    numbers = monitor.step()
    assert numbers is not None
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    update = 3.0 * layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double()
    singular = torch.linalg.svdvals(update)[:8].detach()
    eigenvalues = singular.square()
    name = "module/model.layers.0.self_attn.q_proj"
    assert numbers[f"spectral_norm/{name}"] == pytest.approx(float(singular[0]), rel=1e-6)
    assert numbers[f"stable_rank/{name}"] == pytest.approx(float(eigenvalues.sum() / eigenvalues[0]), rel=1e-6)
    # Hill on the upper half of the eigenvalues, the smallest of which is its bound.
    tail = eigenvalues[:4]
    hill = 1 + 4 / sum(math.log(float(value / tail[-1])) for value in tail)
    assert numbers[f"alpha/{name}"] == pytest.approx(hill, rel=1e-6)


def test_a_model_without_matrices_and_one_that_is_frozen_are_refused(tiny: ModuleType) -> None:
    with pytest.raises(NothingToAnalyzeError, match="no weight matrix that SpectralMonitor could follow"):
        esdtool.SpectralMonitor(nn.Sequential(nn.LayerNorm(8)))
    with pytest.raises(NothingToAnalyzeError, match="frozen"):
        esdtool.SpectralMonitor(tiny.build(layers=1).requires_grad_(False))
    with pytest.raises(AssignmentError, match="no torch module"):
        esdtool.SpectralMonitor(torch.optim.SGD(nn.Linear(2, 2).parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number"),
        ({"every": True}, "every must be a whole number"),
        ({"every": 2, "delay": 2}, "delay must be"),
        ({"jobs": 0}, "jobs must be"),
        ({"measures": ("alhpa",)}, "unknown measure 'alhpa'; choose from alpha, "),
        ({"measures": ()}, "at least one measure"),
        ({"levels": ("block",)}, "unknown level"),
        ({"max_seconds_share": 0}, "max_seconds_share"),
        ({"max_seconds_share": 1.5}, "max_seconds_share"),
        ({"include": ["nothing_like_it"]}, "^include 'nothing_like_it'"),
    ],
)
def test_options_without_sense_are_refused(tiny: ModuleType, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        esdtool.SpectralMonitor(tiny.build(layers=1), **options)
