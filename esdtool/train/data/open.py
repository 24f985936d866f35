"""From the settings to batches: corpus, tokenizer and packing put together.

The loop's view of the data:

    data = open_data(config, rank=rank, world_size=world_size)
    model = build_model(config, vocab_size=data.vocab_size, tokenizer=data.tokenizer)
    for step in range(start, config.schedule.steps):
        for micro_batch in data.train.micro_batches(step):      # this rank's part, equally many on each rank
            ...                                                  # sum of losses / count_targets over all ranks
    for micro_batch in data.validation.micro_batches():
        ...                                                      # sum of losses / data.validation.num_targets
    state = data.train.state_dict(step + 1)                      # plain values
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esdtool.train.config.sections import DataSettings, FilesData, HubData, StdlibData
from esdtool.train.config.train_config import DEFAULT_FRACTION, TrainConfig
from esdtool.train.data import corpus_files, corpus_hub, corpus_stdlib
from esdtool.train.data.batches import BatchLayout, TrainBatches, ValidationBatches
from esdtool.train.data.corpus import Corpus, Splits, Stream, held_out_splits
from esdtool.train.data.local_batches import LocalBatches
from esdtool.train.data.packing import Ids, pack
from esdtool.train.data.stream_batches import StreamBatches
from esdtool.train.data.token_store import open_token_store
from esdtool.train.data.tokenizer import Encoder, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Data:
    """Everything that a run reads."""

    tokenizer: PreTrainedTokenizerFast
    """Saved beside the model (`tokenizer.save_pretrained`)."""
    vocab_size: int
    """Smallest vocabulary of a model that holds every token of the rows."""
    train: TrainBatches
    """Batches by step."""
    validation: ValidationBatches
    """Held-out rows, the same for every run of the same text."""
    train_tokens: int | None
    """Tokens in one pass over the training text; None for a stream."""
    train_rows: int | None
    """Rows in one pass over the training text; None for a stream."""


def open_data(
    config: TrainConfig, *, rank: int = 0, world_size: int = 1, on_phase: Callable[[str], None] | None = None
) -> Data:
    """Open the corpus, load or train the tokenizer, tokenise what is local, and check that there is enough.

    Every rank calls it; the first one to come does the work under a file lock in the
    cache directory, the others wait and read.

    Args:
        config: the run.
        rank: this process among the others.
        world_size: how many there are.
        on_phase: is told what is being done.

    Raises:
        ConfigError: for text or tokenizers that cannot be had, and for a corpus shorter than one batch.
        OutputError: if the cache cannot be written.
    """
    tell: Callable[[str], object] = on_phase or str
    tell("reading the text")
    splits = open_corpus(config.data)
    tell("loading the tokenizer" if config.tokenizer.train_vocab_size is None else "training the tokenizer")
    tokenizer = load_tokenizer(config, splits.train)
    encoder = Encoder(tokenizer)
    layout = BatchLayout.from_config(config, pad=encoder.pad, rank=rank, world_size=world_size)
    tell("tokenizing and packing the validation text")
    validation = open_validation(
        splits.validation, encoder, layout, tokens=config.eval.tokens, micro_size=config.eval_micro_size
    )
    seed, seed_key = config.data_seed, "run.seed" if config.data.seed is None else "data.seed"
    if isinstance(splits.train, Stream):
        assert isinstance(config.data, HubData)
        batches = StreamBatches(
            splits.train,
            encoder,
            layout,
            seed=seed,
            seed_key=seed_key,
            block_size=config.data.shuffle_block,
            prefetch=config.data.prefetch,
        )
        return Data(
            tokenizer=tokenizer,
            vocab_size=encoder.vocab_size,
            train=batches,
            validation=validation,
            train_tokens=None,
            train_rows=None,
        )
    tell("tokenizing the training text")
    store = open_token_store(splits.train, encoder)
    local = LocalBatches(
        store,
        layout,
        seed=seed,
        seed_key=seed_key,
        corpus_fingerprint=splits.train.fingerprint,
        tokenizer_fingerprint=encoder.fingerprint,
        name=splits.train.name,
    )
    return Data(
        tokenizer=tokenizer,
        vocab_size=encoder.vocab_size,
        train=local,
        validation=validation,
        train_tokens=len(store.tokens),
        train_rows=local.num_rows,
    )


def open_validation(
    corpus: Corpus, encoder: Encoder, layout: BatchLayout, *, tokens: int, micro_size: int
) -> ValidationBatches:
    """Return the first `tokens` targets of a corpus as batches: for the run's own validation and for `esdtool eval`.

    Raises:
        ConfigError: if the corpus holds no text.
    """
    return ValidationBatches(
        pack(_documents(corpus, encoder), layout.packing, layout.sequence_length),
        layout,
        tokens=tokens,
        micro_size=micro_size,
        name=corpus.name,
    )


def _documents(corpus: Corpus, encoder: Encoder) -> Iterator[Ids]:
    """Token ids of every document. Tokenised as they are asked for: a budget seldom needs all of them."""
    yield from encoder.encode_all(corpus.documents())


def open_corpus(data: DataSettings) -> Splits:
    """Return the training and the validation text that [data] describes.

    Raises:
        ConfigError: for globs without a match, unreadable files and datasets that cannot be had. What is wrong
            inside a file is raised when the documents are read.
    """
    match data:
        case StdlibData():
            corpus = corpus_stdlib.stdlib_corpus()
        case FilesData():
            corpus = corpus_files.files_corpus(data.files, key="data.files", data=data)
            if data.validation_files is not None:
                validation = corpus_files.files_corpus(data.validation_files, key="data.validation_files", data=data)
                corpus_files.check_disjoint(data.files, data.validation_files)
                return Splits(train=corpus, validation=validation)
        case HubData():
            corpus = corpus_hub.hub_corpus(data, data.split)
            if data.validation_split is not None:
                return Splits(train=corpus, validation=corpus_hub.hub_corpus(data, data.validation_split))
    return held_out_splits(corpus, data.validation_fraction or DEFAULT_FRACTION)


def open_whole_corpus(data: DataSettings) -> Corpus:
    """Return all of the text, nothing held out."""
    match data:
        case StdlibData():
            return corpus_stdlib.stdlib_corpus()
        case FilesData():
            return corpus_files.files_corpus(data.files, key="--data", data=data)
        case HubData():
            return corpus_hub.hub_corpus(data, data.split)
