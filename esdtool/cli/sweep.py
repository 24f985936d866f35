"""`esdtool sweep`: many training runs from one TOML file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from esdtool.cli.completion import settings
from esdtool.cli.options import QuietOption

if TYPE_CHECKING:
    from esdtool.train.sweep.plan import SweepPlan
    from esdtool.train.sweep.runner import Progress, SweepResult


def sweep(
    path: Annotated[str, typer.Argument(help="TOML file with [sweep] and [[grid]].", metavar="SWEEP.toml")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override one key of the base configuration; repeatable.",
            metavar="SECTION.KEY=VALUE",
            show_default=False,
            autocompletion=settings,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Number of runs at a time. Default: the value in the file, or 1.", min=1),
    ] = None,
    until: Annotated[
        list[str] | None,
        typer.Option(
            "--until",
            help="Add seeds to two settings, two at a time, until the 95 % interval of their difference is narrower: "
            "'alphadecay - mean: ci 0.3%'. Repeatable. Default: the rules in the file, if it has any.",
            metavar="RULE",
            show_default=False,
        ),
    ] = None,
    max_seeds: Annotated[
        int | None,
        typer.Option(help="With a rule: end with this many seeds. Default: the value in the file, or 24.", min=2),
    ] = None,
    power: Annotated[
        bool,
        typer.Option("--power", help="Tell from the finished runs how many seeds a difference takes, and stop."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and their progress, and stop.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Train with several policies, decays or other settings and several seeds, and compare the results.

    Give the same command again to continue: finished runs are not repeated, and stopped runs resume. With --until,
    seeds are added until a difference is known well enough; the intervals allow for looking several times.
    """
    from esdtool.cli.output import note
    from esdtool.cli.sweep_rule import Rules, show_power, told, verdict
    from esdtool.support.terminal import say
    from esdtool.train.sweep.plan import plan_sweep
    from esdtool.train.sweep.runner import state_of

    plan = plan_sweep(path, overrides or [])
    rules = Rules.of(plan, path, until=until or (), max_seeds=max_seeds)
    if power:
        if rules.rules:  # the seeds that were added count as well
            added = rules.looks[-1] - len(plan.seeds)
            plan = plan_sweep(path, overrides or [], more_seeds=added, of=rules.settings)
        show_power(plan, rules, path)
        return
    if dry_run:
        for run in plan.runs:
            say(f"{state_of(run):<8}  {run.folder}")
        rules.announce()
        return
    seeds, looks = len(plan.seeds), []
    while True:
        result = _carry_out(plan, jobs, quiet=quiet)
        if result.stopped_by is not None or result.failed or result.elsewhere or not rules.rules:
            break
        looks = rules.look(plan)
        for rule, look in looks:
            note(told(rule, look), quiet=quiet)
        if len(plan.seeds) == rules.looks[-1] or all(look.width < rule.width for rule, look in looks):
            break
        more = rules.looks[rules.looks.index(len(plan.seeds)) + 1] - seeds
        plan = plan_sweep(path, overrides or [], more_seeds=more, of=rules.settings)
    if not quiet:
        _show_table(result)
        for rule, look in looks:
            say(f"{told(rule, look)}: {verdict(rule, look)}")
    if result.stopped_by is not None:
        note(f"stopped with {len(result.finished)} of {len(plan.runs)} runs finished; the same command goes on")
        sys.exit(128 + result.stopped_by)
    _complain(plan, result)


def _carry_out(plan: SweepPlan, jobs: int | None, *, quiet: bool) -> SweepResult:
    """Run what is not finished, and say how far it is."""
    from esdtool.cli.output import note
    from esdtool.train.sweep.runner import run_sweep, state_of

    states = [state_of(run) for run in plan.runs]
    total, done = len(plan.runs), states.count("finished")
    note(f"{total} runs in {plan.folder}, {done} of them finished before", quiet=quiet)
    ended, seconds = done, []

    def show(progress: Progress) -> None:
        nonlocal ended
        if progress.outcome == "begun":
            note(f"{_title(progress)}: begun, its messages go to {progress.run.folder}.log", quiet=quiet)
            return
        ended += 1
        if progress.outcome == "finished" and progress.seconds > 0:
            seconds.append(progress.seconds)
        left = (total - ended) * sum(seconds) / len(seconds) / (jobs or plan.jobs) if seconds else 0.0
        note(f"[{ended}/{total}] {_told(progress)}" + (f"; about {_time(left)} left" if left else ""), quiet=quiet)

    return run_sweep(plan, states=states, jobs=jobs, on_progress=show)


def _told(progress: Progress) -> str:
    if progress.outcome == "elsewhere":
        return f"{_title(progress)}: another process is at work on it"
    if progress.outcome == "failed":
        return f"{_title(progress)}: failed: {progress.message}"
    return f"{_title(progress)}: perplexity {progress.perplexity:.3f} ({_time(progress.seconds)})"


def _title(progress: Progress) -> str:
    return f"{progress.run.name}, seed {progress.run.seed}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _show_table(result: SweepResult) -> None:
    if not result.finished:
        return
    from esdtool.comparison.runs import compare_runs, load_run
    from esdtool.report.terminal.runs import print_settings

    print_settings(compare_runs([load_run(run.folder) for run in result.finished]))


def _complain(plan: SweepPlan, result: SweepResult) -> None:
    """End with what is missing.

    Raises:
        EsdtoolError: if runs failed.
    """
    from esdtool.cli.output import note
    from esdtool.errors import EsdtoolError

    if result.elsewhere:
        note(f"{len(result.elsewhere)} runs are another process's; give the command again when it has ended")
    if result.failed:
        first = result.failed[0]
        raise EsdtoolError(
            f"{len(result.failed)} of {len(plan.runs)} runs failed, the first {first.run.folder}: {first.message}; "
            f"see {first.run.folder}.log, and give the same command again for what is missing"
        )
