"""Members of a zip archive as stretches of its file, or as streams of which no more is unpacked than is believed."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, cast

from esdtool.checkpoint.limits import HEADER_EXPANSION, check_expansion, check_length
from esdtool.checkpoint.stored_file import StoredFile
from esdtool.errors import CheckpointError
from esdtool.support.words import one_line

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_LOCAL_HEADER = 30
_LOCAL_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 1
_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class ZipMember:
    """One member of an archive."""

    file: StoredFile = field(repr=False)
    """The archive."""
    entry: zipfile.ZipInfo = field(repr=False)
    size: int
    """Bytes once unpacked."""

    @property
    def is_stored(self) -> bool:
        """Whether its bytes stand in the archive as they are."""
        return self.entry.compress_type == zipfile.ZIP_STORED

    def stretch(self) -> StoredFile:
        """Return the bytes of a stored member: they follow a local header of 30 bytes, a name and an extra field.

        Raises:
            CheckpointError: if they lie outside of the archive.
        """
        header = self.file.read(self.entry.header_offset, _LOCAL_HEADER).tobytes()
        if not header.startswith(_LOCAL_MAGIC):
            raise CheckpointError(f"{self.file.path}: damaged zip archive: no header before {self.entry.filename!r}")
        name, extra = struct.unpack("<HH", header[26:30])
        return self.file.part(self.entry.header_offset + _LOCAL_HEADER + name + extra, self.size)

    def read(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        """Some bytes of the member."""
        if self.is_stored:
            return self.stretch().read(start, count)
        import numpy as np

        self._check()
        data = np.empty(count, dtype=np.uint8)
        with self.file.open() as archive, zipfile.ZipFile(archive) as opened, opened.open(self.entry) as packed:
            packed.seek(start)
            view, done = memoryview(cast(Any, data)), 0
            while done < count and (got := packed.readinto(view[done:])):  # type: ignore[attr-defined]
                done += got
        if done < count:
            raise CheckpointError(f"{self.file.path}: damaged: {self.entry.filename!r} is shorter than it says")
        return data

    def read_all(self, most: int) -> bytes:
        """Return the whole member.

        Raises:
            CheckpointError: if it has more than `most` bytes, or more than its packed bytes can hold.
        """
        what = f"{self.file.path}: {self.entry.filename}"
        check_length(what, self.size, most)
        check_expansion(what, self.size, self.entry.compress_size, HEADER_EXPANSION)
        return self.read(0, self.size).tobytes()

    def unpack(self, target: IO[bytes]) -> None:
        """Write a member to a file."""
        self._check()
        left = self.size
        with self.file.open() as archive, zipfile.ZipFile(archive) as opened, opened.open(self.entry) as packed:
            while left > 0 and (chunk := packed.read(min(left, _CHUNK))):
                target.write(chunk)
                left -= len(chunk)

    def _check(self) -> None:
        if self.entry.flag_bits & _ENCRYPTED:
            raise CheckpointError(f"{self.file.path}: {self.entry.filename} is encrypted, which is not read")
        check_expansion(f"{self.file.path}: {self.entry.filename}", self.size, self.entry.compress_size)


def zip_members(file: StoredFile) -> dict[str, ZipMember]:
    """Return the members of an archive by name.

    Raises:
        CheckpointError: if it is damaged, or two members have one name.
    """
    try:
        with file.open() as plain, zipfile.ZipFile(plain) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{file.path}: truncated: a zip archive without its directory at the end; download or copy it again"
        ) from error
    except CheckpointError:
        raise
    # Arbitrary bytes in the directory: bad text, sizes beyond the file, unknown versions, ...
    except Exception as error:
        raise CheckpointError(
            f"{file.path}: damaged zip archive: {one_line(error)}; download or copy it again"
        ) from error
    members = {
        entry.filename: ZipMember(file=file, entry=entry, size=entry.file_size)
        for entry in entries
        if not entry.is_dir()
    }
    if len(members) < sum(not entry.is_dir() for entry in entries):
        raise CheckpointError(f"{file.path}: damaged zip archive: two members of one name")
    return members
