"""Files that `torch.save` wrote: state dicts, alone or within what a trainer saves."""

from __future__ import annotations

from esdtool.checkpoint.container import Container, WeightFile
from esdtool.checkpoint.stored_file import StoredFile


def _open(file: StoredFile, label: str) -> WeightFile:
    from esdtool.checkpoint.formats.torch_save.exported import ExportedFile, is_exported
    from esdtool.checkpoint.formats.torch_save.file import TorchSaveFile

    return ExportedFile(file, label) if is_exported(file) else TorchSaveFile(file, label)


CONTAINER = Container(
    kind="a file that torch.save wrote",
    suffixes=(".bin", ".pt", ".pth", ".ckpt", ".pt2", ".pth.tar", ".pt.tar"),
    open=_open,
    precedence=10,
    foreign=False,
    quantizes=False,
)
