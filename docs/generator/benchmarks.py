"""Make the tables of the performance page from the recorded benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from generator.markdown import cell, code, table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def seconds(value: float) -> str:
    """Format a time in a suitable unit.

    >>> seconds(0.0207), seconds(76.09), seconds(600), seconds(25966.8)
    ('0.021 s', '76 s', '10 min', '7.2 h')
    """
    if value >= 5400:
        return f"{value / 3600:.2g} h"
    if value >= 120:
        return f"{value / 60:.0f} min" if value >= 570 else f"{value / 60:.1f} min"
    return f"{value:.0f} s" if value >= 9.95 else f"{value:.2g} s"


def _spectra(name: str) -> str:
    rows = []
    for row in _read(name)["rows"]:
        base = row["svdvals float32"]["seconds"]
        ratios = [
            f"{base / row[name]['seconds']:.1f}" for name in ("svdvals float32, tall", "esdtool", "esdtool --fast")
        ]
        errors = [f"{row[name]['alpha error']:.0e}" for name in ("svdvals float32", "esdtool", "esdtool --fast")]
        bounds = [f"{row[name]['fraction of bound']:.0%}".replace("%", " %") for name in ("esdtool", "esdtool --fast")]
        what = [row["shape"].replace("x", " x "), row["storage"]]
        rows.append([*what, seconds(base), *ratios, *bounds, *errors])
    head = ["shape", "stored as", "svdvals float32", "on the tall side", "esdtool", "`--fast`"]
    bounds = ["of the bound: esdtool", "`--fast`"]
    return table([*head, *bounds, "error of alpha: svdvals", "esdtool", "`--fast`"], rows)


def _minilm() -> str:
    found = _read("analyze-minilm")["rows"].items()
    return table(
        ["", "seconds", "peak memory"],
        [[name, f"{row['seconds']:.2f}", f"{row['peak_mib']:.0f} MiB"] for name, row in found],
    )


def _large(result: str) -> str:
    rows = []
    for name, row in _read(result)["rows"].items():
        predicted = seconds(row["predicted"]) if row.get("predicted") else ""
        memory = f"{row['anonymous_mib']:.0f} MiB" if "anonymous_mib" in row else ""
        rows.append([name, seconds(row["seconds"]), predicted, memory])
    return table(["", "time", "predicted by `--dry-run`", "memory above the interpreter's"], rows)


def _growth() -> str:
    models = _read("growth")["models"]
    columns = ("2 cores like these", "16 cores like these", "1 x A100 80 GB, at best", "8 x H100 SXM, at best")
    rows = []
    for name, model in models.items():
        default, fast = model["seconds"]["default"], model["seconds"]["--fast"]
        cells = [seconds(default[column]) for column in columns]
        rows.append([name, f"{model['modules']:,}", *cells, seconds(fast[columns[0]])])
    return table(["model", "modules", *columns, "2 cores, `--fast`"], rows)


def _refresh() -> str:
    ways = ("public", "1 thread", "1 thread, fast", "2 threads", "8 cores")
    rows = []
    for row in _read("refresh")["rows"]:
        cells = (row["refresh"][way] for way in ways)
        shares = [f"{seconds(cell['seconds'])} ({_percent(cell['share'])})" for cell in cells]
        rows.append([row["model"], seconds(row["training seconds"]), *shares])
    return table(["model", "500 steps (estimate)", *ways], rows)


def _slq() -> str:
    rows: list[Iterable[str]] = []
    for row in _read("slq")["rows"]:
        error = abs(row["slq"]["relative error of alpha"])
        width = row["slq"]["relative half-width of the interval"]
        exact, times = seconds(row["exact"]["seconds"]), f"{row['times faster than exact']:.1f}"
        rows.append([row["shape"].replace("x", " x "), row["weights"], exact, times, _percent(error), _percent(width)])
    head = ["shape", "weights", "exact", "slq: times faster", "error of alpha", "half-width of the interval"]
    return table(head, [list(row) for row in rows])


def _measures() -> str:
    rows = _read("measures")["rows"]
    parts = list(rows[0]["parts"])
    return table(
        ["", *(row["model"] for row in rows)],
        [
            ["modules", *(str(row["modules"]) for row in rows)],
            ["analysis without", *(seconds(row["seconds"]["without"]) for row in rows)],
            ["all that is added", *(_percent(row["added"]) for row in rows)],
            *([f"of it {code(part)}", *(_percent(row["parts"][part]) for row in rows)] for part in parts),
        ],
    )


def _weightwatcher() -> str:
    """Group the columns that agree, and those that differ for one reason."""
    found = _read("weightwatcher-columns")
    layers = sum(each["layers"] for each in found["checkpoints"].values())
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, column in found["columns"].items():
        agrees = column["largest"] is not None and column["largest"] <= _AGREE
        groups.setdefault("" if agrees else column["reason"] or "?", []).append((name, column))
    rows = []
    for reason, members in sorted(groups.items(), key=lambda group: (bool(group[0]), "left out" in group[0], group[0])):
        largest = max((column["largest"] for _, column in members if column["largest"] is not None), default=None)
        differ = max(column["differ"] for _, column in members)
        shown = "" if largest is None else f"{largest:.0e}" if largest < 1e-3 else f"{largest:.2g}"
        counted = "" if largest is None else f"{differ} of {layers}"
        rows.append([", ".join(f"`{name}`" for name, _ in members), shown, counted, cell(reason or "they agree")])
    return table(["columns", "largest relative difference", "layers that differ", "why"], rows)


def _weightwatcher_made() -> str:
    made = _read("weightwatcher-columns")["made"]
    small, other = made["small"], made["unpaired"]
    rows: list[list[str]] = []
    for words, factor in (
        ("alpha of a 300 x 300 matrix", "times 1"),
        ("of the same matrix times 1e-4", "times 0.0001"),
    ):
        one, two = made["scale"][factor]["weightwatcher"], made["scale"][factor]["esdtool"]
        rows.append(
            [words, "no fit (-1)" if one == -1 else f"{one:.4f}", f"{two:.4f}", _THRESHOLD if one == -1 else ""]
        )
    for size in ("3000", "4096"):
        counts = made["overflow"][size]
        what = f"`detX_num` of the Marchenko-Pastur law of {size} x {size}"
        rows.append(
            [what, str(counts["weightwatcher"]), str(counts["esdtool"]), "its product of eigenvalues overflows"]
        )
    words = "its estimator below 20 eigenvalues is another one"
    rows.append(["alpha of a 16 x 64 matrix", f"{small['weightwatcher']:.3f}", f"{small['esdtool']:.3f}", words])
    whole = abs(other["weightwatcher"] / other["norm of the weights"] - 1) < _AGREE
    rows.append(
        [
            "a layer that the base does not have",
            "weights instead of a difference" if whole else "?",
            "left out, and listed" if other["esdtool"] else "?",
            "it analyses the layer itself, in the same table as differences",
        ]
    )
    return table(["", "WeightWatcher", "esdtool", "why"], rows)


_AGREE = 1e-9
"""Relative difference that counts as none."""

_THRESHOLD = "it leaves out eigenvalues of at most 1e-5, whatever the scale"


_PROCESSORS = {"Intel(R) Xeon(R) Processor": "Intel Xeon (Sapphire Rapids)", "AMD EPYC": "AMD EPYC (Zen 5)"}
"""What the processors are that the machines' owners name so."""


def _machines() -> str:
    """Tell on which machine each result was recorded."""
    results: dict[str, list[str]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        machine = _read(path.stem).get("machine")
        if machine is not None:
            processor = _PROCESSORS.get(machine["processor"], machine["processor"])
            versions = machine["versions"]
            described = (
                f"{processor}, {machine['cores']} cores, Python {machine['python']}, torch {versions['torch']}, "
                f"numpy {versions['numpy']}, scipy {versions['scipy']}"
            )
            results.setdefault(described, []).append(f"`{path.stem}`")
    return table(["machine", "results"], [[described, ", ".join(names)] for described, names in results.items()])


def _lapack() -> str:
    """Name the solvers that the trial chose, by processor and order."""
    words = {"torch": "MKL", "openblas-one-stage": "OpenBLAS, one stage", "openblas-two-stage": "OpenBLAS, two stages"}
    rows = []
    for name in ("spectra", "spectra-zen5"):
        found = _read(name)
        processor = _PROCESSORS[found["machine"]["processor"]]
        for dtype, label in (("float64", "float64"), ("float32", "float32 (`--fast`)")):
            rows.append(
                [processor, label, *(words[found["lapack"][f"{dtype} {order}"]] for order in (256, 1024, 4096))]
            )
    return table(["processor", "", "256", "1024", "4096"], rows)


def _startup() -> str:
    return table(["", "seconds"], [[name, f"{value:.2f}"] for name, value in _read("startup")["seconds"].items()])


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


TABLES: dict[str, Callable[[], str]] = {
    "machines": _machines,
    "spectra": partial(_spectra, "spectra"),
    "spectra-zen5": partial(_spectra, "spectra-zen5"),
    "lapack": _lapack,
    "startup": _startup,
    "analyze-minilm": _minilm,
    "large-7b": partial(_large, "large-7b"),
    "large-1b": partial(_large, "large-1b"),
    "growth": _growth,
    "refresh": _refresh,
    "slq": _slq,
    "added-measures": _measures,
    "weightwatcher-columns": _weightwatcher,
    "weightwatcher-made": _weightwatcher_made,
}
"""Functions that make a table, by the name of the results."""
