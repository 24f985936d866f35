"""`python -m tests.fuzz [FORMAT ...] --seconds N [--first SEED]`: fuzz for as long as wanted."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.campaign import run
from tests.fuzz.formats import FORMATS
from tests.fuzz.sandbox import Sandbox


def main() -> int:
    """Fuzz each format in turn; the exit code is 1 if an input was mishandled."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"default: all of {', '.join(FORMATS)}")
    parser.add_argument("--seconds", type=float, default=60, help="for each format (60)")
    parser.add_argument("--first", type=int, help="first seed; default: the time, so that each run is another")
    parser.add_argument("--inputs", type=int, help="at most so many of each format")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.formats) - set(FORMATS))
    if unknown:
        parser.error(f"unknown format {unknown[0]}; there are {', '.join(FORMATS)}")
    first = int(time.time()) * 1000 if arguments.first is None else arguments.first
    total = bad = 0
    sandbox = Sandbox()
    for name in arguments.formats or FORMATS:
        folder = Path(tempfile.mkdtemp(prefix=f"esdtool-fuzz-{name}-"))
        report = run(name, sandbox, folder, first=first, seconds=arguments.seconds, inputs=arguments.inputs)
        total, bad = total + report.inputs, bad + len(report.mishandled)
        codes = ", ".join(f"{count} x {code}" for code, count in sorted(report.codes.items()))
        print(f"{name}: {report.inputs} inputs, exit codes {codes}; {len(report.mishandled)} mishandled", flush=True)
        for words in report.mishandled:
            print(f"  {words}")
        if report.mishandled:
            print(f"  kept in {folder / 'found'}")
        else:
            shutil.rmtree(folder)
    sandbox.close()
    print(f"{total} inputs, {bad} mishandled; first seed {first}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
