"""Draw the picture at the top of the README from a real run: `python examples/readme_picture.py`."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

import esdtool
from esdtool.report import terminal

ROOT = Path(__file__).parent.parent
CHECKPOINT = "examples/checkpoints/stdlib-llama"
TARGET = ROOT / "docs" / "images" / "analyze.svg"


def main() -> None:
    console = Console(record=True, width=130, force_terminal=True, file=io.StringIO())
    analysis = esdtool.analyze(ROOT / CHECKPOINT)
    analysis = analysis.model_copy(update={"source": analysis.source.model_copy(update={"checkpoint": CHECKPOINT})})
    terminal.print_analysis(analysis, top=14, console=console)
    svg = console.export_svg(title=f"esdtool analyze {CHECKPOINT} --top 14", unique_id="esdtool")
    # The default theme loads its font from a CDN; a picture in a repository should not.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
