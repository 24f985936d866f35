"""`esdtool schema`: the JSON Schemas of the files that esdtool writes and reads."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Literal

import typer

SchemaName = Literal["analysis", "trajectory", "comparison", "wd", "train"]


def schema(
    name: Annotated[
        SchemaName,
        typer.Argument(
            help="An analysis (`analyze --json`), a trajectory (the same of several checkpoints), a comparison "
            "of checkpoints (`compare --json`), a weight-decay assignment (`assign --out`), or a training config."
        ),
    ],
) -> None:
    """Print the JSON Schema of a file format."""
    typer.echo(files("esdtool.schemas").joinpath(f"{name}.schema.json").read_text(encoding="utf-8"), nl=False)
