"""Other libraries made quiet: no advice, no progress bars, and errors of one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Only errors are logged inside the block; the caller's verbosity is restored after it."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def whole_message(error: BaseException) -> str:
    """Return an error's whole message with its line breaks taken out, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
