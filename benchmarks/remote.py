"""Measure an analysis of a remote checkpoint against a local one: bytes, peak memory, and how far reading overlaps.

    python benchmarks/remote.py [--layers N] [--analysed N] [--hidden N] [--inner N] [--rates BITS ...] [--folder PATH]
                                [--json PATH]

This writes a LLaMA-shaped checkpoint of random bfloat16 weights in shards (3.2 GB by default), serves it as a Hub on
the loopback address from a process of its own, and analyses some layers, evenly by depth: from the disk (first and
last, the better time counts), from the Hub, and from the Hub over links of `--rates` bits a second. Rate 0, the hardest
case, is the one at which the transfer takes as long as the local analysis. It prints the bytes sent over those of the
weights and headers, the peak memory of each, and the time over each link divided by the larger one of the local
analysis and the transfer alone.

`overlap` is the last of these where other processes do not count: the link is as slow as the computation, and instead
of computing each module two threads wait, `WAITING` seconds in all, in proportion to the modules' work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.checkpoint.remote_server import REPO, serve  # noqa: E402

WAITING = 20.0

WAITED = """
import json, sys, time
from esdtool.analysis.execution import carry_out
from esdtool.analysis.plan import make_plan
from esdtool.modules.base import cost
from esdtool.modules.choice import ModuleChoice
from esdtool.modules.reading import read_matrices
from esdtool.spectra.options import ScoreOptions
seconds = float(sys.argv[3])
plan = make_plan(
    sys.argv[1], ScoreOptions(), choice=ModuleChoice.of(include=[sys.argv[2]]), jobs=2, cache=False, download=False
)
def read(batch):
    return [read_matrices(plan.checkpoint, module) for module in batch]
def compute(batch, weights):
    time.sleep(2 * seconds * sum(map(cost, batch)) / plan.cost)
start = time.perf_counter()
list(carry_out(plan.batches(plan.selection.modules), read, compute, limits=plan.limits))
print(json.dumps({"over_larger": (time.perf_counter() - start) / seconds}))
"""

MEASURED = """
import json, sys, time
from pathlib import Path
import esdtool
start = time.perf_counter()
found = esdtool.analyze(sys.argv[1], include=[sys.argv[2]], download=False, cache=False)
seconds = time.perf_counter() - start
modules = [module.model_dump(mode="json") for module in found.modules]
status = Path("/proc/self/status").read_text()
memory = 1024 * int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps({"seconds": seconds, "memory": memory, "modules": modules}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--analysed", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5504)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e9, 0])
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept; default a temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "model.safetensors.index.json").exists():
            write(folder, arguments)
        record = measure(folder, arguments)
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "folder")}
        arguments.json.write_text(json.dumps({"machine": machine.describe(), "settings": settings, **record}, indent=2))


def write(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the checkpoint, a shard for every four layers."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner = arguments.hidden, arguments.inner
    shapes = dict.fromkeys((f"self_attn.{which}_proj" for which in "qkvo"), (hidden, hidden))
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for first in range(0, arguments.layers, 4):
        shard = f"model-{first // 4 + 1:05d}-of-{-(-arguments.layers // 4):05d}.safetensors"
        tensors = {
            f"model.layers.{layer}.{name}.weight": torch.randn(shape, generator=generator).bfloat16()
            for layer in range(first, min(first + 4, arguments.layers))
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Analyse the checkpoint in the three ways."""
    last, steps = arguments.layers - 1, max(arguments.analysed - 1, 1)
    include = rf"layers\.({'|'.join(str(step * last // steps) for step in range(arguments.analysed))})\."
    local = analyse(str(folder), include)
    weights = sum(2 * module["shape"][0] * module["shape"][1] for module in local["modules"])
    headers = header_bytes(folder)
    ways = {"local": local}
    rates = [rate or (weights + headers) * 8 / local["seconds"] for rate in arguments.rates]
    for name, rate in (("hub", None), *((f"{rate:g} bit/s", rate) for rate in rates)):
        with served(folder, None if rate is None else rate / 8) as (url, sent):
            ways[name] = analyse(REPO, include, HF_ENDPOINT=url, HF_HUB_OFFLINE="0")
            ways[name]["sent"] = sent.value
    with served(folder, (weights + headers) / WAITING) as (url, _):
        overlap = run(WAITED, REPO, include, str(WAITING), HF_ENDPOINT=url, HF_HUB_OFFLINE="0")
    again = analyse(str(folder), include)
    computing = min(local["seconds"], again["seconds"])
    transfers = {f"{rate:g} bit/s": (weights + headers) * 8 / rate for rate in rates}
    same = all(way["modules"] == local["modules"] for way in ways.values())
    record = {
        "same_numbers": same,
        "checkpoint_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "needed_bytes": weights + headers,
        "sent_over_needed": ways["hub"]["sent"] / (weights + headers),
        "seconds": {name: way["seconds"] for name, way in ways.items()} | {"local": computing},
        "peak_memory": {name: way["memory"] for name, way in ways.items()},
        "transfer_seconds": transfers,
        "over_larger": {name: ways[name]["seconds"] / max(computing, transfer) for name, transfer in transfers.items()},
        "overlap": overlap["over_larger"],
    }
    print(json.dumps(record, indent=2))
    return record


def header_bytes(folder: Path) -> int:
    """Count the bytes of all headers, of the index and of the configuration."""
    total = sum(path.stat().st_size for path in folder.glob("*.json"))
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += 8 + int.from_bytes(file.read(8), "little")
    return total


def analyse(location: str, include: str, **environment: str) -> dict[str, Any]:
    """Analyse in a process of its own."""
    return run(MEASURED, location, include, **environment)


def run(program: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run a program in a process of its own, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


class served:  # noqa: N801 - used as a function
    """Serve a folder as a Hub from a process of its own: (URL, bytes sent) in the body."""

    def __init__(self, folder: Path, rate: float | None) -> None:
        self._url, self._stop = multiprocessing.Queue(), multiprocessing.Event()
        self._sent = multiprocessing.Value("q", 0)
        self._process = multiprocessing.Process(target=_serve, args=(folder, rate, self._url, self._stop, self._sent))

    def __enter__(self) -> tuple[str, Any]:
        self._process.start()
        self._sent.value = 0
        return self._url.get(), _After(self)

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> int:
        self._stop.set()
        self._process.join()
        return int(self._sent.value)


class _After:
    """The bytes that were sent; looking ends the serving."""

    def __init__(self, serving: served) -> None:
        self._serving = serving

    @property
    def value(self) -> int:
        return self._serving.finish()


def _serve(folder: Path, rate: float | None, url: Any, stop: Any, sent: Any) -> None:
    with serve(folder, is_hub=True, rate=rate) as server:
        url.put(server.url)
        stop.wait()
        sent.value = server.sent


if __name__ == "__main__":
    main()
