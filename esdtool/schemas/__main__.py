"""Generate the JSON Schemas of this package from the code: `python -m esdtool.schemas`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esdtool.analysis.document import Analysis
from esdtool.assignment.allocation import Allocation
from esdtool.assignment.document import Assignment
from esdtool.comparison.checkpoints import CheckpointComparison
from esdtool.comparison.trajectory import Trajectory
from esdtool.train.config.loading import json_schema


def schemas() -> dict[str, dict[str, Any]]:
    """Return each schema by its name."""
    return {
        "analysis": Analysis.model_json_schema(mode="serialization"),
        "trajectory": Trajectory.model_json_schema(mode="serialization"),
        "comparison": CheckpointComparison.model_json_schema(mode="serialization"),
        "wd": Assignment.json_schema(),
        "assignment": Allocation.model_json_schema(by_alias=True, mode="validation"),
        "train": json_schema(),
    }


def rendered(schema: dict[str, Any]) -> str:
    """Return the text of a schema file."""
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


if __name__ == "__main__":
    for name, schema in schemas().items():
        Path(__file__).with_name(f"{name}.schema.json").write_text(rendered(schema), encoding="utf-8")
