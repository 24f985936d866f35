"""Fill the generated parts of hand-written pages: scripts, sections of the README, tables."""

from __future__ import annotations

import re
from pathlib import Path

from generator import benchmarks, measures, quantities

ROOT = Path(__file__).parents[2]

_TABLES = benchmarks.TABLES | {
    "measures": measures.measures,
    "pair-measures": measures.pair_measures,
    "quantity-settings": quantities.settings,
}

_PART = re.compile(r"(<!-- generated: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, *, where: str) -> str:
    """Generate the parts of a page again and return the page.

    Raises:
        SystemExit: if a part names what is not there; `where` begins the message.
    """

    def made(match: re.Match[str]) -> str:
        kind, name = match[2], match[3]
        if kind == "script":
            path = ROOT / name
            if not path.is_file():
                raise SystemExit(f"{where}: there is no {name}")
            language = {".py": "python", ".toml": "toml", ".json": "json"}[path.suffix]
            body = f"```{language}\n{path.read_text(encoding='utf-8')}```\n"
        elif kind == "section":
            body = _section(name.replace("-", " "), where)
        elif kind == "table" and name in _TABLES:
            body = _TABLES[name]()
        else:
            raise SystemExit(f"{where}: nothing generates '{kind} {name}'")
        return f"{match[1]}\n{body}\n{match[4]}"

    return _PART.sub(made, text)


def _section(title: str, where: str) -> str:
    """Return a section of the README, with pictures and links relative to docs/."""
    sections = re.split(r"^#+ (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for heading, body in zip(sections[1::2], sections[2::2], strict=True):
        if heading.lower() == title.lower():
            return (
                re.sub(r"\]\((?!http|#)(?:docs/)?", lambda m: "](" if "docs/" in m[0] else "](../", body.strip()) + "\n"
            )
    raise SystemExit(f"{where}: the README has no section {title!r}")
