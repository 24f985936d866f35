"""The one line that opening a checkpoint fails with."""

from __future__ import annotations

import pytest

from esdtool.checkpoint import open_checkpoint
from esdtool.errors import CheckpointError


def message(location) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(location)
    text = str(caught.value)
    assert "\n" not in text
    return text
