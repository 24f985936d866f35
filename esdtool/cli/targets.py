"""Check where a command will write, before hours of work and not after."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from esdtool.errors import OutputError, UsageError
from esdtool.support.files import descriptor_of, is_stream

STDOUT: Final = "-"

_FOR_PEOPLE: Final = (".csv", ".html", ".htm", ".png", ".svg", ".pdf")
"""Suffixes of results; no checkpoint keeps a part of itself in such a file."""

_OF_A_MODEL: Final = (
    *("config.json", ".index.json", "tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "trainer_state.json", "modules.json", "manifest.json", "quant_strategy.json"),
)
"""Endings of the JSON files that a checkpoint's folder may hold."""


def check_outputs(
    outputs: Mapping[str, str | None], *, sources: Iterable[str] = (), folder: str | Path | None = None
) -> bool:
    """Refuse outputs that could not be written, or that would destroy something; tell whether stdout carries data.

    Args:
        outputs: the path or `-` by the option that it was given to; None for options that were not given.
        sources: what the command reads, as the user named it.
        folder: a folder for figures, which is made.

    Raises:
        UsageError: if two outputs have one target, or one is a source or a file of it.
        OutputError: if a target's folder is missing or not writable, or the target is a folder.
    """
    check_folder(folder)
    sources = list(sources)
    seen: dict[str, str] = {}
    for option, name in outputs.items():
        if name is None:
            continue
        target = _identity(name)
        if target in seen and not _is_character_device(name):
            if target == STDOUT:
                raise UsageError(f"only one output can go to stdout (-), not {seen[target]} and {option} both")
            raise UsageError(f"{seen[target]} and {option} have one target, {name}: the second would replace the first")
        seen[target] = option
        if target != STDOUT:
            _check_target(Path(name))
            _spare_sources(option, Path(name), sources)
    return STDOUT in seen


def check_folder(folder: str | Path | None) -> None:
    """Make a folder for figures before hours of work, or find out that it cannot be made.

    Raises:
        OutputError: if it cannot be made or written to.
    """
    if folder is None:
        return
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot make the folder: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path}: cannot write: permission denied")


def _identity(name: str) -> str:
    """Name what a path leads to: `-` for stdout by whatever name, a descriptor, or a path without links."""
    descriptor = 1 if name == STDOUT else descriptor_of(name)
    if descriptor is not None:
        return STDOUT if descriptor == 1 else f"descriptor {descriptor}"
    return os.path.realpath(name)


def _is_character_device(name: str) -> bool:
    """Tell whether what is written first stays where it is when more is written: /dev/null, a terminal."""
    try:
        return stat.S_ISCHR(Path(name).stat().st_mode)
    except OSError:
        return False


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise OutputError(f"{target}: cannot write: it is a directory")
    if is_stream(target):
        if descriptor_of(target) is None and not os.access(target, os.W_OK):
            raise OutputError(f"{target}: cannot write: permission denied")
        return
    folder = Path(os.path.realpath(target)).parent
    if not folder.is_dir():
        raise OutputError(f"{target}: cannot write: the directory {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{target}: cannot write: permission denied")


def _spare_sources(option: str, target: Path, sources: Iterable[str]) -> None:
    """Refuse a target that is one of the sources, or a part of one.

    Raises:
        UsageError: if it is.
    """
    real = Path(os.path.realpath(target))
    if is_stream(target):
        return
    for name in sources:
        source = Path(name)
        if not source.exists():  # a Hub id, or a mistake that opening it will name
            continue
        if real == Path(os.path.realpath(source)):
            raise UsageError(f"{option} {target} would replace {name}, which is read: name another file")
        if real.is_file() and _is_part(real, source):
            raise UsageError(f"{option} {target} would replace a file of {name}, which is read: name another file")


def _is_part(target: Path, source: Path) -> bool:
    """Tell whether an existing file is a part of a source: in its folder, or a shard beside the file."""
    from esdtool.checkpoint.layout import is_weight_file

    real = Path(os.path.realpath(source))
    if _is_result(target):
        return False
    if real.is_dir():
        # The Hub's cache is made of links to files that lie elsewhere.
        return target.is_relative_to(real) or any(Path(os.path.realpath(entry)) == target for entry in real.iterdir())
    beside = is_weight_file(target.name) or target.name.endswith((".index.json", "_data", ".data"))
    return target.parent == real.parent and beside


def _is_result(path: Path) -> bool:
    """Tell whether a file is a result of esdtool's, which may be replaced, and no part of a checkpoint."""
    suffix = path.suffix.lower()
    if suffix in _FOR_PEOPLE:
        return True
    if suffix == ".json":
        return not path.name.endswith(_OF_A_MODEL)
    if suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                return (file.metadata() or {}).get("format") == "esdtool.esd"
        except (OSError, SafetensorError):
            return False
    return False
