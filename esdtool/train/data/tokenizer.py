"""Text to token ids: tokenizers from the Hub or a file, or a byte-level BPE trained on the corpus itself.

A document becomes `[begin-of-text] text [end-of-text]`: the first only if the tokenizer
itself adds one, the last always.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from esdtool.errors import ConfigError, MissingExtraError
from esdtool.support.files import atomic_write_text
from esdtool.train.config.train_config import TrainConfig
from esdtool.train.data.cache import cache_folder, locked
from esdtool.train.data.corpus import Corpus, Stream, fingerprint_of
from esdtool.train.pretrained import load_fast_tokenizer
from esdtool.train.quiet import quiet_transformers, whole_message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT: Final = "<|endoftext|>"
"""The one special token of a tokenizer trained here: it ends documents and fills padding."""
STREAM_DOCUMENTS: Final = 50_000
"""Documents of a stream that a tokenizer is trained on: its first ones."""
# What end-of-text is called in a bare tokenizer.json, which does not say.
_END_NAMES: Final = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>")
# Change this when the same corpus and size would give another tokenizer.
_RECIPE: Final = 1


def load_tokenizer(config: TrainConfig, train: Corpus) -> PreTrainedTokenizerFast:
    """Return the tokenizer that [tokenizer] describes; without any key there, the one of model.from.

    Args:
        train: the training documents, for tokenizer.train_vocab_size.

    Raises:
        ConfigError: if it cannot be had.
        MissingExtraError: if transformers is not installed.
    """
    settings = config.tokenizer
    if settings.train_vocab_size is not None:
        return train_tokenizer(train, settings.train_vocab_size)
    if settings.file is not None:
        return _from_file(Path(settings.file))
    if settings.name is not None:
        return load_fast_tokenizer(settings.name, f"tokenizer.name {settings.name}")
    assert config.model.from_ is not None
    return load_fast_tokenizer(config.model.from_, f"model.from {config.model.from_}: tokenizer")


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of exactly `vocab_size` tokens, trained on the corpus or taken from the cache.

    Token 0 is `<|endoftext|>`, then come the 256 bytes and the merges.

    Raises:
        ConfigError: if the text has too few different words for that many tokens.
    """
    key = fingerprint_of("byte-level-bpe", _RECIPE, corpus.fingerprint, vocab_size)
    target = cache_folder("tokenizers") / f"{key}.json"
    with locked(target):
        if not target.is_file():
            atomic_write_text(target, _train(corpus, vocab_size))
    return _wrap(target)


def _train(corpus: Corpus, vocab_size: int) -> str:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingExtraError("training a tokenizer", "train") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = itertools.islice(corpus.documents(), STREAM_DOCUMENTS if isinstance(corpus, Stream) else None)
    tokenizer.train_from_iterator(documents, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise ConfigError(
            f"tokenizer.train_vocab_size {vocab_size} is more than the {found} tokens that {corpus.name} gives; "
            "lower it"
        )
    return tokenizer.to_str()


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    if path.is_dir():
        return load_fast_tokenizer(str(path), f"tokenizer.file {path}")
    if not path.is_file():
        raise ConfigError(f"tokenizer.file {path}: no such file or folder")
    # Beside its settings, tokenizer.json says which of its tokens are special.
    if path.name == "tokenizer.json" and path.with_name("tokenizer_config.json").is_file():
        return load_fast_tokenizer(str(path.parent), f"tokenizer.file {path}")
    return _wrap(path)


def _wrap(path: Path) -> PreTrainedTokenizerFast:
    """Return a bare tokenizer.json as a transformers tokenizer."""
    try:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingExtraError("`esdtool train`", "train") from error
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"tokenizer.file {path}: not a tokenizer.json: {whole_message(error)}") from error
    end = next((name for name in _END_NAMES if backend.token_to_id(name) is not None), None)
    special = {"eos_token": end, "pad_token": end} if end else {}
    with quiet_transformers():
        return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


class Encoder:
    """A tokenizer as training uses it: documents in, arrays of ids out.

    Special tokens come from the tokenizer only, never from the text: `</s>` written in a
    document is encoded as the characters it is made of. (Where a vocabulary holds it as
    an ordinary piece too, as T5's does, it becomes the unknown token.)
    """

    end: int
    """Id that ends every document."""
    begin: int | None
    """Id that begins every document, if the tokenizer itself adds one."""
    pad: int
    """Id of padding; it is never a target."""
    vocab_size: int
    """1 + the highest id that a row can hold."""
    fingerprint: str
    """Hexadecimal; differs wherever ids may differ."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Wrap a tokenizer, which stays as it is.

        Raises:
            ConfigError: if it has no end-of-text token.
        """
        from tokenizers import Tokenizer

        text = tokenizer.backend_tokenizer.to_str()
        self._backend = Tokenizer.from_str(text)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if end is None:
            raise ConfigError(
                "the tokenizer has no end-of-text token (eos_token); set one in its tokenizer_config.json"
            )
        self.end = int(end)
        starts = (tokenizer.bos_token_id, tokenizer.cls_token_id)
        first = tokenizer.encode("a")[0]
        self.begin = int(first) if first in starts and first is not None else None
        self.pad = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self._unknown: int | None = tokenizer.unk_token_id
        special = set(tokenizer.all_special_ids) - {self._unknown}
        self._special: npt.NDArray[np.int64] = np.array(sorted(special), dtype=np.int64)
        ordinary = set(tokenizer.get_vocab().values()) - special
        used = {self.end, self.pad} | ({self.begin} if self.begin is not None else set())
        self.vocab_size = 1 + max(ordinary | used)
        self.fingerprint = hashlib.blake2b(
            f"{text} {self.begin} {self.end} {self._unknown}".encode(), digest_size=16
        ).hexdigest()

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, documents: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Ids of each document, `[begin] text end`, dtype `self.dtype`, one array [length] each."""
        encodings = self._backend.encode_batch_fast(list(documents), add_special_tokens=False)
        return [self._framed(encoding.ids) for encoding in encodings]

    def encode_all(self, documents: Iterable[str]) -> Iterable[npt.NDArray[Any]]:
        """Encode documents, a few hundred documents or a few million characters at a time."""
        batch: list[str] = []
        characters = 0
        for document in documents:
            batch.append(document)
            characters += len(document)
            if len(batch) >= 512 or characters >= 4_000_000:
                yield from self.encode(batch)
                batch, characters = [], 0
        if batch:
            yield from self.encode(batch)

    def _framed(self, ids: list[int]) -> npt.NDArray[Any]:
        text = np.array(ids, dtype=np.int64)
        special = np.isin(text, self._special)
        if special.any():
            text = text[~special] if self._unknown is None else np.where(special, self._unknown, text)
        begin = np.array([] if self.begin is None else [self.begin], dtype=np.int64)
        return np.concatenate([begin, text, [self.end]]).astype(self.dtype)
