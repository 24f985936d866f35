"""Show the figures of `esdtool plot` within a page, as vector pictures."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from esdtool.report.html.markup import Html, tag

if TYPE_CHECKING:
    from esdtool.report.figures.kind import Material


def pictures_of(material: Material, *, leave_out: Collection[str] = ()) -> dict[str, tuple[str, list[Html]]]:
    """Draw all figures that the material has: (heading, pictures) by the name of their kind.

    Args:
        material: what to draw.
        leave_out: kinds that the page shows in another way.
    """
    from esdtool.report.figures.kind import FigureTarget
    from esdtool.report.figures.kinds import FIGURES

    found: dict[str, tuple[str, list[Html]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        target = FigureTarget(folder=Path(folder), suffix="svg")
        for name, kind in FIGURES.items():
            if name in leave_out:
                continue
            heading = kind.heading or kind.summary
            for path in kind.draw(material, target):
                if path is not None:
                    picture = _picture(path.read_bytes(), f"{heading}: {path.stem}")
                    found.setdefault(name, (heading, []))[1].append(picture)
    return found


def _picture(content: bytes, words: str) -> Html:
    address = f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
    return tag("img", src=address, alt=words, class_="curves")
