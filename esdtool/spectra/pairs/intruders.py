"""Intruder dimensions: large singular vectors of a fine-tuned matrix that no singular vector of its base resembles.

A left singular vector y of the tuned matrix, one of the k largest, is an intruder if max_i |cos(y, x_i)| is below a
threshold, over all singular vectors x_i of the base. LoRA makes them and full fine-tuning hardly does, and they go
with forgetting. Where singular values of the base are equal, as in an orthogonal initialisation, its vectors are any
of a space: the cosine is then that with the space. Directions in which the base is zero resemble nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esdtool.spectra.measure import Number, Quantity
from esdtool.spectra.pair_measure import PairMeasure

if TYPE_CHECKING:
    from esdtool.spectra.matrix_pair import MatrixPair


def intruders(pair: MatrixPair) -> dict[str, Number]:
    """Count the intruders among the tuned matrix's largest left singular vectors; None where it is all zero."""
    import torch

    similarity = None
    if pair.other_vectors.rank:
        tuned = pair.products(left=True, of_other=pair.options.intruder_vectors)
        clusters = pair.base_vectors.clusters
        groups = int(clusters[-1]) + 1 if clusters.numel() else 1
        squares = torch.zeros(groups, tuned.shape[1], dtype=tuned.dtype, device=tuned.device)
        squares.index_add_(0, clusters, tuned.square())
        similarity = squares.max(dim=0).values.sqrt().clamp(max=1.0).cpu()
    if similarity is None:
        return {"num_intruders": None, "first_intruder": None, "least_similarity": None}
    found = torch.nonzero(similarity < pair.options.intruder_similarity).flatten()
    return {
        "num_intruders": found.numel(),
        "first_intruder": int(found[0]) + 1 if found.numel() else None,
        "least_similarity": float(similarity.min()),
    }


_SOURCE = "Shuttleworth et al. 2024, arXiv 2410.21228"

MEASURE = PairMeasure(
    quantities=(
        Quantity(
            name="num_intruders",
            title="intruders",
            formula="Intruder dimensions: of the largest left singular vectors (intruder_vectors of them), those whose "
            "largest |cosine| with a left singular vector of the base is below intruder_similarity",
            source=_SOURCE,
            whole=True,
        ),
        Quantity(
            name="first_intruder",
            title="first intruder",
            formula="Place of the first intruder dimension, 1 for the largest singular value; null without any",
            source=_SOURCE,
            whole=True,
        ),
        Quantity(
            name="least_similarity",
            title="least similarity",
            formula="Smallest of these cosines: how far the strangest of the largest singular vectors resembles one of "
            "the base",
            source=_SOURCE,
        ),
    ),
    compute=intruders,
)
