"""Layouts that checkpoints have, with the matrices that their models apply; numpy is the judge of every spectrum.

A case is a state dict in which the model's matrices lie as some library stores them, together with the list of those
matrices. What a case promises of the outcome is only this: every scored spectrum is that of a matrix of the list, or
its module is marked `shape`; and every matrix of the list is scored, or its tensor is listed with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from esdtool.checkpoint import from_state_dict
from esdtool.modules import IdentifiedBy, Selection, WeightModule, select_modules
from esdtool.modules.reading import read_matrices

Array = npt.NDArray[np.float32]
TOLERANCE = 1e-5

PREFIXES = st.sampled_from(
    ["", "module.", "_orig_mod.", "_orig_mod.module.", "model.", "net.", "model.diffusion_model.", "backbone.model."]
)
CONTAINERS = st.sampled_from(["layers", "blocks", "h", "encoder_layers", "trunk", "transformer_blocks", "stack"])


@dataclass(kw_only=True)
class Case:
    """A state dict, and what its model does with it."""

    tensors: dict[str, Array] = field(default_factory=dict)
    applied: list[tuple[str, list[Array]]] = field(default_factory=list)
    """(tensor, the matrices pooled in one spectrum): one entry for each projection that the model applies."""
    config: dict[str, Any] = field(default_factory=dict)
    must_score: set[str] = field(default_factory=set)
    """Tensors whose matrices must all be scored: their family is established."""
    must_skip: set[str] = field(default_factory=set)
    """Tensors that are no matrices of the model."""
    read: set[str] = field(default_factory=set)
    """Tensors that the reader offers: it leaves out what a trainer saves beside a model."""

    def linear(self, name: str, *parts: Array, whole: Array | None = None, sure: bool = True) -> None:
        """Add a tensor that holds the given projections, by default as the only one."""
        self.tensors[name] = parts[0] if whole is None else whole
        self.applied += [(name, [part]) for part in parts]
        if sure:
            self.must_score.add(name)

    def other(self, name: str, value: Array) -> None:
        """Add a tensor that the model multiplies no vector by."""
        self.tensors[name] = value
        self.must_skip.add(name)

    def under(self, prefix: str) -> Case:
        """The same model within another one."""
        return Case(
            tensors={prefix + name: value for name, value in self.tensors.items()},
            applied=[(prefix + name, matrices) for name, matrices in self.applied],
            config=self.config,
            must_score={prefix + name for name in self.must_score},
            must_skip={prefix + name for name in self.must_skip},
        )


class Weights:
    """Random matrices with decaying spectra, no two of which have the same."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> Array:
        values = self._generator.standard_normal(shape) * self._generator.uniform(0.5, 2.0)
        return np.asarray(values, dtype=np.float32)


def spectrum(matrices: Iterable[npt.ArrayLike]) -> npt.NDArray[np.float64]:
    """The pooled singular values, ascending."""
    return np.sort(
        np.concatenate([np.linalg.svd(np.asarray(one, dtype=np.float64), compute_uv=False) for one in matrices])
    )


def same(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> bool:
    """Whether two spectra agree to rounding."""
    return first.shape == second.shape and bool(np.allclose(first, second, rtol=0, atol=TOLERANCE * second[-1]))


def choose(case: Case, **options: Any) -> tuple[Selection, Callable[[WeightModule], npt.NDArray[np.float64]]]:
    """The case's modules, and how to get the spectrum of one of them."""
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in case.tensors.items()}
    checkpoint = from_state_dict(state, config=case.config)

    def spectrum_of(module: WeightModule) -> npt.NDArray[np.float64]:
        return spectrum([matrix.double().numpy() for matrix in read_matrices(checkpoint, module)])

    case.read = set(checkpoint.tensors)
    return select_modules(checkpoint.tensors.values(), config=case.config, **options), spectrum_of


def judge(case: Case, **options: Any) -> Selection:
    """Assert the property of the case, and return what was chosen."""
    selection, spectrum_of = choose(case, **options)
    found = [(module, spectrum_of(module)) for module in selection.modules]
    applied = [(name, spectrum(matrices)) for name, matrices in case.applied]
    for module, values in found:
        assert module.parameter not in case.must_skip, f"{module.name} is no matrix of the model"
        right = any(same(values, other) for _, other in applied)
        assert right or module.identified_by is IdentifiedBy.SHAPE, f"{module.name}: no model applies this matrix"
    listed = {entry.name: entry for entry in selection.skipped}
    assert all(entry.reason for entry in listed.values())
    for name, values in applied:
        if any(same(other, values) for _, other in found):
            continue
        assert name not in case.must_score, f"{name}: a matrix of the model is not scored: {listed.get(name)}"
        marked = [module for module, _ in found if module.parameter == name]
        assert name in listed or marked, f"{name}: neither scored nor listed"
        assert all(module.identified_by is IdentifiedBy.SHAPE for module in marked)
    assert case.read <= {*(module.parameter for module, _ in found), *listed}
    return selection


# How projections lie in one tensor


def side_by_side(parts: Sequence[Array]) -> Array:
    """All rows of the first, then all rows of the second, ..."""
    return np.concatenate(list(parts))


def by_group(parts: Sequence[Array], groups: int) -> Array:
    """Group after group, each with its rows of every part."""
    return np.concatenate(
        [rows for group in range(groups) for part in parts for rows in [np.split(part, groups)[group]]]
    )


def in_turn(parts: Sequence[Array]) -> Array:
    """A row of each in turn."""
    return np.stack(list(parts), axis=1).reshape(-1, parts[0].shape[1])


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of an attention."""

    heads: int
    groups: int
    """Heads of the keys, and of the values."""
    width: int
    """Of a head."""
    hidden: int
    mlp: int

    @property
    def config(self) -> dict[str, Any]:
        """What config.json calls them."""
        return {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.width,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
        }

    def query_key_value(self, weights: Weights) -> tuple[Array, Array, Array]:
        """The three projections."""
        return tuple(weights(count * self.width, self.hidden) for count in (self.heads, self.groups, self.groups))  # type: ignore[return-value]


@st.composite
def sizes(draw: st.DrawFn, *, grouped: bool | None = None) -> Sizes:
    """Sizes of an attention, with grouped queries or not."""
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    shared = draw(st.sampled_from([1, 2, 3])) if grouped is None else draw(st.sampled_from([2, 3])) if grouped else 1
    width = draw(st.sampled_from([4, 6, 8]))
    heads = groups * shared
    return Sizes(heads=heads, groups=groups, width=width, hidden=heads * width, mlp=draw(st.integers(20, 44)))


def attention_block(case: Case, weights: Weights, size: Sizes, where: str, names: Mapping[str, str]) -> None:
    """Add the output projection and an MLP to the block at `where`, under the given names."""
    width = size.heads * size.width
    if "out" in names:
        case.linear(f"{where}{names['out']}.weight", weights(size.hidden, width))
    if "up" in names:
        case.linear(f"{where}{names['up']}.weight", weights(size.mlp, size.hidden))
    if "down" in names:
        case.linear(f"{where}{names['down']}.weight", weights(size.hidden, size.mlp))
