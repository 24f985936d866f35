"""Figures of a whole checkpoint: alpha by layer and role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.ticker import MaxNLocator

from esdtool.analysis.document import Analysis
from esdtool.analysis.module_record import ModuleResult
from esdtool.names import role_rank
from esdtool.report.figures.style import (
    COLOUR_MAP,
    DIVERGING_MAP,
    legend_below,
    legend_beside,
    new_figure,
    nth_style,
    plain,
    role_styles,
    set_title,
    subject,
)

Grid = npt.NDArray[np.float64]

_MOST_NUMBERS = 600
"""Cells of a heat map that still hold a readable number."""

_MOST_NUMBERED = 33
"""Layers whose cells do; a figure with more is wider than a page."""

_MARKED = 40
"""Layers up to which each module has a mark of its own in a figure by depth."""


def alpha_grid(analysis: Analysis) -> tuple[list[int], list[str], Grid]:
    """Mean alpha by layer and role.

    Returns:
        (layers ascending, roles in the order of a block, [roles, layers] float64 with NaN where there is no module).
    """
    return _grid(analysis, lambda module: module.alpha)


def distance_grid(analysis: Analysis) -> Grid | None:
    """Mean distance from random, in percent, in the cells of `alpha_grid`; None where that of a module is not known."""
    layered = [module for module in analysis.scored if module.layer is not None and module.alpha is not None]
    if any(module.null_distance is None for module in layered):
        return None
    return 100 * _grid(analysis, lambda module: module.null_distance)[2]


def _grid(analysis: Analysis, number: Callable[[ModuleResult], float | None]) -> tuple[list[int], list[str], Grid]:
    values: dict[tuple[str, int], list[float]] = defaultdict(list)
    for module in analysis.scored:
        value = number(module)
        if module.layer is not None and module.alpha is not None and value is not None:
            values[module.role, module.layer].append(value)
    layers = sorted({layer for _, layer in values})
    roles = sorted(dict.fromkeys(role for role, _ in values), key=role_rank)
    grid = np.full((len(roles), len(layers)), np.nan)
    for (role, layer), found in values.items():
        grid[roles.index(role), layers.index(layer)] = fmean(found)
    return layers, roles, grid


def save_heat_map(path: Path, analysis: Analysis, *, dpi: int = 150) -> Path | None:
    """Heat map of alpha, role by layer. None, and no file, where no module stands in a numbered block."""
    layers, roles, grid = alpha_grid(analysis)
    if not layers:
        return None
    title = f"{_alpha_name(analysis)} by layer and role\n{subject(analysis)}"
    # Alphas compare across shapes only with their nulls in mind; distances from random do as they are.
    shades = distance_grid(analysis)
    label = "α (smaller: heavier tail)" if shades is None else "distance from random (%)"
    return _heat_map(path, layers, roles, grid, shades=shades, title=title, label=label, dpi=dpi)


def save_difference_map(path: Path, first: Analysis, second: Analysis, *, dpi: int = 150) -> Path | None:
    """Heat map of the second checkpoint's alphas minus the first's; None where they share no cell."""
    layers, roles, grid = alpha_grid(first)
    other_layers, other_roles, other = alpha_grid(second)
    change = np.full_like(grid, np.nan)
    for row, role in enumerate(roles):
        for column, layer in enumerate(layers):
            if role in other_roles and layer in other_layers:
                there = other[other_roles.index(role), other_layers.index(layer)]
                change[row, column] = there - grid[row, column]
    if not np.isfinite(change).any():
        return None
    title = f"Change of {_alpha_name(first)}: {subject(second)}\nminus {subject(first)}"
    return _heat_map(path, layers, roles, change, title=title, label="difference of α", dpi=dpi, diverging=True)


def _heat_map(
    path: Path,
    layers: Sequence[int],
    roles: Sequence[str],
    grid: Grid,
    *,
    title: str,
    label: str,
    dpi: int,
    shades: Grid | None = None,
    diverging: bool = False,
) -> Path:
    """Colour the cells by `shades`, or else by the numbers in them."""
    coloured = grid if shades is None else shades
    colours = colormaps[DIVERGING_MAP if diverging else COLOUR_MAP].with_extremes(bad="#F2F2F2")
    norm = _norm(coloured, diverging=diverging)
    numbers = len(layers) <= _MOST_NUMBERED and grid.size <= _MOST_NUMBERS
    # A figure that is wider is shown smaller, and its letters with it.
    width = min(2.6 + len(layers) * (0.42 if numbers else 0.12), 16.5 if numbers else 11.0)
    with new_figure(path, width=max(width, 5.0), height=1.4 + 0.3 * len(roles), dpi=dpi) as (figure, (axes,)):
        image = axes.imshow(coloured, aspect="auto", cmap=colours, norm=norm)
        axes.grid(visible=False)
        step = 1 if numbers else _label_step(len(layers))
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.set_yticks(range(len(roles)), [plain(role) for role in roles])
        axes.set_xlabel("layer")
        set_title(axes, title)
        if numbers:
            _write_numbers(axes, grid, colours(norm(coloured)), signed=diverging)
        figure.colorbar(image, ax=axes, label=label, pad=0.02)
    return path


def _norm(grid: Grid, *, diverging: bool) -> Normalize:
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    if not diverging:
        return Normalize(low, high if high > low else low + 1e-6)
    reach = max(abs(low), abs(high)) or 1e-6
    return TwoSlopeNorm(0.0, -reach, reach)


def _label_step(layers: int) -> int:
    """Return a round step between labels of layers that are told apart.

    >>> [_label_step(layers) for layers in (20, 48, 100, 150)]
    [1, 2, 5, 10]
    """
    return next((step for step in (1, 2, 5, 10, 20, 50) if layers / step <= 24), 100)


def _write_numbers(axes: Axes, grid: Grid, colours: Grid, *, signed: bool) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if np.isnan(value):
            continue
        red, green, blue, *_ = colours[row, column]
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
        text = f"{value:+.2f}" if signed else f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def save_depth(path: Path, analysis: Analysis, *, dpi: int = 150) -> Path | None:
    """Alpha by depth, one line a role; None with fewer than two layers."""
    layers, roles, grid = alpha_grid(analysis)
    if len(layers) < 2:
        return None
    styles = role_styles(roles)
    many = len(layers) > _MARKED
    with new_figure(path, width=11.0 if many else 7.2, height=4.6 if many else 4.0, dpi=dpi) as (figure, (axes,)):
        for role, values in zip(roles, grid, strict=True):
            there = np.isfinite(values)
            # Among many layers a mark each would hide the lines: one in ten still tells the roles apart.
            sparse = {"markevery": (roles.index(role), 10), "linewidth": 0.9} if many else {}
            axes.plot(np.array(layers)[there], values[there], label=plain(role), **styles[role] | sparse)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("α (smaller: heavier tail)")
        set_title(axes, f"{_alpha_name(analysis)} by depth\n{subject(analysis)}")
        legend_beside(figure, axes)
    return path


def save_role_bars(path: Path, analyses: Sequence[Analysis], *, dpi: int = 150) -> Path | None:
    """Mean alpha by role, bars of several checkpoints side by side (AlphaDecay, figure 1); None without an alpha.

    Whiskers are the standard deviation over the modules, and a grey tick the untrained null.
    """
    roles = sorted(dict.fromkeys(row.role for analysis in analyses for row in analysis.summary.by_role), key=role_rank)
    if not roles:
        return None
    width = 0.8 / len(analyses)
    inches = min(max(4.8, 1.6 + len(roles) * (0.35 + 0.28 * len(analyses))), 16.0)
    with new_figure(path, width=inches, height=3.8, dpi=dpi) as (figure, (axes,)):
        for index, analysis in enumerate(analyses):
            rows = {row.role: row for row in analysis.summary.by_role}
            places = [roles.index(role) + (index - (len(analyses) - 1) / 2) * width for role in rows]
            axes.bar(
                places,
                [row.mean_alpha for row in rows.values()],
                0.92 * width,
                yerr=[row.std_alpha for row in rows.values()],
                error_kw={"elinewidth": 0.8, "capsize": 2},
                color=nth_style(index)["color"],
                alpha=0.85,
                label=subject(analysis) if len(analyses) > 1 else "mean and standard deviation over the modules",
            )
            _draw_nulls(axes, places, [row.mean_mp_alpha for row in rows.values()], width, named=index == 0)
        axes.set_xticks(range(len(roles)), [plain(role) for role in roles], rotation=30 if len(roles) > 8 else 0)
        axes.grid(visible=False, axis="x")
        low = min(row.mean_alpha - row.std_alpha for analysis in analyses for row in analysis.summary.by_role)
        # An alpha is above 1 by definition: bars start there, unless that would hide all differences.
        axes.set_ylim(bottom=1.0 if low < 3 else 0.0)
        axes.set_ylabel("mean α (smaller: heavier tail)")
        one = f"\n{subject(analyses[0])}" if len(analyses) == 1 else ""
        set_title(axes, f"{_alpha_name(analyses[0])} by role{one}")
        legend_below(figure, axes)
    return path


def _draw_nulls(
    axes: Axes, places: Sequence[float], nulls: Sequence[float | None], width: float, *, named: bool
) -> None:
    known = [(place, null) for place, null in zip(places, nulls, strict=True) if null is not None]
    if not known:
        return
    axes.hlines(
        [null for _, null in known],
        [place - width / 2 for place, _ in known],
        [place + width / 2 for place, _ in known],
        color="#555555",
        linewidth=1.6,
        label="untrained null" if named else "_",
    )


def _alpha_name(analysis: Analysis) -> str:
    return f"α ({analysis.settings.fit[0]})"
