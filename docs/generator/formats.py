"""Make the reference of the files that esdtool writes and reads from their pydantic models."""

from __future__ import annotations

import inspect

from pydantic import BaseModel

from esdtool.analysis.document import Analysis
from esdtool.assignment.allocation import Allocation
from esdtool.assignment.document import Assignment
from esdtool.comparison.checkpoints import CheckpointComparison
from esdtool.comparison.trajectory import Trajectory
from generator import schema as schemas
from generator.markdown import NOTICE

INTRODUCTION = """# JSON formats

`esdtool schema NAME` prints the JSON Schema of each format. Every file begins with `format` and `version`. Readers
should refuse an unknown version and ignore unknown keys. Numbers are finite floats or `null`, never NaN. Nothing
depends on the time or the name of the machine: the same input gives the same bytes.
"""

FORMATS: dict[str, tuple[str, type[BaseModel], str]] = {
    "analysis": (
        "Analysis",
        Analysis,
        "Written by `esdtool analyze CKPT --json PATH`; read by `esdtool assign`, `compare` and `plot`, and by "
        "`esdtool.Analysis.from_json`.",
    ),
    "trajectory": (
        "Trajectory",
        Trajectory,
        "Written by `esdtool analyze CKPT CKPT ... --json PATH`: one analysis for each checkpoint, and alpha by role.",
    ),
    "comparison": (
        "Comparison of checkpoints",
        CheckpointComparison,
        "Written by `esdtool compare CKPT CKPT ... --json PATH`.",
    ),
    "wd": (
        "Weight decays: wd.json",
        Assignment,
        "Written by `esdtool assign --out PATH`; read by `esdtool.load_assignment` and by "
        "[any trainer](../trainers/json-only.md), without esdtool too.",
    ),
    "assignment": (
        "Several quantities: version 2",
        Allocation,
        "Written by `esdtool assign --for QUANTITY --out PATH` for any quantity but weight decay alone; see "
        "[module-wise quantities](../quantities.md). A reader of version 1 refuses it by its `version`.",
    ),
}


def page() -> str:
    """Return the whole page."""
    text = [NOTICE, INTRODUCTION]
    seen: dict[str, str] = {}
    for name, (title, model, words) in FORMATS.items():
        schema = model.model_json_schema(mode="serialization", by_alias=True)
        text.append(f"\n## {title}\n\n{words} Schema: `esdtool schema {name}`.\n\n")
        text.append(schemas.fields(schema, schema, defaults=False, head="key"))
        seen[model.__name__] = schemas.fields(schema, schema, defaults=False, head="key")
        for part_name, part in schemas.parts(schema):
            table = schemas.fields(schema, part, defaults=False, head="key")
            if seen.get(part_name) == table:
                continue  # described above
            heading = f"{part_name} ({name})" if part_name in seen else part_name
            seen.setdefault(part_name, table)
            about = inspect.cleandoc(part.get("description", ""))
            text.append(f"\n### {heading}\n\n{about}\n\n{table}")
    return "".join(text)
