"""From a sweep's TOML to its runs: names, order, configurations, and mistakes in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from esdtool.errors import ConfigError
from esdtool.train.sweep.plan import plan_sweep

Write = Callable[..., Path]


@pytest.fixture
def sweep_file(write_config: Write, tmp_path: Path) -> Callable[[str], Path]:
    """Writes a sweep over the small configuration; the text follows the line with `config`."""
    base = write_config("base")

    def make(text: str) -> Path:
        path = tmp_path / "sweep.toml"
        path.write_text(f'[sweep]\nconfig = "{base}"\n{text}', encoding="utf-8")
        return path

    return make


def test_all_combinations_seed_by_seed(sweep_file: Callable[[str], Path]) -> None:
    path = sweep_file(
        """
        seeds = [3, 1]
        dir = "out"
        [[grid]]
        weight_decay.policy = ["uniform", "alphadecay"]
        weight_decay.base = [0.1, 0.3]
        [[grid]]
        weight_decay.policy = "none"
        [[grid]]
        name = "layers"
        weight_decay.granularity = "layer"
        optimizer.betas = [[0.9, 0.95], [0.9, 0.99]]
        """
    )
    plan = plan_sweep(path, ["optimizer.lr=1e-4"])
    names = ["uniform-base-0.1", "uniform-base-0.3", "alphadecay-base-0.1", "alphadecay-base-0.3", "none"]
    names += ["layers-betas-_0.9_0.95_", "layers-betas-_0.9_0.99_"]
    assert [(run.seed, run.name) for run in plan.runs] == [(seed, name) for seed in (3, 1) for name in names]
    assert [run.folder for run in plan.runs[:2]] == [
        Path("out/uniform-base-0.1/seed-3"),
        Path("out/uniform-base-0.3/seed-3"),
    ]
    by_name = {run.name: run.config for run in plan.runs if run.seed == 1}
    assert by_name["alphadecay-base-0.3"].weight_decay.base == 0.3
    assert by_name["none"].weight_decay.policy == "none"
    assert by_name["layers-betas-_0.9_0.99_"].optimizer.betas == (0.9, 0.99)
    assert by_name["layers-betas-_0.9_0.99_"].weight_decay.granularity == "layer"
    assert {run.config.optimizer.lr for run in plan.runs} == {1e-4}
    assert {run.config.run.seed for run in plan.runs} == {1, 3}


def test_a_key_of_some_policies_of_a_grid_is_for_these(sweep_file: Callable[[str], Path]) -> None:
    path = sweep_file(
        """
        [[grid]]
        weight_decay.policy = ["uniform", "alphadecay", "awd"]
        weight_decay.interval = [3, 5]
        weight_decay.fit = ["hill", "ks"]
        weight_decay.base = 0.2
        [[grid]]
        optimizer.name = ["adamw", "muon"]
        optimizer.muon_momentum = 0.9
        """
    )
    plan = plan_sweep(path)
    assert [run.name for run in plan.runs] == [
        "uniform",
        "alphadecay-interval-3-fit-hill",
        "alphadecay-interval-3-fit-ks",
        "alphadecay-interval-5-fit-hill",
        "alphadecay-interval-5-fit-ks",
        "awd-interval-3",
        "awd-interval-5",
        "run-name-adamw",
        "run-name-muon",
    ]
    assert {run.config.weight_decay.base for run in plan.runs[:7]} == {0.2}
    assert plan.runs[-1].config.optimizer.model_dump()["muon_momentum"] == 0.9
    assert "muon_momentum" not in plan.runs[-2].config.optimizer.model_dump()


def test_a_key_of_no_policy_of_a_grid_is_refused(sweep_file: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r'weight_decay\.fit belongs to .*"alphadecay", but the policy is "uniform"'):
        plan_sweep(sweep_file('[[grid]]\nweight_decay.policy = ["uniform", "awd"]\nweight_decay.fit = ["hill", "ks"]'))


def test_the_grid_counts_more_than_set(sweep_file: Callable[[str], Path]) -> None:
    plan = plan_sweep(sweep_file("[[grid]]\noptimizer.lr = [1e-3, 2e-3]"), ["optimizer.lr=9e-3"])
    assert [run.config.optimizer.lr for run in plan.runs] == [1e-3, 2e-3]
    assert [run.name for run in plan.runs] == ["run-lr-0.001", "run-lr-0.002"]
    assert plan.folder == Path("runs/sweep")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "grid is needed"),
        ("grid = []", "sweep.grid is no key"),
        ("seeds = []\n[[grid]]\nrun.threads = 1", "sweep.seeds"),
        ("sedes = [1]\n[[grid]]\nrun.threads = 1", "sweep.sedes is no key of a sweep"),
        ("[[grid]]\nweight_decay.bas = 1", r"\[\[grid\]\] run: unknown key weight_decay.bas; did you mean"),
        ("[[grid]]\nweight_decay.base = [0.1, 'x']", r"\[\[grid\]\] run-base-x: weight_decay.base is the string"),
        ("[[grid]]\nweight_decay.base = []", "empty list of alternatives"),
        ("[[grid]]\nrun.seed = [1, 2]", "run.seed is set by the sweep itself"),
        ("[[grid]]\npolicy = 'none'", "policy is no section"),
        ("[[grid]]\nname = 3", "name must be a text"),
        ("[[grid]]\nweight_decay.exclude = ['mlp']", "takes a list: write a list of lists"),
        (
            "[[grid]]\nweight_decay.policy='none'\n[[grid]]\nweight_decay.policy='none'\noptimizer.lr=1.0",
            "two settings of the grid would be called 'none'",
        ),
    ],
)
def test_mistakes(sweep_file: Callable[[str], Path], words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan_sweep(sweep_file(words))
    assert "\n" not in str(caught.value)


def test_a_configuration_of_one_run_is_recognised(write_config: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a configuration of one run; a sweep names it in \[sweep\] config"):
        plan_sweep(write_config("base"))
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read"):
        plan_sweep(tmp_path / "none.toml")


def test_learning_rate_policies_are_an_axis(sweep_file: Callable[[str], Path]) -> None:
    """Alone they name the runs, beside the decays' policies they stand behind; keys are of those that have them."""
    path = sweep_file(
        """
        [[grid]]
        weight_decay.policy = ["uniform", "alphadecay"]
        learning_rate.policy = ["uniform", "llr"]
        learning_rate.control = ["none", "mean"]
        [[grid]]
        learning_rate.policy = ["tempbalance"]
        weight_decay.cautious = [false, true]
        weight_decay.base = ["power-lines", 0.1]
        """
    )
    names = {run.name: run.config for run in plan_sweep(path).runs}
    assert list(names) == [
        f"{decay}-{rates}"
        for decay in ("uniform", "alphadecay")
        for rates in ("lr-uniform", "lr-llr-lr-control-none", "lr-llr-lr-control-mean")
    ] + [f"tempbalance-cautious-{flag}-base-{base}" for flag in (False, True) for base in ("power-lines", "0.1")]
    assert names["uniform-lr-llr-lr-control-mean"].learning_rate.control == "mean"
    assert names["tempbalance-cautious-True-base-power-lines"].weight_decay.base == "power-lines"
