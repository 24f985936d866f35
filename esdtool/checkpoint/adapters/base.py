"""Share code between the kinds of adapters: the parts of a module in a file, and the update that they make."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from esdtool.checkpoint.adapters.config import AdapterConfig, Scales
from esdtool.checkpoint.base import Checkpoint, TensorInfo
from esdtool.checkpoint.derived import DerivedTensor
from esdtool.errors import CheckpointError
from esdtool.support.words import dimensions

if TYPE_CHECKING:
    from typing import Self


class UnfitError(Exception):
    """Parts of which no update can be made. The message says why; it names no remedy."""


@dataclass(frozen=True, kw_only=True)
class Update(DerivedTensor):
    """The change of one weight, as it is added to it."""

    target: str
    """Name of the weight in the base model."""
    transposed: bool = False
    """Whether the base stores its weight [in, out] (GPT-2's Conv1D, embeddings)."""
    magnitude: str | None = None
    """Stored length of each output, or input, of the merged weight (DoRA)."""
    needs_base: bool = False
    """Whether only the base model tells the shape of the update: alone it is not analysed."""

    @abstractmethod
    def delta(self, source: Checkpoint) -> torch.Tensor:
        """Compute the update [out, in, *kernel], or [stack, out, in], in float64."""

    def read(self, source: Checkpoint) -> torch.Tensor:
        """Compute the update in float32, in the layout of the base weight."""
        return self._in_layout(self.delta(source)).reshape(self.info.shape).float()

    def _in_layout(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.mT if self.transposed else delta

    def merged(self, weight: torch.Tensor, source: Checkpoint) -> torch.Tensor:
        """Apply the update to the base weight: W + dW, and with DoRA the stored lengths of its rows.

        Raises:
            CheckpointError: if the stored lengths do not fit the weight.
        """
        total = weight + self.read(source).to(weight.dtype)
        return total if self.magnitude is None else self._with_length(total, self.magnitude, source)

    def _with_length(self, weight: torch.Tensor, name: str, source: Checkpoint) -> torch.Tensor:
        # DoRA (Liu et al. 2024, arXiv 2402.09353): the direction is W + dW, the length of each output its own. LyCORIS
        # may keep the lengths of the inputs instead, as a row.
        magnitude = source.read(name).to(weight.dtype)
        outputs, inputs = (1, 0) if self.transposed else (0, 1)
        axis = outputs
        if magnitude.ndim >= 2 and magnitude.shape[0] == 1 and magnitude.shape[1] == magnitude.numel():
            axis = inputs if magnitude.shape[1] != weight.shape[outputs] or magnitude.ndim == 2 else outputs
        if magnitude.numel() != weight.shape[axis]:
            raise CheckpointError(
                f"{source.location}: tensor {name!r} has {magnitude.numel()} lengths, but {self.target} has "
                f"{weight.shape[axis]} {'outputs' if axis == outputs else 'inputs'}; it is damaged, or not the base"
            )
        others = [dim for dim in range(weight.ndim) if dim != axis]
        length: torch.Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
        return weight * (magnitude.reshape([-1 if dim == axis else 1 for dim in range(weight.ndim)]) / length)

    def fitted(self, shape: tuple[int, ...]) -> Self | None:
        """Return the update for a base weight of this shape: turned, or with its kernel unfolded; None if none fits."""
        mine = self.info.shape
        if mine == shape:
            return self
        if len(mine) == len(shape) >= 2 and shape == (*mine[:-2], mine[-1], mine[-2]) and self.magnitude is None:
            return replace(self, info=replace(self.info, shape=shape), transposed=not self.transposed)
        if len(shape) > 2 and mine == (shape[0], math.prod(shape[1:])):
            return replace(self, info=replace(self.info, shape=shape))
        return None


@dataclass(frozen=True, kw_only=True)
class FactoredUpdate(Update):
    """An update that is a product of factors: of low rank, if they are slim."""

    @abstractmethod
    def pair(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors, float64: left [out, rank] and right [rank, in, *kernel], or both with a stack in front."""

    def delta(self, source: Checkpoint) -> torch.Tensor:
        """Multiply the factors."""
        return multiply(*self.pair(source))

    def factors(self, source: Checkpoint) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the factors in the layout of the base weight."""
        left, right = self.pair(source)
        return (right.mT, left.mT) if self.transposed else (left, right)


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply factors as `FactoredUpdate.pair` describes them.

    >>> multiply(torch.ones(5, 2), torch.ones(2, 3, 4)).shape, multiply(torch.ones(7, 5, 2), torch.ones(7, 2, 3)).shape
    (torch.Size([5, 3, 4]), torch.Size([7, 5, 3]))
    """
    if left.ndim == 2 and right.ndim > 2:
        return torch.einsum("or,ri...->oi...", left, right)
    return left @ right


@dataclass(kw_only=True)
class Group:
    """The parts of one module's update in a file."""

    module: str
    """Path of the module in the model."""
    stored_module: str
    """Path of the module as the file has it."""
    adapter: str | None
    """Name of the adapter, where names have one."""
    depth: int = 0
    """Wrappers of parameters inside the outermost one (PEFT's `target_parameters`)."""
    embedding: bool = False
    """Whether the factors are an embedding's."""
    parts: dict[str, str] = field(default_factory=dict)
    """Name of the stored tensor of each part."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """The file around a module's parts."""

    checkpoint: Checkpoint
    config: AdapterConfig
    scales: Scales
    shared: Mapping[str, str]
    """Stored tensors that all modules share, by part."""
    groups: tuple[Group, ...]
    """All modules of the adapter, for what follows only from several of them."""
    guessed: set[str] = field(default_factory=set)
    """Modules for which no scale was found; filled while updates are made."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor."""
        return self.checkpoint.tensors[name].shape

    def matrix(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor that must be a matrix, a 1 x 1 kernel aside.

        Raises:
            UnfitError: if it is none, or empty.
        """
        shape = self.shape(name)
        if len(shape) < 2 or set(shape[2:]) - {1} or 0 in shape:
            raise UnfitError(f"{name} is {dimensions(shape) or 'a scalar'}, not a matrix")
        return shape[:2]

    def stored_scale(self, group: Group, rank: int) -> float | None:
        """Return alpha / rank from the file's own `alpha` of the module (kohya, LyCORIS); None if there is none.

        Raises:
            CheckpointError: if it is no finite number.
        """
        name = group.parts.get("alpha")
        if name is None or self.checkpoint.tensors[name].numel != 1:
            return None
        alpha = float(self.checkpoint.read(name).item())
        if not math.isfinite(alpha):
            raise CheckpointError(f"{self.checkpoint.location}: tensor {name!r} is {alpha}, no scale of an update")
        return alpha / rank

    def scale(self, group: Group, rank: int, alpha: float | None) -> float:
        """Return the factor of an update by the file's own alpha, else by the configuration as PEFT reads it, else 1.

        A factor that had to be taken as 1 is noted in `guessed`.

        Args:
            group: the module's parts.
            rank: the rank of its factors.
            alpha: what the configuration says of all modules.
        """
        stored = self.stored_scale(group, rank)
        if stored is not None:
            return stored
        found = self.scales.alpha(group.module, alpha)
        if found is None:
            self.guessed.add(group.module)
            return 1.0
        return found / (math.sqrt(rank) if self.config.use_rslora else rank)

    def info(self, group: Group, shape: tuple[int, ...], *, rank: int | None, weight: str = "weight") -> TensorInfo:
        """Catalogue entry of a module's update; its name is that of the base weight."""
        names = [self.checkpoint.tensors[name].file for name in group.parts.values()]
        return TensorInfo(
            name=f"{group.module}.{weight}",
            shape=shape,
            dtype="float32",
            file=", ".join(dict.fromkeys(names)),
            rank=rank,
            trained=(),
        )


@dataclass(frozen=True, kw_only=True)
class AdapterKind:
    """A kind of adapter whose updates can be computed. Each file of `esdtool.checkpoint.adapters.kinds` defines one."""

    name: str
    """In a user's words, e.g. `LoRA`."""
    endings: Mapping[str, str]
    """Part by the ending of a tensor's name; see `esdtool.checkpoint.adapters.names.Spellings`."""
    claims: Callable[[Group, Context], bool]
    """Whether a module's parts make an update of this kind."""
    build: Callable[[Group, Context], Update]
    """Makes the update; raises `UnfitError` if the parts do not fit each other."""
    precedence: int = 0
    """Kinds that extend another's parts are asked before it: the higher, the earlier."""


def shown(name: str, shape: tuple[int, ...]) -> str:
    """Return a tensor's name and shape for a message."""
    return f"{name} {list(shape)}"
