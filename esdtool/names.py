"""Read a parameter's name: its module, its block, and its place in the model's natural order.

Everything here works on names alone; no shape, no configuration.
"""

from __future__ import annotations

import functools
import re

ADAPTER_SHELLS = frozenset({"base_layer", "original_module"})
"""Segments with which PEFT wraps a module that it leaves unchanged."""

BLOCKS = frozenset(
    {
        "layers",
        "layer",
        "h",
        "blocks",
        "block",
        "blk",
        "resblocks",
        "stages",
        "albert_layer_groups",
        "gated_cross_attn_layers",
        "self_attends",
    }
)
"""Names of containers that mean blocks in any model; `esdtool.modules.blocks` finds those of a particular one."""

NUMBERED_BLOCK = re.compile(r"(?:encoder_|decoder_)?(?:layer|block)_(\d+)|encoderblock_(\d+)")
"""Segments that are a block's name and number in one."""

NUMBERED_STAGE = re.compile(r"(\w*(?:layer|block|stage))_?(\d+)")
"""Segments such as torchvision's `layer1` to `layer4`, which are blocks only if their structure repeats."""

Segments = tuple[str, ...]
Block = tuple[int, int]
"""(position in a path of the segment that holds a block's number, the number)."""
SortKey = tuple[tuple[int, tuple[tuple[int, int, str], ...]], ...]


def module_name(parameter: str) -> str:
    """Return the module that owns a parameter: `a.b.weight` -> `a.b`; any other name stays (`a.kernel`)."""
    return parameter.removesuffix(".weight")


@functools.lru_cache(maxsize=65536)
def module_path(parameter: str) -> Segments:
    """Segments of the owning module's name that rules look at: without wrappers and adapter shells.

    >>> module_path("module.layers.0.q_proj.base_layer.weight")
    ('layers', '0', 'q_proj')
    """
    segments = module_name(canonical_name(parameter)).split(".")
    kept: list[str] = []
    skip_next = False
    for segment in segments:
        if skip_next:
            skip_next = False
        elif segment == "modules_to_save":  # followed by the adapter's name
            skip_next = True
        elif segment not in ADAPTER_SHELLS:
            kept.append(segment)
    return tuple(kept) or tuple(segments)


ROOT_PREFIXES = frozenset({"base_model", "model", "transformer", "language_model"})
"""Outer segments in which a model with a head and the model within it differ."""


def without_root(path: Segments) -> Segments:
    """Return a path without its outer prefixes, its last segment aside.

    >>> without_root(("model", "layers", "0")), without_root(("model",))
    (('layers', '0'), ('model',))
    """
    start = 0
    while start < len(path) - 1 and path[start] in ROOT_PREFIXES:
        start += 1
    return path[start:]


def block_by_name(path: Segments) -> Block | None:
    """Find the block's number by the names that mean blocks in any model; None if there is none.

    The outermost numbered container counts: T5's `encoder.block.3.layer.1` is block 3. Where all names of the model are
    at hand, `esdtool.modules.blocks.find_blocks` knows better.
    """
    for position, segment in enumerate(path):
        if position and segment.isdecimal() and path[position - 1] in BLOCKS:
            return position, int(segment)
        numbered = NUMBERED_BLOCK.fullmatch(segment)
        if numbered:
            return position, int(numbered.group(1) or numbered.group(2))
    return None


def layer_index(parameter: str) -> int | None:
    """Find the index of a parameter's block by its name alone, see `block_by_name`; None outside a numbered stack."""
    block = block_by_name(module_path(parameter))
    return None if block is None else block[1]


def place_of_block(path: Segments, layer: int | None) -> int | None:
    """Find where in a module path the number of its block stands; None if it has none.

    >>> place_of_block(("trf_blocks", "1", "ff", "layers", "2"), 1)
    1
    """
    if layer is None:
        return None
    for position, segment in enumerate(path):
        numbered = NUMBERED_BLOCK.fullmatch(segment) or NUMBERED_STAGE.fullmatch(segment)
        digits = numbered[numbered.lastindex or 0] if numbered else segment
        if digits.isdecimal() and int(digits) == layer:
            return position
    return None


_NUMBERED_EXPERT = re.compile(r"(?:expert_)?(\d+)")


def expert_index(parameter: str) -> int | None:
    """Index of the expert that a parameter or module belongs to; None outside a mixture of experts.

    >>> expert_index("model.layers.0.mlp.experts.3.up_proj.weight"), expert_index("model.layers.0.mlp.up_proj.weight")
    (3, None)
    """
    path = module_path(parameter)
    if "experts" not in path:
        return None
    start = path.index("experts") + 1
    numbers = (_NUMBERED_EXPERT.fullmatch(segment) for segment in path[start : start + 2])
    return next((int(number[1]) for number in numbers if number), None)


_FIRST = re.compile(r"shared|wte|wpe|\w*embed\w*|stem|conv_stem|conv\d*|project_in")
_ENCODER = re.compile(r"encoder|vision_model|vision_tower|visual|audio_tower|feature_extractor|feature_projection")
_DECODER = re.compile(r"decoder")
_LAST = re.compile(
    r"norm|\w*_norm|\w*layer_?norm|ln_f|ln_post|pooler|\w*head\w*|classifier|score|cls|predictions|output"
)
_ATTENTION_ROLES = ("q_a_proj", "q_b_proj", "q_proj", "k_proj", "v_proj", "o_proj")
_ROLE_GROUPS = (
    _ATTENTION_ROLES,
    tuple(f"cross_{role}" for role in _ATTENTION_ROLES),
    ("gate_proj", "up_proj", "down_proj"),
)
_PLACE_OF_ROLE = {role: (group, rank) for group, roles in enumerate(_ROLE_GROUPS) for rank, role in enumerate(roles)}
_OTHER_ROLE = (len(_ROLE_GROUPS), 0)
_NO_ROLE = (len(_ROLE_GROUPS) + 1, 0)


def role_rank(role: str) -> tuple[int, int]:
    """Sort key of a role: attention, cross-attention, MLP, then all others alike.

    >>> sorted(["mixer", "down_proj", "o_proj", "q_proj"], key=role_rank)
    ['q_proj', 'o_proj', 'down_proj', 'mixer']
    """
    return _PLACE_OF_ROLE.get(role, _OTHER_ROLE)


def order_key(parameter: str, role: str | None, block: Block | None = None) -> SortKey:
    """Sort key of the model's natural order.

    Outside blocks, segment by segment: embeddings, encoder, the rest, decoder, then norms, poolers
    and heads; numbers compare as numbers. Inside a block: self-attention q, k, v, o, then
    cross-attention, then the MLP gate, up, down, expert after expert, then all other roles;
    tensors without a role (`role=None`) last.

    Args:
        parameter: name of the tensor, or of a module with `.weight`.
        role: the module's role.
        block: the number of its block in `module_path(parameter)`; None finds it by the name alone.
    """
    path = module_path(parameter)
    block = block or block_by_name(path)
    if block is None:
        return (*(_segment_key(segment) for segment in path), (0, ((1, 0, parameter),)))
    position, index = block
    rest = path[position + 1 :]
    numbers = tuple((0, int(segment), "") for segment in rest if segment.isdecimal())
    group, rank = _NO_ROLE if role is None else _PLACE_OF_ROLE.get(role, _OTHER_ROLE)
    return (
        *(_segment_key(segment) for segment in path[:position]),
        (2, ((0, index, ""),)),
        (group, numbers),
        (rank, _natural(".".join(rest))),
        (0, ((1, 0, parameter),)),
    )


@functools.lru_cache(maxsize=4096)
def _segment_key(segment: str) -> tuple[int, tuple[tuple[int, int, str], ...]]:
    """Rank of one segment among its siblings, then its natural order."""
    for rank, pattern in ((4, _LAST), (0, _FIRST), (1, _ENCODER), (3, _DECODER)):
        if pattern.fullmatch(segment.lower()):
            return rank, _natural(segment)
    return 2, _natural(segment)


def _natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """`h10` sorts after `h9`: runs of digits compare as numbers, and before letters."""
    chunks = re.split(r"(\d+)", text)
    return tuple((0, int(chunk), "") if chunk.isdecimal() else (1, 0, chunk) for chunk in chunks if chunk)


_GENERATIONS = (("_g", "original0"), ("_v", "original1"), ("_orig", "original"))
"""How torch's two generations of re-parametrised weights call the parts that are trained."""


def reparametrised_names(parameter: str) -> list[tuple[str, ...]]:
    """List what a parameter may be called, or be computed from, where a model re-parametrises its weights.

    >>> reparametrised_names("conv.weight_g")
    [('conv.parametrizations.weight.original0',)]
    >>> reparametrised_names("conv.weight")[0]
    ('conv.weight_g', 'conv.weight_v')
    """
    stem, dot, leaf = parameter.rpartition(".")
    base, _, module = stem.rpartition("parametrizations.")
    if base.endswith(".") or (not base and stem.startswith("parametrizations.")):
        return [(f"{base}{module}{ending}",) for ending, part in _GENERATIONS if leaf == part]
    for ending, part in _GENERATIONS:
        if leaf.endswith(ending):
            return [(f"{stem}{dot}parametrizations.{leaf.removesuffix(ending)}.{part}",)]
    registered = f"{stem}{dot}parametrizations.{leaf}."
    return [
        (f"{parameter}_g", f"{parameter}_v"),
        (f"{registered}original0", f"{registered}original1"),
        (f"{parameter}_orig",),
        (f"{registered}original",),
    ]


WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Name segments that DataParallel, torch.compile, FSDP1 and activation checkpointing insert."""


@functools.lru_cache(maxsize=65536)
def canonical_name(name: str) -> str:
    """Return a parameter or module name without the segments that wrappers insert, at any depth.

    >>> canonical_name("_orig_mod.module.layers.0._checkpoint_wrapped_module.fc1.weight")
    'layers.0.fc1.weight'

    A name that consists of nothing else is returned as it is.
    """
    kept = [segment for segment in name.split(".") if segment not in WRAPPERS]
    return ".".join(kept) or name
