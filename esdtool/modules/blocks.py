"""Find the numbers that count the blocks in the names of a model's tensors.

A name alone does not tell: `trf_blocks.1.ff.layers.2.weight` is of block 1, its `layers` is the Sequential of an MLP.
All names of the model together do: the modules of a block container have one structure, which repeats.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from esdtool.names import BLOCKS, NUMBERED_BLOCK, NUMBERED_STAGE, Block, Segments, module_path

_NEVER = frozenset({"experts", "local_experts", "heads"})
"""Containers whose members work side by side inside one block."""

_DEEPEST = 8
"""Numbers in a name that are looked at: no model nests its blocks deeper, and a hostile name must not cost more."""

_LEAF = ""
"""Relative path of a matrix that is itself a numbered member of its container."""


@dataclass
class _Members:
    """The contents of the numbered modules of one container."""

    name: str
    """Last segment of the container, without number."""
    kinds: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Relative paths of each member's matrices, with every number in them replaced."""
    sizes: Counter[int] = field(default_factory=Counter)
    """Matrices of each member."""
    leaf_shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Shapes of the members that are matrices themselves."""
    is_stage: bool = False
    """Whether the numbers are parts of the members' own names in a way that not only blocks have."""

    @property
    def repeats(self) -> bool:
        """Whether at least two members have one structure of at least two matrices."""
        if self.name in _NEVER:
            return False
        structures = Counter(frozenset(kinds) for index, kinds in self.kinds.items() if self.sizes[index] > 1)
        return any(count > 1 for count in structures.values())

    @property
    def may_be_named(self) -> bool:
        """Whether a name that means blocks may be trusted: an MLP's Sequential holds matrices of differing shapes."""
        composite = any(kinds - {_LEAF} for kinds in self.kinds.values())
        return composite or any(count > 1 for count in self.leaf_shapes.values())


@dataclass(frozen=True)
class BlockIndex:
    """The blocks of one model. Made by `find_blocks`."""

    _containers: frozenset[Segments]

    def find(self, path: Segments) -> Block | None:
        """Find the number of the block in a module path, as `module_path` gives it; None outside the blocks.

        >>> find_blocks([(f"x.{i}.{leaf}.weight", (8, 8)) for i in (0, 1) for leaf in "qk"]).find(("x", "1", "k"))
        (1, 1)
        """
        return next(((at, index) for key, at, index, _ in _numbers(path) if key in self._containers), None)

    def layer(self, parameter: str) -> int | None:
        """Find the index of the block that holds a parameter; None outside the blocks."""
        block = self.find(module_path(parameter))
        return None if block is None else block[1]


def find_blocks(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> BlockIndex:
    """Find the containers that number a model's blocks.

    The block of a tensor is the number in the outermost container on its path that is one of these:

    - its members repeat one structure of two or more matrices at least twice, whatever the container's name
      (`transformer_blocks`, `double_blocks`, `layer_stack`, the stages of a pyramid);
    - its name means blocks (`layers`, `h`, `blk`, ...; `esdtool.names.BLOCKS`), or is that of a container of the first
      kind elsewhere in the model, and its members hold modules: so a model of one block has a block, too.

    The Sequential of an MLP is neither, nor are experts and heads, which work side by side in one block.

    Args:
        tensors: names and shapes of all tensors of the model, in any order.
    """
    containers: dict[Segments, _Members] = {}
    for name, shape in tensors:
        if len(shape) < 2 or min(shape[0], shape[1]) < 2:
            continue  # norms, biases and gains do not make a structure
        path = module_path(name)
        for key, position, index, is_stage in _numbers(path):
            members = containers.get(key)
            if members is None:
                members = containers[key] = _Members(name=key[-1] if key else "", is_stage=is_stage)
            relative = _kind(path[position + 1 :])
            members.kinds[index].add(relative)
            members.sizes[index] += 1
            if relative == _LEAF:
                members.leaf_shapes[shape] += 1
    repeating = {key for key, members in containers.items() if members.repeats}
    names = BLOCKS | {containers[key].name for key in repeating if key}
    named = {
        key
        for key, members in containers.items()
        if members.name not in _NEVER and not members.is_stage and members.name in names and members.may_be_named
    }
    return BlockIndex(frozenset(repeating | named))


def _numbers(path: Segments) -> Iterator[tuple[Segments, int, int, bool]]:
    """List the numbers of a path, from the outermost: (container, position of the number, number, whether a stage)."""
    found = 0
    for position, segment in enumerate(path):
        if found == _DEEPEST:
            return
        if segment.isdecimal():
            found += 1
            yield path[:position], position, int(segment), False
        elif numbered := NUMBERED_BLOCK.fullmatch(segment):
            found += 1
            # The name itself means a block: its container is one of `BLOCKS`, whatever stands before the number.
            yield (*path[:position], "block"), position, int(numbered[1] or numbered[2]), False
        elif stage := NUMBERED_STAGE.fullmatch(segment):
            found += 1
            yield (*path[:position], stage[1]), position, int(stage[2]), True


def _kind(path: Segments) -> str:
    """Name a relative path without the numbers in it, so that stages of different depth are of one structure."""
    return re.sub(r"\d+", "#", ".".join(path))
