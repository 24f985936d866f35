"""A dataset of the Hugging Face Hub, or a local one that `datasets` can load, as a corpus."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from esdtool.errors import ConfigError, MissingExtraError
from esdtool.train.config.sections import HubData
from esdtool.train.data.corpus import Corpus, Stream, fingerprint_of, not_blank
from esdtool.train.data.corpus_files import text_of
from esdtool.train.quiet import whole_message

if TYPE_CHECKING:
    import datasets

# Streams are read in background threads; loading changes state that `datasets` shares among them.
_LOADING: Final = threading.Lock()


def hub_corpus(data: HubData, split: str) -> Corpus:
    """Return one split of data.dataset: a `Stream` if data.streaming, else a `Corpus` that is downloaded whole.

    Raises:
        ConfigError: if the dataset, its configuration or its split cannot be had, or has no such text column.
    """
    name = f"{data.dataset}{f' ({data.name})' if data.name else ''}, split {split}"
    column = data.text_column

    def load() -> Any:
        return _load(data, split, name)

    dataset = load()
    if dataset.column_names is not None and column not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise ConfigError(f"{name}: no column {column!r}; there are: {columns} (data.text_column)")
    if not data.streaming:
        # `datasets` hashes the data and every operation on it into this one string.
        fingerprint = fingerprint_of("dataset", str(getattr(dataset, "_fingerprint", name)), column)
        return Corpus(
            name=name,
            fingerprint=fingerprint,
            documents=lambda: not_blank(_texts(iter(dataset), column, name)),
        )
    # An iterable dataset holds the position of its iterator, so every reader loads one of its own. (A deep copy
    # would not do: it contains file systems that other threads change.)
    return Stream(
        name=name,
        fingerprint=fingerprint_of("stream", data.dataset, data.name, data.revision, split, column),
        documents=lambda: not_blank(_texts(iter(load()), column, name)),
        reader=lambda position: _HubReader(load(), column, name, position),
    )


class _HubReader:
    """A place in a streamed dataset, saved and found again by `datasets` itself."""

    def __init__(self, dataset: Any, column: str, name: str, position: dict[str, Any] | None) -> None:
        if position is not None:
            dataset.load_state_dict(position)
        self._dataset = dataset
        self._texts = not_blank(_texts(iter(dataset), column, name))

    def read(self, count: int) -> list[str]:
        return list(itertools.islice(self._texts, count))

    def position(self) -> dict[str, Any]:
        # A copy already: later reads do not change it.
        state: dict[str, Any] = self._dataset.state_dict()
        return state


def _load(data: HubData, split: str, name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError('data.source = "huggingface"', "train") from error
    with _explained(name), _LOADING:
        if _is_saved_to_disk(Path(data.dataset)):
            return _load_saved(data, split, name)
        # Releases before 4 would ask on stdin whether to run a dataset's own script; later ones know no such option.
        takes_code = "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters
        options = {"trust_remote_code": False} if takes_code else {}
        return datasets.load_dataset(
            data.dataset, data.name, split=split, revision=data.revision, streaming=data.streaming, **options
        )


def _is_saved_to_disk(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _load_saved(data: HubData, split: str, name: str) -> datasets.Dataset | datasets.IterableDataset:
    import datasets

    saved = datasets.load_from_disk(data.dataset)
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ConfigError(f"{name}: no such split; there are: {', '.join(map(str, saved))}")
        saved = saved[split]
    return saved.to_iterable_dataset() if data.streaming else saved


def _texts(records: Iterator[dict[str, Any]], column: str, name: str) -> Iterator[str]:
    with _explained(name):
        for record in records:
            yield text_of(record, column, name)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Whatever `datasets`, the Hub client or the network raise, as one line.

    Their errors have no common base (OSError, ValueError, RuntimeError, and libraries'
    own), so everything is caught that is not an esdtool error already.
    """
    try:
        yield
    except (ConfigError, GeneratorExit):
        raise
    except Exception as error:
        raise ConfigError(f"{name}: cannot load the dataset: {whole_message(error)}") from error
