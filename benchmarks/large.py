"""Measure a checkpoint larger than the memory of many machines: time, peak memory, prediction, gain from the cache.

    python benchmarks/large.py FOLDER [--shape 7b|1b] [--layers N] [--memory SIZE] [--json PATH]

This makes a LLaMA-shaped checkpoint of random bf16 weights in FOLDER (7b: 32 layers, 13 GB; kept for the next run), in
shards of one layer. It analyses the checkpoint in a new process each time: by default, with `--fast`, and with another
fit from the cache that the default run filled. `--layers` makes fewer layers of the same shapes; the cost of a layer is
the same. Peak memory is sampled from /proc. `anonymous` is the memory that the process allocated beyond that of the
interpreter with its libraries. `resident` includes the pages of the mapped files, which the system may reclaim.

The rows of "the command" include the start of Python and torch: `esdtool analyze` with one module at a time, and the
same analysis divided between two processes by torchrun.

The svdvals row is a `torch.linalg.svdvals(W.float())` loop over the first layer with all cores, as in the public
AlphaDecay code, times the number of layers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from safetensors.torch import save_file

SHAPES = {"7b": (32, 4096, 11008), "1b": (24, 2048, 5461)}
"""Layers, hidden size, MLP size: LLaMA 7B, and the paper's 1B."""

_WORKER = """
import json, sys, threading, time
import esdtool, esdtool.analysis.run, scipy.integrate, scipy.linalg, torch
from esdtool.analysis.timing import estimate_seconds
from esdtool.analysis.run import make_plan, run
from esdtool.spectra.options import ScoreOptions

def status():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith("Rss"))
    anonymous = int(fields["RssAnon"].split()[0])
    return anonymous, anonymous + int(fields["RssFile"].split()[0])

checkpoint, options, cache, memory = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "cache", int(sys.argv[4])
torch.linalg.eigvalsh(torch.eye(64, dtype=torch.float64))
if "fit" in options:
    options["fit"] = tuple(options["fit"])  # JSON has no tuples
plan = make_plan(checkpoint, ScoreOptions(**options), cache=cache, memory=memory or None)
predicted = None if cache else estimate_seconds(plan)
base, most, done = status()[0], [0, 0], threading.Event()

def watch():
    while not done.wait(0.01):
        most[:] = map(max, most, status())

thread = threading.Thread(target=watch, daemon=True)
thread.start()
start = time.perf_counter()
analysis = run(plan)
seconds = time.perf_counter() - start
done.set()
thread.join()
print("RESULT", json.dumps({
    "seconds": seconds, "predicted": predicted, "modules": len(analysis.scored),
    "anonymous_mib": (most[0] - base) / 1024, "resident_mib": most[1] / 1024,
}))
"""


def make_checkpoint(folder: Path, layers: int, hidden: int, inner: int) -> None:
    """Write shards of one layer each and their index; existing shards are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    names: dict[str, str] = {}
    for layer in range(layers):
        shard = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        tensors = {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        names |= dict.fromkeys(tensors, shard)
        if not (folder / shard).exists():
            generator = torch.Generator().manual_seed(layer)
            weights = {
                name: (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
                for name, shape in tensors.items()
            }
            save_file(weights, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def race(checkpoint: Path, options: dict[str, Any], *, cache: Path | None, memory: int) -> dict[str, Any]:
    """Run one analysis in a new process."""
    environment = os.environ | ({} if cache is None else {"ESDTOOL_CACHE_DIR": str(cache)})
    words = [str(checkpoint), json.dumps(options), "none" if cache is None else "cache", str(memory)]
    result = subprocess.run(
        [sys.executable, "-c", _WORKER, *words], env=environment, capture_output=True, text=True, check=True
    )
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def command_seconds(checkpoint: Path, *, processes: int) -> float:
    """Time the whole command in one process, one module at a time, or in several that torchrun starts."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [
        sys.executable,
        *start,
        "-m",
        "esdtool",
        "analyze",
        str(checkpoint),
        "--quiet",
        "--jobs",
        "1",
        "--no-cache",
    ]
    begin = time.perf_counter()
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    return time.perf_counter() - begin


def svdvals_of_a_layer(shard: Path, device: str | torch.device = "cpu") -> float:
    """Time `svdvals` for one layer, as the public code calls it, reading and copying aside."""
    from safetensors.torch import load_file

    weights = {name: weight.to(device) for name, weight in load_file(shard).items()}
    torch.linalg.svdvals(torch.eye(64, device=device))
    start = time.perf_counter()
    for weight in weights.values():
        torch.linalg.svdvals(weight.float()).cpu()  # the copy waits for the result
    return time.perf_counter() - start


def main() -> None:
    """Make the checkpoint, run all contestants, print and record."""
    from esdtool.support.sizes import parse_size

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--memory", default="0")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    layers, hidden, inner = SHAPES[arguments.shape]
    layers = arguments.layers or layers
    make_checkpoint(arguments.folder, layers, hidden, inner)
    memory = parse_size(arguments.memory)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as cache:
        contests: tuple[tuple[str, dict[str, Any], Path | None], ...] = (
            ("esdtool", {}, None),
            ("esdtool --fast", {"fast": True}, None),
            ("esdtool, filling the cache", {}, Path(cache)),
            ("esdtool --fit ks, from the cache", {"fit": ["ks"]}, Path(cache)),
        )
        for name, options, folder in contests:
            rows[name] = race(arguments.folder, options, cache=folder, memory=memory)
            print(name, rows[name], flush=True)
    for name, processes in (("the command, one module at a time", 1), ("the command, two processes by torchrun", 2)):
        rows[name] = {"seconds": command_seconds(arguments.folder, processes=processes)}
        print(name, rows[name], flush=True)
    layer = svdvals_of_a_layer(arguments.folder / f"model-00001-of-{layers:05d}.safetensors")
    rows["svdvals, first layer times the layers"] = {"seconds": layer * layers}
    document = {
        "shape": arguments.shape,
        "layers": layers,
        "memory_limit": memory or None,
        "machine": machine.describe(),
        "rows": rows,
        "ratios": {
            "svdvals / esdtool": layer * layers / rows["esdtool"]["seconds"],
            "svdvals / esdtool --fast": layer * layers / rows["esdtool --fast"]["seconds"],
            "second run / first run": rows["esdtool --fit ks, from the cache"]["seconds"]
            / rows["esdtool, filling the cache"]["seconds"],
            "two processes / one module at a time": rows["the command, two processes by torchrun"]["seconds"]
            / rows["the command, one module at a time"]["seconds"],
        },
    }
    print(json.dumps(document["ratios"], indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
