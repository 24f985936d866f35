"""Train the bundled example checkpoint: a small LLaMA on the source of Python's standard library.

    python examples/checkpoints/make_stdlib_llama.py

The corpus is on every machine that has Python, so the checkpoint can be remade without a network. The script writes a
Hugging Face directory (config, bfloat16 safetensors, tokenizer), the loss curve as `training.jsonl`, and the model card
`README.md` with the numbers of the run. Nothing appears at the target until all of it is written.

The run is deterministic for one Python version (the corpus), one PyTorch build and one number of threads.
Needs torch, transformers and tokenizers: `pip install "esdtool[train]"`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# One thread for the BPE trainer too; read when its library starts.
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Corpus. Tests and IDLE are left out as less typical code; `encodings` and `pydoc_data` are mostly generated tables.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
)
EXCLUDED_PREFIX = "_sysconfigdata"  # generated per machine, full of its paths
VALIDATION_EVERY = 20  # of the sorted files, the 10th of each 20 is held out
END_OF_TEXT = "<|endoftext|>"

# Model. Head dimension 32; the MLP is 8/3 of the hidden size, as in LLaMA.
VOCABULARY_SIZE = 1536
HIDDEN_SIZE = 192
INTERMEDIATE_SIZE = 512
LAYERS = 5
HEADS = 6
SEQUENCE_LENGTH = 256

# Training.
STEPS = 2400
SEQUENCES_PER_STEP = 8
PEAK_LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE_RATIO = 0.1
WARMUP_RATIO = 0.05
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
GRADIENT_CLIP = 1.0
RECORD_EVERY = 50
# The curve uses this many evenly spaced validation sequences; the final numbers use all of them.
CURVE_SEQUENCES = 64


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The source files, split by file into training and validation."""

    train: list[str]
    """Texts of the training files, in the order of their sorted paths."""
    validation: list[str]
    """Texts of the held-out files, in the order of their sorted paths."""
    sha256: str
    """Digest of all relative paths and texts: two runs with the same digest saw the same corpus."""


def read_corpus(root: Path) -> Corpus:
    """Read the standard library's `.py` files below `root` in the order of their relative POSIX paths."""
    relative = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts) and not path.name.startswith(EXCLUDED_PREFIX)
    )
    train, validation = [], []
    digest = hashlib.sha256()
    for index, name in enumerate(relative):
        with tokenize.open(root / name) as file:  # honours the file's own coding line
            text = file.read()
        digest.update(f"{name}\0{text}\0".encode())
        (validation if index % VALIDATION_EVERY == VALIDATION_EVERY // 2 else train).append(text)
    return Corpus(train=train, validation=validation, sha256=digest.hexdigest())


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `VOCABULARY_SIZE` tokens; token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=SEQUENCE_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Concatenate all documents, each followed by the end-of-text token, as one int64 stream."""
    backend = tokenizer.backend_tokenizer
    stream: list[int] = []
    for text in texts:
        stream.extend(backend.encode(text, add_special_tokens=False).ids)
        stream.append(tokenizer.eos_token_id)
    return torch.tensor(stream, dtype=torch.int64)


def windows(stream: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Cut a stream into (N, SEQUENCE_LENGTH + 1) windows that overlap by one token: inputs and shifted targets.

    Every token after the first is a target exactly once; the incomplete tail is dropped.
    """
    return stream[offset:].unfold(0, SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)


def batches(stream: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield (SEQUENCES_PER_STEP, SEQUENCE_LENGTH + 1) batches for ever, each epoch cut at another offset."""
    while True:
        offset = int(torch.randint(SEQUENCE_LENGTH, (), generator=generator))
        cut = windows(stream, offset)
        order = torch.randperm(len(cut), generator=generator)
        for start in range(0, len(order) - SEQUENCES_PER_STEP + 1, SEQUENCES_PER_STEP):
            yield cut[order[start : start + SEQUENCES_PER_STEP]]


def build_model(seed: int, end_of_text_id: int = 0) -> LlamaForCausalLM:
    """Build the untrained model: float32, normal initialisation of standard deviation 0.02, untied head."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=SEQUENCE_LENGTH,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=end_of_text_id,
        eos_token_id=end_of_text_id,
        pad_token_id=end_of_text_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def parameter_groups(model: torch.nn.Module) -> list[dict[str, object]]:
    """Decay the matrices, not the norm gains."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(step: int, steps: int) -> float:
    """Rate for the `step`-th update (from 1): linear warm-up, then a cosine that ends at a tenth of the peak."""
    warmup = max(1, round(WARMUP_RATIO * steps))
    if step <= warmup:
        return PEAK_LEARNING_RATE * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return PEAK_LEARNING_RATE * (FINAL_LEARNING_RATE_RATIO + (1 - FINAL_LEARNING_RATE_RATIO) * cosine)


def mean_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token of a (B, SEQUENCE_LENGTH + 1) batch."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, sequences: torch.Tensor) -> float:
    """Mean validation loss in nats per token; every sequence has the same weight."""
    was_training = model.training
    model.eval()
    total = sum(float(mean_loss(model, chunk)) * len(chunk) for chunk in sequences.split(SEQUENCES_PER_STEP))
    model.train(was_training)
    return total / len(sequences)


def unigram_loss(train: torch.Tensor, validation: torch.Tensor) -> float:
    """Cross-entropy (nats per token) of the training token frequencies, add-one smoothed, on validation targets."""
    counts = torch.bincount(train, minlength=VOCABULARY_SIZE).double() + 1
    return float(-(counts / counts.sum()).log()[validation[:, 1:]].mean())


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, validation: torch.Tensor, *, steps: int, seed: int
) -> list[dict[str, float]]:
    """Train in place and return the loss curve, one row every `RECORD_EVERY` updates and one for the last."""
    spaced = torch.linspace(0, len(validation) - 1, min(CURVE_SEQUENCES, len(validation))).long()
    curve_sequences = validation[spaced]
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=PEAK_LEARNING_RATE, betas=BETAS, fused=True)
    source = batches(stream, torch.Generator().manual_seed(seed))
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        rate = learning_rate(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = mean_loss(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % RECORD_EVERY == 0 or step == steps:
            row = {
                "step": step,
                "tokens": step * SEQUENCES_PER_STEP * SEQUENCE_LENGTH,
                "train_loss": round(sum(losses) / len(losses), 4),
                "val_loss": round(evaluate(model, curve_sequences), 4),
                "lr": float(f"{rate:.4g}"),
            }
            losses.clear()
            curve.append(row)
            print(json.dumps(row), f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return curve


def model_card(facts: dict[str, object]) -> str:
    """The README of the checkpoint directory, with the measured numbers of this run."""
    return """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, python, example]
---

# stdlib-llama

A {parameters:,}-parameter LLaMA trained from random weights on the source code of Python's standard library. It is a
real, trained checkpoint, small enough to live in a repository: an input for `esdtool analyze`, `assign` and the tests.
It is not a code assistant.

```sh
esdtool analyze examples/checkpoints/stdlib-llama
```

## Model

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {layers} layers, {heads} heads, untied `lm_head` |
| sizes | hidden {hidden}, intermediate {intermediate}, context {length} |
| vocabulary | {vocabulary}, byte-level BPE trained on the training files; token 0 (`{end_of_text}`) ends a document |
| weights | bfloat16 (trained in float32, rounded once at the end) |
| initialisation | normal, standard deviation 0.02 |

## Training

| | |
|---|---|
| corpus | standard library of Python {python}: {train_files} training and {validation_files} held-out `.py` files |
| left out | folders `{excluded}` and the generated `{excluded_prefix}*` |
| corpus digest (SHA-256) | `{sha256}` |
| training tokens | {corpus_tokens:,} in the corpus, {seen_tokens:,} seen ({epochs:.2f} epochs) |
| steps | {steps}, each {batch} sequences of {length} tokens, densely packed |
| optimizer | AdamW, betas {betas}, weight decay {decay} on every matrix, embeddings too, and 0 on norms |
| learning rate | linear warm-up to {peak} over {warmup} steps, cosine to {final:.1g} |
| gradient clipping | norm {clip} |
| precision, seed | float32, {seed} |
| versions | Python {python}, PyTorch {torch}, transformers {transformers}, tokenizers {tokenizers} |
| time | {minutes:.0f} minutes on {threads} CPU thread(s) |

```sh
{command}
```

The loss curve is in `training.jsonl`: `train_loss` is the mean since the row before, `val_loss` that of
{curve_sequences} evenly spaced validation sequences, both in nats per token.

## Result

On all {validation_tokens:,} held-out tokens ({bytes_per_token:.2f} bytes a token):

| | loss (nats per token) | perplexity |
|---|---|---|
| uniform over the vocabulary | {uniform_loss:.4f} | {uniform_ppl:.1f} |
| unigram (training frequencies) | {unigram_loss:.4f} | {unigram_ppl:.1f} |
| this model, float32 | {loss:.4f} | {ppl:.2f} |
| this model, bfloat16 as saved | {saved_loss:.4f} | {saved_ppl:.2f} |

The saved model needs {bits_per_byte:.3f} bits per byte.

## Licence

The weights, the tokenizer and this card: Apache-2.0, like esdtool. The training text is the Python standard library,
copyright the Python Software Foundation and the authors named in its files, under the PSF License Agreement.
""".format(**facts)


def write_checkpoint(
    target: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    curve: list[dict[str, float]],
    validation: torch.Tensor,
    facts: dict[str, object],
) -> None:
    """Write the whole directory beside the target, then rename it; an older one is replaced only at the end.

    `validation` is evaluated once more on what was written, so that the card states the saved weights' loss.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        fresh = scratch / target.name
        model.to(torch.bfloat16).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        # transformers 5 writes its new name of this class, which transformers 4 cannot load; both know the old one.
        tokenizer_config = fresh / "tokenizer_config.json"
        settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokenizer_config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (fresh / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve), encoding="utf-8")
        saved = LlamaForCausalLM.from_pretrained(fresh, dtype=torch.float32)
        saved_loss = evaluate(saved, validation)
        bits_per_byte = saved_loss / math.log(2) / float(facts["bytes_per_token"])
        results = {"saved_loss": saved_loss, "saved_ppl": math.exp(saved_loss), "bits_per_byte": bits_per_byte}
        (fresh / "README.md").write_text(model_card(facts | results), encoding="utf-8")
        for path in fresh.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone
        if target.exists():
            target.rename(scratch / "replaced")
        fresh.rename(target)
    finally:
        shutil.rmtree(scratch)


def main() -> None:
    import tokenizers
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("stdlib-llama"), help="directory")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer updates; the schedule scales with them")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)

    corpus = read_corpus(Path(sysconfig.get_path("stdlib")))
    tokenizer = train_tokenizer(corpus.train)
    stream = pack(corpus.train, tokenizer)
    validation_stream = pack(corpus.validation, tokenizer)
    validation = windows(validation_stream)
    print(f"{len(stream):,} training tokens, {len(validation_stream):,} validation tokens", file=sys.stderr)

    model = build_model(arguments.seed, tokenizer.eos_token_id)
    started = time.monotonic()
    curve = train(model, stream, validation, steps=arguments.steps, seed=arguments.seed)
    minutes = (time.monotonic() - started) / 60
    model.eval()
    loss = evaluate(model, validation)
    baseline = unigram_loss(stream, validation)
    uniform = math.log(VOCABULARY_SIZE)
    validation_bytes = sum(len(text.encode()) for text in corpus.validation)
    options = "".join(
        f" --{name} {value}"
        for name, value in vars(arguments).items()
        if name != "output" and value != parser.get_default(name)
    )
    facts: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": LAYERS,
        "hidden": HIDDEN_SIZE,
        "intermediate": INTERMEDIATE_SIZE,
        "heads": HEADS,
        "vocabulary": VOCABULARY_SIZE,
        "end_of_text": END_OF_TEXT,
        "train_files": len(corpus.train),
        "validation_files": len(corpus.validation),
        "excluded": "`, `".join(sorted(EXCLUDED_FOLDERS - {"__pycache__"})),
        "excluded_prefix": EXCLUDED_PREFIX,
        "sha256": corpus.sha256,
        "corpus_tokens": len(stream),
        "seen_tokens": curve[-1]["tokens"],
        "epochs": curve[-1]["tokens"] / len(stream),
        "steps": arguments.steps,
        "batch": SEQUENCES_PER_STEP,
        "length": SEQUENCE_LENGTH,
        "betas": BETAS,
        "decay": WEIGHT_DECAY,
        "peak": PEAK_LEARNING_RATE,
        "warmup": max(1, round(WARMUP_RATIO * arguments.steps)),
        "final": PEAK_LEARNING_RATE * FINAL_LEARNING_RATE_RATIO,
        "clip": GRADIENT_CLIP,
        "seed": arguments.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "minutes": minutes,
        "threads": arguments.threads,
        "command": f"python examples/checkpoints/make_stdlib_llama.py{options}",
        "curve_sequences": min(CURVE_SEQUENCES, len(validation)),
        "validation_tokens": validation[:, 1:].numel(),
        "bytes_per_token": validation_bytes / len(validation_stream),
        "uniform_loss": uniform,
        "uniform_ppl": math.exp(uniform),
        "unigram_loss": baseline,
        "unigram_ppl": math.exp(baseline),
        "loss": loss,
        "ppl": math.exp(loss),
    }
    write_checkpoint(arguments.output, model, tokenizer, curve, validation, facts)
    print(f"{arguments.output}: validation perplexity {math.exp(loss):.2f}, unigram {math.exp(baseline):.1f}")


if __name__ == "__main__":
    main()
