from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from esdtool.errors import ConfigError, OutputError
from esdtool.train.data.corpus import Corpus
from esdtool.train.data.tokenizer import END_OF_TEXT, Encoder, load_tokenizer, train_tokenizer


def corpus_of(documents: list[str], fingerprint: str = "test") -> Corpus:
    return Corpus(name="test corpus", fingerprint=fingerprint, documents=lambda: iter(documents))


@pytest.fixture
def corpus(words: Callable[[int], list[str]]) -> Corpus:
    return corpus_of(words(50))


def unigram(pieces: list[str], **special: str) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer as T5's: its special tokens are pieces of its vocabulary."""
    vocabulary = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.index("<unk>")))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def t5_like() -> PreTrainedTokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefgh", "▁a", "<extra_id_0>", "<extra_id_1>"]
    tokenizer = unigram(pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]})
    return tokenizer


def test_training_gives_the_size_asked_for_and_every_byte(corpus: Corpus) -> None:
    tokenizer = train_tokenizer(corpus, 300)
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    text = "any text: äöü 第三 🙂\x00\t"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic_and_cached_by_content(corpus: Corpus, cache: Path) -> None:
    first = train_tokenizer(corpus, 300).backend_tokenizer.to_str()
    (file,) = (cache / "tokenizers").glob("*.json")
    written = file.stat().st_mtime_ns
    assert train_tokenizer(corpus, 300).backend_tokenizer.to_str() == first
    assert file.stat().st_mtime_ns == written
    file.unlink()
    assert train_tokenizer(corpus, 300).backend_tokenizer.to_str() == first
    train_tokenizer(corpus, 301)
    train_tokenizer(corpus_of(["other " * 50 + "text"], "other"), 260)
    assert len(list((cache / "tokenizers").glob("*.json"))) == 3


def test_more_tokens_than_the_text_has_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"train_vocab_size 5000 is more than the \d+ tokens that test corpus"):
        train_tokenizer(corpus_of(["ab ab"]), 5000)


def test_a_cache_that_cannot_be_made_is_named(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ESDTOOL_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="ESDTOOL_CACHE_DIR"):
        train_tokenizer(corpus, 300)


def test_documents_end_with_end_of_text(corpus: Corpus) -> None:
    tokenizer = train_tokenizer(corpus, 300)
    encoder = Encoder(tokenizer)
    (ids,) = encoder.encode(["word1x1 word2x2"])
    assert ids.tolist() == [*tokenizer.encode("word1x1 word2x2"), tokenizer.eos_token_id]
    assert ids.dtype == np.uint16
    assert (encoder.begin, encoder.vocab_size, encoder.pad) == (None, 300, tokenizer.eos_token_id)


def test_documents_begin_with_what_the_tokenizer_itself_begins_with() -> None:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    assert Encoder(plain).encode(["a a"])[0].tolist() == [2, 2, 1]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    beginning = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    assert Encoder(beginning).encode(["a a"])[0].tolist() == [0, 2, 2, 1]


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b {END_OF_TEXT}"])
def test_special_tokens_in_the_text_are_ordinary_characters(corpus: Corpus, text: str) -> None:
    tokenizer = train_tokenizer(corpus, 300)
    (ids,) = Encoder(tokenizer).encode([text])
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(ids[:-1]) == text


def test_special_pieces_of_a_unigram_vocabulary_become_unknown(t5_like: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(t5_like)
    (ids,) = encoder.encode(["a </s> <extra_id_1> b <pad>"])
    assert set(ids.tolist()[:-1]) & {0, 1, 13, 14} == set()
    assert 2 in ids.tolist()
    assert ids[-1] == 1


def test_sentinels_need_no_place_in_the_model(t5_like: PreTrainedTokenizerFast) -> None:
    """T5 has 32,100 tokens, the paper's models 32,000: the last hundred never occur in text."""
    assert len(t5_like) == 15
    assert Encoder(t5_like).vocab_size == 13


def test_a_tokenizer_without_end_of_text_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no end-of-text token"):
        Encoder(unigram(["<unk>", "a"], unk_token="<unk>"))


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(documents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=8))
def test_encoding_loses_nothing(documents: list[str]) -> None:
    tokenizer = train_tokenizer(corpus_of(["some text " * 9], "fixed"), 260)
    encoder = Encoder(tokenizer)
    encoded = list(encoder.encode_all(documents))
    assert [tokenizer.decode(ids[:-1]) for ids in encoded] == documents
    assert all(np.array_equal(one, two) for one, two in zip(encoded, encoder.encode(documents), strict=True))


def test_the_tokenizer_itself_stays_as_it_is(corpus: Corpus) -> None:
    tokenizer = train_tokenizer(corpus, 300)
    before = tokenizer.encode(f"a{END_OF_TEXT}")
    Encoder(tokenizer).encode(["text"])
    assert tokenizer.encode(f"a{END_OF_TEXT}") == before


def test_fingerprints_tell_tokenizers_apart(corpus: Corpus, t5_like: PreTrainedTokenizerFast) -> None:
    tokenizers = [train_tokenizer(corpus, 300), train_tokenizer(corpus, 301), t5_like, train_tokenizer(corpus, 300)]
    prints = [Encoder(tokenizer).fingerprint for tokenizer in tokenizers]
    assert prints[0] == prints[3]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("what", ["folder", "file with its settings", "bare file"])
def test_a_saved_tokenizer_is_found_again(settings: Any, corpus: Corpus, tmp_path: Path, what: str) -> None:
    saved = train_tokenizer(corpus, 300)
    saved.save_pretrained(tmp_path)
    if what == "bare file":
        (tmp_path / "tokenizer_config.json").unlink()
    path = tmp_path if what == "folder" else tmp_path / "tokenizer.json"
    loaded = load_tokenizer(settings(tokenizer={"file": str(path)}), corpus)
    assert loaded.eos_token_id == saved.eos_token_id
    assert loaded.encode("word1x1 word5x5") == saved.encode("word1x1 word5x5")


def test_without_a_tokenizer_that_of_the_checkpoint_is_taken(settings: Any, corpus: Corpus, tmp_path: Path) -> None:
    train_tokenizer(corpus, 300).save_pretrained(tmp_path)
    assert len(load_tokenizer(settings(model={"from": str(tmp_path)}, tokenizer={}), corpus)) == 300


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        ({"file": "no/such/file.json"}, "tokenizer.file no/such/file.json: no such file or folder"),
        ({"file": "EMPTY"}, "cannot load"),
        ({"file": "BROKEN"}, "not a tokenizer.json"),
        ({"name": "no-such-organisation/no-such-tokenizer"}, "tokenizer.name no-such-organisation/no-such-tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_had(
    settings: Any, corpus: Corpus, tmp_path: Path, tokenizer: dict[str, str], expected: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    places = {"EMPTY": str(tmp_path / "empty"), "BROKEN": str(tmp_path / "broken.json")}
    keys = {key: places.get(value, value) for key, value in tokenizer.items()}
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(settings(tokenizer=keys), corpus)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
