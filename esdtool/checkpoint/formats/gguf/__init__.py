"""Read GGUF files of llama.cpp. This needs the extra `gguf`."""

from __future__ import annotations

import re

from esdtool.checkpoint.container import Container, WeightFile
from esdtool.checkpoint.stored_file import StoredFile

SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
"""Name of one file of a split model, as llama.cpp's gguf-split writes it."""


def _open(file: StoredFile, label: str) -> WeightFile:
    from esdtool.checkpoint.formats.gguf.file import GGUFFile

    return GGUFFile(file, label)


def _model_of(name: str) -> str:
    """Name the model to which a shard belongs, since the shards of a set are one model."""
    shard = SHARD.fullmatch(name)
    return f"{shard['stem']}-of-{shard['count']}" if shard else name


CONTAINER = Container(kind="a GGUF file", suffixes=(".gguf",), open=_open, precedence=20, model_of=_model_of)
