"""Compare two recorded results of one script, and name what has become worse.

    python benchmarks/compare.py OLD.json NEW.json [--tolerance 0.1]

Every measured number that both files have is compared: times and memory should not grow, shares of a bound and ratios
"times faster" should not shrink, errors should not grow beyond ten times. Where the files come from different
processors only shares, ratios, perplexities and errors count. The exit code is 1 if something is worse by more than the
tolerance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

_NAMES = ("shape", "storage", "weights", "model", "dtype", "name", "device", "what")
"""Keys that tell the entries of a list apart."""

_LEFT_OUT = ("machine", "settings", "predicted", "load before", "rate")


class Kind(Enum):
    """How two measurements of a quantity are compared."""

    COST = "a time or memory: less is better, on the same processor"
    GAIN = "a share of a bound or a ratio: more is better"
    LOSS = "a perplexity: less is better, on any processor"
    ERROR = "a relative error: less is better, of the order of magnitude"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One number in both files."""

    what: str
    kind: Kind
    before: float
    after: float

    @property
    def growth(self) -> float:
        """How much worse it is: 0.1 for a time that has grown by a tenth."""
        if self.kind is Kind.GAIN:
            return self.before / self.after - 1 if self.after > 0 else math.inf
        if self.kind is Kind.ERROR:  # within a digit, errors are noise
            return self.after / max(self.before, 1e-15) / 10 - 1
        return self.after / self.before - 1 if self.before > 0 else 0.0


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Pair the numbers of two results by where they stand; times and memory only if the processor is the same."""
    before, after = dict(_numbers(old, ())), dict(_numbers(new, ()))
    same = old.get("machine", {}).get("processor") == new.get("machine", {}).get("processor")
    found = []
    for path in before:
        kind = _kind(path)
        if path in after and kind is not None and (same or kind is not Kind.COST):
            found.append(Change(what=" / ".join(path), kind=kind, before=before[path], after=after[path]))
    return found


def _numbers(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    """Walk through a document; entries of a list go by what names them."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield path, float(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in _LEFT_OUT:
                yield from _numbers(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            names = [str(inner[key]) for key in _NAMES if key in inner] if isinstance(inner, dict) else []
            yield from _numbers(inner, (*path, ", ".join(names) or str(index)))


def _kind(path: tuple[str, ...]) -> Kind | None:
    words = " ".join(path).lower()
    if "error" in path[-1]:
        return Kind.ERROR
    if path[-1] == "perplexity":
        return Kind.LOSS
    if "fraction" in path[-1] or "times faster" in path[-1] or "flop/s" in path[-2:]:
        return Kind.GAIN
    if "seconds" in words or path[-1].endswith(("mib", "bytes")) or "shapes" in path:
        return Kind.COST
    return None


def main() -> int:
    """Print the table of changes, the worst first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="share by which a number may be worse")
    arguments = parser.parse_args()
    documents = []
    for path in (arguments.old, arguments.new):
        try:
            documents.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            print(f"{path}: cannot read the result: {error}", file=sys.stderr)
            return 2
    old, new = documents
    found = sorted(changes(old, new), key=lambda change: -change.growth)
    if not found:
        print("the two results have no measured number in common", file=sys.stderr)
        return 2
    if old.get("machine", {}).get("processor") != new.get("machine", {}).get("processor"):
        print("Different processors: times and memory are not compared.")
    worse = [change for change in found if change.growth > arguments.tolerance]
    for change in found:
        mark = "WORSE " if change in worse else "better" if change.growth < -arguments.tolerance else "      "
        print(f"{mark} {change.before:10.4g} -> {change.after:10.4g}  {change.what}")
    print(f"{len(found)} numbers compared, {len(worse)} worse by more than {arguments.tolerance:.0%}")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
