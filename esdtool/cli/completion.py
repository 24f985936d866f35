"""Complete values in the shell: keys of a training configuration, and names of modules of the checkpoint at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import typer


def settings(incomplete: str) -> list[str]:
    """Complete `--set SECTION.KEY=`, from the schema of training configurations: nothing heavy is imported."""
    schema = json.loads((resources.files("esdtool.schemas") / "train.schema.json").read_text(encoding="utf-8"))
    keys = {
        f"{section}.{key}="
        for section, value in schema["properties"].items()
        for key in _properties(value, schema.get("$defs", {}))
    }
    return sorted(key for key in keys if key.startswith(incomplete))


def module_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete an expression by the names of the matrices in the local checkpoint that stands on the line.

    Nothing is fetched: a repository of the Hub, or a path that cannot be read, gives no names.
    """
    from esdtool.checkpoint import open_checkpoint
    from esdtool.cli.sources import checkpoint_of
    from esdtool.errors import EsdtoolError

    given = [ctx.params.get(name) for name in ("checkpoint", "checkpoints", "source", "sources")]
    sources = [source for each in given if each for source in ([each] if isinstance(each, str) else each)]
    sources += ctx.args  # of a line whose last option has no value yet, click has parsed no argument
    names: set[str] = set()
    for source in sources:
        if not Path(source).exists():
            continue
        try:
            tensors = open_checkpoint(checkpoint_of(source, quiet=True)).tensors
        except EsdtoolError:
            continue
        names |= {name.removesuffix(".weight") for name, info in tensors.items() if len(info.shape) > 1}
    return sorted(name for name in names if name.startswith(incomplete))


def _properties(value: Any, definitions: dict[str, Any]) -> Iterator[str]:
    """Name the keys of a section, in whichever of its variants they are."""
    if isinstance(value, dict):
        yield from value.get("properties", {})
        if "$ref" in value:
            yield from _properties(definitions[value["$ref"].rpartition("/")[2]], definitions)
        for word in ("anyOf", "oneOf", "allOf"):
            for variant in value.get(word, ()):
                yield from _properties(variant, definitions)
