"""The spectra of attention heads (`--per-head`): of each head's parts of q, k, v and o, and of two products.

Of a head h with keys and values from g, the products are W_q[h]^T W_k[g], the form that gives the attention scores, and
W_o[h] W_v[g], what the head writes of what it reads. Both are [hidden, hidden] and of the rank of a head. They are
never formed: with the QR decompositions of both factors only a matrix of the order of a head remains, which has the
same singular values (`esdtool.modules.reading.product_core`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import torch

from esdtool.analysis.execution import Batch, carry_out, lack_of_memory_named
from esdtool.analysis.head_result import HeadResult
from esdtool.analysis.plan import Plan
from esdtool.analysis.ranks import AnalysisRanks
from esdtool.analysis.record import Record
from esdtool.analysis.weights import ModuleWeights, Read, weights_of_batch
from esdtool.modules import WeightModule
from esdtool.modules.attention import PRODUCTS, Attention, Part
from esdtool.modules.base import cost
from esdtool.modules.reading import Rows, product_core, read_matrices
from esdtool.spectra.cache import note_key
from esdtool.spectra.marchenko_pastur import mp_quantiles
from esdtool.spectra.metrics import spectral_metrics
from esdtool.spectra.null_distance import distance_from
from esdtool.spectra.options import LOW_RANK_MIN_EIGS, ScoreOptions
from esdtool.spectra.product_null import product_null_alpha, product_quantiles
from esdtool.spectra.scoring import NOT_FINITE, MatrixScore, null_alpha, score_matrices
from esdtool.spectra.spectrum import rounding_error
from esdtool.spectra.tail import Vector
from esdtool.support.balance import balance
from esdtool.support.devices import own_stream

VERSION = 1
"""Raise it when the numbers change for the same weights: cached results are then computed again."""


class _Note(Record):
    """The entry of one attention block in the cache."""

    heads: tuple[HeadResult, ...]


def analyze_heads(plan: Plan, *, ranks: AnalysisRanks | None = None) -> tuple[HeadResult, ...]:
    """Compute the spectra of all heads of a plan's attention blocks, block by block.

    Args:
        plan: whose `attention` says where the heads lie.
        ranks: processes that share the work; only the first one gets results.
    """
    blocks = plan.attention
    if ranks is not None:
        owners = balance([sum(map(cost, block.modules)) for block in blocks], ranks.size)
        blocks = tuple(block for block, owner in zip(blocks, owners, strict=True) if owner == ranks.rank)
    work = functools.partial(_carry_out, plan, blocks)
    found = dict(work() if ranks is None else ranks.collect(work))
    return tuple(head for block in plan.attention for head in found.get(block.name, ()))


def _carry_out(plan: Plan, blocks: Sequence[Attention]) -> list[tuple[str, tuple[HeadResult, ...]]]:
    """Compute some of the blocks; each goes with its name."""
    by_module = {block.modules[0].name: block for block in blocks}
    limits, location = plan.limits, plan.checkpoint.location

    def read(batch: Batch) -> list[ModuleWeights]:
        with lack_of_memory_named(batch, limits, location=location):
            return weights_of_batch(plan, batch, _read)

    def compute(batch: Batch, weights: list[ModuleWeights]) -> tuple[str, tuple[HeadResult, ...]]:
        with lack_of_memory_named(batch, limits, location=location), own_stream(plan.device):
            block = by_module[batch[0].name]
            return block.name, _known_heads(plan, block, dict(zip(block.projections, weights, strict=True)))

    return [found for _, found in carry_out([block.modules for block in blocks], read, compute, limits=limits)]


def _read(plan: Plan, module: WeightModule, shared: Rows | None) -> Read:
    return Read(matrices=read_matrices(plan.checkpoint, module, shared=shared), roundoff=module.roundoff)


def _known_heads(plan: Plan, block: Attention, weights: Mapping[Part, ModuleWeights]) -> tuple[HeadResult, ...]:
    """Find the heads of a block in the cache, or compute them."""
    options = _options(plan.options)
    if plan.cache is None:
        return _heads(plan, block, weights, options)
    places = [(part, item.heads, item.axis, item.module.name) for part, item in block.projections.items()]
    contents = [(item.content, item.roundoff) for item in weights.values()]
    key = note_key("heads", VERSION, repr(contents), block.name, block.layer, places, options, plan.device.type)
    text = plan.cache.load_note(key)
    if text is not None:
        with suppress(ValueError):
            return _Note.model_validate_json(text).heads
    found = _heads(plan, block, weights, options)
    plan.cache.save_note(key, _Note(heads=found).model_dump_json())
    return found


def _options(options: ScoreOptions) -> ScoreOptions:
    """Adapt the options to matrices that have no more eigenvalues than a head is wide."""
    spectrum = "auto" if options.spectrum == "slq" else options.spectrum
    fewest = min(options.min_eigs, LOW_RANK_MIN_EIGS)
    return replace(options, min_eigs=fewest, spectrum=spectrum, traps="law", seed=0, vectors=False)


def _heads(
    plan: Plan, block: Attention, weights: Mapping[Part, ModuleWeights], options: ScoreOptions
) -> tuple[HeadResult, ...]:
    """Compute the parts of each projection, head by head, then the products."""
    shared: Rows = {}
    matrices = {
        part: weights[part].matrices[0] if weights[part].load is None else _read(plan, item.module, shared).matrices[0]
        for part, item in block.projections.items()
    }
    results = []
    for part, projection in block.projections.items():
        module, roundoff = projection.module, weights[part].roundoff
        for head in range(projection.heads):
            group = head if part in ("k", "v") else block.group_of(head)
            place = _Place(
                name=f"{module.name}.heads.{head}",
                role=module.role,
                head=head,
                key_value_head=group,
                modules=(module.name,),
                shape=(projection.width, projection.outer),
                num_eigs=min(projection.width, projection.outer),
            )
            results.append(
                _part(place, block, projection.of_head(matrices[part], head), options, plan.device, roundoff)
            )
    for product in block.products():
        first, second = PRODUCTS[product]
        one, other = block.projections[first], block.projections[second]
        # Each factor's rounding adds its own error to the product.
        roundoff = sum(
            max(rounding_error(matrices[each].dtype), weights[each].roundoff or 0.0) for each in (first, second)
        )
        for head in range(block.heads):
            group = block.group_of(head)
            place = _Place(
                name=f"{block.name}.heads.{head}.{product}",
                role=product,
                head=head,
                key_value_head=group,
                modules=(one.module.name, other.module.name),
                shape=(one.outer, other.outer),
                num_eigs=min(one.width, one.outer, other.outer),
            )
            factors = one.of_head(matrices[first], head).T, other.of_head(matrices[second], group)
            results.append(_product(place, block, factors, options, plan.device, roundoff))
    return tuple(results)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The part of a head's result that is no measurement; see `HeadResult`."""

    name: str
    role: str
    head: int
    key_value_head: int
    modules: tuple[str, ...]
    shape: tuple[int, int]
    num_eigs: int


def _part(
    place: _Place,
    block: Attention,
    matrix: torch.Tensor,
    options: ScoreOptions,
    device: torch.device,
    roundoff: float | None,
) -> HeadResult:
    """Score a part of a projection, [width, channels]."""
    width, channels = place.shape
    return _result(
        place,
        block,
        score_matrices([matrix], options, device=device, roundoff=roundoff),
        options,
        null=null_alpha(options.fit[0], place.shape, 1, options),
        quantiles=mp_quantiles(width, channels, min(place.shape)),
    )


def _product(
    place: _Place,
    block: Attention,
    factors: tuple[torch.Tensor, torch.Tensor],
    options: ScoreOptions,
    device: torch.device,
    roundoff: float,
) -> HeadResult:
    """Score a product of factors [channels, width] and [width, channels]."""
    width = factors[0].shape[1]
    if all(bool(torch.isfinite(factor).all()) for factor in factors):
        score = score_matrices([product_core(*factors)], options, device=device, roundoff=roundoff)
    else:
        score = MatrixScore(status=NOT_FINITE)
    return _result(
        place,
        block,
        score,
        options,
        null=product_null_alpha(options.fit[0], width, *place.shape, options),
        quantiles=product_quantiles(width, *place.shape),
    )


def _result(
    place: _Place,
    block: Attention,
    score: MatrixScore,
    options: ScoreOptions,
    *,
    null: float | None,
    quantiles: Vector | None,
) -> HeadResult:
    """Bring a score into the form of the file; `null` and `quantiles` are those of untrained weights."""
    described = {
        **asdict(place),
        "attention": block.name,
        "layer": block.layer,
        "status": score.status,
        "alphas": dict.fromkeys(options.fit),
    }
    first = score.fits.get(options.fit[0])
    if score.alpha is None or score.spectrum is None or first is None:
        return HeadResult(**described)
    metrics = spectral_metrics(score.spectrum, place.shape)
    eigenvalues = score.spectrum.eigenvalues
    return HeadResult(
        **described
        | {
            "alphas": {name: None if fit is None else fit.alpha for name, fit in score.fits.items()},
            "alpha": first.alpha,
            "alpha_stderr": first.alpha_stderr,
            "xmin": score.spectrum.unscaled(first.xmin),
            "num_tail": first.num_tail,
            "ks_distance": first.ks_distance,
            "mp_alpha": null,
            "null_distance": None if quantiles is None else distance_from(eigenvalues, quantiles),
            "lambda_max": metrics.lambda_max,
            "frobenius_norm": metrics.frobenius_norm,
            "stable_rank": metrics.stable_rank,
            "effective_rank": metrics.effective_rank,
        }
    )
