from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esdtool.errors import ConfigError, OutputError
from esdtool.train.data import token_store
from esdtool.train.data.batches import MicroBatch, count_targets
from esdtool.train.data.corpus import Corpus, Stream
from esdtool.train.data.open import Data, open_data
from esdtool.train.data.packing import pack
from esdtool.train.data.token_store import open_token_store
from esdtool.train.data.tokenizer import Encoder, train_tokenizer

Rows = list[tuple[int, ...]]


@pytest.fixture
def open_text(
    settings: Any, words: Callable[[int], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Data]:
    """Opens documents, local or streamed, as a run does."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def make(
        *, streaming: bool = False, documents: int = 300, rank: int = 0, world_size: int = 1, **sections: Any
    ) -> Data:
        folder = tmp_path / f"text-{documents}"
        if not folder.exists():
            folder.mkdir()
            texts = words(documents)
            for shard in range(3):
                lines = [json.dumps({"text": text}) + "\n" for text in texts[shard::3]]
                (folder / f"train-0000{shard}.jsonl").write_text("".join(lines))
        source: dict[str, Any] = {"source": "files", "files": str(folder / "*.jsonl")}
        if streaming:
            source = {"source": "huggingface", "dataset": str(folder), "shuffle_block": 32}
        data = {**source, "validation_fraction": 0.2, **sections.pop("data", {})}
        if not streaming:
            data = {key: value for key, value in data.items() if key not in ("shuffle_block", "prefetch")}
        return open_data(settings(data=data, **sections), rank=rank, world_size=world_size)

    return make


@pytest.mark.parametrize("streaming", [False, True])
def test_the_order_has_a_seed_of_its_own(open_text: Any, streaming: bool) -> None:
    def rows(data_seed: int | None, run_seed: int) -> list[Rows]:
        data = {} if data_seed is None else {"seed": data_seed}
        train = open_text(streaming=streaming, data=data, run={"seed": run_seed}).train
        return [rows_of(train.micro_batches(step)) for step in range(3)]

    assert rows(7, 0) == rows(7, 1) == rows(None, 7)
    assert rows(8, 0) != rows(7, 0)
    saved = open_text(streaming=streaming, data={"seed": 7}).train.state_dict(0)
    open_text(streaming=streaming, run={"seed": 7}).train.load_state_dict(saved)
    with pytest.raises(ConfigError, match=r"cannot resume: data\.seed differs .*\(7 then, 8 now\)"):
        open_text(streaming=streaming, data={"seed": 8}).train.load_state_dict(saved)


def rows_of(batches: list[MicroBatch]) -> Rows:
    return [tuple(row.tolist()) for batch in batches for row in batch["labels"]]


KINDS = [
    pytest.param(streaming, packing, id=f"{'stream' if streaming else 'local'}-{packing}")
    for streaming in (False, True)
    for packing in ("document", "dense")
]


@pytest.mark.parametrize(("streaming", "packing"), KINDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_does_not_depend_on_the_ranks(
    open_text: Any, streaming: bool, packing: str, world_size: int
) -> None:
    data = {"packing": packing}
    alone = open_text(streaming=streaming, data=data).train
    ranks = [
        open_text(streaming=streaming, data=data, rank=rank, world_size=world_size).train for rank in range(world_size)
    ]
    for step in range(30):
        parts = [rank.micro_batches(step) for rank in ranks]
        assert {len(part) for part in parts} == {4 // world_size}
        assert [row for part in parts for row in rows_of(part)] == rows_of(alone.micro_batches(step))


@pytest.mark.parametrize(("streaming", "packing"), KINDS)
def test_the_order_is_that_of_the_seed(open_text: Any, streaming: bool, packing: str) -> None:
    def first(seed: int) -> list[Rows]:
        train = open_text(streaming=streaming, data={"packing": packing}, run={"seed": seed}).train
        return [rows_of(train.micro_batches(step)) for step in range(4)]

    assert first(1) == first(1)
    assert first(1) != first(2)


@pytest.mark.parametrize(("streaming", "packing"), KINDS)
@pytest.mark.parametrize("stop", [0, 1, 5, 29, 47])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_run_sees_the_same_batches(
    open_text: Any, streaming: bool, packing: str, stop: int, prefetch: int
) -> None:
    """Over several epochs, with another number of ranks, and through JSON."""
    data = {"packing": packing, "prefetch": prefetch}
    whole = open_text(streaming=streaming, data=data).train
    expected = [rows_of(whole.micro_batches(step)) for step in range(stop + 8)]
    first = open_text(streaming=streaming, data=data).train
    for step in range(stop):
        first.micro_batches(step)
    state = json.loads(json.dumps(first.state_dict(stop)))
    for world_size in (1, 2):
        ranks = [
            open_text(streaming=streaming, data=data, rank=rank, world_size=world_size).train
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.load_state_dict(state)
        for step in range(stop, stop + 8):
            assert [row for rank in ranks for row in rows_of(rank.micro_batches(step))] == expected[step]


@pytest.mark.parametrize(("streaming", "packing"), KINDS)
def test_the_last_batch_can_be_saved_and_served_again(open_text: Any, streaming: bool, packing: str) -> None:
    """What a run needs that finds NaN in the loss of a batch it has already drawn."""
    train = open_text(streaming=streaming, data={"packing": packing}).train
    served = [rows_of(train.micro_batches(step)) for step in range(12)]
    state = train.state_dict(11)
    assert rows_of(train.micro_batches(11)) == served[11]
    resumed = open_text(streaming=streaming, data={"packing": packing}).train
    resumed.load_state_dict(state)
    assert rows_of(resumed.micro_batches(11)) == served[11]
    assert rows_of(resumed.micro_batches(12)) == rows_of(train.micro_batches(12))


def test_states_of_all_ranks_are_equal(open_text: Any) -> None:
    ranks = [open_text(streaming=True, data={"packing": "dense"}, rank=rank, world_size=2).train for rank in range(2)]
    for rank in ranks:
        for step in range(9):
            rank.micro_batches(step)
    assert ranks[0].state_dict(9) == ranks[1].state_dict(9)


@pytest.mark.parametrize("packing", ["document", "dense"])
def test_each_epoch_serves_every_row_once(open_text: Any, packing: str) -> None:
    data = open_text(data={"packing": packing}, batch={"global_size": 1, "micro_size": 1})
    rows = data.train_rows
    epochs = [
        [rows_of(data.train.micro_batches(step))[0] for step in range(epoch * rows, (epoch + 1) * rows)]
        for epoch in range(2)
    ]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("packing", ["document", "dense"])
def test_a_stream_serves_what_the_local_corpus_does(open_text: Any, packing: str) -> None:
    """Each epoch of a stream has every document once; dense rows are cut elsewhere, so tokens are counted."""
    sections = {"data": {"packing": packing}, "batch": {"global_size": 1, "micro_size": 1}}
    local, stream = open_text(**sections), open_text(streaming=True, **sections)
    steps = range(local.train_rows)
    tokens = [
        Counter(token for step in steps for row in rows_of(data.train.micro_batches(step)) for token in row)
        for data in (local, stream)
    ]
    if packing == "document":
        assert tokens[0] == tokens[1]
    else:
        # Rows of the same number of full length; at most one row of tokens is left over by each.
        assert tokens[0].total() == tokens[1].total()
        assert (tokens[0] - tokens[1]).total() <= 16


def test_dense_streams_lose_nothing_between_blocks(open_text: Any) -> None:
    """The rows of the first epoch hold the end of every document, but for those in the last few tokens."""
    sections = {"data": {"packing": "dense", "shuffle_block": 5}, "batch": {"global_size": 1, "micro_size": 1}}
    stream = open_text(streaming=True, **sections)
    end = stream.tokenizer.eos_token_id
    rows = [rows_of(stream.train.micro_batches(step))[0] for step in range(open_text(**sections).train_rows)]
    ends = sum(token == end for row in rows for token in row)
    documents = open_text(data={"packing": "document"}).train_rows
    assert documents - 16 <= ends <= documents


@pytest.mark.parametrize(("streaming", "packing"), KINDS)
def test_training_and_validation_share_no_document(open_text: Any, streaming: bool, packing: str) -> None:
    data = open_text(
        streaming=streaming, data={"packing": packing}, batch={"sequence_length": 512}, eval={"tokens": 10**6}
    )
    texts = [
        {
            document
            for row in rows
            for document in data.tokenizer.decode([token for token in row if token >= 0]).split("<|endoftext|>")
            if len(document) > 40
        }
        for rows in (
            [row for step in range(8) for row in rows_of(data.train.micro_batches(step))],
            rows_of(data.validation.micro_batches()),
        )
    ]
    assert texts[0]
    assert texts[1]
    if packing == "document":
        assert not texts[0] & texts[1]


@pytest.mark.parametrize(("streaming", "packing"), KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_validation_rows_do_not_depend_on_the_ranks(
    open_text: Any, streaming: bool, packing: str, world_size: int
) -> None:
    sizes = {"batch": {"global_size": 30, "micro_size": 1}, "eval": {"tokens": 203, "micro_size": 3}}
    alone = open_text(streaming=streaming, data={"packing": packing}, **sizes).validation
    ranks = [
        open_text(streaming=streaming, data={"packing": packing}, rank=rank, world_size=world_size, **sizes).validation
        for rank in range(world_size)
    ]
    served = [rank.micro_batches() for rank in ranks]
    with_targets = [row for part in served for row in rows_of(part) if sum(token >= 0 for token in row) > 1]
    assert Counter(with_targets) == Counter(row for row in rows_of(alone.micro_batches()) if row[1] >= 0)
    # Under FSDP every rank must take part in every forward pass.
    assert len({len(part) for part in served}) == 1
    targets = sum(count_targets(batch) for part in served for batch in part)
    assert targets == alone.num_targets == ranks[0].num_targets
    assert 203 <= targets < 203 + 16


def test_the_validation_budget_may_exceed_the_text(open_text: Any) -> None:
    data = open_text(eval={"tokens": 10**9}, data={"packing": "document"})
    assert data.validation.num_targets == sum(map(count_targets, data.validation.micro_batches())) < 10**4


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corpus_shorter_than_one_batch_is_an_error(open_text: Any, streaming: bool) -> None:
    sizes = {"batch": {"global_size": 4096, "micro_size": 2}}
    with pytest.raises(ConfigError, match=r"shorter than one batch: .* \d+ rows of 16, but batch.global_size is 4096"):
        open_text(streaming=streaming, documents=90, **sizes).train.micro_batches(0)


def test_an_empty_corpus_is_an_error(settings: Any, tmp_path: Path, words: Any) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    data = {"source": "files", "files": str(tmp_path / "blank.txt")}
    with pytest.raises(ConfigError, match=r"tokenizer.train_vocab_size 300 is more than the 257 tokens"):
        open_data(settings(data=data))
    encoder = Encoder(train_tokenizer(Corpus(name="x", fingerprint="x", documents=lambda: iter(words(50))), 300))
    with pytest.raises(ConfigError, match="test: the corpus is empty: no document has any text"):
        open_token_store(Corpus(name="test", fingerprint="0", documents=lambda: iter([])), encoder)


def test_no_validation_text_is_an_error(open_text: Any) -> None:
    with pytest.raises(ConfigError, match=r"no validation text; raise data.validation_fraction"):
        open_text(data={"validation_fraction": 1e-9})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"run": {"seed": 5}}, r"run.seed differs from the checkpoint's \(0 then, 5 now\)"),
        ({"batch": {"global_size": 4}}, r"batch.global_size differs from the checkpoint's \(8 then, 4 now\)"),
        ({"batch": {"sequence_length": 8}}, r"batch.sequence_length differs"),
        ({"data": {"packing": "document"}}, r"data.packing differs from the checkpoint's \(dense then, document now\)"),
        ({"data": {"validation_fraction": 0.3}}, r"the training text differs from the checkpoint's, so"),
        ({"tokenizer": {"train_vocab_size": 301}}, r"the tokenizer differs from the checkpoint's, so"),
    ],
)
def test_resuming_with_other_batches_is_refused(
    open_text: Any, streaming: bool, sections: dict[str, Any], expected: str
) -> None:
    state = open_text(streaming=streaming).train.state_dict(0)
    with pytest.raises(ConfigError, match=f"^cannot resume: {expected}"):
        open_text(streaming=streaming, **sections).train.load_state_dict(state)


def test_the_micro_batch_size_may_change_on_resume(open_text: Any) -> None:
    state = open_text().train.state_dict(3)
    other = open_text(batch={"micro_size": 4}).train
    other.load_state_dict(state)
    assert rows_of(other.micro_batches(3)) == rows_of(open_text().train.micro_batches(3))


def test_ranks_that_do_not_divide_the_batch_are_refused(open_text: Any) -> None:
    with pytest.raises(ConfigError, match=r"8 is not divisible by batch.micro_size 2 x 3 ranks"):
        open_text(world_size=3)


def test_tokens_are_cached_and_made_anew_if_broken(open_text: Any, cache: Path) -> None:
    expected = rows_of(open_text().train.micro_batches(0))
    (tokens,) = (cache / "tokens").glob("*.tokens")
    written = tokens.stat().st_mtime_ns
    assert rows_of(open_text().train.micro_batches(0)) == expected
    assert tokens.stat().st_mtime_ns == written
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert rows_of(open_text().train.micro_batches(0)) == expected
    next((cache / "tokens").glob("*.npy")).write_bytes(b"")
    assert rows_of(open_text().train.micro_batches(0)) == expected


def test_a_full_disk_leaves_no_half_cache(open_text: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(token_store.np, "save", no_space)
        with pytest.raises(OutputError, match="No space left on device"):
            open_text()
    assert not list((cache / "tokens").glob("*.npy"))
    assert open_text().train_rows > 0


def test_the_token_store_holds_the_documents(words: Any) -> None:
    documents = words(40)
    corpus = Corpus(name="test", fingerprint="1", documents=lambda: iter(documents))
    encoder = Encoder(train_tokenizer(corpus, 280))
    store = open_token_store(corpus, encoder)
    encoded = encoder.encode(documents)
    assert all(np.array_equal(store.document(index), ids) for index, ids in enumerate(encoded))
    for packing in ("document", "dense"):
        rows = [store.row(index, packing, 16).tolist() for index in range(store.num_rows(packing, 16))]
        expected = [row.tolist() for row in pack(encoded, packing, 16)]
        assert rows == (expected if packing == "document" or len(expected[-1]) == 16 else expected[:-1])


def test_an_error_in_the_background_thread_reaches_the_loop(open_text: Any) -> None:
    train = open_text(streaming=True).train

    def broken(position: Any) -> Any:
        raise ConfigError("the network is gone")

    assert isinstance(train._stream, Stream)
    train._stream = replace(train._stream, reader=broken)
    with pytest.raises(ConfigError, match="the network is gone"):
        train.micro_batches(0)


@pytest.mark.parametrize(("streaming", "packing"), KINDS)
def test_batches_are_whole_tensors(open_text: Any, streaming: bool, packing: str) -> None:
    for batch in open_text(streaming=streaming, data={"packing": packing}).train.micro_batches(0):
        assert ("attention_mask" in batch) == (packing == "document")
        assert all(tensor.shape == (2, 16) and tensor.dtype == torch.int64 for tensor in batch.values())
