"""`esdtool sweep --until` and `--power`, with runs that are made up: which are asked for, and what is said of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from esdtool.cli import app
from esdtool.comparison.stopping import nominal_level
from esdtool.errors import EsdtoolError
from esdtool.train.config.loading import to_toml
from esdtool.train.sweep import runner
from esdtool.train.sweep.plan import SweepPlan
from esdtool.train.sweep.runner import SweepResult, state_of

Made = dict[tuple[str, int], float]
"""Final perplexity by setting and seed."""
GRID = """
[[grid]]
name = "alphadecay"
[[grid]]
name = "mean"
weight_decay.control = "mean"
[[grid]]
weight_decay.policy = "uniform"
"""


@pytest.fixture
def sweep(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, list[tuple[str, int]]]]:
    """Writes a sweep whose runs end, at once, at these perplexities; and lists which were run."""
    base = write_config("base")

    def make(perplexities: Made, head: str = "seeds = [0, 1]") -> tuple[Path, list[tuple[str, int]]]:
        path = tmp_path / "sweep.toml"
        path.write_text(f'[sweep]\nconfig = "{base}"\ndir = "{tmp_path}/out"\n{head}\n{GRID}', encoding="utf-8")
        done: list[tuple[str, int]] = []

        def run_sweep(plan: SweepPlan, **options: Any) -> SweepResult:
            for run in plan.runs:
                if state_of(run) == "finished":
                    continue
                (run.folder / "final").mkdir(parents=True)
                (run.folder / "config.toml").write_text(to_toml(run.config))
                value = perplexities[run.name, run.seed]
                line = {"step": 12, "split": "validation", "loss": math.log(value), "perplexity": value}
                (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
                done.append((run.name, run.seed))
            return SweepResult(finished=plan.runs, failed=(), elsewhere=(), stopped_by=None)

        monkeypatch.setattr(runner, "run_sweep", run_sweep)
        return path, done

    return make


def call(*arguments: object) -> None:
    app(["sweep", *map(str, arguments)], standalone_mode=False)


def noisy(seeds: int, spread: float) -> Made:
    """Perplexities whose paired differences, in percent, alternate around 1 by `spread`."""
    made: Made = {}
    for seed in range(seeds):
        made["mean", seed] = 10.0 + seed
        made["alphadecay", seed] = (10.0 + seed) * math.exp((1 + (-1) ** seed * spread) / 100)
        made["uniform", seed] = 11.0
    return made


def test_seeds_are_added_to_the_compared_settings_until_the_interval_is_narrow(
    sweep: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path, done = sweep(noisy(12, 0.5), 'seeds = [0, 1]\nuntil = "alphadecay - mean: ci 2%"\nmax_seeds = 12')
    call(path)
    seeds = max(seed for _, seed in done) + 1
    assert seeds % 2 == 0
    assert 2 < seeds < 12
    assert sorted(done) == sorted(
        [("uniform", seed) for seed in (0, 1)]
        + [(name, seed) for name in ("alphadecay", "mean") for seed in range(seeds)]
    )
    shown, said = capsys.readouterr()
    level = nominal_level((2, 4, 6, 8, 10, 12))
    for count in range(2, seeds + 1, 2):
        differences = [1 + (-1) ** seed * 0.5 for seed in range(count)]
        interval = stats.ttest_1samp(differences, 0).confidence_interval(level)
        assert f"+1.00 %, 95 % interval {interval.low:+.2f} to {interval.high:+.2f} ({count} seeds" in said
        assert (interval.high - interval.low < 2) == (count == seeds)
    assert f"({seeds} seeds, look {seeds // 2} of 6, nominal {100 * level:.1f} %)" in shown
    assert "the interval is narrower than 2 %, and 0 is outside it" in shown

    done.clear()
    call(path)  # again: nothing is left to do, and the answer is the same
    assert done == []
    assert shown.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]
    call(path, "--power")
    assert f" {seeds} " in capsys.readouterr().out  # the added ones, too


def test_it_ends_at_the_maximum_and_says_that_nothing_is_decided(
    sweep: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path, done = sweep(noisy(7, 5.0))
    call(path, "--until", "alphadecay - mean: ci 0.3%", "--max-seeds", "5")
    assert max(seed for _, seed in done) == 4
    last = capsys.readouterr().out.splitlines()[-1]
    assert "(5 seeds, look 3 of 3" in last
    assert last.endswith("undecided: the interval is not narrower than 0.3 % after 5 seeds; 0 is inside it")


def test_of_several_rules_each_is_waited_for(sweep: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    path, done = sweep(noisy(6, 0.01))
    call(path, "--until", "alphadecay - mean: ci 2%", "--until", "alphadecay - uniform: ci 1%", "--max-seeds", "6")
    assert {name for name, seed in done if seed == 5} == {"alphadecay", "mean", "uniform"}
    last = capsys.readouterr().out.splitlines()[-2:]
    assert ["undecided" in line for line in last] == [False, True]


def test_without_a_rule_the_seeds_are_those_of_the_file(sweep: Callable[..., Any]) -> None:
    path, done = sweep(noisy(2, 5.0))
    call(path, "--quiet")
    assert {seed for _, seed in done} == {0, 1}


@pytest.mark.parametrize(
    ("head", "arguments", "message"),
    [
        ("", ["--until", "alphadecay vs mean"], "is no rule for stopping: write it as 'SETTING - SETTING: ci 0.3%'"),
        ("", ["--until", "alphadecay - mean: ci 0%"], "0 is no positive number of percent"),
        ("", ["--until", "alphadecay - mean: ci nan%"], "nan is no positive number of percent"),
        ("", ["--until", "mean - mean: ci 1%"], "compares mean with itself"),
        ("", ["--until", "alphadecay - men: ci 1%"], "is called men; there are alphadecay, mean, uniform"),
        ("", ["--max-seeds", "8"], "--max-seeds needs a rule: --until, or [sweep] until in"),
        ("seeds = [0]", ["--until", "alphadecay - mean: ci 1%"], "needs at least 2 seeds to begin with: write [sweep]"),
        ("seeds = [0, 1, 2]", ["--until", "alphadecay - mean: ci 1%", "--max-seeds", "2"], "a maximum of 2 seeds, but"),
        ('until = "x"', [], "'x' is no rule for stopping"),
        ("", ["--power"], "no two settings have 2 finished seeds in common; run the sweep first"),
    ],
)
def test_mistakes_are_one_line_before_any_run(
    head: str, arguments: list[str], message: str, sweep: Callable[..., Any]
) -> None:
    path, done = sweep({}, head if "seeds" in head else f"seeds = [0, 1]\n{head}")
    with pytest.raises(EsdtoolError, match=re.escape(message)) as caught:
        call(path, *arguments)
    assert "\n" not in str(caught.value)
    assert done == []


def test_the_dry_run_tells_the_rule(sweep: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    path, done = sweep({}, 'seeds = [0, 1]\nuntil = "alphadecay - mean: ci 0.3%"')
    call(path, "--dry-run")
    shown, said = capsys.readouterr()
    assert len(shown.splitlines()) == 6
    assert "then more seeds of alphadecay, mean, up to 24, until 'alphadecay - mean: ci 0.3%'" in said
    assert done == []


def test_power_from_the_runs_at_hand(
    sweep: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    path, _ = sweep(noisy(4, 0.5), "seeds = [0, 1, 2, 3]")
    call(path, "--quiet")
    capsys.readouterr()
    call(path, "--power")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " - alphadecay" in line]
    assert [line[0] for line in lines] == ["mean", "uniform"]  # each against the first setting of the file
    spread = math.sqrt(4 * 0.5**2 / 3)
    assert lines[0][3:8] == ["4", "-1.00", "%", f"{spread:.2f}", "%"]
    call(path, "--power", "--until", "alphadecay - mean: ci 1%")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if " - mean" in line] == ["alphadecay"]
