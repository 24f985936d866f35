"""Measure everything that a GPU changes, in one run of at most ten minutes.

    python benchmarks/gpu.py [--device cuda] [--layers 32] [--minutes 10] [--json PATH]

Four parts, each beside its peer in the same process; what the time does not allow is left out and said:

- rates of matrix products, and the time of one spectrum by each path against `torch.linalg.svdvals(W.float())` on the
  device (the public AlphaDecay way);
- `analyze` of a checkpoint of a 7B model's shapes in bf16, by default and with `--fast`; svdvals of one layer times the
  layers; WeightWatcher on the first layer times the layers, if it is installed;
- a refresh of AlphaDecay against 500 real training steps (forward, backward, AdamW in bf16) of the paper's models on
  the same device;
- `pytest -m gpu`, which compares the numbers with the CPU's.

The bound of a spectrum is n^2 m + 4/3 n^3 flops at the measured rate of products. `--device cpu --layers 1 --minutes 1`
tries the script out where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from large import SHAPES, make_checkpoint, svdvals_of_a_layer
from refresh import INTERVAL, PAPER, SEQUENCE_LENGTH, TOKENS

import esdtool
from esdtool.optim import AlphaDecay
from esdtool.spectra.accelerator import multiplies_16_bit
from esdtool.spectra.options import ScoreOptions
from esdtool.spectra.scoring import score_matrices
from esdtool.train.config.presets import PRESETS

SPECTRA = ((512, 512), (768, 3072), (1024, 2736), (2048, 5461), (4096, 4096), (4096, 11008))

MICRO_BATCH = 32
"""Sequences of a forward pass; a step of the paper has 512."""


class Clock:
    """Times work on a device, within a limit for the whole run."""

    def __init__(self, device: torch.device, minutes: float) -> None:
        self.device = device
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._end - time.monotonic()

    def seconds(self, function: Callable[[], object], *, repeats: int = 3) -> float:
        """Return the best time of a few calls, after one that warms up unless there is to be a single one."""
        times = []
        for _ in range(repeats + (repeats > 1)):
            self._wait()
            start = time.perf_counter()
            function()
            self._wait()
            times.append(time.perf_counter() - start)
        return min(times[1:] or times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def rates(clock: Clock, order: int) -> dict[str, float]:
    """Measure the flop/s of matrix products, in float32 without TF32."""
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        left = torch.randn(order, order, device=clock.device).to(dtype)
        found[str(dtype).removeprefix("torch.")] = 2 * order**3 / clock.seconds(lambda left=left: left @ left)
    return found


def spectra(clock: Clock, rate: dict[str, float], shapes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """Time one spectrum of each shape by each way."""
    rows = []
    for height, width in shapes:
        weight = (torch.randn(height, width) / width**0.5).to(torch.bfloat16).to(clock.device)
        short, long = sorted((height, width))
        work = short**2 * long + 4 / 3 * short**3
        row: dict[str, Any] = {"shape": f"{height}x{width}"}
        for name, precision, options in (
            ("esdtool", "float64", ScoreOptions()),
            ("esdtool --fast", "float32", ScoreOptions(fast=True)),
        ):
            seconds = clock.seconds(
                lambda weight=weight, options=options: score_matrices([weight], options, device=clock.device)
            )
            row[name] = {"seconds": seconds, "fraction of bound": work / rate[precision] / seconds}
        row["svdvals"] = {
            "seconds": clock.seconds(lambda weight=weight: torch.linalg.svdvals(weight.float()), repeats=1)
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def checkpoint(clock: Clock, layers: int, shape: str) -> dict[str, Any]:
    """Analyse a checkpoint of a large model's shapes by each tool."""
    _, hidden, inner = SHAPES[shape]
    rows: dict[str, Any] = {"shape": shape, "layers": layers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_checkpoint(path, layers, hidden, inner)
        for name, fast in (("esdtool", False), ("esdtool --fast", True)):
            rows[name] = {
                "seconds": clock.seconds(
                    lambda fast=fast: esdtool.analyze(path, device=str(clock.device), fast=fast, cache=False), repeats=1
                )
            }
            print(name, rows[name], flush=True)
        shard = path / f"model-00001-of-{layers:05d}.safetensors"
        rows["svdvals, one layer times the layers"] = {"seconds": layers * svdvals_of_a_layer(shard, clock.device)}
        rows["weightwatcher, one layer times the layers"] = weightwatcher(clock, shard, layers)
    return rows


def weightwatcher(clock: Clock, shard: Path, layers: int) -> dict[str, Any]:
    """Time WeightWatcher on the modules of one layer."""
    try:
        import weightwatcher as peer
    except ImportError:
        return {"left out": "weightwatcher is not installed"}
    from safetensors.torch import load_file

    model = torch.nn.ModuleList()
    for weight in load_file(shard).values():
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=clock.device)
        linear.weight.data = weight.float().to(clock.device)
        model.append(linear)
    seconds = clock.seconds(lambda: peer.WeightWatcher(model=model).analyze(), repeats=1)
    return {"seconds": layers * seconds, "version": getattr(peer, "__version__", None)}


def refreshes(clock: Clock, presets: tuple[str, ...]) -> list[dict[str, Any]]:
    """Time a refresh beside real training steps of the same model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rows: list[dict[str, Any]] = []
    for name in presets:
        preset = PRESETS[name]
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=preset.vocab_size or 32000,
                hidden_size=preset.hidden_size,
                intermediate_size=preset.intermediate_size,
                num_hidden_layers=preset.num_hidden_layers,
                num_attention_heads=preset.num_attention_heads,
            )
        ).to(clock.device, torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        schedule = AlphaDecay(model, optimizer, weight_decay=0.1, interval=1, initial=False)
        micro = MICRO_BATCH if clock.device.type == "cuda" else 1
        ids = torch.randint(0, model.config.vocab_size, (micro, SEQUENCE_LENGTH), device=clock.device)

        def pass_over(model: Any = model, ids: torch.Tensor = ids) -> None:
            model(input_ids=ids, labels=ids).loss.backward()

        passes = TOKENS / ids.numel()
        step = passes * clock.seconds(pass_over) + clock.seconds(optimizer.step)
        refresh = clock.seconds(schedule.step, repeats=2)
        rows.append(
            {
                "model": name,
                "seconds of a step": step,
                "seconds of a refresh": refresh,
                "share of the time": refresh / (INTERVAL * step),
            }
        )
        print(rows[-1], flush=True)
        del model, optimizer, schedule
        if clock.left < 120:
            break
    return rows


def main() -> None:
    """Run the parts, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --shape 1b --layers 1 --minutes 1 tries the script out")
    small = device.type != "cuda"
    clock = Clock(device, arguments.minutes)
    rate = rates(clock, 1024 if small else 8192)
    document: dict[str, Any] = {
        "machine": machine.describe(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "16-bit products": multiplies_16_bit(torch.bfloat16, device),
        "product flop/s": rate,
    }
    parts: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("rows", lambda: spectra(clock, rate, SPECTRA[:2] if small else SPECTRA)),
        ("checkpoint", lambda: checkpoint(clock, arguments.layers, arguments.shape)),
        ("refresh", lambda: refreshes(clock, ("llama-1m",) if small else PAPER)),
        ("tests", lambda: tests(clock)),
    )
    for name, part in parts:
        if clock.left < 30:
            document[name] = "left out: no time"
            print(f"{name}: left out, no time", flush=True)
            continue
        try:
            document[name] = part()
        except RuntimeError as error:  # one part that fails on this device must not cost the others
            document[name] = f"failed: {error}"
            print(f"{name} failed: {error}", flush=True)
        if arguments.json:  # after each part: the machine may be gone before the end
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def tests(clock: Clock) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    root = Path(__file__).parent.parent
    try:
        result = subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=False, timeout=max(clock.left, 1)
        )
    except subprocess.TimeoutExpired:
        return {"result": "not finished in time"}
    print(result.stdout[-3000:], flush=True)
    return {"exit code": result.returncode, "result": result.stdout.strip().splitlines()[-1]}


if __name__ == "__main__":
    main()
