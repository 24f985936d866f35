"""Keras models: `.keras` archives and `.h5` files. Needs the extra `keras`."""

from __future__ import annotations

from esdtool.checkpoint.container import Container, WeightFile
from esdtool.checkpoint.stored_file import StoredFile


def _open(file: StoredFile, label: str) -> WeightFile:
    from esdtool.checkpoint.formats.keras.file import KerasFile

    return KerasFile(file, label)


CONTAINER = Container(
    kind="a Keras file",
    suffixes=(".keras", ".h5", ".hdf5"),
    open=_open,
    precedence=40,
    known_names=("tf_model.h5",),
)
