"""Local text files as a corpus: .txt, .jsonl (plain, .gz, .zst) and .parquet, found by glob."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, cast

from esdtool.errors import ConfigError, MissingExtraError
from esdtool.train.config.sections import FilesData
from esdtool.train.data.corpus import Corpus, fingerprint_of, not_blank

SUFFIXES: Final = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def files_corpus(patterns: Sequence[str], *, key: str, data: FilesData) -> Corpus:
    """Return the documents of all files that match, in the order of their paths.

    Args:
        patterns: globs; `**` descends into folders.
        key: the setting that the patterns come from, for messages.
        data: column, and what a document of a .txt file is.

    Raises:
        ConfigError: for a pattern without a match, a file of another kind, or one that cannot be read.
    """
    files = find_files(patterns, key=key)

    def documents() -> Iterator[str]:
        return not_blank(document for file in files for document in _read(file, data))

    # By content and order, not by name: moving a corpus keeps what was tokenised.
    contents = [digest for file in files for digest in (_suffix(file), _digest(file))]
    fingerprint = fingerprint_of("files", data.text_column, data.txt_document, *contents)
    return Corpus(name=f"{key} {', '.join(patterns)}", fingerprint=fingerprint, documents=documents)


def find_files(patterns: Sequence[str], *, key: str = "data.files") -> list[Path]:
    """Return every file that matches one of the globs, once, sorted.

    Raises:
        ConfigError: for a pattern that matches no file, and for a file of an unknown kind.
    """
    found: set[Path] = set()
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        files = [Path(name) for name in glob.glob(expanded, recursive=True) if Path(name).is_file()]  # noqa: PTH207
        if not files:
            is_folder = Path(expanded).is_dir()
            remedy = f"; it is a folder, did you mean {pattern.rstrip('/')}/**/*.txt?" if is_folder else ""
            raise ConfigError(f"{key}: {pattern!r} matches no file (working directory {Path.cwd()}){remedy}")
        found.update(files)
    for file in found:
        if _suffix(file) is None:
            raise ConfigError(f"{key}: {file} is of an unknown kind; there are {', '.join(SUFFIXES)}")
    return sorted(found)


def check_disjoint(train: Sequence[str], validation: Sequence[str]) -> None:
    """Refuse a file that is both training and validation text.

    Raises:
        ConfigError: naming the first such file.
    """
    ours = {file.resolve(): file for file in find_files(train)}
    for file in find_files(validation, key="data.validation_files"):
        if file.resolve() in ours:
            raise ConfigError(f"{file} is matched by both data.files and data.validation_files")


def _suffix(file: Path) -> str | None:
    name = file.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _digest(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError as error:
        raise ConfigError(f"{file}: cannot read: {error.strerror}") from error


def _read(file: Path, data: FilesData) -> Iterator[str]:
    try:
        if _suffix(file) == ".parquet":
            yield from _read_parquet(file, data.text_column)
        elif _suffix(file) == ".txt":
            yield from _read_txt(file, data.txt_document)
        else:
            yield from _read_jsonl(file, data.text_column)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text ({error.reason}); convert it first") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{file}: cannot read: {getattr(error, 'strerror', None) or error}") from error


def _read_txt(file: Path, unit: str) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as stream:
        if unit == "line":
            yield from (line.rstrip("\n") for line in stream)
        elif unit == "paragraph":
            yield from re.split(r"\n\s*\n", stream.read())
        else:
            yield stream.read()


def _read_jsonl(file: Path, column: str) -> Iterator[str]:
    with _open_text(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}, line {number}: not valid JSON: {error}") from error
            if not isinstance(record, dict):
                raise ConfigError(f"{file}, line {number}: expected a JSON object, found {type(record).__name__}")
            yield text_of(record, column, f"{file}, line {number}")


def text_of(record: dict[str, Any], column: str, where: str) -> str:
    """Return the text of one record.

    Raises:
        ConfigError: if there is no such column (lists those that there are), or it holds no text.
    """
    if column not in record:
        columns = ", ".join(map(str, record)) or "none"
        raise ConfigError(f"{where}: no column {column!r}; there are: {columns} (data.text_column)")
    text = record[column]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: column {column!r} holds {type(text).__name__}, not text (data.text_column)")
    # JSON can spell half a character (a lone surrogate), which no encoding has: the replacement character instead.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _open_text(file: Path) -> IO[str]:
    suffix = _suffix(file)
    if suffix == ".jsonl.gz":
        return gzip.open(file, "rt", encoding="utf-8")
    if suffix == ".jsonl.zst":
        raw = cast(IO[bytes], _pyarrow(file).input_stream(str(file), compression="zstd"))
        return io.TextIOWrapper(raw, encoding="utf-8")
    return file.open(encoding="utf-8-sig")


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    arrow = _pyarrow(file)
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
    except arrow.ArrowInvalid as error:
        raise ConfigError(f"{file}: not a parquet file: {str(error).splitlines()[0]}") from error
    names = table.schema_arrow.names
    if column not in names:
        raise ConfigError(f"{file}: no column {column!r}; there are: {', '.join(names)} (data.text_column)")
    row = 0
    for batch in table.iter_batches(columns=[column]):
        for value in batch.column(0):
            row += 1
            yield text_of({column: value.as_py()}, column, f"{file}, row {row}")


def _pyarrow(file: Path) -> Any:
    """Import pyarrow, which comes with `datasets`."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError(f"reading {file}", "train") from error
    return pyarrow
