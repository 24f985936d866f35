"""Plots of runs: loss curves, alpha by role over time, decay by layer and role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esdtool.errors import OutputError
from esdtool.files import atomic_write
from esdtool.modules.names import layer_index
from esdtool.train.compare import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save_plots(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the figures as PNG files; runs without module-wise decays have none of the last two.

    Returns:
        The files, in the order written.

    Raises:
        OutputError: if a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot make the folder: {error.strerror}") from error
    labels = _labels(runs)
    files = [_loss_curves(runs, labels, folder / "loss.png")]
    for run, label in zip(runs, labels, strict=True):
        name = label.replace("/", "-")
        lines = [line for line in run.decays if line["modules"]]
        if any(module["alpha"] is not None for line in lines for module in line["modules"].values()):
            files.append(_alpha_curves(lines, label, folder / f"alpha-{name}.png"))
        if lines and len({module["weight_decay"] for module in lines[-1]["modules"].values()}) > 1:
            files.append(_decay_map(lines[-1], label, folder / f"decay-{name}.png"))
    return files


def _labels(runs: Sequence[Run]) -> list[str]:
    """The folders' own names, or whole paths where those are not distinct."""
    names = [run.path.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path).strip("/") for run in runs]


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure that is saved at the end. No window, no global state: pyplot is not involved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure, figure.add_subplot()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _loss_curves(runs: Sequence[Run], labels: Sequence[str], path: Path) -> Path:
    with _figure(path, 7, 4.5) as (_, axes):
        for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
            colour = f"C{index % 10}"
            train = [line for line in run.metrics if line["split"] == "train" and line["loss"] is not None]
            policy = run.settings["weight_decay.policy"]
            axes.plot(*_xy(train, "loss"), color=colour, alpha=0.35, linewidth=1)
            axes.plot(*_xy(run.validation, "loss"), color=colour, marker=".", label=f"{label} ({policy})")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title("Validation loss (marked) and training loss (pale)")
        axes.legend(fontsize="small")
    return path


def _alpha_curves(lines: Sequence[dict[str, Any]], label: str, path: Path) -> Path:
    means: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in lines:
        values: dict[str, list[float]] = defaultdict(list)
        for name, module in line["modules"].items():
            if module["alpha"] is not None:
                values[_role(name)].append(module["alpha"])
        for role, found in values.items():
            means[role].append((line["step"], sum(found) / len(found)))
    with _figure(path, 7, 4.5) as (_, axes):
        for role, points in means.items():
            axes.plot([step for step, _ in points], [alpha for _, alpha in points], marker=".", label=role)
        axes.set_xlabel("step")
        axes.set_ylabel("mean alpha")
        axes.set_title(f"Alpha by role: {label}")
        axes.legend(fontsize="small")
    return path


def _decay_map(line: dict[str, Any], label: str, path: Path) -> Path:
    import numpy as np

    cells: dict[tuple[int, str], list[float]] = defaultdict(list)
    for name, module in line["modules"].items():
        layer = layer_index(name)
        cells[(-1 if layer is None else layer, _role(name))].append(module["weight_decay"])
    layers = sorted({layer for layer, _ in cells})
    roles = list(dict.fromkeys(role for _, role in cells))
    grid = np.full((len(roles), len(layers)), np.nan)
    for (layer, role), found in cells.items():
        grid[roles.index(role), layers.index(layer)] = sum(found) / len(found)
    with _figure(path, 2.5 + 0.35 * len(layers), 1.5 + 0.35 * len(roles)) as (figure, axes):
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(layers)), ["-" if layer < 0 else str(layer) for layer in layers])
        axes.set_yticks(range(len(roles)), roles)
        axes.set_xlabel("layer")
        axes.set_title(f"Weight decay, step {line['step']}: {label}", fontsize="medium")
        figure.colorbar(image, ax=axes)
    return path


def _role(name: str) -> str:
    """The last part of a module's name that is no number."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def _xy(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [line["step"] for line in lines], [line[key] for line in lines]
