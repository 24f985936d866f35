"""Measure how long the smallest analysis takes beyond the import of torch.

    python benchmarks/startup.py [--repeats 5] [--json PATH]

Whole processes take turns, warm: `esdtool --help`, `python -c "import torch"`, and `esdtool analyze` of the bundled
checkpoint, with its spectra computed and with all of them from the cache. The figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

CHECKPOINT = Path(__file__).parent.parent / "examples" / "checkpoints" / "stdlib-llama"

ANALYZE = [sys.executable, "-m", "esdtool", "analyze", str(CHECKPOINT), "--quiet"]

CONTESTANTS = {
    "esdtool --help": [sys.executable, "-m", "esdtool", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
    "esdtool analyze": [*ANALYZE, "--no-cache"],
    "esdtool analyze, from the cache": ANALYZE,
}


def main() -> None:
    """Run all contestants in turn, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["ESDTOOL_CACHE_DIR"] = cache
        for repeat in range(arguments.repeats + 1):
            for name, command in CONTESTANTS.items():
                start = time.perf_counter()
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                if repeat:  # the first round compiles bytecode and fills the caches
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    beyond = medians["esdtool analyze"] - medians["import torch"]
    for name, median in medians.items():
        print(f"{median:6.2f} s  {name}")
    print(f"{beyond:6.2f} s  esdtool analyze, beyond the import of torch")
    if arguments.json:
        document = {"machine": machine.describe(), "seconds": medians, "seconds beyond the import of torch": beyond}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
