"""Write every number of docs/study.md, and its figure, from the recorded runs in examples/study/results.

    python examples/study/page.py

Between `<!-- NAME -->` and `<!-- end -->` on the page stands what the function `block_NAME` of blocks.py or answer.py
returns.
"""

from __future__ import annotations

import re
from pathlib import Path

from answer import block_answer
from blocks import BLOCKS
from figure import draw

PAGE = Path(__file__).resolve().parents[2] / "docs" / "study.md"
FIGURE = PAGE.parent / "images" / "study-differences.png"
WRITERS = BLOCKS | {"answer": block_answer}


def filled(page: str) -> str:
    """The page with every block written again."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{WRITERS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (?!end)(\w+) -->\n(?:.*?\n)??<!-- end -->", replace, page, flags=re.DOTALL)


def main() -> None:
    """Write the page and the figure."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(FIGURE)


if __name__ == "__main__":
    main()
