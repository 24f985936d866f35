"""Show the figures of `esdtool plot` within a page, as vector pictures."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from esdtool.report.html.markup import Html, tag

if TYPE_CHECKING:
    from esdtool.report.figures.kind import Material


def pictures_of(material: Material) -> dict[str, tuple[str, list[Html]]]:
    """Draw all figures that the material has: (heading, pictures) by the name of their kind."""
    from esdtool.report.figures.collect import draw_figures
    from esdtool.report.figures.kind import FigureTarget

    found: dict[str, tuple[str, list[Html]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for figure in draw_figures(material, FigureTarget(folder=Path(folder), suffix="svg")):
            heading, pictures = found.setdefault(figure.name, (figure.kind.heading or figure.kind.summary, []))
            pictures.append(_picture(figure.path.read_bytes(), f"{heading}: {figure.path.stem}"))
    return found


def _picture(content: bytes, words: str) -> Html:
    address = f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
    return tag("img", src=address, alt=words, class_="curves")
