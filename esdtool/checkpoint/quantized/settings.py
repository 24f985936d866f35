"""Read what the configuration of a model says about its quantisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Block = tuple[int, int]
"""(rows, columns) of a weight that share one scale."""

_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, kw_only=True)
class Settings:
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


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Read the settings of a `config.json`, from the model or from a part of it (`text_config`, ...).

    >>> read_settings({"text_config": {"quantization_config": {"quant_method": "GPTQ", "bits": 3}}}).bits
    frozenset({3})
    """
    found = _settings_of(config)
    if found is None:
        return Settings()
    schemes = [found, *_schemes(found)]
    method = _text(found.get("quant_method"))
    # The serialised form of GPTQ's and of AWQ's layout has several names; the first that is there counts.
    keys = ("format",) if method == "compressed-tensors" else ("checkpoint_format", "packing_format", "version")
    layouts = (_text(found.get(key)) for key in keys)
    groups = [size for scheme in schemes if (size := _positive(scheme.get("group_size", scheme.get("q_group_size"))))]
    blocks = [
        block
        for scheme in schemes
        if (block := _block(scheme.get("weight_block_size", scheme.get("block_structure")))) is not None
    ]
    widths = [_positive(scheme.get(key)) for scheme in schemes for key in ("bits", "w_bit", "num_bits")]
    return Settings(
        method=method,
        layout=next((layout for layout in layouts if layout is not None), None),
        bits=frozenset(width for width in widths if width),
        group_sizes=tuple(dict.fromkeys(groups)),
        blocks=tuple(dict.fromkeys(blocks)),
    )


def _settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in _KEYS:
            if isinstance(found := part.get(key), Mapping):
                return found
    return None


def _schemes(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the `weights` of each group of modules that compressed-tensors and ModelOpt distinguish."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights


def _text(value: object) -> str | None:
    return value.lower() if isinstance(value, str) else None


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _block(value: object) -> Block | None:
    """Read the shape of a block from a pair, or from a text such as `128x128`."""
    parts: object = value.split("x") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    sizes = [int(part) if isinstance(part, str) and part.isdecimal() else _positive(part) for part in parts]
    return (sizes[0], sizes[1]) if sizes[0] and sizes[1] else None
