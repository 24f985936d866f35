"""A refresh beside the training: the decays of a snapshot, in force at exactly the step that was asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from esdtool.errors import UsageError
from esdtool.optim import AlphaDecay, live_scores
from esdtool.support.threads import Beside

STEPS, INTERVAL, DELAY = 11, 4, 2


def _train(
    tiny: ModuleType, *, steps: int = STEPS, start: Any = None, first: int = 0, **options: Any
) -> tuple[list[dict[str, float]], nn.Module, torch.optim.Optimizer, AlphaDecay]:
    """Decays in force at each update."""
    model = tiny.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = AlphaDecay(model, optimizer, interval=INTERVAL, **options)
    if start is not None:
        for part, state in zip((model, optimizer, schedule), start, strict=True):
            part.load_state_dict(state)
    seen = []
    for step in range(first, steps):
        tiny.loss(model, step).backward()
        schedule.step()
        seen.append(schedule.last_decays)
        optimizer.step()
        optimizer.zero_grad()
    return seen, model, optimizer, schedule


def _by_hand(tiny: ModuleType) -> list[dict[str, float]]:
    """The same run without the option: weights are measured at update t, their decays set at update t + DELAY."""
    model = tiny.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    in_force = AlphaDecay(model, optimizer, interval=1000)
    measured: dict[int, dict[str, float]] = {}
    now = in_force.last_decays
    seen = []
    for step in range(1, STEPS + 1):
        tiny.loss(model, step - 1).backward()
        if step % INTERVAL == 0:
            probe = AlphaDecay(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
            measured[step + DELAY] = probe.last_decays
        now = measured.get(step, now)
        groups = {id(group["params"][0]): group for group in optimizer.param_groups}
        for name, parameter in model.named_parameters():
            if name in now:
                groups[id(parameter)]["weight_decay"] = now[name]
        seen.append(dict(now))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def test_the_decays_are_those_of_the_snapshot_and_come_when_they_should(tiny: ModuleType) -> None:
    threads = torch.get_num_threads()
    seen, *_, schedule = _train(tiny, delay=DELAY)
    assert seen == _by_hand(tiny)
    changes = [step + 1 for step in range(1, STEPS) if seen[step] != seen[step - 1]]
    assert changes == [INTERVAL + DELAY, 2 * INTERVAL + DELAY]
    assert torch.get_num_threads() == threads
    schedule.settle()
    assert not [thread for thread in threading.enumerate() if thread.name == "esdtool-beside"]


def test_delay_0_starts_no_thread(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", _refuse_ours(threading.Thread.start))
    seen, *_ = _train(tiny, delay=0)
    assert seen == _train(tiny)[0]
    with pytest.raises(AssertionError, match="a thread of ours"):
        _train(tiny, delay=DELAY)


def _refuse_ours(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    def refuse(thread: threading.Thread) -> None:
        assert thread.name != "esdtool-beside", "a thread of ours"
        start(thread)

    return refuse


@pytest.mark.parametrize("stop", [3, 4, 5, 6, 9])
def test_a_resumed_run_is_the_same_run(tiny: ModuleType, stop: int) -> None:
    whole, model, *_ = _train(tiny, delay=DELAY)
    before, *parts = _train(tiny, delay=DELAY, steps=stop)
    assert parts[2].is_pending == (stop in (4, 5, 9))
    after, resumed, *_ = _train(tiny, delay=DELAY, first=stop, start=[part.state_dict() for part in parts])
    assert before + after == whole
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_state_of_a_refresh_under_way_is_plain(tiny: ModuleType, tmp_path: Any) -> None:
    *_, schedule = _train(tiny, delay=DELAY, steps=INTERVAL)
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == schedule.state_dict()
    old = schedule.state_dict()
    del old["late"]  # as versions before wrote it
    schedule.load_state_dict(old)
    assert not schedule.is_pending


def test_gradients_are_copied_too(tiny: ModuleType) -> None:
    options: dict[str, Any] = {"score": "gradient_norm", "assign": "sigmoid"}
    late, *_ = _train(tiny, delay=1, **options)
    now, *_ = _train(tiny, **options)
    assert late[INTERVAL] == now[INTERVAL - 1]  # before any decay differed
    assert late[INTERVAL - 1] != now[INTERVAL - 1]


def test_a_failure_comes_out_when_the_decays_are_due(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, schedule = _train(tiny, delay=DELAY, steps=INTERVAL - 1)

    def broken(*arguments: Any, **keywords: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr(live_scores, "score_matrices", broken)
    schedule.step()
    schedule.step()
    with pytest.raises(MemoryError, match="no memory"):
        schedule.step()
    monkeypatch.undo()
    assert not schedule.is_pending
    for _ in range(INTERVAL):
        schedule.step()
    assert schedule.last_notes == {}


def test_a_refresh_by_hand_comes_before_one_under_way(tiny: ModuleType) -> None:
    _, model, _, schedule = _train(tiny, delay=DELAY, steps=INTERVAL)
    assert schedule.is_pending
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    schedule.refresh()
    decays = schedule.last_decays
    assert not schedule.is_pending
    schedule.step()
    schedule.step()
    assert schedule.last_decays == decays


@pytest.mark.parametrize("delay", [-1, INTERVAL, INTERVAL + 1, 1.0, True, "2"])
def test_rejected_delays(tiny: ModuleType, delay: Any) -> None:
    with pytest.raises(UsageError, match="delay must be a whole number of updates, less than interval 4"):
        _train(tiny, delay=delay)


@pytest.fixture
def two_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_work_beside_leaves_our_threads_alone(two_threads: int) -> None:
    before, inside = two_threads, []
    for count in (1, 3):
        beside = Beside([lambda: inside.append(torch.get_num_threads())] * 7, count)
        seen: list[int] = []
        late = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
        late.start()
        late.join()
        beside.wait()
        assert (torch.get_num_threads(), seen) == (before, [before])
    assert inside == [1] * 14


def test_dropped_work_is_not_begun() -> None:
    begun, go, done = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        go.wait(10)
        done.append("first")

    beside = Beside([first, lambda: done.append("second")], 1)
    begun.wait(10)
    threading.Timer(0.1, go.set).start()
    beside.drop()
    assert done == ["first"]
