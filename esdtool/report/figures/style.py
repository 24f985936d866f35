"""One look for all figures: colours that the colour-blind can tell, line styles that survive a grey printer."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Final

from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from esdtool.analysis.document import Analysis
from esdtool.errors import OutputError, UsageError
from esdtool.names import role_rank
from esdtool.support.files import atomic_write

FORMATS: Final = ("png", "svg", "pdf")

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette without yellow, which white paper swallows."""
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
LINES: Final = ("-", "--", "-.", ":")
_SMALLEST_TITLE: Final = 7.0
"""Points; smaller letters are not read."""
BULK: Final = "#8C8C8C"
"""The untrained null, in every figure."""
COLOUR_MAP: Final = "cividis"
DIVERGING_MAP: Final = "PuOr"

_STYLE: Final[Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "esdtool",  # the same figure gives the same file
    "pdf.fonttype": 42,
}


@contextmanager
def new_figure(
    path: Path, *, width: float, height: float, dpi: int = 150, rows: int = 1, columns: int = 1, **grid: Any
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure in the house style, saved at the end. No window and no global state: pyplot is not involved.

    Args:
        path: target; its suffix is the format.
        width: inches.
        height: inches.
        dpi: pixels per inch of a PNG.
        rows: rows of axes.
        columns: columns of axes.
        grid: for `Figure.subplots`.

    Raises:
        UsageError: if the suffix is none of `FORMATS`.
        OutputError: if the file cannot be written.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise UsageError(f"{path}: figures are {', '.join(FORMATS)}, not '{kind}'")
    # What would otherwise put the time of day into the file.
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **grid)
        yield figure, list(axes.flat)
        with atomic_write(path) as temporary, warnings.catch_warnings():
            # A checkpoint's name may hold characters that the font lacks; a box stands for them.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(temporary, format=kind, dpi=dpi, metadata=undated)


def make_folder(folder: Path) -> None:
    """Make the folder for figures.

    Raises:
        OutputError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot make the folder: {error.strerror}") from error


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: no formula between dollars, no control characters.

    >>> plain("a$b$\\n")
    'a\\\\$b\\\\$'
    """
    return re.sub(r"[^\S ]|[\x00-\x1f\x7f]", "", text).replace("$", r"\$")


def short_name(checkpoint: str) -> str:
    """The end of a path that still tells checkpoints apart: at most its last two parts.

    >>> short_name("/data/models/run/step_100/"), short_name("org/name@main"), short_name("model.safetensors")
    ('run/step_100', 'org/name@main', 'model.safetensors')
    """
    parts = [part for part in PurePath(checkpoint).parts if part != "/"]
    return plain("/".join(parts[-2:]) or checkpoint)


def subject(analysis: Analysis) -> str:
    """Name what was analysed, for a title."""
    source = analysis.source
    name = short_name(source.checkpoint)
    return name if source.base is None else f"{name} minus {short_name(source.base)}"


def role_styles(roles: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each role, in the order of a transformer block: a role looks the same in all figures.

    >>> styles = role_styles(["down_proj", "q_proj"])
    >>> list(styles), styles["q_proj"] == role_styles(["q_proj"])["q_proj"]
    (['q_proj', 'down_proj'], True)
    """
    ordered = sorted(dict.fromkeys(roles), key=role_rank)
    others = (index for index in range(len(_FIXED), len(_FIXED) + len(ordered)))
    places = {role: _FIXED.index(role) if role in _FIXED else next(others) for role in ordered}
    return {role: nth_style(place) for role, place in places.items()}


_FIXED: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def nth_style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the n-th curve; 28 differ."""
    size = len(COLOURS)
    return {
        "color": COLOURS[index % size],
        "marker": MARKERS[index % size],
        "linestyle": LINES[index // size % len(LINES)],
    }


def set_title(axes: Axes, text: str) -> None:
    """A title that stays within the figure: a long line in smaller letters, a longer one without its middle."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    # Points right of the axes' left end. A letter of this font is at most some 0.64 times as wide as it is high.
    width = 72 * (figure.get_figwidth() - 1.0)
    lines = [_fitting(line, int(width / (0.64 * _SMALLEST_TITLE))) for line in text.splitlines()]
    longest = max(map(len, lines))
    axes.set_title("\n".join(lines), fontsize=max(_SMALLEST_TITLE, min(10.0, width / (0.64 * longest))))


def _fitting(line: str, most: int) -> str:
    r"""Leave out the middle of a line, and nothing of an escaped sign.

    >>> _fitting("a/model/of/many/words", 11), _fitting("short", 11), _fitting(r"aaaaa\$b", 6)
    ('a/mod…words', 'short', 'aa…b')
    """
    if len(line) <= most:
        return line
    kept = (most - 1) // 2
    return f"{line[:kept].removesuffix(chr(92))}…{line[-kept:].removeprefix('$')}"


def legend_beside(figure: Figure, axes: Axes) -> None:
    """A legend of short names beside the axes, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", ncols=math.ceil(len(labels) / 24))


def legend_below(figure: Figure, axes: Axes) -> None:
    """A legend of long names below the axes."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max((len(label) for label in labels), default=1)
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 14 / (longest + 8))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
