"""Read a file of `torch.save`: the tree of its pickle, and the places of its storages.

Since torch 1.6 a file is a zip archive, `<name>/data.pkl` with the bytes of each storage in `<name>/data/<key>`,
uncompressed. Before, it was five pickles in a row and then the storages, each after its number of elements.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from esdtool.checkpoint.formats.torch_save.plain_pickle import CallsCodeError, PickleError, Symbol, load_plain
from esdtool.checkpoint.formats.torch_save.saved_tensor import Storage, admitted, make
from esdtool.checkpoint.limits import PICKLE_BYTES
from esdtool.checkpoint.other_files import refuse_other_binary
from esdtool.checkpoint.stored_file import StoredFile
from esdtool.checkpoint.zip_member import ZipMember, zip_members
from esdtool.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SAFE_COPY = "re-save its state dict with torch.save(model.state_dict(), ...) or as safetensors"

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_TAR_MAGIC = b"ustar"
_TAR_PLACE = 257


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The content of one file."""

    tree: Any
    """Plain data with `SavedTensor` for tensors."""
    storages: Mapping[str, StoredFile | ZipMember] = field(repr=False)
    """Bytes by the storage's key."""
    swapped: bool = False
    """Whether numbers are in the other order of bytes than this machine's."""

    def read(self, storage: Storage, start: int, count: int) -> npt.NDArray[np.uint8]:
        """Some bytes of a storage."""
        return self.storages[storage.key].read(start, count)


def open_saved(file: StoredFile) -> Saved:
    """Read the pickle of a file of either format, and find its storages.

    Raises:
        CheckpointError: if it is something else, is damaged, or holds code.
    """
    refuse_other_binary(file.path, file.head)
    try:
        return _open_zip(file) if file.head.startswith(_ZIP_MAGIC) else _open_legacy(file)
    except CallsCodeError as error:
        raise CheckpointError(
            f"{file.path}: refused: its pickle calls code ({error.what}), which is never run; {SAFE_COPY}"
        ) from error
    except PickleError as error:
        raise CheckpointError(f"{file.path}: not a file that torch.save wrote, or damaged: {error}") from error


def _open_zip(file: StoredFile) -> Saved:
    members = zip_members(file)
    records = {name.partition("/")[2]: member for name, member in members.items()}
    if "constants.pkl" in records:
        raise CheckpointError(f"{file.path}: refused: a TorchScript archive holds code; {SAFE_COPY}")
    if "archive_format" in records:
        raise CheckpointError(f"{file.path}: refused: a torch.export archive holds a program; {SAFE_COPY}")
    if "data.pkl" not in records:
        raise CheckpointError(f"{file.path}: a zip archive, but not one that torch.save wrote")
    if len(records) < len(members):
        raise CheckpointError(f"{file.path}: damaged: records of more than one archive")
    order = records["byteorder"].read_all(16).decode("ascii", "replace") if "byteorder" in records else "little"
    if order not in ("little", "big"):
        raise CheckpointError(f"{file.path}: damaged: numbers in the byte order {order!r}")
    return Saved(
        tree=load_plain(records["data.pkl"].read_all(PICKLE_BYTES), admitted(), make),
        storages={name.removeprefix("data/"): member for name, member in records.items() if name.startswith("data/")},
        swapped=order != sys.byteorder,
    )


def _open_legacy(file: StoredFile) -> Saved:
    with file.open() as plain:
        plain.seek(_TAR_PLACE)
        if plain.read(len(_TAR_MAGIC)) == _TAR_MAGIC:
            raise CheckpointError(
                f"{file.path}: torch's format from before 0.1.10 (tar), which is not read; {SAFE_COPY}"
            )
        plain.seek(0)
        stream = _Bounded(plain, PICKLE_BYTES)
        found: dict[str, Storage] = {}

        def noted(symbol: Symbol, arguments: tuple[Any, ...]) -> Any:
            value = make(symbol, arguments)
            storage = getattr(value, "storage", None)
            if isinstance(storage, Storage):
                found.setdefault(storage.key, storage)
            return value

        allowed = admitted()
        magic = load_plain(stream, ())
        if magic != _LEGACY_MAGIC:
            raise PickleError("a pickle of another program")
        protocol = load_plain(stream, ())
        if protocol != _LEGACY_PROTOCOL:
            raise PickleError("an unknown version of the format")
        system = load_plain(stream, ())
        tree = load_plain(stream, allowed, noted)
        keys = load_plain(stream, ())
        start = plain.tell()
        little = not isinstance(system, dict) or system.get("little_endian") is not False
    return Saved(
        tree=tree, storages=_places(file, start, keys, found, little), swapped=little != (sys.byteorder == "little")
    )


def _places(
    file: StoredFile, start: int, keys: Any, found: Mapping[str, Storage], little: bool
) -> dict[str, StoredFile | ZipMember]:
    """Find the place of each storage behind the pickles, in the order of their keys."""
    if not isinstance(keys, list):
        raise PickleError("no list of storages")
    places: dict[str, StoredFile | ZipMember] = {}
    for key in keys:
        storage = found.get(key) if isinstance(key, str) else None
        if storage is None or key in places:
            raise PickleError("a storage that no tensor has")
        (count,) = struct.unpack("<q" if little else ">q", file.read(start, 8).tobytes())
        if count < 0 or (width := storage.nbytes // max(count, 1)) * count != storage.nbytes or width > 16:
            raise PickleError("a storage of another size than its tensors say")
        places[key] = file.part(start + 8, storage.nbytes)
        start += 8 + storage.nbytes
    return places


class _Bounded:
    """A stream of which no more is read than a budget, and never more at once than is there."""

    def __init__(self, stream: IO[bytes], budget: int) -> None:
        self._stream, self._left = stream, budget

    def read(self, count: int) -> bytes:
        self._spend(count)
        return self._stream.read(count)

    def readline(self) -> bytes:
        line = self._stream.readline(self._left + 1)
        self._spend(len(line))
        return line

    def _spend(self, count: int) -> None:
        self._left -= count
        if count < 0 or self._left < 0:
            raise PickleError("a pickle that is too long")
