"""From the learning-rate ratios of a live model's parameters to an assignment of version 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from esdtool._version import __version__
from esdtool.assignment.allocation import Allocation, ParameterValues, QuantityRecord, ValueDetail
from esdtool.assignment.document import Origin
from esdtool.assignment.fused import joined_roles, members_of
from esdtool.assignment.quantity import OWN_SCORE

if TYPE_CHECKING:
    from esdtool.assignment.rule import DecayRule
    from esdtool.modules import WeightModule
    from esdtool.optim.live_scores import LiveScore, Measure


def live_rates(
    modules: Mapping[str, Sequence[WeightModule]],
    scores: Mapping[str, LiveScore],
    ratios: Mapping[str, float],
    *,
    ends: Mapping[str, tuple[int, ...]],
    rule: DecayRule,
    measure: Measure,
    model_type: str | None,
    left_out: Mapping[str, str],
) -> Allocation:
    """Write ratios as a file; all mappings are by parameter.

    Args:
        modules: those that each parameter with a spectrum holds.
        scores: what the ratios follow; empty before the first look.
        ratios: of all parameters.
        ends: shapes of the parameters without a spectrum, which have the ratio of the largest score.
        rule: from scores to ratios.
        measure: what the scores are.
        model_type: of the model's configuration.
        left_out: modules without a ratio, with the reasons.
    """
    parameters = {}
    for name, held in modules.items():
        score = scores.get(name)
        value = None if score is None else score.value
        source = OWN_SCORE if value is not None else "not scored" + ("" if score is None else f": {score.status}")
        parameters[name] = ParameterValues(
            lr_ratio=ratios[name],
            details={"lr_ratio": ValueDetail(ratio=ratios[name], score=value, source=source)},
            role=joined_roles(module.role for module in held),
            layer=held[0].layer,
            shape=held[0].stored_shape,
        )
    for name, shape in ends.items():
        detail = ValueDetail(ratio=ratios[name], source="as the largest score")
        parameters[name] = ParameterValues(lr_ratio=ratios[name], details={"lr_ratio": detail}, shape=shape)
    low, high = rule.ratios_range if rule.assign == "linear" else (None, None)
    settings: dict[str, Any] = {
        "score": measure.score,
        "fit": measure.options.fit[0],
        "assign": rule.assign,
        "min_ratio": low,
        "max_ratio": high,
        "granularity": rule.granularity,
        "normalize": rule.normalize,
        "control": rule.control,
        "ends": bool(ends),
    }
    return Allocation(
        created_by=f"esdtool {__version__}",
        source=Origin(checkpoint="memory", model_type=model_type),
        quantities={
            "learning-rate": QuantityRecord(key="lr_ratio", method="LLR", source="arXiv 2605.22297", settings=settings)
        },
        parameters=parameters,
        members={
            name: members
            for name, held in modules.items()
            if (members := members_of([module.name for module in held])) is not None
        },
        left_out=dict(left_out),
    )
