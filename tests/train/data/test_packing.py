from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from esdtool.train.data.packing import count_targets, document_row, pack, targets_of, to_micro_batch, to_micro_batches

DOCUMENTS = st.lists(st.lists(st.integers(1, 999), max_size=30).map(lambda ids: np.array([*ids, 0], dtype=np.uint16)))


@given(documents=DOCUMENTS, length=st.integers(2, 20))
def test_dense_rows_are_the_joined_documents(documents: list[Any], length: int) -> None:
    rows = list(pack(documents, "dense", length))
    joined = np.concatenate([*documents, np.array([], dtype=np.uint16)])
    assert np.array_equal(np.concatenate([*rows, joined[:0]]), joined)
    assert all(len(row) == length for row in rows[:-1])
    assert all(0 < len(row) <= length for row in rows)


@given(documents=DOCUMENTS, length=st.integers(2, 20))
def test_document_rows_are_what_transformers_truncation_gives(documents: list[Any], length: int) -> None:
    rows = list(pack(documents, "document", length))
    for row, document in zip(rows, documents, strict=True):
        # A tokenizer cuts the text so that the end-of-text token still fits.
        assert row.tolist() == [*document[:-1].tolist()[: length - 1], 0]


@pytest.mark.parametrize(("size", "expected"), [(1, [0]), (4, [1, 2, 3, 0]), (5, [1, 2, 3, 0]), (9, [1, 2, 3, 0])])
def test_a_cut_document_still_ends(size: int, expected: list[int]) -> None:
    assert document_row(np.array([*range(1, size), 0]), 4).tolist() == expected


def test_tensors_of_padded_rows() -> None:
    rows = [
        np.array([5, 6, 0], dtype=np.uint16),
        np.array([7, 8, 9, 0], dtype=np.uint16),
        np.array([0], dtype=np.uint16),
    ]
    batch = to_micro_batch(rows, packing="document", length=4, pad=3)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 3], [7, 8, 9, 0], [0, 3, 3, 3]]
    assert batch["labels"].tolist() == [[5, 6, 0, -100], [7, 8, 9, 0], [0, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert count_targets(batch) == sum(map(targets_of, rows)) == 5
    assert set(to_micro_batch(rows, packing="dense", length=4, pad=3)) == {"input_ids", "labels"}


def test_end_of_text_is_a_target_even_where_it_also_pads() -> None:
    batch = to_micro_batch([np.array([5, 0])], packing="document", length=3, pad=0)
    assert batch["labels"].tolist() == [[5, 0, -100]]


@pytest.mark.parametrize(("rows", "sizes"), [(0, []), (1, [1]), (4, [2, 2]), (5, [2, 2, 1])])
def test_micro_batches_take_consecutive_rows(rows: int, sizes: list[int]) -> None:
    batches = to_micro_batches(
        [np.array([index, 0]) for index in range(rows)], micro_size=2, packing="dense", length=2, pad=0
    )
    assert [len(batch["labels"]) for batch in batches] == sizes
    assert [int(row[0]) for batch in batches for row in batch["input_ids"]] == list(range(rows))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).double()


@pytest.mark.parametrize("packing", ["document", "dense"])
def test_padding_changes_no_loss(model: LlamaForCausalLM, packing: Any) -> None:
    """The sum over a padded batch is that of each row by itself, by transformers' own shift and mean."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 50, size) for size in (2, 7, 11, 16)]
    batch = to_micro_batch(rows, packing=packing, length=16, pad=0)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor(row[None]), labels=torch.tensor(row[None])).loss for row in rows]
        together = model(**batch).loss * count_targets(batch)
    expected = sum(float(loss) * (len(row) - 1) for loss, row in zip(alone, rows, strict=True))
    assert float(together) == pytest.approx(expected, rel=1e-6)
