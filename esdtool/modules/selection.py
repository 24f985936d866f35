"""From a checkpoint's tensors to the modules that are scored, and the list of those that are not."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from esdtool.checkpoint.base import TensorInfo
from esdtool.errors import UsageError
from esdtool.modules.base import Selection, WeightModule
from esdtool.modules.blocks import BlockIndex, find_blocks
from esdtool.modules.classify import Classifier, Identified, is_weight, leaf_role
from esdtool.modules.consult import consult
from esdtool.modules.identification import PERHAPS_SEVERAL, IdentifiedBy
from esdtool.modules.layouts import UnknownLayoutError
from esdtool.modules.model_code import ParameterKinds
from esdtool.modules.patterns import compile_patterns
from esdtool.modules.rules import Fused, Score, Skip, Stacked, Verdict
from esdtool.modules.skipped import SkipKind, SkippedTensor, SkipReason
from esdtool.modules.split import Piece
from esdtool.modules.splitting import SplitRequest, as_requests
from esdtool.names import WRAPPERS, expert_index, module_name, module_path, order_key
from esdtool.support.words import dimensions


def select_modules(
    tensors: Iterable[TensorInfo],
    *,
    config: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    split_fused: bool = True,
    split: Sequence[str | SplitRequest] = (),
    kinds: Callable[[], ParameterKinds] | None = None,
    prefix: str = "--",
) -> Selection:
    """Sort every tensor of a checkpoint into modules to score and tensors to skip, with reasons.

    Scored by default: matrices and convolution kernels of floating-point numbers, except
    embeddings, position tables, output heads and routers. A tensor that holds several projections, or
    the projections of several experts, is as many modules. The tables that decide are
    `esdtool.modules.general` and `esdtool.modules.families`.

    Args:
        tensors: all tensors of the checkpoint, in any order. The result does not depend on the order.
        config: the model's config.json, if any: which family tables hold, and the sizes of fused projections.
        include: regular expressions, searched in the names of parameters and of modules. If any is given,
            exactly the matching modules are scored - also tensors that the tables leave out, such as
            embeddings, under the role of their own last name. Matching tensors that hold no float matrix
            (biases, quantised codes, ...) stay out with their reason.
        exclude: regular expressions, searched in the same names; matching modules are not scored. It
            prevails over `include`.
        split_fused: False keeps fused projections in one module. Stacked experts are told apart all the same.
        split: how tensors are cut that the tables know nothing of, as `REGEX=LAYOUT` or as requests
            (`esdtool.modules.splitting`). It prevails over the tables.
        kinds: gives what the model's own code says of its parameters (`esdtool.modules.model_code`); asked only where
            names and shapes leave a doubt.
        prefix: what stands before `include` and `exclude` in messages; nothing for a caller from Python.

    Returns:
        Every tensor, as one module or several, or skipped; both parts in the model's natural order. A part of a
        tensor that include or exclude leaves out is listed under its module's name.

    Raises:
        UsageError: if an expression is no regular expression, matches no name, or (`include`, `split`)
            matches only tensors that cannot be scored or cut so.
        ValueError: if two tensors have the same name.

    Example:
        >>> info = TensorInfo(name="layers.3.mlp.fc1.weight", shape=(64, 16), dtype="float32", file="")
        >>> [(m.name, m.role, m.layer) for m in select_modules([info]).modules]
        [('layers.3.mlp.fc1', 'up_proj', 3)]
    """
    catalogue = list(tensors)
    names = sorted(tensor.name for tensor in catalogue)
    for name, following in itertools.pairwise(names):
        if name == following:
            raise ValueError(f"two tensors are named {name!r}")
    classifier = Classifier(catalogue, config)
    decisions = {tensor.name: classifier.identify(tensor) for tensor in catalogue}
    if kinds is not None:
        decisions = consult(decisions, {tensor.name: tensor for tensor in catalogue}, kinds)
    requests = _requested(catalogue, decisions, as_requests(split))
    found = _parts(catalogue, decisions, requests, classifier, split_fused=split_fused)
    if include or exclude:
        both = sorted({name for part in found for name in part.names})
        includes = compile_patterns(include, both, option=f"{prefix}include", what="tensor name")
        excludes = compile_patterns(exclude, both, option=f"{prefix}exclude", what="tensor name")
        if includes:
            found = _restrict(found, includes, option=f"{prefix}include")
        found = [_without(part, excludes, option=f"{prefix}exclude") for part in found]
    return _selection(
        found,
        find_blocks((tensor.name, tensor.shape) for tensor in catalogue),
        {name: decision.rule for name, decision in decisions.items()},
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A tensor, or a part of one, and what becomes of it."""

    tensor: TensorInfo
    verdict: Score | Skip
    piece: Piece | None = None
    name: str
    """Name of the module."""
    by: IdentifiedBy
    note: str | None = None

    @property
    def names(self) -> tuple[str, str]:
        """What the user's expressions are searched in."""
        return self.tensor.name, self.name

    def matches(self, pattern: re.Pattern[str]) -> bool:
        """Return whether an expression means this part."""
        return any(pattern.search(name) for name in self.names)


def _requested(
    catalogue: Sequence[TensorInfo], decisions: dict[str, Identified], requests: Sequence[SplitRequest]
) -> dict[str, SplitRequest]:
    """The user's request for each tensor that it concerns; the decisions are changed accordingly.

    Biases and the like that an expression matches as well are no matter; each must match a matrix.
    """
    names = sorted({name for tensor in catalogue for name in (tensor.name, module_name(tensor.name))})
    concerned: dict[str, SplitRequest] = {}
    for request in requests:
        (pattern,) = compile_patterns([request.pattern], names, option="--split", what="tensor name")
        matching = [tensor for tensor in catalogue if pattern.search(tensor.name)]
        able = [tensor for tensor in matching if _can_be_cut(tensor, decisions[tensor.name].verdict)]
        if not able:
            first = matching[0]
            reason = decisions[first.name].verdict
            why = reason.reason.words if isinstance(reason, Skip) else f"shape {dimensions(first.shape)}"
            raise UsageError(f"--split {request.words!r} matches no matrix; {first.name}: {why}")
        for tensor in able:
            concerned.setdefault(tensor.name, request)
    for name, request in concerned.items():
        stacked = isinstance(decisions[name].verdict, Stacked)
        parts, layout = request.how.parts, request.how.layout
        verdict: Verdict = Stacked(parts=parts, layout=layout) if stacked else Fused(parts=parts, layout=layout)
        decisions[name] = Identified(verdict=verdict, by=IdentifiedBy.FAMILY, rule=f"--split {request.words}")
    return concerned


def _can_be_cut(tensor: TensorInfo, verdict: Verdict) -> bool:
    if isinstance(verdict, Skip) and not verdict.forceable:
        return False
    return len(tensor.shape) == 2 or isinstance(verdict, Stacked)


def _parts(
    catalogue: Sequence[TensorInfo],
    decisions: Mapping[str, Identified],
    requests: Mapping[str, SplitRequest],
    classifier: Classifier,
    *,
    split_fused: bool,
) -> list[_Part]:
    """Every tensor, those of several modules cut into them."""
    parts: list[_Part] = []
    cut: list[tuple[TensorInfo, list[Piece]]] = []
    for tensor in catalogue:
        decision, request = decisions[tensor.name], requests.get(tensor.name)
        verdict, note = decision.verdict, decision.note
        whole = not split_fused and request is None
        if isinstance(verdict, Fused) and whole and len(tensor.shape) == 2:
            verdict, note = Score(role=leaf_role(tensor)), PERHAPS_SEVERAL
        if isinstance(verdict, Fused | Stacked):
            try:
                cut.append((tensor, classifier.pieces(tensor, verdict, whole_experts=whole)))
            except UnknownLayoutError as problem:
                if request is not None:
                    raise UsageError(f"--split {request.words!r}: {tensor.name}: {problem}") from problem
                words = f"{verdict.reason}; {problem}: {_remedy(problem, verdict)}"
                verdict = Skip(reason=SkipReason(kind=SkipKind.SEVERAL_MATRICES, words=words))
            else:
                continue
        parts.append(_Part(tensor=tensor, verdict=verdict, name=module_name(tensor.name), by=decision.by, note=note))
    taken = Counter(".".join(module_path(tensor.name)) for tensor in catalogue)
    taken.update(piece.name for _, pieces in cut for piece in pieces)
    for tensor, pieces in cut:
        # All parts of a tensor are named alike: by the parent, or below the tensor's own name.
        alone = all(taken[piece.name] == 1 for piece in pieces)
        parts += [
            _Part(
                tensor=tensor,
                verdict=Score(role=piece.role),
                piece=piece,
                name=_outer_wrappers(tensor) + (piece.name if alone else piece.qualified_name),
                by=decisions[tensor.name].by,
            )
            for piece in pieces
        ]
    return parts


def _outer_wrappers(tensor: TensorInfo) -> str:
    """The wrappers' segments at the front of a name (`module.`), which modules that are stored alone keep, too."""
    outer = itertools.takewhile(lambda segment: segment in WRAPPERS, tensor.name.split("."))
    return "".join(f"{segment}." for segment in outer)


def _remedy(problem: UnknownLayoutError, verdict: Fused | Stacked) -> str:
    """Tell the user what to do about a tensor that cannot be cut."""
    config = ["put config.json beside the file"] if problem.config_would_tell else []
    whole = ["keep it whole (--no-split-fused)"] if isinstance(verdict, Fused) else []
    return ", or ".join(["say how it is split (--split)", *config, *whole])


def _restrict(parts: Sequence[_Part], includes: Sequence[re.Pattern[str]], *, option: str) -> list[_Part]:
    """The parts under `include`: matching ones are scored if they can be, all others are out."""
    restricted = []
    for part in parts:
        if not any(part.matches(pattern) for pattern in includes):
            restricted.append(replace(part, verdict=_not_chosen(f"not matched by {option}")))
        elif isinstance(part.verdict, Score) or not _can_be_forced(part.tensor, part.verdict):
            restricted.append(part)
        else:
            restricted.append(replace(part, verdict=Score(role=leaf_role(part.tensor))))
    for pattern in includes:
        matching = sorted((part for part in restricted if part.matches(pattern)), key=lambda part: part.names)
        first = matching[0].verdict
        if isinstance(first, Skip) and not any(isinstance(part.verdict, Score) for part in matching):
            raise UsageError(
                f"{option} {pattern.pattern!r} matches no tensor that can be scored; "
                f"{matching[0].tensor.name}: {first.reason.words}"
            )
    return restricted


def _can_be_forced(tensor: TensorInfo, verdict: Skip) -> bool:
    """Return whether the tensor is one float matrix or convolution, whatever it is for."""
    return verdict.forceable and (len(tensor.shape) == 2 or is_weight(tensor.name))


def _without(part: _Part, excludes: Sequence[re.Pattern[str]], *, option: str) -> _Part:
    """The part under `exclude`."""
    if isinstance(part.verdict, Score):
        for pattern in excludes:
            if part.matches(pattern):
                return replace(part, verdict=_not_chosen(f"excluded by {option} {pattern.pattern!r}"))
    return part


def _not_chosen(words: str) -> Skip:
    return Skip(reason=SkipReason(kind=SkipKind.NOT_CHOSEN, words=words))


def _selection(parts: Sequence[_Part], blocks: BlockIndex, rules: Mapping[str, str]) -> Selection:
    """Modules and skipped tensors in natural order."""
    embeddings = {
        part.tensor.shape: part.tensor.name
        for part in sorted(parts, key=lambda part: part.tensor.name, reverse=True)
        if isinstance(part.verdict, Skip) and part.verdict.reason.kind is SkipKind.TOKEN_EMBEDDING
    }
    modules: list[tuple[Any, WeightModule]] = []
    skipped: list[tuple[Any, SkippedTensor]] = []
    for position, part in enumerate(_joined(parts)):
        tensor = part.tensor
        if isinstance(part.verdict, Score):
            block = blocks.find(module_path(f"{part.name}.weight"))
            key = order_key(f"{part.name}.weight", part.verdict.role, block)
            module = _module(part, part.verdict, layer=None if block is None else block[1])
            modules.append(((key, tensor.name, position), module))
            continue
        kind, words = part.verdict.reason.kind, part.verdict.reason.words
        if kind is SkipKind.OUTPUT_HEAD and tensor.shape in embeddings:
            words = f"{words}; same shape as {embeddings[tensor.shape]}, perhaps a tied copy"
        name = tensor.name if part.piece is None else part.name
        shape = tensor.shape if part.piece is None else part.piece.view.shape(tensor.shape)
        entry = SkippedTensor(
            name=name,
            shape=shape,
            dtype=tensor.storage,
            kind=kind,
            reason=words,
            parameter=None if part.piece is None else tensor.name,
        )
        key = order_key(name, None, blocks.find(module_path(name)))
        skipped.append(((key, tensor.name, position), entry))
    return Selection(
        modules=tuple(module for _, module in sorted(modules, key=lambda pair: pair[0])),
        skipped=tuple(entry for _, entry in sorted(skipped, key=lambda pair: pair[0])),
        rules=rules,
    )


def _joined(parts: Sequence[_Part]) -> list[_Part]:
    """The parts; a tensor of which all are left out for one reason is a whole again."""
    verdicts: dict[str, set[Score | Skip]] = defaultdict(set)
    for part in parts:
        verdicts[part.tensor.name].add(part.verdict)
    joined: dict[object, _Part] = {}
    for position, part in enumerate(parts):
        if part.piece is not None and len(verdicts[part.tensor.name]) == 1 and isinstance(part.verdict, Skip):
            whole = _Part(tensor=part.tensor, verdict=part.verdict, name=module_name(part.tensor.name), by=part.by)
            joined[part.tensor.name] = whole
        else:
            joined[position] = part
    return list(joined.values())


def _module(part: _Part, verdict: Score, *, layer: int | None) -> WeightModule:
    tensor, piece = part.tensor, part.piece
    shape = tensor.shape if piece is None else piece.view.shape(tensor.shape)
    return WeightModule(
        name=part.name,
        parameter=tensor.name,
        role=verdict.role,
        layer=layer,
        shape=shape,
        dtype=tensor.storage,
        kind="linear" if len(shape) == 2 else "headwise" if verdict.headwise else "conv",
        expert=expert_index(f"{part.name}.weight"),
        view=None if piece is None else piece.view,
        parameter_shape=None if piece is None else tensor.shape,
        rank=tensor.rank,
        trained=tensor.trained,
        roundoff=tensor.roundoff,
        identified_by=part.by,
        note=part.note,
    )
