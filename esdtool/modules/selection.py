"""From a checkpoint's tensors to the modules that are scored, and the list of those that are not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from esdtool.checkpoint.base import TensorInfo
from esdtool.errors import UsageError
from esdtool.modules import general
from esdtool.modules.base import Selection, SkippedTensor, WeightModule
from esdtool.modules.classify import Classifier, is_weight, leaf_role
from esdtool.modules.names import SortKey, layer_index, module_name, order_key
from esdtool.modules.patterns import compile_patterns
from esdtool.modules.rules import Score, Skip, Verdict


def select_modules(
    tensors: Iterable[TensorInfo],
    *,
    config: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Selection:
    """Sort every tensor of a checkpoint into modules to score and tensors to skip, with reasons.

    Scored by default: matrices and convolution kernels of floating-point numbers, except
    embeddings, position tables, output heads, routers, and tensors that hold several projections
    or several experts at once. The tables that decide are `esdtool.modules.general` and
    `esdtool.modules.families`.

    Args:
        tensors: all tensors of the checkpoint, in any order. The result does not depend on the order.
        config: the model's config.json, if any. Only `model_type` (which family tables hold) and
            `quantization_config.quant_method` (for the reasons) are read.
        include: regular expressions, searched in the parameter names. If any is given, exactly the
            matching tensors are scored - also those that the tables leave out, such as embeddings,
            under the role of their own last name. Matching tensors that hold no float matrix (biases,
            quantised codes, ...) stay out with their reason.
        exclude: regular expressions, searched in the parameter names; matching tensors are not
            scored. It prevails over `include`.

    Returns:
        Every tensor exactly once, both parts in the model's natural order.

    Raises:
        UsageError: if an expression is no regular expression, matches no tensor name, or (`include`)
            matches only tensors that cannot be scored.
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
    includes = compile_patterns(include, names, option="--include", what="tensor name")
    excludes = compile_patterns(exclude, names, option="--exclude", what="tensor name")

    classifier = Classifier(catalogue, config)
    verdicts = {tensor.name: classifier.verdict(tensor) for tensor in catalogue}
    if includes:
        verdicts = _restrict(catalogue, verdicts, includes)
    for pattern in excludes:
        verdicts |= {
            name: Skip(reason=f"excluded by --exclude {pattern.pattern!r}")
            for name, verdict in verdicts.items()
            if isinstance(verdict, Score) and pattern.search(name)
        }
    return _selection(catalogue, verdicts)


def _restrict(
    catalogue: Sequence[TensorInfo], verdicts: Mapping[str, Verdict], includes: Sequence[re.Pattern[str]]
) -> dict[str, Verdict]:
    """Verdicts under `include`: matching tensors are scored if they can be, all others are out."""
    restricted: dict[str, Verdict] = {}
    for tensor in catalogue:
        verdict = verdicts[tensor.name]
        if not any(pattern.search(tensor.name) for pattern in includes):
            restricted[tensor.name] = Skip(reason="not matched by --include")
        elif isinstance(verdict, Score) or not _can_be_forced(tensor, verdict):
            restricted[tensor.name] = verdict
        else:
            restricted[tensor.name] = Score(role=leaf_role(tensor))
    for pattern in includes:
        matching = sorted(name for name in restricted if pattern.search(name))
        first = restricted[matching[0]]
        if not isinstance(first, Score) and not any(isinstance(restricted[name], Score) for name in matching):
            raise UsageError(
                f"--include {pattern.pattern!r} matches no tensor that can be scored; {matching[0]}: {first.reason}"
            )
    return restricted


def _can_be_forced(tensor: TensorInfo, verdict: Verdict) -> bool:
    """Whether the tensor is one float matrix or convolution, whatever it is for."""
    if isinstance(verdict, Skip):
        return verdict.forceable and (len(tensor.shape) == 2 or is_weight(tensor.name))
    return len(tensor.shape) == 2


def _selection(catalogue: Sequence[TensorInfo], verdicts: Mapping[str, Verdict]) -> Selection:
    """Modules and skipped tensors in natural order."""
    embeddings = {
        tensor.shape: tensor.name
        for tensor in sorted(catalogue, key=lambda tensor: tensor.name, reverse=True)
        if verdicts[tensor.name] == Skip(reason=general.TOKEN_EMBEDDING)
    }
    modules: list[tuple[SortKey, WeightModule]] = []
    skipped: list[tuple[SortKey, SkippedTensor]] = []
    for tensor in catalogue:
        verdict = verdicts[tensor.name]
        if isinstance(verdict, Score):
            modules.append((order_key(tensor.name, verdict.role), _module(tensor, verdict)))
            continue
        reason = verdict.reason
        if reason in (general.LM_HEAD, general.OUTPUT_HEAD) and tensor.shape in embeddings:
            reason = f"{reason}; same shape as {embeddings[tensor.shape]}, perhaps a tied copy"
        entry = SkippedTensor(name=tensor.name, shape=tensor.shape, dtype=tensor.dtype, reason=reason)
        skipped.append((order_key(tensor.name, None), entry))
    return Selection(
        modules=tuple(module for _, module in sorted(modules, key=lambda pair: pair[0])),
        skipped=tuple(entry for _, entry in sorted(skipped, key=lambda pair: pair[0])),
    )


def _module(tensor: TensorInfo, verdict: Score) -> WeightModule:
    return WeightModule(
        name=module_name(tensor.name),
        parameter=tensor.name,
        role=verdict.role,
        layer=layer_index(tensor.name),
        shape=tensor.shape,
        dtype=tensor.dtype,
        kind="linear" if len(tensor.shape) == 2 else "conv",
    )
