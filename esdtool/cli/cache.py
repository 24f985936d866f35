"""`esdtool cache`: the spectra that are kept on disk."""

from __future__ import annotations

import typer

from esdtool.cli.help import HelpCommand, HelpGroup

app = typer.Typer(
    cls=HelpGroup, help="Show or clear the cache of spectra on disk.", no_args_is_help=True, rich_markup_mode=None
)


@app.command(cls=HelpCommand)
def info() -> None:
    """Say where the cache is, and how much it holds."""
    from esdtool.spectra.cache import SpectrumCache
    from esdtool.support.sizes import format_size
    from esdtool.support.terminal import say

    found = SpectrumCache.of_user().info()
    say(f"{found.folder}: {found.entries} spectra, {format_size(found.bytes)} of at most {format_size(found.limit)}")


@app.command(cls=HelpCommand)
def clear() -> None:
    """Remove all spectra from the cache."""
    from esdtool.spectra.cache import SpectrumCache
    from esdtool.support.sizes import format_size
    from esdtool.support.terminal import say

    found = SpectrumCache.of_user().clear()
    say(f"{found.folder}: removed {found.entries} spectra, {format_size(found.bytes)}")
