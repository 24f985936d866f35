"""Mutate one format for a number of inputs or of seconds, and keep what was mishandled."""

from __future__ import annotations

import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.formats import FORMATS
from tests.fuzz.sandbox import Outcome, Sandbox


@dataclass(kw_only=True)
class Report:
    """What a campaign found."""

    name: str
    inputs: int = 0
    commands: int = 0
    codes: dict[int, int] = field(default_factory=dict)
    """How often each exit code came."""
    mishandled: list[str] = field(default_factory=list)
    """Seed, command and faults of each."""


def run(
    name: str,
    sandbox: Sandbox,
    folder: Path,
    *,
    first: int = 0,
    inputs: int | None = None,
    seconds: float | None = None,
) -> Report:
    """Mutate a format from one seed on.

    Args:
        name: key of `FORMATS`.
        sandbox: where the commands run.
        folder: an empty folder to work in; mishandled inputs stay in `folder/found`.
        first: seed of the first input; each input has the next one, and the same seed always gives the same input.
        inputs: how many; None for no limit.
        seconds: for how long; None for no limit.
    """
    kind = FORMATS[name]
    work = folder / "work"
    work.mkdir()
    target = kind.build(work)
    commands = [
        [str(target.relative_to(work)) if word == "FILE" else word for word in words] for words in kind.commands
    ]
    sound = target.read_bytes()
    report = Report(name=name)
    for words in commands:
        sandbox.run(work, *words, warm=True)  # libraries look around when they are imported
        outcome = sandbox.run(work, *words)
        assert outcome.code == 0, (name, words, outcome)
        assert not outcome.deeds, (name, words, outcome)
    seed = first
    end = time.monotonic() + seconds if seconds is not None else float("inf")
    while time.monotonic() < end and (inputs is None or seed < first + inputs):
        data = kind.mutation(sound, random.Random(f"{name} {seed}"))
        target.write_bytes(data)
        before = _tree(work)
        report.inputs += 1
        for words in commands:
            outcome = sandbox.run(work, *words)
            report.commands += 1
            report.codes[outcome.code] = report.codes.get(outcome.code, 0) + 1
            faults = outcome.faults()
            if _tree(work) != before:
                faults.append("changed the folder")
            if faults:
                _keep(report, folder, seed, words, data, outcome, faults)
            shutil.rmtree(work / "out")
        seed += 1
    return report


def _keep(
    report: Report, folder: Path, seed: int, command: list[str], data: bytes, outcome: Outcome, faults: list[str]
) -> None:
    found = folder / "found"
    found.mkdir(exist_ok=True)
    (found / f"{report.name}-{seed}").write_bytes(data)
    words = f"seed {seed}: esdtool {' '.join(command)}: {'; '.join(faults)[:500]}"
    (found / f"{report.name}-{seed}.txt").write_text(f"{words}\n\n{outcome.stderr}\n", errors="backslashreplace")
    tail = outcome.stderr.strip().splitlines()
    report.mishandled.append(f"{words} | {tail[-1][:200] if tail else ''}")


def _tree(work: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file, but for those that a command may write."""
    found = {}
    for place, folders, files in os.walk(work):
        folders[:] = [name for name in folders if name not in ("out", "cache", "tmp", "__pycache__")]
        for name in files:
            status = (Path(place) / name).lstat()
            found[str(Path(place) / name)] = (status.st_size, status.st_mtime_ns)
    return found
