"""`esdtool cache`: the spectra that are kept on disk."""

from __future__ import annotations

import typer

app = typer.Typer(help="Show or clear the cache of spectra on disk.", no_args_is_help=True)


@app.command()
def info() -> None:
    """Say where the cache is, and how much it holds."""
    from esdtool.spectra.cache import SpectrumCache
    from esdtool.support.sizes import format_size
    from esdtool.support.terminal import say

    found = SpectrumCache.of_user().info()
    say(f"{found.folder}: {found.entries} spectra, {format_size(found.bytes)} of at most {format_size(found.limit)}")


@app.command()
def clear() -> None:
    """Remove all spectra from the cache."""
    from esdtool.spectra.cache import SpectrumCache
    from esdtool.support.sizes import format_size
    from esdtool.support.terminal import say

    found = SpectrumCache.of_user().clear()
    say(f"{found.folder}: removed {found.entries} spectra, {format_size(found.bytes)}")
