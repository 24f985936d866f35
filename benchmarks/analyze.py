"""Compare time and peak memory of esdtool with two other tools on a whole real checkpoint.

    python benchmarks/analyze.py CHECKPOINT [--weightwatcher-python PATH] [--repeats N] [--json PATH]

Each contestant runs in its own process on the same matrices (those that `esdtool analyze` scores):

- `torch.linalg.svdvals(W.float())` in a loop, then Hill: what the public AlphaDecay code does;
- `weightwatcher.WeightWatcher(model=...).analyze()` on `nn.Linear` layers that hold the matrices (needs weightwatcher
  0.7.7, in this environment or in the one whose interpreter `--weightwatcher-python` names);
- `esdtool.analyze`, with its default, with `fast=True`, and with `fit="ks"`, the estimator WeightWatcher uses.

The clock starts after imports and loading for all of them, except that the time of esdtool includes reading the
checkpoint. Peak memory is the maximum resident set of the process, including interpreter and libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONTESTANTS = ("svdvals", "weightwatcher", "esdtool", "esdtool --fast", "esdtool --fit ks")

_WORKER = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
contestant, checkpoint, matrices = sys.argv[1:4]
import torch

def load():
    return torch.load(matrices, weights_only=True)

if contestant == "svdvals":
    weights = load()
    start = time.perf_counter()
    alphas = {}
    for name, weight in weights.items():
        eigenvalues = torch.linalg.svdvals(weight.float()).square().sort().values
        tail = eigenvalues[len(eigenvalues) // 2 :]
        alphas[name] = float(1 + len(tail) / torch.log(tail / tail[0]).sum())
elif contestant == "weightwatcher":
    import logging, weightwatcher
    logging.disable(logging.CRITICAL)
    layers = torch.nn.ModuleList()
    names = []
    for name, weight in load().items():
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.float()
        layers.append(layer)
        names.append(name)
    start = time.perf_counter()
    details = weightwatcher.WeightWatcher(model=layers).analyze()
    alphas = {names[int(row["longname"].split(".")[-1])]: float(row["alpha"]) for _, row in details.iterrows()}
else:
    import esdtool, esdtool.analysis.run, scipy.integrate
    options = {"esdtool": {}, "esdtool --fast": {"fast": True}, "esdtool --fit ks": {"fit": "ks"}}[contestant]
    start = time.perf_counter()
    analysis = esdtool.analyze(checkpoint, cache=False, **options)
    alphas = {module.name: module.alpha for module in analysis.scored}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print("RESULT", json.dumps({"seconds": seconds, "peak_mib": peak, "alphas": alphas}))
"""


def race(contestant: str, python: str, checkpoint: str, matrices: Path) -> dict[str, Any] | None:
    result = subprocess.run(
        [python, "-c", _WORKER, contestant, checkpoint, str(matrices)], capture_output=True, text=True, check=False
    )
    for line in result.stdout.splitlines():
        if line.startswith("RESULT "):
            document: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return document
    print(f"{contestant}: failed: {(result.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr)
    return None


def save_matrices(checkpoint: str, target: Path) -> int:
    """Read the matrices that esdtool scores, for the contestants that cannot read checkpoints."""
    import torch

    from esdtool.analysis.plan import make_plan
    from esdtool.spectra.options import ScoreOptions

    plan = make_plan(checkpoint, ScoreOptions())
    weights = {m.name: plan.checkpoint.read(m.parameter) for m in plan.selection.modules if m.kind == "linear"}
    torch.save(weights, target)
    return len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--weightwatcher-python", default=sys.executable)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import machine

    with tempfile.TemporaryDirectory() as folder:
        matrices = Path(folder) / "matrices.pt"
        count = save_matrices(options.checkpoint, matrices)
        best: dict[str, dict[str, Any]] = {}
        for _ in range(options.repeats):
            for contestant in CONTESTANTS:
                python = options.weightwatcher_python if contestant == "weightwatcher" else sys.executable
                result = race(contestant, python, options.checkpoint, matrices)
                if result and (contestant not in best or result["seconds"] < best[contestant]["seconds"]):
                    best[contestant] = result
    print(f"{options.checkpoint}: {count} matrices, best of {options.repeats}")
    base = best.get("weightwatcher", best["svdvals"])["seconds"]
    for contestant, result in best.items():
        print(
            f"  {contestant:18s} {result['seconds']:8.3f} s   {base / result['seconds']:6.1f} x weightwatcher's speed"
            f"   {best['svdvals']['seconds'] / result['seconds']:6.1f} x svdvals'   peak {result['peak_mib']:6.0f} MiB"
        )
    agreement = {}
    for ours, theirs in (("esdtool", "svdvals"), ("esdtool --fit ks", "weightwatcher")):
        if ours in best and theirs in best:
            a, b = best[ours]["alphas"], best[theirs]["alphas"]
            gaps = sorted(abs(a[name] / b[name] - 1) for name in a if name in b)
            agreement[f"{ours} / {theirs}"] = {"modules": len(gaps), "median": gaps[len(gaps) // 2], "max": gaps[-1]}
            print(f"  alpha, {ours} against {theirs}: {len(gaps)} modules, relative difference:")
            print(f"    median {gaps[len(gaps) // 2]:.1e}, at most {gaps[-1]:.1e}")
    if options.json:
        rows = {name: {key: result[key] for key in ("seconds", "peak_mib")} for name, result in best.items()}
        document = {
            "checkpoint": options.checkpoint,
            "matrices": count,
            "machine": machine.describe(),
            "rows": rows,
            "agreement": agreement,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
