"""Which figures a set of analyses, assignments and runs has, and what their files are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from esdtool.analysis.document import Analysis, ModuleResult
from esdtool.assignment.document import Assignment
from esdtool.comparison.runs import Run
from esdtool.comparison.trajectory import Trajectory, make_trajectory
from esdtool.errors import UsageError
from esdtool.report.figures.alphas import save_depth, save_difference_map, save_heat_map, save_role_bars
from esdtool.report.figures.decays import decays_of_assignment, decays_of_line, save_decays
from esdtool.report.figures.differences import save_differences
from esdtool.report.figures.esd import save_esd, save_ks_scan
from esdtool.report.figures.style import file_part, make_folder, plain, short_name, subject
from esdtool.report.figures.training import (
    alpha_curves,
    save_alpha_curves,
    save_decay_range,
    save_validation,
    trajectory_curves,
)

KINDS: Final = (
    "esd",
    "ks",
    "heat-map",
    "depth",
    "roles",
    "decay",
    "alpha-steps",
    "decay-steps",
    "loss",
    "perplexity",
    "differences",
)
"""All figures, in the order in which they are made."""

_OF_MODULES = ("esd", "ks")


@dataclass(frozen=True, kw_only=True)
class Material:
    """What is to be drawn."""

    analyses: tuple[Analysis, ...] = ()
    trajectories: tuple[Trajectory, ...] = ()
    assignments: tuple[tuple[str, Assignment], ...] = ()
    """(file, assignment)."""
    runs: tuple[Run, ...] = ()
    modules: tuple[str, ...] = field(default=())
    """Regular expressions: draw the ESDs of these modules, not of the heaviest, the middle and the lightest tail."""


def save_figures(
    material: Material | Sequence[Analysis],
    folder: Path,
    *,
    kinds: Sequence[str] = (),
    suffix: str = "png",
    dpi: int = 150,
) -> list[Path]:
    """Write all figures that the material has.

    Args:
        material: what to draw, or just analyses; several analyses alone are the steps of one training run.
        folder: is made if it is missing.
        kinds: of `KINDS`; empty for all that there is material for.
        suffix: png, svg or pdf.
        dpi: of PNG files.

    Returns:
        The files, in the order written.

    Raises:
        UsageError: if a figure is asked for that the material does not have, or a module that it does not have.
        OutputError: if a file cannot be written.
    """
    if not isinstance(material, Material):
        several = len(material) > 1
        material = Material(analyses=tuple(material), trajectories=(make_trajectory(material),) if several else ())
    make_folder(folder)
    written: list[Path] = []
    for kind in kinds or KINDS:
        # A module's own figures need eigenvalues, which an analysis from a file lacks: an error only if asked for.
        made = list(_MAKERS[kind](material, _Target(folder=folder, suffix=suffix, dpi=dpi)))
        if kinds and not made:
            raise UsageError(f"no figure '{kind}': {_MISSING[kind]}")
        written += made
    if not written:
        raise UsageError("nothing to draw: no module has an alpha")
    return written


def save_comparison(analyses: Sequence[Analysis], folder: Path, *, suffix: str = "png") -> list[Path]:
    """Checkpoints side by side: alpha by role, and of each the heat map of its difference to the first."""
    make_folder(folder)
    target = _Target(folder=folder, suffix=suffix, dpi=150)
    files = [save_role_bars(target.path("roles"), analyses)]
    for name, other in zip(_names([subject(analysis) for analysis in analyses[1:]]), analyses[1:], strict=True):
        files.append(save_difference_map(target.path(f"difference{name}"), analyses[0], other))
    return [path for path in files if path is not None]


def save_run_figures(runs: Sequence[Run], folder: Path, *, suffix: str = "png") -> list[Path]:
    """Runs side by side: loss, perplexity and decays over training; of each run alpha by role, and its last decays."""
    return save_figures(Material(runs=tuple(runs)), folder, suffix=suffix)


@dataclass(frozen=True, kw_only=True)
class _Target:
    folder: Path
    suffix: str
    dpi: int

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.{self.suffix}"


def _names(labels: Sequence[str]) -> list[str]:
    """An ending of a file's name for each of several things: empty for a single one, distinct in any case."""
    if len(labels) == 1:
        return [""]
    parts = [file_part(label) for label in labels]
    return [f"-{part}" if parts.count(part) == 1 else f"-{part}-{index}" for index, part in enumerate(parts, start=1)]


def chosen_modules(analysis: Analysis, patterns: Sequence[str]) -> list[ModuleResult]:
    """Modules that match one of the patterns; without any, those with the heaviest, the median and the lightest tail.

    Raises:
        UsageError: if a pattern is no regular expression, or matches no scored module.
    """
    scored = [module for module in analysis.scored if module.name in analysis.esds]
    if not patterns:
        ranked = sorted(scored, key=lambda module: module.alpha or 0.0)
        places = dict.fromkeys((0, len(ranked) // 2, len(ranked) - 1)) if ranked else {}
        return [ranked[place] for place in places]
    found: dict[str, ModuleResult] = {}
    for pattern in patterns:
        try:
            matches = [module for module in scored if re.search(pattern, module.name)]
        except re.error as error:
            raise UsageError(f"--module {pattern}: not a regular expression: {error}") from error
        if not matches:
            raise UsageError(f"--module {pattern}: matches no scored module of {analysis.source.checkpoint}")
        found |= {module.name: module for module in matches}
    return list(found.values())


Maker = Callable[[Material, _Target], Iterator[Path]]


def _of_modules(kind: str) -> Maker:
    """ESDs and scans go into a folder of their own: there may be hundreds."""
    save = save_esd if kind == "esd" else save_ks_scan

    def make(material: Material, target: _Target) -> Iterator[Path]:
        analyses = [analysis for analysis in material.analyses if analysis.esds]
        for name, analysis in zip(_names([subject(found) for found in analyses]), analyses, strict=True):
            inner = target.folder / f"{kind}{name}"
            for module in chosen_modules(analysis, material.modules):
                make_folder(inner)
                path = inner / f"{file_part(module.name)}.{target.suffix}"
                yield save(path, module, analysis.esds[module.name], subject=subject(analysis), dpi=target.dpi)

    return make


def _of_analyses(name: str, save: Callable[..., Path | None]) -> Maker:
    def make(material: Material, target: _Target) -> Iterator[Path]:
        endings = _names([subject(analysis) for analysis in material.analyses])
        for ending, analysis in zip(endings, material.analyses, strict=True):
            path = save(target.path(name + ending), analysis, dpi=target.dpi)
            if path is not None:
                yield path

    return make


def _roles(material: Material, target: _Target) -> Iterator[Path]:
    if material.analyses and (path := save_role_bars(target.path("roles"), material.analyses, dpi=target.dpi)):
        yield path


def _decays(material: Material, target: _Target) -> Iterator[Path]:
    sources = [
        (
            file,
            decays_of_assignment(found),
            found.base_weight_decay,
            f"Weight decay by layer and role\n{short_name(file)}",
        )
        for file, found in material.assignments
    ]
    for run in material.runs:
        line = next((line for line in reversed(run.decays) if line["modules"]), None)
        # A uniform decay is no picture.
        if line is not None and len({module["weight_decay"] for module in line["modules"].values()}) > 1:
            title = f"Weight decay by layer and role, from step {line['step']}\n{short_name(str(run.path))}"
            base = run.settings["weight_decay.base"]
            sources.append((str(run.path), decays_of_line(line), 0.0 if base is None else base, title))
    endings = _names([short_name(label).removesuffix(".json") for label, *_ in sources])
    for ending, (_, decays, base, title) in zip(endings, sources, strict=True):
        path = save_decays(target.path(f"decay{ending}"), decays, base=base, title=title, dpi=target.dpi)
        if path is not None:
            yield path


def _alpha_steps(material: Material, target: _Target) -> Iterator[Path]:
    found = [(run_label(run), alpha_curves(run), "step") for run in material.runs]
    for trajectory in material.trajectories:
        curves, across = trajectory_curves(trajectory)
        ends = (trajectory.steps[0].checkpoint, trajectory.steps[-1].checkpoint)
        found.append((" to ".join(short_name(end) for end in ends), curves, across))
    found = [item for item in found if item[1]]
    for ending, (label, curves, across) in zip(_names([label for label, *_ in found]), found, strict=True):
        title = f"Mean α by role over training\n{plain(label)}"
        path = save_alpha_curves(
            target.path(f"alpha-steps{ending}"), curves, title=title, across=across, dpi=target.dpi
        )
        if path is not None:
            yield path


def _decay_steps(material: Material, target: _Target) -> Iterator[Path]:
    labels = [run_label(run) for run in material.runs]
    path = save_decay_range(target.path("decay-steps"), material.runs, labels, dpi=target.dpi)
    if path is not None:
        yield path


def _validation(material: Material, target: _Target, what: str) -> Iterator[Path]:
    path = save_validation(target.path(what), material.runs, "loss" if what == "loss" else "perplexity", dpi=target.dpi)
    if path is not None:
        yield path


def _differences(material: Material, target: _Target) -> Iterator[Path]:
    path = save_differences(target.path("differences"), material.runs, dpi=target.dpi) if material.runs else None
    if path is not None:
        yield path


def run_label(run: Run) -> str:
    """The end of a run directory's path."""
    return short_name(str(run.path))


_MAKERS: Final[dict[str, Maker]] = {
    "esd": _of_modules("esd"),
    "ks": _of_modules("ks"),
    "heat-map": _of_analyses("heat-map", save_heat_map),
    "depth": _of_analyses("depth", save_depth),
    "roles": _roles,
    "decay": _decays,
    "alpha-steps": _alpha_steps,
    "decay-steps": _decay_steps,
    "loss": lambda material, target: _validation(material, target, "loss"),
    "perplexity": lambda material, target: _validation(material, target, "perplexity"),
    "differences": _differences,
}

_NO_EIGENVALUES = "it needs the eigenvalues: name a checkpoint, or give --esd FILE with an analysis from a file"
_MISSING: Final[dict[str, str]] = {
    "esd": _NO_EIGENVALUES,
    "ks": _NO_EIGENVALUES,
    "heat-map": "no scored module stands in a numbered block of a checkpoint or analysis",
    "depth": "it needs a checkpoint or analysis with at least two numbered blocks",
    "roles": "it needs a checkpoint or an analysis with a scored module",
    "decay": "it needs a wd.json or a run with module-wise decays, in numbered blocks",
    "alpha-steps": "it needs a run whose policy uses alpha, or several checkpoints of one run",
    "decay-steps": "it needs a run directory with module-wise decays",
    "loss": "it needs a run directory of 'esdtool train'",
    "perplexity": "it needs a run directory of 'esdtool train'",
    "differences": "it needs runs with uniform decay and with another policy, with at least two common seeds",
}
