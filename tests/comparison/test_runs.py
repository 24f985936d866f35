"""The comparison's numbers against the log lines themselves, and its files."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from esdtool.comparison.leading import leading_words
from esdtool.comparison.runs import compare_runs, load_run
from esdtool.errors import ConfigError, UsageError
from esdtool.report.figures import save_run_figures
from esdtool.report.figures.differences import seed_differences
from esdtool.report.figures.training import alpha_curves, by_setting, mean_curve, validation_curve
from esdtool.report.html import runs_page
from esdtool.report.markdown import runs_markdown
from esdtool.report.tables.runs import policy_table, settings_csv
from esdtool.train.config.loading import to_toml

Config = Callable[..., Any]


@pytest.fixture
def fake_run(make_config: Config) -> Callable[..., Path]:
    """A run directory with these validation perplexities at steps 4, 8, 12."""

    def make(name: str, perplexities: list[float], **sections: dict[str, Any]) -> Path:
        from math import log

        config = make_config(name, **sections)
        folder = Path(config.run_dir)
        folder.mkdir()
        (folder / "config.toml").write_text(to_toml(config))
        lines = []
        for index, perplexity in enumerate(perplexities, start=1):
            for split in ("train", "validation"):
                lines.append({"step": 4 * index, "split": split, "loss": log(perplexity), "perplexity": perplexity})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        modules = {
            f"model.layers.{layer}.mlp.{role}": {"alpha": 2.0 + layer, "weight_decay": 0.1 * (layer + 1)}
            for layer in range(3)
            for role in ("up_proj", "down_proj")
        }
        decays = [{"step": step, "seconds": 0.1, "modules": modules} for step in (0, 5, 10)]
        (folder / "decay.jsonl").write_text("".join(json.dumps(line) + "\n" for line in decays))
        return folder

    return make


def test_seeds_are_put_together(fake_run: Callable[..., Path]) -> None:
    alpha = [fake_run(f"a{seed}", [40, 30, 20.0 + seed], run={"seed": seed}) for seed in range(3)]
    uniform = [fake_run("u", [40, 18, 19], weight_decay={"policy": "uniform"})]
    table = compare_runs([load_run(path) for path in alpha + uniform])
    assert [row.policy for row in table.settings] == ["uniform", "alphadecay"]
    best, worse = table.settings
    assert (best.seeds, best.final_std) == ((0,), None)
    assert best.best_mean == pytest.approx(18)
    assert best.final_mean == pytest.approx(19)
    assert worse.seeds == (0, 1, 2)
    assert worse.final_mean == pytest.approx(21)
    assert worse.final_std == pytest.approx(statistics.stdev([20, 21, 22]))
    assert [row.best_step for row in table.runs] == [12, 12, 12, 8]
    assert table.notes == ()


def test_other_settings_stay_apart_and_are_named(fake_run: Callable[..., Path]) -> None:
    runs = [fake_run("a", [30, 20, 10]), fake_run("b", [30, 20, 10], optimizer={"lr": 1e-3}, logging={"every": 7})]
    table = compare_runs([load_run(path) for path in runs])
    assert [row.setting for row in table.settings] == [{"optimizer.lr": 3e-3}, {"optimizer.lr": 1e-3}]
    columns = next(csv.reader(io.StringIO(table.to_csv())))
    assert columns[-1] == "optimizer.lr"
    document = json.loads(table.to_json())
    assert document["format"] == "esdtool.comparison"
    assert [row["final_perplexity"] for row in document["runs"]] == pytest.approx([10, 10])


def test_what_is_not_comparable_is_said(fake_run: Callable[..., Path]) -> None:
    runs = [fake_run("a", [30, 20]), fake_run("b", [30, 20, 10], data={"validation_fraction": 0.2})]
    notes = compare_runs([load_run(path) for path in runs]).notes
    assert any("data.validation_fraction: their perplexities are not of the same text" in note for note in notes)
    assert any("is at step 8 of 12" in note for note in notes)


def test_figures(fake_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [load_run(fake_run("a", [30, 20, 10])), load_run(fake_run("b", [31, 22, 11]))]
    files = save_run_figures(runs, tmp_path / "plots")
    each = [f"{kind}-{tmp_path.name}-{run}.png" for kind in ("decay", "alpha-steps") for run in "ab"]
    assert [path.name for path in files] == [*each, "decay-steps.png", "loss.png", "perplexity.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_curves_are_the_means_over_seeds(fake_run: Callable[..., Path]) -> None:
    runs = [load_run(fake_run(f"s{seed}", [30 + seed, 20 - seed], run={"seed": seed})) for seed in range(2)]
    (label,) = (groups := by_setting(runs))
    assert label == "alphadecay (2 seeds)"
    curve = mean_curve([validation_curve(run, "perplexity") for run in groups[label]])
    assert curve == [(4, pytest.approx(30.5)), (8, pytest.approx(19.5))]
    alphas = alpha_curves(runs[0])
    assert alphas == {role: [(0, 3.0), (5, 3.0), (10, 3.0)] for role in ("up_proj", "down_proj")}


def test_the_page_of_runs(fake_run: Callable[..., Path]) -> None:
    hostile = "<script>alert(1)"
    runs = [load_run(fake_run(f"s{seed}", [30, 20 + seed], run={"seed": seed})) for seed in range(2)]
    runs.append(load_run(fake_run(hostile, [30, 25], weight_decay={"policy": "uniform"})))
    text = runs_page(compare_runs(runs), runs)
    assert "Lowest final validation perplexity: alphadecay" in text
    assert "20.50 ± 0.50 (2 seeds); next uniform" in text
    assert "they share fewer than two seeds" in text
    assert "<script>alert" not in text
    assert html.escape(hostile) in text
    pictures = re.findall(r'<img src="data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)"', text)
    assert len(pictures) == 3  # the last decays of each run; the page draws the curves itself
    assert text.count('<figure class="chart">') == 3 + 3  # three of all runs, one of each
    assert all(base64.b64decode(picture).startswith(b"<?xml") for picture in pictures)
    assert not re.search(r'(src|href)="https?:', text)


def test_what_is_no_run_is_refused(fake_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run directory"):
        load_run(tmp_path)
    young = fake_run("young", [])
    with pytest.raises(ConfigError, match="no validation result yet"):
        load_run(young)
    broken = fake_run("broken", [30, 20, 10])
    log = broken / "metrics.jsonl"
    log.write_text("not json\n" + log.read_text())
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 1 is not JSON"):
        load_run(broken)


def test_a_half_written_last_line_is_left_out(fake_run: Callable[..., Path]) -> None:
    run = fake_run("cut", [30, 20, 10])
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 16, "spl')
    assert load_run(run).steps_done == 12


def test_the_table_of_policies_against_scipy(fake_run: Callable[..., Path], tmp_path: Path) -> None:
    finals = {
        ("uniform", 0.1): [20.0, 21.0, 22.5],
        ("uniform", 0.3): [25.0, 24.0, 26.0],
        ("alphadecay", 0.1): [19.5, 20.2, 22.4],
        ("alphadecay", 0.3): [26.0, 24.5, 26.1],
        ("none", 0.1): [19.9, 19.8, 23.0],
    }
    runs = [
        load_run(
            fake_run(
                f"{p}{b}{s}", [30, x], run={"seed": s}, weight_decay={"policy": p, "base": b}, schedule={"steps": 8}
            )
        )
        for (p, b), values in finals.items()
        for s, x in enumerate(values)
    ]
    table = compare_runs(runs)
    assert table.notes == ()
    by_label = {row.label: row for row in table.settings}
    for (policy, base), values in finals.items():
        row = by_label[f"{policy}, base {base:g}"]
        assert row.final_mean == pytest.approx(statistics.fmean(values))
        assert row.final_standard_error == pytest.approx(stats.sem(values))
        if policy == "uniform":
            assert row.paired is None
            continue
        # The same base; without decay there is none, and it is set against the best.
        other = ("uniform", 0.1 if policy == "none" else base)
        test = stats.ttest_rel(values, finals[other])
        interval = test.confidence_interval()
        assert row.paired is not None
        assert row.paired.against == f"uniform, base {other[1]:g}"
        assert row.paired.p_value == pytest.approx(test.pvalue)
        assert (row.paired.low, row.paired.high) == pytest.approx((interval.low, interval.high))

    arranged = policy_table(table.settings)
    assert arranged.headings == ("policy", "0.1", "0.3", "seeds")
    shown = {cells[0]: cells[1:] for cells in arranged.shown(bold=lambda text: f"<{text}>")}
    assert shown["none"] == ("20.9 ± 1.1", "<20.9 ± 1.1>", "3")
    assert shown["alphadecay"][0] == "<20.70 ± 0.87>"
    assert shown["uniform"][1] == "25.00 ± 0.58"
    found = table.settings[0].paired
    assert found is not None
    assert statistics.fmean(seed_differences(table, table.settings[0].label, found.against)) == found.difference
    assert save_run_figures(runs, tmp_path / "plots")[-1].name == "differences.png"
    lines = list(csv.DictReader(io.StringIO(settings_csv(table))))
    assert {line["policy"] for line in lines if line["is_best"] == "True"} == {"alphadecay", "none"}
    assert "| alphadecay | **20.70 ± 0.87** | 25.53 ± 0.52 | 3 |" in runs_markdown(table)

    chosen = compare_runs(runs, against="none, base 0.1")
    against = {row.label: row.paired for row in chosen.settings}
    assert against.pop("none, base 0.1") is None
    assert {found.against for found in against.values() if found} == {"none, base 0.1"}
    with pytest.raises(UsageError, match=r"no setting is called 'non'; there are 'alphadecay, base 0\.1'"):
        compare_runs(runs, against="non")


def test_averaged_weights_are_compared_beside_the_final_ones(fake_run: Callable[..., Path]) -> None:
    finals = {"uniform": [20.0, 21.0, 22.5], "alphadecay": [19.0, 20.5, 21.0], "none": [20.1, 21.3, 22.4]}
    averages = {"uniform": [19.0, 19.5, 20.0], "alphadecay": [19.1, 19.2, 20.5], "none": [18.0, 18.7, 19.2]}
    runs = []
    for policy, values in finals.items():
        for seed, value in enumerate(values):
            folder = fake_run(f"{policy}{seed}", [30, 25, value], run={"seed": seed}, weight_decay={"policy": policy})
            line = {"step": 12, "split": "averaged", "loss": math.log(averages[policy][seed])}
            with (folder / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            runs.append(load_run(folder))
    table = compare_runs(runs)
    rows = {row.policy: row for row in table.settings}
    for policy in finals:
        assert rows[policy].final_mean == pytest.approx(statistics.fmean(finals[policy]))
        assert rows[policy].averaged_mean == pytest.approx(statistics.fmean(averages[policy]))
    for values, found in ((finals, "paired"), (averages, "averaged_paired")):
        tests = {policy: stats.ttest_rel(values[policy], values["uniform"]).pvalue for policy in ("alphadecay", "none")}
        for policy, p_value in tests.items():
            row = getattr(rows[policy], found)
            assert row.p_value == pytest.approx(p_value)
            # Of two tests Holm doubles the smaller p-value, and the other one is not to be below it then.
            assert row.holm_p_value == pytest.approx(max(2 * min(tests.values()), p_value))
    text = runs_markdown(table)
    assert "The same of the averaged weights" in text
    assert f"{statistics.fmean(averages['none']) - 19.5:+.3f}" in text.split("The same of")[1]
    line = next(line for line in csv.DictReader(io.StringIO(settings_csv(table))) if line["policy"] == "none")
    assert float(line["averaged_difference"]) == pytest.approx(statistics.fmean(averages["none"]) - 19.5)
    # One run without an average: the setting has no mean of it.
    plain = fake_run("x", [30, 25, 21], run={"seed": 9}, weight_decay={"policy": "uniform"})
    (partial,) = compare_runs([*runs[:3], load_run(plain)]).settings
    assert (len(partial.seeds), partial.averaged_mean) == (4, None)


def test_unfinished_runs_take_no_part_in_the_means(fake_run: Callable[..., Path]) -> None:
    runs = [fake_run("a0", [40, 30, 20]), fake_run("a1", [40, 30, 22], run={"seed": 1})]
    runs.append(fake_run("a2", [40, 30], run={"seed": 2}))
    table = compare_runs([load_run(path) for path in runs])
    (row,) = table.settings
    assert (row.seeds, row.final_mean) == ((0, 1), pytest.approx(21))
    assert any("at step 8 of 12: it takes no part in the means" in note for note in table.notes)
    assert len(table.runs) == 3


def test_learning_rates_are_compared_with_uniform_ones(fake_run: Callable[..., Path]) -> None:
    """A setting's counterpart is uniform in decay and learning rate; what differs is named, a predicted base too."""
    decays = ({"policy": "uniform"}, {"policy": "alphadecay"})
    runs = [
        fake_run(
            f"{decay['policy']}-{rates}-{seed}",
            [30, 20 + seed],
            run={"seed": seed},
            weight_decay=decay,
            learning_rate={"policy": rates},
        )
        for decay in decays
        for rates in ("uniform", "llr")
        for seed in range(2)
    ]
    table = compare_runs([load_run(path) for path in runs])
    against = {row.label: None if row.paired is None else row.paired.against for row in table.settings}
    assert against.pop("uniform") is None
    assert set(against.values()) == {"uniform"}
    assert set(against) == {"alphadecay", "uniform, lr llr", "alphadecay, lr llr"}
    predicted = fake_run("predicted", [30, 19], weight_decay={"policy": "uniform", "base": "power-lines"})
    arranged = policy_table(compare_runs([load_run(path) for path in [*runs, predicted]]).settings)
    assert "uniform, base power-lines" in {row.label for row in arranged.rows}


def test_no_winner_is_named_inside_the_noise(fake_run: Callable[..., Path]) -> None:
    def leading(alpha: list[float], uniform: list[float]) -> str:
        name = f"{alpha[0]}-{uniform[0]}"
        runs = [fake_run(f"a{name}-{seed}", [30, last], run={"seed": seed}) for seed, last in enumerate(alpha)]
        runs += [
            fake_run(f"u{name}-{seed}", [30, last], run={"seed": seed}, weight_decay={"policy": "uniform"})
            for seed, last in enumerate(uniform)
        ]
        table = compare_runs([load_run(run) for run in runs])
        words = leading_words(table)
        assert words.lower() in html.unescape(runs_page(table, [])).lower()
        assert words.lower() in runs_markdown(table).lower()
        return words

    noise = leading([20.0, 21.0, 19.0], [20.5, 20.0, 20.0])
    assert noise.startswith("no difference that these seeds can tell from chance")
    low, high = stats.t.interval(0.95, 2, *_mean_and_error([-0.5, 1.0, -1.0]))
    assert f"{low:+.2f} to {high:+.2f}" in noise
    assert leading([18.0, 18.1, 18.2], [20.0, 20.0, 20.1]).startswith("alphadecay is ahead of uniform")
    assert "fewer than two seeds" in leading([17.0], [20.0])


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
