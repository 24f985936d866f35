"""Remember the analyses of checkpoints that come and go, for whoever follows the same run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from pydantic import ValidationError

from esdtool._version import __version__
from esdtool.analysis.document import Analysis
from esdtool.comparison.trajectory import in_order_of_training
from esdtool.errors import OutputError
from esdtool.spectra.options import ScoreOptions
from esdtool.support.files import cache_directory, naming_the_file

try:
    import fcntl
except ImportError:  # Windows: two watchers may then analyse one checkpoint twice, with one result
    fcntl = None  # type: ignore[assignment]

_FOLDER: Final = "watch"


class Journal:
    """The analyses of one source with one set of options, in the user's cache.

    A file of one JSON object a line: a checkpoint's path, the state of its files, and its analysis. Lines are appended
    under a lock, so that several watchers share the work. A damaged line is as if it were not there.

    Args:
        source: what is followed, as the user gave it.
        options: what is computed.
    """

    def __init__(self, source: str, options: ScoreOptions) -> None:
        identity = repr((__version__, os.path.realpath(source), options))
        name = hashlib.sha256(identity.encode()).hexdigest()[:24]
        self._path = cache_directory() / _FOLDER / f"{name}.jsonl"
        self._place = 0
        self._held: dict[str, tuple[str, Analysis]] = {}
        self._signatures: set[str] = set()

    def read(self) -> dict[str, Analysis]:
        """Return all analyses by path in the order of training, those of other watchers included."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._place)
                text = stream.read()
        except OSError:
            text = b""
        whole = text.rfind(b"\n") + 1
        self._place += whole
        for line in text[:whole].splitlines():
            try:
                entry = json.loads(line)
                path, signature = str(entry["path"]), str(entry["signature"])
                self._held[path] = signature, Analysis.model_validate(entry["analysis"])
            except (ValueError, TypeError, KeyError, ValidationError):
                continue
            self._signatures.add(signature)
        return {path: self._held[path][1] for path in in_order_of_training(list(self._held))}

    def knows(self, signature: str) -> bool:
        """Tell whether a state of a checkpoint has been analysed."""
        return signature in self._signatures

    def add(self, path: str, signature: str, analysis: Analysis) -> None:
        """Append an analysis.

        Raises:
            OutputError: if the cache cannot be written.
        """
        line = json.dumps({"path": path, "signature": signature, "analysis": analysis.model_dump(mode="json")})
        with naming_the_file(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as stream:
                # A line that a killed watcher left half-written is ended first.
                torn = stream.tell() > 0 and not self._ends_with_newline()
                stream.write((b"\n" if torn else b"") + line.encode() + b"\n")
        self.read()

    def _ends_with_newline(self) -> bool:
        with self._path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock, while another watcher of the same source waits.

        Raises:
            OutputError: if the cache cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            stream = self._path.with_suffix(".lock").open("ab")
        except OSError as error:
            raise OutputError(f"{self._path.parent}: cannot write: {error.strerror}") from error
        with stream:
            if fcntl is not None:
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield
