"""`esdtool cache`: the spectra that are kept on disk."""

from __future__ import annotations

import typer

app = typer.Typer(help="The spectra that are kept on disk, so that nothing is computed twice.", no_args_is_help=True)


@app.command()
def info() -> None:
    """Say where the cache is, and how much it holds."""
    from esdtool.spectrum_cache import SpectrumCache

    found = SpectrumCache.of_user().info()
    typer.echo(
        f"{found.folder}: {found.entries} spectra, {_megabytes(found.bytes)} of at most {_megabytes(found.limit)}"
    )


@app.command()
def clear() -> None:
    """Remove all spectra from the cache."""
    from esdtool.spectrum_cache import SpectrumCache

    found = SpectrumCache.of_user().clear()
    typer.echo(f"{found.folder}: removed {found.entries} spectra, {_megabytes(found.bytes)}")


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MB"
