"""Read what the configuration of a model says about its quantisation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from esdtool.checkpoint.limits import shortened
from esdtool.errors import CheckpointError

Block = tuple[int, int]
"""(rows, columns) of a weight that share one scale."""

_BLOCK_TEXT = re.compile(r"(\d{1,9})x(\d{1,9})", re.ASCII)
_MOST_BITS = 64
_LARGEST = 2**31

_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings:
    """The parts of a `quantization_config` that shapes and dtypes do not determine."""

    method: str | None = None
    """`quant_method` in lower case, e.g. `gptq`, `compressed-tensors`."""
    layout: str | None = None
    """Layout of the codes as the method names it: `checkpoint_format` of GPTQ, `version` of AWQ,
    `packing_format` of AutoRound."""
    bits: frozenset[int] = frozenset()
    """Every width that the configuration names; several for mixed precision."""
    group_sizes: tuple[int, ...] = ()
    """Every size that the configuration names for a group of inputs with one scale."""
    blocks: tuple[Block, ...] = ()
    """Every shape that the configuration names for a block with one scale."""

    @property
    def named(self) -> str:
        """Name of the method, for messages."""
        return self.method or "unknown method"


def _block_of(value: Any) -> Any:
    """Return a block's shape from a pair, or from a text such as `128x128`."""
    if not isinstance(value, str):
        return value
    sizes = _BLOCK_TEXT.fullmatch(value)
    if sizes is None:
        raise ValueError("not two sizes, as in 128x128")
    return [int(size) for size in sizes.groups()]


_Shape = Annotated[tuple[int, int] | None, BeforeValidator(_block_of)]


class _Scheme(BaseModel):
    """The quantisation of one group of modules."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    bits: float | None = None
    w_bit: float | None = None
    num_bits: float | None = None
    group_size: int | None = None
    q_group_size: int | None = None
    weight_block_size: _Shape = None
    block_structure: _Shape = None


class _Group(BaseModel):
    """A group of modules that compressed-tensors and ModelOpt distinguish."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    weights: _Scheme | None = None


class _Quantization(_Scheme):
    """A `quantization_config`."""

    quant_method: str | None = None
    format: Any = None
    checkpoint_format: Any = None
    packing_format: Any = None
    version: Any = None
    config_groups: dict[str, _Group] | None = None


def read_settings(config: Mapping[str, Any], *, file: str | None = None) -> QuantizationSettings:
    """Read the settings in a model's configuration, of the model or of a part of it (`text_config`, ...).

    Args:
        config: the content of a `config.json`, or what a live model has in its place.
        file: the file that it was read from. A value of a wrong type is an error there; elsewhere it counts as absent.

    >>> read_settings({"text_config": {"quantization_config": {"quant_method": "GPTQ", "bits": 3}}}).bits
    frozenset({3})

    Raises:
        CheckpointError: if a file has a value of a wrong type; the message names the key.
    """
    key, content = _settings_of(config)
    if content is None:
        return QuantizationSettings()
    try:
        found = _Quantization.model_validate(content)
    except ValidationError as error:
        if file is not None:
            raise CheckpointError(f"{file}: {key}.{first_problem(error)}") from error
        wrong = {str(problem["loc"][0]) for problem in error.errors() if problem["loc"]}
        right = content.items() if isinstance(content, Mapping) else ()
        found = _Quantization.model_validate({name: value for name, value in right if name not in wrong})
    schemes = [found, *_schemes(found)]
    method = _text(found.quant_method)
    # The serialised form of GPTQ's and of AWQ's layout has several names; the first that is there counts.
    named = (
        (found.format,)
        if method == "compressed-tensors"
        else (found.checkpoint_format, found.packing_format, found.version)
    )
    groups = [scheme.q_group_size if scheme.group_size is None else scheme.group_size for scheme in schemes]
    blocks = [
        scheme.block_structure if scheme.weight_block_size is None else scheme.weight_block_size for scheme in schemes
    ]
    widths = [width for scheme in schemes for width in (scheme.bits, scheme.w_bit, scheme.num_bits)]
    return QuantizationSettings(
        method=method,
        layout=next((layout for layout in map(_text, named) if layout is not None), None),
        bits=frozenset(int(width) for width in widths if width and 0 < width <= _MOST_BITS and width % 1 == 0),
        group_sizes=tuple(dict.fromkeys(size for size in groups if size and 0 < size < _LARGEST)),
        blocks=tuple(dict.fromkeys(block for block in blocks if block and all(0 < size < _LARGEST for size in block))),
    )


def first_problem(error: ValidationError) -> str:
    """Say which key is the first that is wrong, and why."""
    first = error.errors(include_input=False, include_url=False)[0]
    return f"{shortened('.'.join(map(str, first['loc'])))}: {first['msg']}"


def _settings_of(config: Mapping[str, Any]) -> tuple[str, Any]:
    """(key, content) of the settings; the content is None if there are none."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in _KEYS:
            if part.get(key) is not None:
                return key, part[key]
    return "", None


def _schemes(settings: _Quantization) -> Iterator[_Scheme]:
    """Yield the schemes of the groups of modules."""
    for group in (settings.config_groups or {}).values():
        if group.weights is not None:
            yield group.weights


def _text(value: object) -> str | None:
    return value.lower() if isinstance(value, str) else None
