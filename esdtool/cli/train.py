"""`esdtool train`: pretraining with module-wise weight decay, from a TOML file."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from esdtool.cli.completion import settings

if TYPE_CHECKING:
    from esdtool.train.config.train_config import TrainConfig


def train(
    configs: Annotated[
        list[str],
        typer.Argument(help="TOML file. If there are several, later files override earlier ones.", metavar="CONFIG..."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override one key; repeatable.",
            metavar="SECTION.KEY=VALUE",
            show_default=False,
            autocompletion=settings,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="'auto' continues from the run's newest complete checkpoint, if any. A path continues from that one.",
            metavar="auto|PATH",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the complete configuration with all defaults, and stop.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Build everything, print the numbers of parameters and tokens and the memory, and stop."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Train a language model with AlphaDecay or another policy of weight decay and learning rates.

    On several GPUs or processes: torchrun --nproc-per-node N -m esdtool train CONFIG.
    """
    from esdtool.cli.output import note
    from esdtool.support.launch import speaks
    from esdtool.support.terminal import write_data
    from esdtool.train.config.loading import load_config, to_toml

    remarks: list[str] = []
    config = load_config(configs, overrides or [], on_note=remarks.append)
    if print_config:
        write_data(to_toml(config))
        return
    if dry_run:
        _show_plan(config, resume, remarks)
        return

    from esdtool.train.loop import train as run

    result = run(config, resume=resume, quiet=quiet, remarks=remarks)
    is_first = speaks()
    if result.stopped_by is not None:
        name = signal.Signals(result.stopped_by).name
        text = f"{name}: stopped after step {result.step}; {result.checkpoint} is saved; go on with --resume auto"
        note(text, quiet=not is_first)
        # Not typer.Exit: 130 would be reported once more, as an interruption without a checkpoint.
        sys.exit(128 + result.stopped_by)
    if result.evaluation is not None:
        if config.logging.tensorboard:
            note(f"curves: tensorboard --logdir {result.run}", quiet=quiet or not is_first)
        note(
            f"{result.run / 'final'}: validation loss {result.evaluation.loss:.4f}, "
            f"perplexity {result.evaluation.perplexity:.2f}",
            quiet=quiet or not is_first,
        )


def _show_plan(config: TrainConfig, resume: str | None, remarks: list[str]) -> None:
    from esdtool.cli.output import note
    from esdtool.support.launch import launched, speaks
    from esdtool.support.sizes import format_size
    from esdtool.support.terminal import say
    from esdtool.train.config.sections import HubData
    from esdtool.train.dry_run import rehearse

    if not speaks():
        return
    launch = launched()
    world_size = launch.size if launch is not None else 1
    if isinstance(config.data, HubData):
        note("dataset and tokenizer are not fetched: their vocabulary is not checked")
    found = rehearse(config, resume=resume, world_size=world_size)
    for remark in [*remarks, *([found.base_explanation] if found.base_explanation else [])]:
        note(remark)
    plan, train_tokens = found.estimate, found.train_tokens
    policy, rates = config.weight_decay.policy, config.learning_rate.policy
    rows = [
        ("parameters", f"{plan.parameters:,} ({plan.block_parameters:,} in the blocks)"),
        ("steps", f"{config.schedule.steps:,}"),
        ("tokens", f"{plan.total_tokens:,} ({plan.tokens_per_step:,} a step)"),
        ("passes over the text", "unknown" if not train_tokens else f"{plan.total_tokens / train_tokens:.3g}"),
        ("micro-batches", f"{plan.micro_batches_per_step} a step and rank, {world_size} rank(s)"),
        (
            "weight decay",
            f"{policy}{', cautious' if config.weight_decay.cautious else ''}, base {found.base_decay:g}, "
            f"{found.num_modules} modules",
        ),
        *([] if rates == "uniform" else [("learning rate", f"{rates}, times that of the schedule")]),
        ("weights", format_size(plan.weight_bytes)),
        ("gradients", format_size(plan.gradient_bytes)),
        ("optimizer state", format_size(plan.optimizer_bytes)),
        ("activations", f"about {format_size(plan.activation_bytes)}"),
        ("memory a rank", f"about {format_size(plan.total_bytes)}"),
        ("run directory", config.run_dir),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name:<{width}}  {value}")
