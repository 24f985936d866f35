"""The user's latest analysis, remembered so that `esdtool assign` can pick it up."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from esdtool.analysis.document import Analysis
from esdtool.errors import CheckpointError, OutputError
from esdtool.support.files import atomic_write_text, cache_directory


def latest_path() -> Path:
    """Return the path of the latest analysis."""
    return cache_directory() / "latest-analysis.json"


def remember(analysis: Analysis) -> None:
    """Keep an analysis as the latest one.

    Raises:
        OutputError: if the cache directory cannot be written.
    """
    path = latest_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot create the cache directory: {error.strerror}") from error
    atomic_write_text(path, analysis.to_json())


def recall() -> tuple[Analysis, datetime]:
    """Return the latest analysis and the local time at which it was made.

    Raises:
        CheckpointError: if there is none yet, or it is damaged.
    """
    path = latest_path()
    if not path.exists():
        raise CheckpointError("no analysis yet: run 'esdtool analyze CHECKPOINT' first, or name a checkpoint")
    return Analysis.from_json(path), datetime.fromtimestamp(path.stat().st_mtime).astimezone()
