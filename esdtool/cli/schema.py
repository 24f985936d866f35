"""`esdtool schema`: the JSON Schemas of the files that esdtool writes and reads."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Literal

import typer

SchemaName = Literal["analysis", "wd"]


def schema(
    name: Annotated[
        SchemaName,
        typer.Argument(
            help="Which file: an analysis (`analyze --json`) or a weight-decay assignment (`assign --out`)."
        ),
    ],
) -> None:
    """Print the JSON Schema of a file format."""
    typer.echo(files("esdtool.schemas").joinpath(f"{name}.schema.json").read_text(encoding="utf-8"), nl=False)
