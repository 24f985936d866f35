"""`esdtool assign`: spectra to weight decays and other module-wise values, in forms that trainers read."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esdtool.assignment.assign_options import AssignOptions
from esdtool.assignment.options import (
    AssignmentFormat,
    AssignName,
    Granularity,
    Names,
    OptimizerName,
    ScoreName,
    Unlisted,
)
from esdtool.assignment.quantities import QUANTITY_NAMES, WEIGHT_DECAY
from esdtool.assignment.rule import DecayRule
from esdtool.cli.options import DeviceOption, DownloadOption, JobsOption, QuietOption, download_of, finite
from esdtool.spectra.options import FITS, ScoreOptions

if TYPE_CHECKING:
    from esdtool.analysis.document import Analysis
    from esdtool.assignment.document import Assignment


def assign(
    ctx: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint, as for `esdtool analyze`, or an analysis JSON. Default: your latest analysis.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Write the assignment here; - for stdout.", metavar="PATH")
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(help="Base decay: the value that uniform weight decay would have.", callback=finite)
    ] = AssignOptions.weight_decay,
    optimizer: Annotated[
        OptimizerName,
        typer.Option(help="Select the published ratios and how the decay acts: decoupled (adamw) or as L2 (adam)."),
    ] = DecayRule.optimizer,
    min_ratio: Annotated[
        float | None,
        typer.Option(help="Smallest decay divided by the base. Default: 0.67.", show_default=False, callback=finite),
    ] = None,
    max_ratio: Annotated[
        float | None,
        typer.Option(
            help="Largest decay divided by the base. Default: 5 (adamw), 3 (adam).",
            show_default=False,
            callback=finite,
        ),
    ] = None,
    assign_by: Annotated[
        AssignName, typer.Option("--assign", help="Function from scores to decays.")
    ] = DecayRule.assign,
    score: Annotated[ScoreName, typer.Option(help="Metric that determines the decays.")] = AssignOptions.score,
    fit: Annotated[
        str | None,
        typer.Option(
            help=f"Estimator of alpha: {', '.join(FITS)}. Default: hill, or the first one of an analysis.",
            show_default=False,
            autocompletion=lambda: list(FITS),
        ),
    ] = None,
    granularity: Annotated[
        Granularity, typer.Option(help="One decay per module, per layer or per role.")
    ] = DecayRule.granularity,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="Assign decays only to parameters that match this regular expression; repeatable.", metavar="REGEX"
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Do not list parameters that match this regular expression; repeatable.", metavar="REGEX"),
    ] = None,
    unlisted: Annotated[
        Unlisted,
        typer.Option(help="Decay of norms, biases, embeddings and heads: the trainer's, none, or the base."),
    ] = AssignOptions.unlisted,
    normalize: Annotated[
        bool,
        typer.Option("--normalize", help="Rescale so that the parameter-weighted mean decay equals the base."),
    ] = DecayRule.normalize,
    names: Annotated[
        Names,
        typer.Option(help="Parameter names: those of the file, or of the transformers model that loads it."),
    ] = "file",
    quantities: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            help=f"What to assign: {', '.join(QUANTITY_NAMES)}; repeatable. Default: weight-decay.",
            metavar="QUANTITY",
            show_default=False,
            autocompletion=lambda: list(QUANTITY_NAMES),
        ),
    ] = None,
    rate_map: Annotated[
        str | None,
        typer.Option(
            "--map",
            help="Function from scores to learning rates: llr, tempbalance, model-balancing, ... Default: llr.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="Mean sparsity (default 0.7), share of LoRA targets (0.2) or of layers to train (0.5).",
            show_default=False,
            callback=finite,
        ),
    ] = None,
    mean_budget: Annotated[
        float | None,
        typer.Option(
            "--budget", help="Mean bits (default 3.5) or mean LoRA rank (8).", show_default=False, callback=finite
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            help="For experiments: mean, shuffled or reversed use of the method's own numbers.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    assigned: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other setting of a quantity, as sparsity.eps=0.2; repeatable.",
            metavar="QUANTITY.NAME=VALUE",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="The schedule's learning rate, for formats with absolute rates.", show_default=False, callback=finite
        ),
    ] = None,
    file_format: Annotated[AssignmentFormat, typer.Option("--format", help="Format of --out.")] = "json",
    check: Annotated[
        Path | None,
        typer.Option(
            help="Check this file against --model: names, shapes, coverage. Assigns nothing.", metavar="WD.JSON"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint for --check.", metavar="CKPT")] = None,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    jobs: JobsOption = None,
    download: DownloadOption = False,
) -> None:
    """Turn alphas into a weight decay for each module: the heavier the tail, the weaker the decay.

    With --for, into learning rates, sparsities, bits, LoRA ranks and targets, or a choice of layers to train.
    """
    from esdtool.cli.output import note, write_text
    from esdtool.cli.quantities import check_writing, settings_of
    from esdtool.cli.targets import check_outputs
    from esdtool.errors import UsageError

    if check is not None or model is not None:
        if check is None or model is None:
            raise UsageError("--check WD.JSON and --model CKPT go together")
        if source is not None or out is not None:
            raise UsageError("--check compares a file with --model and writes nothing: leave out SOURCE and --out")
        _check(check, model, download=download_of(download, in_part=True), quiet=quiet)
        return
    stdout_is_data = check_outputs({"--out": out}, sources=[] if source is None else [source])

    # Contradictions are refused before the spectra, which may take hours.
    options = AssignOptions(
        weight_decay=weight_decay,
        rule=DecayRule(
            assign=assign_by,
            min_ratio=min_ratio,
            max_ratio=max_ratio,
            optimizer=optimizer,
            granularity=granularity,
            normalize=normalize,
            control=control or DecayRule.control,  # type: ignore[arg-type] # checked by DecayRule itself
        ),
        score=score,
        fit=fit,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        unlisted=unlisted,
    )

    work = {"device": device, "jobs": jobs, "download": download_of(download, in_part=False)}
    chosen = list(dict.fromkeys(quantities or [WEIGHT_DECAY]))
    check_writing(chosen, file_format, learning_rate)
    if (quantities is not None and set(quantities) != {WEIGHT_DECAY}) or assigned or _given(ctx, *_OF_OTHERS):
        shared = {
            name: value
            for option, (name, value) in {
                "rate_map": ("map", rate_map),
                "target": ("target", target),
                "mean_budget": ("budget", mean_budget),
                "control": ("control", control),
                "fit": ("fit", fit),
                "score": ("score", score),
                "normalize": ("normalize", normalize),
                "min_ratio": ("min_ratio", min_ratio),
                "max_ratio": ("max_ratio", max_ratio),
                "weight_decay": ("weight_decay", weight_decay),
                "optimizer": ("optimizer", optimizer),
                "assign_by": ("assign", assign_by),
                "granularity": ("granularity", granularity),
                "unlisted": ("unlisted", unlisted),
            }.items()
            if _given(ctx, option)
        }
        values = settings_of(chosen, shared, assigned or [])
        if names == "live":
            raise UsageError("--names live is for weight decays alone: the other quantities keep the file's names")
        _allocate(
            source,
            chosen,
            values,
            decays=options,
            out=out,
            file_format=file_format,
            learning_rate=learning_rate,
            work=work,
            quiet=quiet,
            stdout_is_data=stdout_is_data,
        )
        return

    from esdtool.assignment.assign import assign_in_scope

    analysis = _analysis(source, fits=() if fit is None else (fit,), work=work, quiet=quiet)
    found = assign_in_scope(analysis, options)
    assignment, scope = found.assignment, found.scope
    if scope.remark is not None:
        note(f"warning: {scope.remark}" if scope.is_surprising else scope.remark, quiet=quiet)
    _warn(analysis, assignment, quiet=quiet)
    if names == "live":
        assignment = _with_live_names(assignment, analysis)
    if out is not None:
        write_text(out, _rendered(assignment, file_format, learning_rate), quiet=quiet)
    if not quiet and not stdout_is_data:
        from esdtool.report.terminal.decays import print_assignment

        print_assignment(assignment)
    if out is None:
        note("nothing was written: name a file with --out wd.json", quiet=quiet)


_OF_OTHERS = ("rate_map", "target", "mean_budget")
"""Options that only quantities besides weight decay have."""


def _given(ctx: typer.Context, *options: str) -> bool:
    """Tell whether the user gave one of the options."""
    return any(
        (source := ctx.get_parameter_source(option)) is not None and source.name == "COMMANDLINE" for option in options
    )


def _allocate(
    source: str | None,
    quantities: list[str],
    values: dict[str, dict[str, Any]],
    *,
    decays: AssignOptions,
    out: str | None,
    file_format: AssignmentFormat,
    learning_rate: float | None,
    work: dict[str, Any],
    quiet: bool,
    stdout_is_data: bool,
) -> None:
    """Assign several quantities, or one that is not weight decay."""
    from esdtool.assignment.allocate import AllocateOptions, allocate
    from esdtool.assignment.writer import WriteOptions, write_as
    from esdtool.cli.output import note, write_text

    options = AllocateOptions.of(quantities, values, decays=decays, include=decays.include, exclude=decays.exclude)
    own = (decays.fit or ScoreOptions.fit[0],) if WEIGHT_DECAY in quantities else ()
    fits = tuple(dict.fromkeys((*own, *options.needs.fits)))
    analysis = _analysis(source, fits=fits, work=work, quiet=quiet)
    found = allocate(analysis, options)
    if found.scope.remark is not None:
        remark = found.scope.remark.replace("no decay", "no value")
        note(f"warning: {remark}" if found.scope.is_surprising else remark, quiet=quiet)
    if found.allocation.decays is not None:
        _warn(analysis, found.allocation.decays, quiet=quiet)
    if out is not None:
        how = WriteOptions(command=f"esdtool {shlex.join(sys.argv[1:])}", learning_rate=learning_rate)
        write_text(out, write_as(file_format, found.allocation, how), quiet=quiet)
    if not quiet and not stdout_is_data:
        from esdtool.report.terminal.values import print_allocation

        print_allocation(found.allocation)
    if out is None:
        note("nothing was written: name a file with --out assignment.json", quiet=quiet)


def _warn(analysis: Analysis, assignment: Assignment, *, quiet: bool) -> None:
    """Say what a user should know before trusting the weight decays."""
    from esdtool.assignment.remarks import geometry_remark, total_remark
    from esdtool.cli.output import note

    for warning in filter(None, (geometry_remark(analysis, assignment), total_remark(assignment))):
        note(f"warning: {warning}", quiet=quiet)


def _analysis(source: str | None, *, fits: tuple[str, ...], work: dict[str, Any], quiet: bool) -> Analysis:
    """Return the analysis of a checkpoint (`work`: arguments of `make_plan`), the one in a file, or the latest one."""
    from esdtool.analysis.document import Analysis
    from esdtool.cli.output import note, progress_bar

    if source is None:
        from esdtool.analysis.latest import recall

        analysis, when = recall()
        note(f"using your latest analysis: {analysis.source.checkpoint}, of {when:%Y-%m-%d %H:%M}")
        return analysis
    if source.endswith(".json") and Path(source).is_file() and not source.endswith(".index.json"):
        return Analysis.from_json(source)

    from esdtool.analysis.plan import make_plan
    from esdtool.analysis.run import run
    from esdtool.cli.sources import checkpoint_of

    source = checkpoint_of(source, quiet=quiet)
    plan = make_plan(source, ScoreOptions(fit=fits or ScoreOptions.fit), **work)
    for remark in plan.checkpoint.notes:
        note(remark, quiet=quiet)
    with progress_bar(plan.cost, quiet=quiet) as advance:
        return run(plan, on_progress=advance)


def _with_live_names(assignment: Assignment, analysis: Analysis) -> Assignment:
    """Rename the parameters as in the model that transformers builds from the checkpoint's config.json."""
    from esdtool.checkpoint import open_checkpoint
    from esdtool.checkpoint.hub import without_revision
    from esdtool.optim.live_names import meta_model, with_live_names

    source = analysis.source
    location = source.checkpoint if source.revision is None else without_revision(source.checkpoint)
    config = open_checkpoint(location, revision=source.revision, download=False).config
    return with_live_names(assignment, meta_model(config, location=source.checkpoint))


def _rendered(assignment: Assignment, file_format: AssignmentFormat, learning_rate: float | None) -> str:
    if file_format == "csv":
        return assignment.to_csv()
    if file_format == "torch-groups":
        return assignment.to_torch_groups()
    if file_format == "json":
        return assignment.to_json()
    from esdtool.assignment.writer import WriteOptions, write_as

    how = WriteOptions(command=f"esdtool {shlex.join(sys.argv[1:])}", learning_rate=learning_rate)
    return write_as(file_format, assignment, how)


def _check(path: Path, model: str, *, download: bool | None, quiet: bool) -> None:
    """Compare a file with a checkpoint, list the problems, and raise an error if there are any."""
    from esdtool.assignment.check import check as check_assignment
    from esdtool.assignment.reading import load_assignment
    from esdtool.checkpoint import open_checkpoint
    from esdtool.errors import AssignmentError

    assignment = load_assignment(path)
    checkpoint = open_checkpoint(model, download=download)
    report = check_assignment(assignment, checkpoint.tensors.values(), config=checkpoint.config)
    if not quiet:
        from esdtool.report.terminal.decays import print_check

        print_check(report, path=str(path), model=model)
    if not report.ok:
        raise AssignmentError(f"{path}: does not fit {model}: {report.problem}")
