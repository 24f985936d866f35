"""Write the parts of the documentation that come from the code: `python docs/generate.py [--check]`.

Whole pages are `reference/cli.md`, `config.md`, `json.md`, `findings.md` and `python.md`. In other pages the text
between `<!-- generated: KIND NAME -->` and `<!-- end -->` is a script of the repository, a section of the README, or a
table from `benchmarks/results`. With `--check` nothing is written; the exit code is 1 if a page is not up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from generator import cli, config, findings, formats, parts, python_api

DOCS = Path(__file__).parent
PAGES = {
    "cli": cli.page,
    "config": config.page,
    "json": formats.page,
    "findings": findings.page,
    "python": python_api.page,
}


def wanted() -> dict[Path, str]:
    """Return the text that each page should have."""
    texts = {DOCS / "reference" / f"{name}.md": render() for name, render in PAGES.items()}
    for path in sorted(DOCS.rglob("*.md")):
        if path not in texts:
            texts[path] = parts.filled(path.read_text(encoding="utf-8"), where=path.name)
    return texts


def main() -> int:
    """Write the pages that differ, or only name them."""
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        print(__doc__, file=sys.stderr)
        return 2
    texts = wanted()
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(DOCS.parent)}: {'not up to date' if check else 'written'}")
    if check:
        if stale:
            print("run: python docs/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
