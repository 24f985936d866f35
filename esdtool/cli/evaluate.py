"""`esdtool eval`: the perplexity of any checkpoint on any text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from esdtool.cli.options import finite

if TYPE_CHECKING:
    from esdtool.train.config.sections import DataSettings

PrecisionName = Literal["float32", "bf16-autocast", "bf16"]
DeviceName = Literal["auto", "cpu", "cuda"]
PackingName = Literal["dense", "document"]
TxtDocument = Literal["file", "line", "paragraph"]


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(help="Folder or Hub id of a causal language model that transformers reads.", show_default=False),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="'stdlib', or a glob of .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet files; repeatable.",
            metavar="GLOB",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --data: use the validation text of the training run with this config.toml.", metavar="TOML"
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Instead of --data: use a Hub dataset, given as name or name:configuration.")
    ] = None,
    dataset_split: Annotated[
        str | None, typer.Option("--split", help="Split of --dataset. Default: validation.", show_default=False)
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Column of --dataset, .jsonl or .parquet that holds the text. Default: text.", show_default=False
        ),
    ] = None,
    txt_document: Annotated[
        TxtDocument | None,
        typer.Option(help="What counts as one document in a .txt file. Default: the file.", show_default=False),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Use only the fraction that training with this data.validation_fraction holds out.", callback=finite
        ),
    ] = None,
    packing: Annotated[
        PackingName, typer.Option(help="Join the documents and cut them into rows, or put one document in each row.")
    ] = "dense",
    sequence_length: Annotated[int, typer.Option(help="Tokens per row.", min=2)] = 256,
    tokens: Annotated[
        int, typer.Option(help="Evaluate rows until they contain this many target tokens.", min=1)
    ] = 1_000_000,
    micro_size: Annotated[int, typer.Option(help="Rows per forward pass.", min=1)] = 16,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder, file or Hub id of the tokenizer. Default: that of the checkpoint.", show_default=False
        ),
    ] = None,
    precision: Annotated[PrecisionName, typer.Option(help="Number format of the computation.")] = "float32",
    device: Annotated[DeviceName, typer.Option(help="Where to compute.")] = "auto",
    json_path: Annotated[
        str | None, typer.Option("--json", help="Write the result as JSON; - for stdout.", metavar="PATH")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but --json.")] = False,
) -> None:
    """Measure the loss and the perplexity of a checkpoint, as training does."""
    import json

    from esdtool.cli.output import write_text
    from esdtool.cli.targets import check_outputs
    from esdtool.errors import UsageError
    from esdtool.support.terminal import say

    given = [name for name, value in (("--data", data), ("--config", config), ("--dataset", dataset)) if value]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UsageError(f"exactly one of --data, --config and --dataset is needed, not {found}")
    stdout_is_data = check_outputs(
        {"--json": json_path}, sources=[checkpoint] if config is None else [checkpoint, str(config)]
    )

    from esdtool.cli.sources import checkpoint_of
    from esdtool.train.evaluate import EvalRequest, evaluate_checkpoint

    checkpoint = checkpoint_of(checkpoint, quiet=quiet)
    if config is not None:
        from esdtool.train.config.loading import load_run_config

        request = EvalRequest.of_run(checkpoint, load_run_config(config))
    else:
        options = {
            "packing": packing,
            "split": dataset_split,
            "text_column": text_column,
            "txt_document": txt_document,
            "validation_fraction": held_out,
        }
        text: dict[str, object] = {key: value for key, value in options.items() if value is not None}
        request = EvalRequest(
            checkpoint=checkpoint,
            data=_data(data or [], dataset, text),
            held_out=held_out is not None,
            tokenizer=tokenizer,
            sequence_length=sequence_length,
            micro_size=micro_size,
            tokens=tokens,
            precision=precision,
            device=device,
        )
    result = evaluate_checkpoint(request)
    if json_path is not None:
        document = {
            "checkpoint": checkpoint,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "targets": result.num_targets,
            "sequence_length": request.sequence_length,
        }
        write_text(json_path, json.dumps(document, indent=2) + "\n", quiet=quiet)
    if not quiet and not stdout_is_data:
        say(f"loss {result.loss:.4f}  perplexity {result.perplexity:.3f}  ({result.num_targets:,} targets)")


def _data(globs: list[str], dataset: str | None, text: dict[str, object]) -> DataSettings:
    """Return the [data] section that the options stand for."""
    from esdtool.train.config.loading import config_from_mapping

    where: dict[str, object]
    if dataset is not None:
        name, _, configuration = dataset.partition(":")
        where = {"source": "huggingface", "dataset": name, "name": configuration or None, "split": "validation"}
    elif globs == ["stdlib"]:
        where = {"source": "stdlib"}
    else:
        where = {"source": "files", "files": globs}
    # Through the whole configuration, for its messages of one line.
    rest = {"model": {"from": "-"}, "schedule": {"steps": 1}}
    return config_from_mapping({"data": where | text, **rest}, where="esdtool eval").data
