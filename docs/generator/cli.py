"""Make the reference of the command line from the signatures of the commands."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from esdtool.cli import app
from generator.markdown import NOTICE, cell, code, table

INTRODUCTION = """# Command line

This page lists every subcommand with all of its options, as `esdtool COMMAND --help` shows them. `esdtool --version`
prints the version, `-h` is short for `--help`, and `esdtool --install-completion` installs completion for your shell.

Data goes to stdout, everything else to stderr. Exit codes: 0 success, 1 cannot read or run, 2 usage, 3 nothing to
analyse, 4 a finding that `--fail-on` names, 130 interrupted. The environment variable `ESDTOOL_CACHE_DIR` sets the
directory in which esdtool keeps spectra and the latest analysis.
"""


def page() -> str:
    """Return the whole page."""
    return NOTICE + INTRODUCTION + "".join(_section(name, function) for name, function in commands())


def commands() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield each command with its full name, in the order of `esdtool --help`."""
    for command in app.registered_commands:
        assert command.callback is not None
        yield command.name or command.callback.__name__.replace("_", "-"), command.callback
    for group in app.registered_groups:
        assert group.typer_instance is not None
        for command in group.typer_instance.registered_commands:
            assert command.callback is not None
            yield f"{group.name} {command.name or command.callback.__name__.replace('_', '-')}", command.callback


def _section(name: str, function: Callable[..., Any]) -> str:
    arguments, options = [], []
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        annotation = hints[parameter.name]
        if get_origin(annotation) is not Annotated:
            continue  # the context
        kind, info = get_args(annotation)[:2]
        if isinstance(info, ArgumentInfo):
            arguments.append((info.metavar or parameter.name.upper(), parameter, kind, info))
        else:
            options.append((parameter, kind, info))
    usage = " ".join([f"esdtool {name}", "[OPTIONS]", *(_usage(*argument[:3]) for argument in arguments)])
    text = [f"\n## {name}\n", inspect.cleandoc(function.__doc__ or ""), f"\n```text\n{usage}\n```\n"]
    if arguments:
        rows = [[code(metavar), cell(_help(info))] for metavar, _, _, info in arguments]
        text.append(table(["argument", ""], rows))
    rows = [[_names(p, kind, info), code(cell(_default(p, info))), cell(_help(info))] for p, kind, info in options]
    if rows:
        text.append(table(["option", "default", ""], rows))
    return "\n".join(text)


def _usage(metavar: str, parameter: inspect.Parameter, kind: Any) -> str:
    bare = metavar.removesuffix("...")
    shown = f"{bare}..." if get_origin(_bare(kind)) is list else bare
    return shown if parameter.default is inspect.Parameter.empty else f"[{shown}]"


def _names(parameter: inspect.Parameter, kind: Any, info: OptionInfo) -> str:
    # In an Annotated, typer takes the first name where a default would stand.
    names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    if not any(name.startswith("--") for name in names):
        names.insert(0, f"--{parameter.name.replace('_', '-')}")
    kind = _bare(kind)
    value = ""
    if kind is not bool:
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        # A bar would end the cell, and cannot be escaped in code so that all renderers agree.
        value = (info.metavar or "").replace("|", " or ") or "{" + ", ".join(map(str, choices)) + "}"
        value = {"{}": {int: "N", float: "X"}.get(kind, "TEXT")}.get(value, value)
    shown = [name for pair in names for name in pair.split("/")]
    return ", ".join(code(name) for name in shown) + (f" {code(cell(value))}" if value else "")


def _bare(kind: Any) -> Any:
    """Return the type without None."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _default(parameter: inspect.Parameter, info: OptionInfo) -> str:
    value = parameter.default
    if value is None or value is False or info.show_default is False or value is inspect.Parameter.empty:
        return ""
    return "on" if value is True else str(value)


def _help(info: ArgumentInfo | OptionInfo) -> str:
    """Return the help with `<` escaped for Markdown."""
    return (info.help or "").replace("<", "&lt;")
