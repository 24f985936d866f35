from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esdtool.errors import ConfigError
from esdtool.train.config.sections import FilesData, HubData
from esdtool.train.data.corpus import Corpus, Splits, Stream, held_out_splits, is_held_out
from esdtool.train.data.corpus_files import find_files
from esdtool.train.data.corpus_stdlib import stdlib_corpus, stdlib_files
from esdtool.train.data.open import open_corpus

DOCUMENTS = ["first text", "zweiter Text: äöü", "third 第三 🙂"]


def of_files(*patterns: Path | str, **keys: Any) -> Splits:
    """A corpus of files, as one split with everything but a sliver held in."""
    return open_corpus(FilesData(source="files", files=tuple(map(str, patterns)), **keys))


def all_documents(splits: Splits) -> list[str]:
    return [*splits.train.documents(), *splits.validation.documents()]


def write(path: Path, documents: Sequence[str]) -> Path:
    """The same documents in whatever format the suffix says."""
    lines = "".join(json.dumps({"text": document, "id": index}) + "\n" for index, document in enumerate(documents))
    if path.name.endswith(".jsonl"):
        path.write_text(lines)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".jsonl.zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines.encode())
    elif path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(documents)), "text": documents}), path)
    else:
        path.write_text("\n".join(documents), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "A.JSONL"])
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    write(tmp_path / name.lower(), DOCUMENTS).rename(tmp_path / name)
    assert sorted(all_documents(of_files(tmp_path / name))) == sorted(DOCUMENTS)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("file", ["a\nb\n\n  \nc\n"]), ("line", ["a", "b", "c"]), ("paragraph", ["a\nb", "c\n"])],
)
def test_a_txt_file_is_one_document_or_many(tmp_path: Path, unit: str, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_text("a\nb\n\n  \nc\n")
    assert sorted(all_documents(of_files(tmp_path / "a.txt", txt_document=unit))) == expected


def test_the_order_is_that_of_the_paths_and_each_file_counts_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b", "a", "sub/c"):
        (tmp_path / f"{name}.txt").write_text(name)
    splits = of_files(tmp_path / "**" / "*.txt", tmp_path / "a.txt", validation_fraction=1e-9)
    assert list(splits.train.documents()) == ["a", "b", "sub/c"]


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["", " \n\t", "text"])
    assert all_documents(of_files(tmp_path / "a.jsonl")) == ["text"]


def test_half_a_character_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude42"}\n')
    assert all_documents(of_files(tmp_path / "a.jsonl")) == ["a � b 🙂"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8 text"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl: not UTF-8 text"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'["text"]\n', "a.jsonl, line 1: expected a JSON object, found list"),
        ("a.jsonl", b'{"body": "x", "id": 3}\n', "line 1: no column 'text'; there are: body, id (data.text_column)"),
        ("a.jsonl", b'{"text": null}\n', "line 1: column 'text' holds NoneType, not text"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12], "a.jsonl.gz: cannot read"),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst: cannot read"),
        ("a.parquet", b"no parquet", "a.parquet: not a parquet file"),
        ("a.csv", b"text\nx\n", "a.csv is of an unknown kind; there are .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        all_documents(of_files(tmp_path / name))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column_lists_those_it_has(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", DOCUMENTS)
    with pytest.raises(ConfigError, match=r"a.parquet: no column 'body'; there are: id, text"):
        all_documents(of_files(tmp_path / "a.parquet", text_column="body"))


def test_a_glob_without_a_match_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"data.files: '.*/\*.md' matches no file"):
        of_files(tmp_path / "a.txt", tmp_path / "*.md")
    with pytest.raises(ConfigError, match=r"it is a folder, did you mean .*/\*\*/\*.txt\?"):
        of_files(tmp_path)
    with pytest.raises(ConfigError, match=r"data.validation_files: '.*none' matches no file"):
        of_files(tmp_path / "a.txt", validation_files=(str(tmp_path / "none"),))


def test_a_glob_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert find_files(["*.txt"]) == [Path("a.txt")]


def test_a_file_on_both_sides_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("other")
    with pytest.raises(ConfigError, match=r"b.txt is matched by both data.files and data.validation_files"):
        of_files(tmp_path / "*.txt", validation_files=(str(tmp_path / "b.txt"),))
    splits = of_files(tmp_path / "a.txt", validation_files=(str(tmp_path / "b.txt"),))
    assert (list(splits.train.documents()), list(splits.validation.documents())) == (["text"], ["other"])


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    original = of_files(write(tmp_path / "a.jsonl", DOCUMENTS))
    moved = of_files(write(tmp_path / "z.jsonl", DOCUMENTS))
    changed = of_files(write(tmp_path / "c.jsonl", DOCUMENTS[:2]))
    other_split = of_files(tmp_path / "a.jsonl", validation_fraction=0.5)
    prints = [splits.train.fingerprint for splits in (original, moved, changed, other_split)]
    assert prints[0] == prints[1]
    assert len({*prints, original.validation.fingerprint}) == 4


@given(documents=st.lists(st.text(min_size=1), max_size=60), fraction=st.floats(0.01, 0.99))
def test_the_split_is_disjoint_and_whole(documents: list[str], fraction: float) -> None:
    corpus = Corpus(name="test", fingerprint="0", documents=lambda: iter(documents))
    splits = held_out_splits(corpus, fraction)
    train, validation = list(splits.train.documents()), list(splits.validation.documents())
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(documents)
    assert [document for document in documents if document in set(train)] == train


def test_the_held_out_fraction_is_about_what_was_asked_for() -> None:
    share = sum(is_held_out(f"document {index}", 0.1) for index in range(10_000)) / 10_000
    # Binomial: standard deviation 0.003.
    assert abs(share - 0.1) < 0.015


def test_a_larger_fraction_holds_out_a_superset() -> None:
    documents = [f"document {index}" for index in range(500)]
    small, large = ({text for text in documents if is_held_out(text, fraction)} for fraction in (0.1, 0.3))
    assert small < large


def test_stdlib_leaves_out_tests_and_installed_packages(tmp_path: Path) -> None:
    for name in (
        "os.py",
        "json/encoder.py",
        "json/tests/test_json.py",
        "test/test_os.py",
        "idlelib/run.py",
        "site-packages/numpy/core.py",
        "_sysconfigdata__linux.py",
        "test_support_like_name.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    found = [str(file.relative_to(tmp_path)) for file in stdlib_files(tmp_path)]
    assert found == ["json/encoder.py", "os.py", "test_support_like_name.py"]


def test_stdlib_obeys_the_encoding_that_a_file_declares(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = 'caf\xe9'\n")
    assert "café" in next(stdlib_corpus(tmp_path).documents())
    (tmp_path / "a.py").write_bytes(b"x = 'caf\xe9'\n")
    with pytest.raises(ConfigError, match=r"a.py: cannot read as Python source"):
        list(stdlib_corpus(tmp_path).documents())


def test_a_python_without_library_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this Python has no library source"):
        stdlib_corpus(tmp_path)


def test_the_real_stdlib_is_megabytes_of_source() -> None:
    documents = list(stdlib_corpus().documents())
    assert sum(map(len, documents)) > 5_000_000
    assert any("class OrderedDict" in document for document in documents)


@pytest.fixture
def dataset_folder(tmp_path: Path, words: Callable[[int], list[str]]) -> Path:
    """A dataset that `datasets` finds without a network: two shards of training text, and a validation split."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    documents = words(60)
    write(folder / "train-00000-of-00002.jsonl", documents[:35])
    write(folder / "train-00001-of-00002.jsonl", documents[35:])
    write(folder / "validation.jsonl", ["held out a", "held out b"])
    return folder


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_with_a_validation_split(dataset_folder: Path, words: Callable, streaming: bool) -> None:
    settings = HubData(
        source="huggingface", dataset=str(dataset_folder), validation_split="validation", streaming=streaming
    )
    splits = open_corpus(settings)
    assert isinstance(splits.train, Stream) == streaming
    assert list(splits.train.documents()) == words(60)
    assert list(splits.train.documents()) == words(60)
    assert list(splits.validation.documents()) == ["held out a", "held out b"]
    assert splits.train.fingerprint != splits.validation.fingerprint


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_saved_to_disk(tmp_path: Path, streaming: bool) -> None:
    import datasets

    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": DOCUMENTS})})
    saved.save_to_disk(tmp_path / "saved")
    settings = {"source": "huggingface", "dataset": str(tmp_path / "saved"), "streaming": streaming}
    assert sorted(all_documents(open_corpus(HubData(**settings)))) == sorted(DOCUMENTS)
    with pytest.raises(ConfigError, match="no such split; there are: train"):
        open_corpus(HubData(**settings, split="test"))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"dataset": "no-such-organisation/no-such-dataset"}, "cannot load the dataset"),
        ({"split": "nonsense"}, "cannot load the dataset"),
        ({"text_column": "body"}, "no column 'body'; there are: "),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_that_cannot_be_had(
    dataset_folder: Path, keys: dict[str, str], expected: str, streaming: bool
) -> None:
    settings = HubData(**{"source": "huggingface", "dataset": str(dataset_folder), "streaming": streaming, **keys})
    with pytest.raises(ConfigError) as caught:
        list(open_corpus(settings).train.documents())
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("consumed", [0, 1, 10, 34, 35, 36, 59, 60])
@pytest.mark.parametrize("fraction", [None, 0.3])
def test_a_stream_goes_on_where_it_was_saved(dataset_folder: Path, consumed: int, fraction: float | None) -> None:
    held_out = {"validation_split": "validation"} if fraction is None else {"validation_fraction": fraction}
    stream = open_corpus(HubData(source="huggingface", dataset=str(dataset_folder), **held_out)).train
    assert isinstance(stream, Stream)
    whole = list(stream.documents())
    reader = stream.reader(None)
    before = reader.read(consumed)
    position = json.loads(json.dumps(reader.position()))
    assert before + stream.reader(position).read(1000) == whole
    assert before + reader.read(1000) == whole
