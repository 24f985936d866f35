"""From the name of an adapter's tensor to the module that it changes, whichever library wrote it.

PEFT prefixes the model's names by `base_model.model.` and puts the adapter's name behind the part (`lora_A.default`);
kohya's scripts and LyCORIS flatten a module's path (`lora_unet_mid_block_attentions_0_proj_in`); diffusers' attention
processors say `attn1.processor.to_q_lora.down` for what the model calls `attn1.to_q`; llama.cpp puts the part behind
the weight's whole name (`blk.0.attn_q.weight.lora_a`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PEFT_PREFIX = "base_model.model."
SHARED = "base_model"
"""Module under which PEFT keeps what all modules share (VeRA's projections)."""

FLAT_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_")
"""Prefixes of names whose dots have become underscores."""

_COMPONENTS = (
    "model.diffusion_model.",
    "diffusion_model.",
    "unet.",
    "transformer.",
    "text_encoder.",
    "text_encoder_2.",
)
"""Prefixes of a pipeline's parts, which flattened names lack."""

_PROCESSOR = re.compile(r"^(?P<module>.+)\.processor\.(?P<entry>[^.]+)$")
_ENTRIES = {"to_out": "to_out.0"}
"""Modules that a diffusers attention processor calls otherwise than the model does."""


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The information in the name of an adapter's tensor."""

    stored_module: str
    """Path of the module as the file has it."""
    module: str
    """Path of the module in the model: without PEFT's prefix and shells."""
    adapter: str | None
    """Name of the adapter, where the file has several or comes from a live model."""
    part: str
    """What the tensor is, in the words of the kinds (`esdtool.checkpoint.adapters.kinds`)."""
    depth: int
    """Wrappers of parameters inside the outermost one (`target_parameters`)."""
    embedding: bool
    """Whether the factors are an embedding's, which are transposed."""


class Spellings:
    """The ways in which libraries write the parts of an adapter."""

    def __init__(self, parts: Mapping[str, str]) -> None:
        """Compile the spellings.

        Args:
            parts: part by the ending of a tensor's name after the module's path, e.g. `lora_A` or `_lora.down`. One
                that begins with `_` is joined to the module's last segment. `.weight` and the adapter's name may follow
                any of them.
        """
        self._parts = parts
        endings = "|".join(
            ("" if ending.startswith("_") else r"\.") + re.escape(ending)
            for ending in sorted(parts, key=len, reverse=True)
        )
        # The module's path takes what it can: no part of it is then taken for the ending.
        self._form = re.compile(
            rf"(?P<module>.+)(?P<ending>{endings})(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.weight)?"
        )

    def parse(self, name: str) -> Parsed | None:
        """Take a tensor's name apart; None if it is no part of an adapter."""
        found = self._form.fullmatch(name)
        if found is None:
            return None
        stored, ending = found["module"], found["ending"].removeprefix(".")
        rest, _, last = stored.rpartition(".")
        if f"{last}.{ending}" in self._parts:
            stored, ending = rest, f"{last}.{ending}"
        module, depth = _without_shells(stored.removeprefix(PEFT_PREFIX))
        return Parsed(
            stored_module=stored,
            module=_of_model(module),
            adapter=found["adapter"],
            part=self._parts[ending],
            depth=depth,
            embedding="lora_embedding" in ending,
        )


_SHELLS = re.compile(r"(?:^|(?<=\.))(?:base_layer|original_module|modules_to_save\.[^.]+)\.")


def without_adapters(parameter: str) -> str:
    """Return what a parameter of a PEFT model is called in the model without adapters.

    >>> without_adapters("base_model.model.model.layers.0.q_proj.base_layer.weight")
    'model.layers.0.q_proj.weight'
    >>> without_adapters("base_model.model.lm_head.modules_to_save.default.weight")
    'lm_head.weight'
    """
    return _SHELLS.sub("", parameter.removeprefix(PEFT_PREFIX))


def _without_shells(module: str) -> tuple[str, int]:
    """Return the path without the `base_layer` of wrappers around wrappers, and how many there were at its end."""
    depth = 0
    while module.endswith(".base_layer"):
        module, depth = module.removesuffix(".base_layer"), depth + 1
    return module.removesuffix(".token_adapter").replace(".base_layer.", "."), depth


def _of_model(module: str) -> str:
    """Return the model's name of a module that a diffusers attention processor writes in its own way."""
    processor = _PROCESSOR.fullmatch(module)
    if processor is not None:
        return f"{processor['module']}.{_ENTRIES.get(processor['entry'], processor['entry'])}"
    return module


def flat(name: str) -> str:
    """Return a parameter's or module's name as kohya's scripts flatten it, without the prefix of a pipeline's part.

    >>> flat("lora_unet_mid_block_proj_in"), flat("unet.mid_block.proj_in.weight")
    ('mid_block_proj_in', 'mid_block_proj_in')
    """
    for prefix in (*FLAT_PREFIXES, *_COMPONENTS):
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return name.removesuffix(".weight").replace(".", "_")


def is_flat(module: str) -> bool:
    """Return whether a module's name has lost its dots."""
    return "." not in module and module.startswith(FLAT_PREFIXES)
