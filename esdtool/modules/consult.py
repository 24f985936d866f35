"""The model's own code where the names leave a doubt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from esdtool.checkpoint.base import TensorInfo
from esdtool.modules.classify import Identified, leaf_role
from esdtool.modules.identification import IdentifiedBy
from esdtool.modules.model_code import ParameterKind, ParameterKinds, plain_name
from esdtool.modules.reasons import EMBEDDING, NORM_MATRIX, OUTPUT_HEAD
from esdtool.modules.rules import Score, Skip
from esdtool.modules.skipped import SkipKind

_NOT_SCORED = {
    ParameterKind.EMBEDDING: Skip(reason=EMBEDDING),
    ParameterKind.OUTPUT_HEAD: Skip(reason=OUTPUT_HEAD),
    ParameterKind.NORMALISATION: Skip(reason=NORM_MATRIX, forceable=False),
}


def consult(
    decisions: Mapping[str, Identified], tensors: Mapping[str, TensorInfo], kinds: Callable[[], ParameterKinds]
) -> dict[str, Identified]:
    """Settle by the model's code what names and shapes alone decided.

    Args:
        decisions: by tensor name.
        tensors: the tensors by name.
        kinds: gives what the code says; not called where no decision is in doubt.

    Returns:
        The decisions, those in doubt settled where the code knows the parameter.
    """
    doubtful = [name for name, decision in decisions.items() if _is_doubtful(decision)]
    settled = dict(decisions)
    known = kinds() if doubtful else {}
    for name in doubtful:
        kind = known.get(plain_name(name))
        if kind is not None:
            settled[name] = _settled(decisions[name], kind, tensors[name])
    return settled


def _is_doubtful(decision: Identified) -> bool:
    verdict = decision.verdict
    if isinstance(verdict, Skip):
        return verdict.reason.kind is SkipKind.UNKNOWN_LAYOUT
    return decision.by is IdentifiedBy.SHAPE and isinstance(verdict, Score)


def _settled(decision: Identified, kind: ParameterKind, tensor: TensorInfo) -> Identified:
    rule = f"{decision.rule}; the model's code: {kind.value}"
    if kind in _NOT_SCORED:
        return Identified(verdict=_NOT_SCORED[kind], by=IdentifiedBy.MODEL, rule=rule)
    if isinstance(decision.verdict, Skip):
        if kind is not ParameterKind.CONVOLUTION or tensor.shape[1] == 1:
            return decision
        return Identified(verdict=Score(role=leaf_role(tensor)), by=IdentifiedBy.MODEL, rule=rule)
    # A linear layer may still hold several projections: the note stays.
    return replace(decision, by=IdentifiedBy.MODEL, rule=rule)
