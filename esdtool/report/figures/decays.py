"""The figure of an assignment: weight decay by layer and role, with the alphas it follows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from esdtool.assignment.document import Assignment
from esdtool.modules.blocks import find_blocks
from esdtool.names import role_rank
from esdtool.report.figures.style import BULK, COLOURS, new_figure, plain

_PANELS_ACROSS = 4
_ALPHA = COLOURS[1]


@dataclass(frozen=True, kw_only=True)
class Decay:
    """One parameter's or module's decay."""

    role: str
    layer: int | None
    """Index of the block; None outside a numbered stack."""
    weight_decay: float
    alpha: float | None


def decays_of_assignment(assignment: Assignment) -> list[Decay]:
    """The entries of wd.json."""
    return [
        Decay(
            role=entry.role or last_name(name.removesuffix(".weight")),
            layer=entry.layer,
            weight_decay=entry.weight_decay,
            alpha=entry.alpha,
        )
        for name, entry in assignment.parameters.items()
    ]


def decays_of_line(line: Mapping[str, Any]) -> list[Decay]:
    """The modules of a line of decay.jsonl."""
    # The line holds matrices only, and not their shapes.
    blocks = find_blocks((f"{name}.weight", (2, 2)) for name in line["modules"])
    return [
        Decay(
            role=module.get("role") or last_name(name),
            layer=module.get("layer", blocks.layer(name)),
            weight_decay=module["weight_decay"],
            alpha=module["alpha"],
        )
        for name, module in line["modules"].items()
    ]


def last_name(name: str) -> str:
    """The last part of a module's name that is no number: its role, where a file does not name it.

    >>> last_name("model.layers.0.mlp.up_proj"), last_name("mlp.experts.3")
    ('up_proj', 'experts')
    """
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def save_decays(path: Path, decays: Iterable[Decay], *, base: float, title: str, dpi: int = 150) -> Path | None:
    """Weight decay by layer, a panel a role, with alpha as a line over it; None where no block is numbered.

    Args:
        path: target, .png, .svg or .pdf.
        decays: of all modules; several of one layer and role (experts) are averaged.
        base: the base decay, drawn as a line.
        title: two lines at most.
        dpi: of a PNG.
    """
    cells: dict[str, dict[int, list[Decay]]] = defaultdict(lambda: defaultdict(list))
    for decay in decays:
        if decay.layer is not None:
            cells[decay.role][decay.layer].append(decay)
    if not cells:
        return None
    roles = sorted(cells, key=role_rank)
    across = min(_PANELS_ACROSS, len(roles))
    down = math.ceil(len(roles) / across)
    alphas = [decay.alpha for layers in cells.values() for found in layers.values() for decay in found]
    known = [alpha for alpha in alphas if alpha is not None]
    with new_figure(
        path,
        width=2.0 + 2.1 * across,
        height=1.3 + 1.7 * down,
        dpi=dpi,
        rows=down,
        columns=across,
        sharex=True,
        sharey=True,
    ) as (figure, panels):
        twins = []
        for index, (role, axes) in enumerate(zip(roles, panels, strict=False)):
            twin = _draw_role(axes, cells[role], base)
            axes.set_title(plain(role), fontsize=9)
            if twin is not None:
                twins.append(twin)
                # Only the last panel of a row has the scale of alpha.
                twin.tick_params(labelright=index % across == across - 1 or index == len(roles) - 1)
        _same_scale(twins, known)
        for axes in panels[len(roles) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(roles) - across) : len(roles)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("layer")
        for axes in panels[::across]:
            axes.set_ylabel("weight decay")
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        handles, labels = panels[0].get_legend_handles_labels()
        if twins:
            more, names = twins[0].get_legend_handles_labels()
            handles, labels = [*handles, *more], [*labels, *names]
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return path


def _draw_role(axes: Axes, layers: Mapping[int, Sequence[Decay]], base: float) -> Axes | None:
    """Bars of the decays, and the axes of the alphas; None without any."""
    places = sorted(layers)
    heights = [fmean(decay.weight_decay for decay in layers[layer]) for layer in places]
    axes.bar(places, heights, color="#9CC3E0", edgecolor=COLOURS[0], linewidth=0.5, label="weight decay")
    axes.axhline(base, color=BULK, linestyle="--", linewidth=1, label=f"base decay {base:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    alphas = {
        layer: fmean(values)
        for layer in places
        if (values := [decay.alpha for decay in layers[layer] if decay.alpha is not None])
    }
    if not alphas:
        return None
    twin = axes.twinx()
    twin.grid(visible=False)
    twin.spines["right"].set_visible(True)
    twin.spines["right"].set_color(_ALPHA)
    twin.tick_params(axis="y", colors=_ALPHA)
    twin.plot(
        list(alphas), list(alphas.values()), color=_ALPHA, marker="o", markersize=3, linewidth=1.2, label="α (right)"
    )
    return twin


def _same_scale(twins: Sequence[Axes], alphas: Sequence[float]) -> None:
    if not twins:
        return
    low, high = min(alphas), max(alphas)
    margin = 0.08 * (high - low) or 0.05
    for twin in twins:
        twin.set_ylim(low - margin, high + margin)
