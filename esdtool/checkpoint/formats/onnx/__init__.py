"""ONNX models. Needs the extra `onnx`."""

from __future__ import annotations

from collections.abc import Sequence

from esdtool.checkpoint.container import Container, WeightFile
from esdtool.checkpoint.stored_file import StoredFile


def _open(file: StoredFile, label: str) -> WeightFile:
    from esdtool.checkpoint.formats.onnx.file import ONNXFile

    return ONNXFile(file, label)


def _external_data(name: str, names: Sequence[str]) -> list[str]:
    """Return the files in which exporters put a model's data."""
    return [other for other in names if other.startswith((f"{name}_data", f"{name}.data"))]


CONTAINER = Container(
    kind="an ONNX file",
    suffixes=(".onnx",),
    open=_open,
    precedence=30,
    is_read_whole=True,
    known_names=("model.onnx",),
    companions=_external_data,
)
