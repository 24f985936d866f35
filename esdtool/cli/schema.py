"""`esdtool schema`: the JSON Schemas of the files that esdtool writes and reads."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Literal

import typer

SchemaName = Literal["analysis", "trajectory", "comparison", "wd", "assignment", "train"]


def schema(
    name: Annotated[
        SchemaName,
        typer.Argument(
            help="analysis (`analyze --json`), trajectory (`analyze --json` with several checkpoints), comparison "
            "(`compare --json`), wd (`assign --out`), "
            "assignment (`assign --for` of other quantities), or train (a training configuration)."
        ),
    ],
) -> None:
    """Print the JSON Schema of a file format."""
    typer.echo(files("esdtool.schemas").joinpath(f"{name}.schema.json").read_text(encoding="utf-8"), nl=False)
