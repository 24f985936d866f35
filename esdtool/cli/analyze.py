"""`esdtool analyze`: a checkpoint to its spectra and alphas."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from esdtool.checkpoint.formats import weight_suffixes
from esdtool.cli.options import (
    CacheOption,
    DeviceOption,
    DistancesOption,
    DownloadOption,
    ExcludeOption,
    ExpertsOption,
    FastOption,
    FitOption,
    HtmlOption,
    IncludeOption,
    IntruderSimilarityOption,
    IntruderVectorsOption,
    JobsOption,
    KFractionOption,
    MemoryOption,
    MinEigsOption,
    QuietOption,
    SplitFusedOption,
    SplitOption,
    TableFormatOption,
    TopOption,
    download_of,
    finite,
)
from esdtool.spectra.options import FixFingerBound, PairOptions, ScoreOptions, SpectrumName, TrapsName

FailOn = Literal["warning", "error"]
SortKey = Literal["order", "name", "role", "layer", "alpha", "ks", "stable-rank", "lambda-max"]


def analyze(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help=f"A {', '.join(weight_suffixes()[:-1])} or {weight_suffixes()[-1]} file, a Hugging Face or "
            "torch.distributed.checkpoint directory, a PEFT adapter, a Hub id org/name[@revision], or a URL "
            "(hf://, s3://, gs://, az://, https://, ...). Several checkpoints are taken as steps of one training run.",
            show_default=False,
            metavar="CHECKPOINT",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="Analyse the differences from this checkpoint. An adapter is merged into it instead.",
            metavar="CHECKPOINT",
        ),
    ] = None,
    merged_from: Annotated[
        list[str] | None,
        typer.Option(
            help="A checkpoint that was merged into this one, made from the same --base. Given for each, findings "
            "say where their changes cancel.",
            metavar="CHECKPOINT",
        ),
    ] = None,
    distances: DistancesOption = PairOptions.distances,
    intruder_vectors: IntruderVectorsOption = PairOptions.intruder_vectors,
    intruder_similarity: IntruderSimilarityOption = PairOptions.intruder_similarity,
    fit: FitOption = None,
    k_fraction: KFractionOption = ScoreOptions.k_fraction,
    min_eigs: MinEigsOption = ScoreOptions.min_eigs,
    spectrum: Annotated[
        SpectrumName,
        typer.Option(help="How to compute the eigenvalues. 'slq' estimates the alpha of large modules without them."),
    ] = ScoreOptions.spectrum,
    budget: Annotated[
        float | None,
        typer.Option(
            help="If the exact spectra would take longer than this, estimate the largest modules with 'slq'.",
            metavar="SECONDS",
            callback=finite,
        ),
    ] = None,
    fast: FastOption = ScoreOptions.fast,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    split_fused: SplitFusedOption = True,
    split: SplitOption = None,
    sample_layers: Annotated[
        int | None,
        typer.Option(
            help="Analyse only N layers, evenly by depth, with all their modules. The reports call it a sample.",
            metavar="N",
            min=1,
        ),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            help="Say what becomes of the tensors whose names match, and why, and compute nothing.", metavar="REGEX"
        ),
    ] = None,
    experts: ExpertsOption = "mean",
    json_path: Annotated[
        str | None, typer.Option("--json", help="Write the analysis as JSON; - for stdout.", metavar="PATH")
    ] = None,
    csv_path: Annotated[
        str | None, typer.Option("--csv", help="Write one CSV line per module; - for stdout.", metavar="PATH")
    ] = None,
    weightwatcher_path: Annotated[
        str | None,
        typer.Option(
            "--weightwatcher-columns",
            help="Write a CSV with the column names of WeightWatcher 0.7.7, for notebooks that read its tables; - for "
            "stdout. Alpha is by 'ks' then, unless --fit says otherwise.",
            metavar="PATH",
        ),
    ] = None,
    esd_path: Annotated[
        str | None,
        typer.Option(
            "--esd", help="Write the eigenvalues of every module, not of heads (.safetensors).", metavar="PATH"
        ),
    ] = None,
    html_path: HtmlOption = None,
    plots: Annotated[
        str | None,
        typer.Option(help="Write figures to this folder. 'esdtool plot' has more options.", metavar="DIR"),
    ] = None,
    table_format: TableFormatOption = "table",
    sparklines: Annotated[
        bool, typer.Option("--sparklines", help="Show each module's ESD in its row, and alpha by layer and role.")
    ] = False,
    sort: Annotated[SortKey, typer.Option(help="Order of the table. 'order' is the order in the model.")] = "order",
    top: TopOption = None,
    fail_on: Annotated[
        FailOn | None,
        typer.Option(
            help="End with exit code 4 if a finding of this severity or a graver one is made.", metavar="SEVERITY"
        ),
    ] = None,
    quiet: QuietOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read headers only: modules, shapes, estimated time and memory.")
    ] = False,
    device: DeviceOption = "auto",
    jobs: JobsOption = None,
    memory: MemoryOption = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub checkpoint.")] = None,
    download: DownloadOption = False,
    cache: CacheOption = True,
    filter_zeros: Annotated[
        bool,
        typer.Option(
            "--filter-zeros", help="Leave eigenvalues of at most 1e-5 out of the fits, as the original code can."
        ),
    ] = ScoreOptions.filter_zeros,
    fix_finger_bound: Annotated[
        FixFingerBound,
        typer.Option(help="Lower bound of 'fix-finger'. 'legacy' reproduces numbers published with the original code."),
    ] = ScoreOptions.fix_finger_bound,
    traps: Annotated[
        TrapsName,
        typer.Option(
            help="How to count correlation traps, the spikes that survive a shuffle of the elements: by 'law', or by a "
            "'shuffle' as well."
        ),
    ] = ScoreOptions.traps,
    seed: Annotated[int, typer.Option(help="Seed of the shuffles.", min=0)] = ScoreOptions.seed,
    vectors: Annotated[
        bool,
        typer.Option(
            "--vectors",
            help="Also compute the singular vectors: how localised they are, and the rows and columns that carry the "
            "most localised ones. Takes two to three times as long.",
        ),
    ] = ScoreOptions.vectors,
    per_head: Annotated[
        bool,
        typer.Option(
            "--per-head",
            help="Also analyse each attention head: its parts of q, k, v and o, and W_q^T W_k and W_o W_v. Needs the "
            "head counts of config.json.",
        ),
    ] = False,
    farms_rows: Annotated[int, typer.Option(help="Rows of a 'farms' window.")] = ScoreOptions.farms_rows,
    farms_ratio: Annotated[
        float, typer.Option(help="Columns divided by rows of a 'farms' window.", callback=finite)
    ] = ScoreOptions.farms_ratio,
    farms_windows: Annotated[
        int, typer.Option(help="Number of 'farms' windows per dimension.")
    ] = ScoreOptions.farms_windows,
) -> None:
    """Compute the spectrum and the power-law alpha of every weight module of a checkpoint.

    A small alpha means a heavy tail. The table also shows the null: the alpha of an untrained matrix of the same shape.
    For several checkpoints it shows alpha by role over the steps.
    """
    from esdtool.cli.output import note, progress_bar, write_esds, write_text, wrote
    from esdtool.cli.targets import check_outputs
    from esdtool.errors import NothingToAnalyzeError, OutputError, UsageError
    from esdtool.report.tables.weightwatcher import FIT, check_fit, weightwatcher_csv

    options = ScoreOptions(
        fit=tuple(fit or (ScoreOptions.fit if weightwatcher_path is None else (FIT,))),
        k_fraction=k_fraction,
        min_eigs=min_eigs,
        spectrum=spectrum,
        fast=fast,
        filter_zeros=filter_zeros,
        fix_finger_bound=fix_finger_bound,
        traps=traps,
        seed=seed,
        vectors=vectors,
        farms_rows=farms_rows,
        farms_ratio=farms_ratio,
        farms_windows=farms_windows,
    )
    pairs = PairOptions(distances=distances, intruder_vectors=intruder_vectors, intruder_similarity=intruder_similarity)
    if distances and base is None:
        raise UsageError("--distances are from a base: name it with --base, or use 'esdtool compare --distances'")
    stdout_is_data = check_outputs(
        {
            "--json": json_path,
            "--csv": csv_path,
            "--esd": esd_path,
            "--html": html_path,
            "--weightwatcher-columns": weightwatcher_path,
        },
        sources=[*checkpoints, *([] if base is None else [base]), *(merged_from or ())],
        folder=plots,
    )
    if merged_from and (base is None or len(merged_from) < 2 or len(checkpoints) > 1):
        raise UsageError("--merged-from is for one checkpoint, is given twice or more, and needs --base")
    if weightwatcher_path is not None:
        check_fit(options.fit)
    for option, value in (
        ("--esd", esd_path),
        ("--html", html_path),
        ("--weightwatcher-columns", weightwatcher_path),
    ):
        if value is not None and len(checkpoints) > 1:
            raise UsageError(f"{option} takes one checkpoint at a time")

    from esdtool.analysis.latest import remember
    from esdtool.analysis.plan import Plan, make_plan
    from esdtool.analysis.ranks import join_ranks
    from esdtool.analysis.run import run
    from esdtool.checkpoint.remote.traffic import FETCHED
    from esdtool.cli.sources import checkpoint_of
    from esdtool.comparison.trajectory import in_order_of_training, make_trajectory
    from esdtool.findings.diagnosis import diagnose, fail_on_findings
    from esdtool.modules.choice import ModuleChoice
    from esdtool.support.launch import speaks
    from esdtool.support.sizes import format_size, parse_size
    from esdtool.support.threads import available_cores

    checkpoints = [checkpoint_of(checkpoint, quiet=quiet) for checkpoint in checkpoints]
    base = None if base is None else checkpoint_of(base, quiet=quiet)
    choice = ModuleChoice.of(
        include=include or (),
        exclude=exclude or (),
        split_fused=split_fused,
        split=split or (),
        sample_layers=sample_layers,
    )
    memory_bytes = None if memory is None else parse_size(memory)
    computes = not dry_run and explain is None
    # What is not read need not be here.
    in_part = not computes or bool(include) or sample_layers is not None
    if not computes and not speaks():
        return
    with join_ranks() if computes else nullcontext() as ranks:
        if ranks is not None:
            device = ranks.device(device)
            jobs = jobs or max(1, available_cores() // ranks.local_size)
            quiet = quiet or not ranks.is_first

        def open_all() -> list[Plan]:
            """Open all before the first is computed: a mistake in the last name shows at once."""
            if budget is not None and ranks is not None:
                raise UsageError("--budget is for one process: each would time and choose for itself")
            return [
                make_plan(
                    checkpoint,
                    options,
                    choice=choice,
                    base=base,
                    merged_from=merged_from or (),
                    device=device,
                    jobs=jobs,
                    revision=revision,
                    cache=cache,
                    memory=memory_bytes,
                    download=download_of(download, in_part=in_part),
                    pairs=pairs,
                    per_head=per_head,
                )
                for checkpoint in in_order_of_training(checkpoints)
            ]

        plans = open_all() if ranks is None else ranks.together(open_all)
        for plan in plans:
            for remark in plan.notes:
                note(remark, quiet=quiet)
        if explain is not None:
            from esdtool.report.terminal.explanation import print_explanations

            for plan in plans:
                print_explanations(plan, explain)
            return
        if budget is not None:
            from esdtool.analysis.budget import keep_within

            # Several checkpoints share the time in proportion to their work.
            work = sum(plan.cost for plan in plans)
            limited = [keep_within(plan, budget * plan.cost / work) for plan in plans]
            plans = [plan for plan, _ in limited]
            for _, estimated in limited:
                if estimated is not None:
                    note(estimated, quiet=quiet)
        if dry_run:
            from esdtool.report.terminal.analysis import print_plan

            for plan in plans:
                print_plan(plan)
            return
        if budget is None and ranks is None and not quiet:
            from esdtool.analysis.timing import faster_choice

            hint = faster_choice(max(plans, key=lambda plan: plan.cost))
            if hint is not None:
                note(hint, quiet=quiet)
        shares = [plan.cost if ranks is None else ranks.cost(plan.selection.modules) for plan in plans]
        with progress_bar(sum(shares), quiet=quiet) as advance:
            analyses = [run(plan, ranks=ranks, on_progress=advance) for plan in plans]
        if ranks is not None and not ranks.is_first:
            return
        analyses = [diagnose(analysis) for analysis in analyses]
    if FETCHED.bytes:
        note(f"fetched {format_size(FETCHED.bytes)}", quiet=quiet)

    trajectory = make_trajectory(analyses) if len(analyses) > 1 else None
    analysis = analyses[-1]
    if json_path is not None:
        write_text(json_path, (trajectory or analysis).to_json(), quiet=quiet)
    if csv_path is not None:
        write_text(csv_path, (trajectory or analysis).to_csv(), quiet=quiet)
    if weightwatcher_path is not None:
        write_text(weightwatcher_path, weightwatcher_csv(analysis), quiet=quiet)
    if esd_path is not None:
        write_esds(esd_path, analysis, quiet=quiet)
    if html_path is not None:
        from esdtool.report.html import analysis_page

        write_text(html_path, analysis_page(analysis, experts=experts), quiet=quiet)
    if plots is not None:
        from esdtool.report.figures import save_figures

        for path in save_figures(analyses, Path(plots)):
            wrote(path, quiet=quiet)
    if analysis.source.base is None:
        try:
            remember(analysis)
        except OutputError as error:
            note(f"the analysis is not remembered for 'esdtool assign': {error}", quiet=quiet)
    if not quiet and not stdout_is_data:
        if table_format == "markdown":
            from esdtool.report.markdown import analysis_markdown, trajectory_markdown
            from esdtool.support.terminal import say

            say(
                trajectory_markdown(trajectory)
                if trajectory is not None
                else analysis_markdown(analysis, sort=sort, top=top, experts=experts)
            )
        else:
            from esdtool.report.terminal.analysis import print_analysis, print_trajectory

            if trajectory is not None:
                print_trajectory(trajectory, sparklines=sparklines)
            else:
                print_analysis(analysis, sort=sort, top=top, experts=experts, sparklines=sparklines)
    for found in analyses:
        if not found.scored:
            raise NothingToAnalyzeError(
                f"{found.source.checkpoint}: none of the {len(found.modules)} weight modules could be scored: "
                f"{found.modules[0].name}: {found.modules[0].status}"
            )
    if fail_on is not None:
        fail_on_findings(analyses, fail_on)
