"""How often the 95 % intervals of `--spectrum slq` hold, by kind of spectrum.

    python -m tests.spectra.slq_coverage [--trials 200] [KIND ...]

Each trial draws a spectrum of its kind and fresh probes. The estimate depends on the eigenvalues alone, so that a
diagonal matrix stands for all with these eigenvalues. A spectrum whose estimate is refused is computed exactly in use.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from esdtool.spectra.estimators.hill import hill
from esdtool.spectra.lanczos import block_lanczos
from esdtool.spectra.marchenko_pastur import mp_quantiles
from esdtool.spectra.slq import estimate_from

ORDER = 1600
BUNDLED = Path(__file__).parents[2] / "examples" / "checkpoints" / "stdlib-llama" / "model.safetensors"

Draw = Callable[[np.random.Generator], np.ndarray]


def random_matrix(draw: np.random.Generator) -> np.ndarray:
    columns = int(ORDER * draw.uniform(1, 4))
    return np.linalg.eigvalsh((lambda w: w @ w.T)(draw.standard_normal((ORDER, columns))))


def heavy_tailed(draw: np.random.Generator) -> np.ndarray:
    if draw.random() < 0.5:
        return (1 - draw.random(ORDER)) ** (-1 / draw.uniform(0.5, 2.5))
    return np.exp(draw.uniform(0.3, 2) * draw.standard_normal(ORDER))


def decaying(draw: np.random.Generator) -> np.ndarray:
    return np.arange(1, ORDER + 1) ** -draw.uniform(0.3, 2.0)


def clustered(draw: np.random.Generator) -> np.ndarray:
    clusters, distance = draw.integers(5, 60), draw.uniform(0.1, 0.8)
    return np.exp(distance * (np.floor(draw.random(ORDER) * clusters) + 0.05 * draw.random(ORDER)))


def stepped(draw: np.random.Generator) -> np.ndarray:
    levels = np.sort(draw.uniform(-3, 3, draw.integers(3, 12)))
    return np.exp(draw.choice(levels, ORDER) + draw.uniform(0.001, 0.3) * draw.standard_normal(ORDER))


def low_rank_and_noise(draw: np.random.Generator) -> np.ndarray:
    found = np.array(mp_quantiles(ORDER, int(ORDER * draw.uniform(1, 3))))
    rank = int(ORDER * draw.uniform(0.01, 0.6))
    found[-rank:] += found.mean() * np.exp(draw.uniform(0, 4, rank))
    return found


def real(draw: np.random.Generator) -> np.ndarray:
    """Interpolate the quantiles of a trained matrix's spectrum, with a little jitter."""
    with safe_open(BUNDLED, framework="pt") as file:
        names = [name for name in sorted(file.keys()) if "_proj" in name]
        weight = file.get_tensor(names[draw.integers(len(names))]).double()
    logs = np.log(np.sort(torch.linalg.svdvals(weight).square().numpy()))
    spacing = np.abs(np.diff(logs)).mean()
    inner = np.interp(np.sort(draw.random(ORDER)), np.linspace(0, 1, logs.size), logs)
    return np.exp(inner + 0.3 * spacing * draw.standard_normal(ORDER))


KINDS: dict[str, Draw] = {
    "random": random_matrix,
    "heavy-tailed": heavy_tailed,
    "decaying": decaying,
    "clustered": clustered,
    "stepped": stepped,
    "low rank and noise": low_rank_and_noise,
    "real": real,
}


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What came of several trials."""

    trials: int
    estimates: int
    held: int


def coverage(kind: str, trials: int, *, seed: int = 0) -> Coverage:
    """Estimate alpha of several spectra of a kind, and count the intervals that hold the exact one."""
    draw = np.random.default_rng(seed)
    estimates = held = 0
    for trial in range(trials):
        eigenvalues = np.sort(KINDS[kind](draw))
        diagonal = torch.from_numpy(eigenvalues)[:, None]
        blocks = block_lanczos(lambda q, d=diagonal: (d * q, q.T @ (d * q)), ORDER, seed=seed + trial)
        found = None if blocks is None else estimate_from(blocks, ORDER, float(eigenvalues.sum()))
        if found is not None:
            estimates += 1
            held += found.alpha_ci[0] <= hill(eigenvalues).alpha <= found.alpha_ci[1]
    return Coverage(trials=trials, estimates=estimates, held=held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND")
    parser.add_argument("--trials", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.kinds:
        found = coverage(kind, options.trials)
        share = f"{found.held / found.estimates:.1%} of the intervals hold" if found.estimates else "all refused"
        print(f"{kind:20s} {found.estimates} of {found.trials} estimated, {share}", flush=True)


if __name__ == "__main__":
    main()
