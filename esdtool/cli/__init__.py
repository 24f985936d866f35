"""The command line: one thin file per subcommand. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from esdtool._version import __version__
from esdtool.cli.analyze import analyze
from esdtool.cli.assign import assign
from esdtool.cli.cache import app as cache_app
from esdtool.cli.compare import compare
from esdtool.cli.evaluate import evaluate
from esdtool.cli.help import HelpCommand, HelpGroup
from esdtool.cli.plot import plot
from esdtool.cli.schema import schema
from esdtool.cli.sweep import sweep
from esdtool.cli.train import train
from esdtool.cli.watch import watch

app = typer.Typer(
    name="esdtool",
    cls=HelpGroup,
    help="Analyse the spectra of language model weights and derive a weight decay for each module.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"esdtool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Analyse the spectra of language model weights and derive a weight decay for each module."""


app.command(cls=HelpCommand)(analyze)
app.command(cls=HelpCommand)(assign)
app.command(cls=HelpCommand)(train)
app.command(cls=HelpCommand)(sweep)
app.command("eval", cls=HelpCommand)(evaluate)
app.command(cls=HelpCommand)(compare)
app.command(cls=HelpCommand)(watch)
app.command(cls=HelpCommand)(plot)
app.command(cls=HelpCommand)(schema)
app.add_typer(cache_app, name="cache")
