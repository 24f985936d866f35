"""Measure what the measures beside alpha add to the time of `esdtool analyze` on real checkpoints.

    python benchmarks/measures.py CHECKPOINT... [--repeats N] [--json PATH]

The same analysis runs in one process, in turns with and without all that is always computed beside the spectrum, the
tail and the older metrics: the files of `esdtool/spectra/measures` (bulk and spikes, condition, ERG gap, SNR), the
distance from the null, correlation traps by the law, and the means over the model. `--vectors`, `--per-head` and
`--traps shuffle` are not part of it. The ratio is of processor seconds, which other processes disturb least, and of the
fastest turn of each kind. Within the turns with all, the parts are timed too. The cache of spectra is off: with it the
spectra cost nothing, and the rest is all that is left.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import machine

from esdtool.analysis import module_result, run, summary
from esdtool.analysis.plan import Plan, make_plan
from esdtool.spectra import measure, measures
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.trap_records import Traps

_NO_TRAPS = Traps(from_elements=0, from_mean=0)

_FUNCTIONS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "null distance": (module_result, "null_distance", lambda *_: None),
    "traps": (run, "known_traps", lambda *_, **__: _NO_TRAPS),
    "means": (summary, "means_of", lambda _: {}),
}
"""Where each part that is no measure is called, and what stands in for it."""


@contextmanager
def without() -> Iterator[None]:
    """Leave all parts out."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(measure, "load_measures", tuple))
        for room, name, replacement in _FUNCTIONS.values():
            stack.enter_context(patch.object(room, name, replacement))
        yield


@contextmanager
def timed(spent: Counter[str]) -> Iterator[None]:
    """Add the seconds of each part to `spent`."""

    def timing(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.thread_time()
            found = function(*arguments, **options)
            spent[part] += time.thread_time() - start  # type: ignore[assignment]
            return found

        return call

    with ExitStack() as stack:
        loaded = zip(measures.MEASURE_NAMES, measure.load_measures(), strict=True)
        found = tuple(replace(each, compute=timing(name, each.compute)) for name, each in loaded)
        stack.enter_context(patch.object(measure, "load_measures", lambda: found))
        for part, (room, name, _) in _FUNCTIONS.items():
            stack.enter_context(patch.object(room, name, timing(part, getattr(room, name))))
        yield


def seconds(plan: Plan) -> float:
    """Return the processor seconds of one analysis."""
    start = time.process_time()
    run.run(plan)
    return time.process_time() - start


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="where the results go")
    arguments = parser.parse_args()
    measure.all_quantities()
    rows = [measured(checkpoint, arguments.repeats) for checkpoint in arguments.checkpoints]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows, "machine": machine.describe()}, indent=1) + "\n")


def measured(checkpoint: str, repeats: int) -> dict[str, Any]:
    """Measure and print one checkpoint."""
    plan = make_plan(checkpoint, ScoreOptions(), jobs=1, cache=False)
    seconds(plan)  # loads libraries
    times: dict[str, list[float]] = {"without": [], "with": []}
    parts: list[Counter[str]] = []
    for _ in range(repeats):
        with without():
            times["without"].append(seconds(plan))
        parts.append(Counter())
        with timed(parts[-1]):
            times["with"].append(seconds(plan))
    best = {kind: min(found) for kind, found in times.items()}
    shares = {part: min(spent[part] for spent in parts) / best["without"] for part in parts[0]}
    added = best["with"] / best["without"] - 1
    print(f"{checkpoint}: {len(plan.selection.modules)} modules, {best['without']:.3f} s without, {added:+.1%}")
    for part, share in shares.items():
        print(f"  {part:15s} {share:+.1%}")
    print(f"  {'sum':15s} {sum(shares.values()):+.1%}")
    return {
        "model": "/".join(Path(checkpoint).parts[-2:]),
        "modules": len(plan.selection.modules),
        "seconds": best,
        "added": added,
        "parts": shares,
    }


if __name__ == "__main__":
    main()
