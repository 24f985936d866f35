"""Define a container of weights: its names, and a function that opens it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esdtool.checkpoint.base import TensorInfo

if TYPE_CHECKING:
    import torch

    from esdtool.checkpoint.stored_file import StoredFile


class WeightFile(ABC):
    """One file with tensors. A subclass sets `tensors` when it is made; several threads may read at a time."""

    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()
    """Remarks that the user should see, each starting with the file's path."""
    config: Mapping[str, Any] = {}
    """What the file says of its model, under the names of a `config.json`. Used where there is no such file."""

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read one tensor, or some positions of its first dimension.

        Any exception becomes an error of one line that names file and tensor.
        """

    def stored_bytes(self, name: str) -> int:
        """Return the bytes that a tensor takes in the file."""
        return self.tensors[name].nbytes

    def stretch(self, name: str) -> StoredFile | None:  # noqa: ARG002 - for those that have it
        """Return the bytes that are all that a tensor is read from; None where there is more to it."""
        return None


@dataclass(frozen=True, kw_only=True)
class Container:
    """A kind of weight file. `esdtool.checkpoint.formats` has one in each of its modules."""

    kind: str
    """With its article, for messages: `a GGUF file`."""
    suffixes: tuple[str, ...]
    """Ends of its files' names in lower case, e.g. `.gguf`."""
    open: Callable[[StoredFile, str], WeightFile]
    """Reads the header of a file; the text is its name within the checkpoint. Any exception becomes one line.

    Heavy libraries are imported inside: every command loads the declarations.
    """
    precedence: int = 100
    """Place in lists of what is known; lower is earlier."""
    foreign: bool = True
    """Whether it is chosen in a folder only where there is nothing of torch's, and must then be the only model."""
    quantizes: bool = True
    """Whether it knows quantised weights itself, so that no codes and scales are looked for among its tensors."""
    is_read_whole: bool = False
    """Whether there is no reading a tensor without the whole file, so that ranges of a remote one are of no use."""
    known_names: tuple[str, ...] = ()
    """Names of files that have a `config.json` of their own beside them."""
    model_of: Callable[[str], str] = str
    """Tells by their names which files are parts of one model: the same text for all of them."""
    companions: Callable[[str, Sequence[str]], Sequence[str]] = lambda _file, _names: ()
    """Further files that one of these names needs, among the names in its folder."""
