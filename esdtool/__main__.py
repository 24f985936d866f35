"""`esdtool` and `python -m esdtool`: run the command line and turn errors into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from esdtool.errors import ConfigError, EsdtoolError, OutputError, UsageError

_INTERRUPTED = 130

_SAME_ON_ALL_RANKS = (UsageError, ConfigError, OutputError)
"""Errors that every rank of a job finds in the same command line: one of them reports."""


def main() -> None:
    """Run the command line and end the process.

    Exit codes: 0 fine, 1 cannot read or run, 2 usage, 3 nothing to analyse, 4 finding failed on, 130 interrupted.
    """
    _notice_interrupts()
    try:
        from esdtool.cli import app  # here, so that Ctrl-C is one line from the beginning

        code = app(prog_name="esdtool", standalone_mode=False)
    except EsdtoolError as error:
        if error.reported_elsewhere or (isinstance(error, _SAME_ON_ALL_RANKS) and not _speaks()):
            _leave(error.exit_code)
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as leaving:
        _leave(leaving.code if isinstance(leaving.code, int) else 0)
    except BrokenPipeError:
        _abandon_stdout()  # its reader (`head`, say) has gone, and knows
        sys.exit(1)
    except MemoryError:
        _fail("not enough memory", 1)
    except OSError as error:
        # Our own files raise OutputError: what is left is a full or closed stdout.
        _abandon_stdout()
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", 1)
    except Exception as error:
        if type(error).__name__ == "Abort":
            _interrupted()
        if not hasattr(error, "format_message"):  # typer's own usage errors have it, whichever click is beneath
            _report_lack_of_memory(error)
            raise
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is the answer, and needs no error beside it
            print(error.format_message())
            _leave(2)
        hint = f" (see '{context.command_path} --help')" if context is not None else ""
        code = getattr(error, "exit_code", 2)
        if not _speaks():
            _leave(code)
        _fail(error.format_message().replace("Value error, ", "") + hint, code)  # a word of typer's own
    if code == _INTERRUPTED:  # how some versions of typer report Ctrl-C
        _interrupted()
    _leave(code or 0)


def _notice_interrupts() -> None:
    """Let Ctrl-C end the process at once while modules are imported.

    numpy and torch catch what is raised during their import, KeyboardInterrupt included, and go on half imported. At
    any other time Ctrl-C raises KeyboardInterrupt as usual.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where SIGINT is ignored (nohup, `&`)
        signal.signal(signal.SIGINT, _on_interrupt)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    at: FrameType | None = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            _interrupted()
        at = at.f_back
    signal.default_int_handler(number, frame)


def _report_lack_of_memory(error: Exception) -> None:
    """End with one line if that is what the error means; torch and others have no exception of their own for it."""
    from esdtool.support.memory import is_lack_of_memory

    if is_lack_of_memory(error):
        _fail("not enough memory", 1)


def _speaks() -> bool:
    from esdtool.support.launch import speaks

    return speaks()


def _leave(code: int) -> NoReturn:
    """End the process; one of several ranks ends without Python's finalization.

    DDP and FSDP2 keep gloo's threads alive after destroy_process_group, and such a thread aborts the process if it
    drops a tensor while Python is being finalized (pytorch issue 190489). All files are closed by now.
    """
    if "torch.distributed" not in sys.modules or os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(message: str, code: int) -> NoReturn:
    """Say on one line of stderr what went wrong, and end; nothing in the message steers the terminal."""
    from esdtool.support.terminal import remark

    remark("error: " + " ".join(message.split()))
    _leave(code)


def _abandon_stdout() -> None:
    """Keep the interpreter from writing what is left in the buffer of a stdout that takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupted() -> NoReturn:
    """End at once: worker threads may be minutes deep in LAPACK, and nothing is half-written."""
    if _speaks():
        print("\nesdtool: interrupted", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
