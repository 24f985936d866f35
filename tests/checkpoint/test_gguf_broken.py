"""GGUF files that are damaged, truncated, something else, or cannot be read here: one line each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from esdtool.checkpoint import open_checkpoint
from esdtool.errors import CheckpointError, MissingExtraError
from tests.checkpoint.gguf_files import Writer, normal, writer_to


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """See `writer_to`."""
    return writer_to(tmp_path)


def test_truncated_anywhere(write: Writer) -> None:
    path = write({"blk.0.attn_q.weight": normal(4, 8)}, sizes={"some_names": ["a", "bc"], "block_count": 1})
    whole = path.read_bytes()
    for size in [*range(1, 300, 7), len(whole) - 1]:
        if size >= len(whole):
            continue
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_damaged_anywhere(write: Writer) -> None:
    """Any byte of the header may be wrong: an error of one line, or a catalogue; never another exception."""
    path = write({"blk.0.attn_q.weight": normal(4, 8)}, sizes={"some_names": ["a", "bc"], "block_count": 1})
    whole = path.read_bytes()
    refused: list[str] = []
    for position in range(0, 240):
        for value in (0xFF, 0x00):
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            try:
                open_checkpoint(path)
            except CheckpointError as error:
                refused.append(str(error))
    assert len(refused) > 100
    assert not [message for message in refused if "\n" in message]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"PK\x03\x04 something else", "not a GGUF file: it does not begin with 'GGUF'"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "GGUF version 1, which is not read"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian, which is not read"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "truncated within its header"),
    ],
)
def test_not_gguf(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_without_the_extra(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write({"x": normal(4)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: reading a GGUF file needs an optional extra: pip install 'esdtool[gguf]'"


def test_file_that_shrinks_after_opening(write: Writer) -> None:
    path = write({"x": normal(64, 64)})
    file = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="tensor 'x': cannot read: the file has become shorter"):
        file.read("x")
