"""Every error a user can cause, as one tree.

The command line prints `str(error)` as a single line on stderr and exits with
`error.exit_code`; a library user catches `EsdtoolError`. A message names the file
and the tensor it is about and says what to do.
"""

from __future__ import annotations


class EsdtoolError(Exception):
    """Base of every error that esdtool raises on purpose. Exit code 1."""

    exit_code: int = 1
    reported_elsewhere: bool = False
    """Whether another process reports it: this one ends without a word."""


class CheckpointError(EsdtoolError):
    """A checkpoint that is missing, broken, unsafe or of an unknown format."""


class OutputError(EsdtoolError):
    """An output file that cannot be written; what stood there before is intact."""


class AssignmentError(EsdtoolError):
    """A weight-decay assignment that is invalid or does not fit the model."""


class ConfigError(EsdtoolError):
    """A training configuration with an unknown key, a wrong type or an impossible combination."""


class MissingExtraError(EsdtoolError):
    """A feature that needs an optional dependency which is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional extra: pip install 'esdtool[{extra}]'")


class UsageError(EsdtoolError):
    """An option that has an unknown value or contradicts another. Exit code 2."""

    exit_code = 2


class NothingToAnalyzeError(EsdtoolError):
    """The input is readable, but holds no weight matrix that can be scored. Exit code 3."""

    exit_code = 3


class FindingsError(EsdtoolError):
    """A finding as grave as the user wants a command to fail on. Exit code 4."""

    exit_code = 4


class LackOfMemoryError(EsdtoolError):
    """Too little memory for a module that was asked for."""


class DeviceError(EsdtoolError):
    """A device that was asked for and is not there."""
