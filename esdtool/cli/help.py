"""Lay out `--help`: two columns that fit 80 characters, options in groups, values in capitals, no markup."""

from __future__ import annotations

import re
from typing import Any, Final

from typer.core import TyperCommand, TyperGroup

GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "Modules": ("base", "revision", "include", "exclude", "split_fused", "split", "model", "names", "unlisted"),
    "Estimates": (
        *("fit", "k_fraction", "min_eigs", "spectrum", "budget", "fast", "fix_finger_bound"),
        *("traps", "seed", "vectors", "per_head"),
        *("farms_rows", "farms_ratio", "farms_windows"),
    ),
    "Decays": (
        *("weight_decay", "optimizer", "min_ratio", "max_ratio", "assign_by", "score", "granularity", "normalize"),
    ),
    "Quantities": ("quantities", "rate_map", "target", "mean_budget", "control", "assigned", "learning_rate"),
    "Text": (
        "data",
        "config",
        "dataset",
        "dataset_split",
        "text_column",
        "txt_document",
        "held_out",
        "packing",
        "tokenizer",
    ),
    "Outputs": ("out", "file_format", "json_path", "csv_path", "esd_path", "html_path", "plots", "check"),
    "Figures": ("kind", "module", "figure_format", "dpi"),
    "Seeds": ("until", "max_seeds", "power"),
    "Tables": ("table_format", "sort", "top", "experts", "sparklines", "against"),
    "Work": (
        *(
            "device",
            "jobs",
            "memory",
            "cache",
            "download",
            "precision",
            "sequence_length",
            "tokens",
            "micro_size",
            "overrides",
        ),
        *("resume", "print_config", "dry_run", "quiet"),
    ),
}
"""Parameters by the group that they stand in, in every command; the order is that of the groups in the help."""

_OTHERS: Final = "Options"
_UNBREAKABLE: Final = "\N{NON-BREAKING HYPHEN}"
"""Stands for a hyphen within a word while lines are broken."""
_LONGEST_CHOICES = 26
"""Characters of a list of choices beside the option's name; a longer one stands in its words."""


class HelpGroup(TyperGroup):
    """A group of commands whose help says in full what each does."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with the first paragraph of its help."""
        records = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                records.append((name, " ".join((command.help or "").partition("\n\n")[0].split())))
        with formatter.section("Commands"):
            formatter.write_dl(records)


class HelpCommand(TyperCommand):
    """A command whose help is in groups."""

    def get_help(self, ctx: Any) -> str:
        """Write the help without line breaks at hyphens, since values such as `gate-up` are typed as they stand."""
        return str(super().get_help(ctx)).replace(_UNBREAKABLE, "-")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Name the arguments: in brackets if they may be left out, with dots if there may be several."""
        pieces = ["[OPTIONS]"]
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "argument":
                name = _argument(parameter)
                pieces.append(name if parameter.required else f"[{name}]")
        return pieces

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then a section for each group of options."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", *GROUPS, _OTHERS)}
        groups = {parameter: group for group, parameters in GROUPS.items() for parameter in parameters}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            words = re.sub(r"(?<=\w)-(?=\w)", _UNBREAKABLE, record[1])
            if parameter.param_type_name == "argument":
                sections["Arguments"].append((_argument(parameter), words))
            else:
                sections[groups.get(str(parameter.name), _OTHERS)].append(_option(parameter, ctx, words))
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records, col_max=28)


def _argument(argument: Any) -> str:
    """Name an argument."""
    name = (argument.metavar or str(argument.name).upper()).strip("[].")
    return f"{name}..." if argument.nargs != 1 else name


def _option(option: Any, ctx: Any, words: str) -> tuple[str, str]:
    """Name an option, its short form and its value; and say what it does."""
    short = sorted(option.opts, key=len)
    names = ", ".join([*short, *option.secondary_opts])
    if option.is_flag or option.count:
        return names, words
    value = option.metavar or _value(option, ctx)
    if len(value) > _LONGEST_CHOICES:
        return f"{names} NAME", f"{words} One of {value.strip('{}').replace('|', ', ')}."
    return f"{names} {value}", words


def _value(option: Any, ctx: Any) -> str:
    """Name the value of an option that names none: its choices, N for a whole number, X for any, or TEXT."""
    if hasattr(option, "display_type_rich"):
        shown = option.display_type_rich(ctx=ctx)
    else:
        try:
            shown = option.make_metavar(ctx)
        except TypeError:  # before click 8.2
            shown = option.make_metavar()
    shown = str(shown).strip("<>[]{}")
    if "|" in shown:
        return f"{{{shown}}}"
    return {"int": "N", "flo": "X"}.get(shown.lower()[:3], "TEXT")
