"""The model's own code as a witness: which parameters belong to a linear layer, an embedding, a head, a norm.

A live model tells by itself. For a checkpoint whose config.json names an architecture that transformers has, the
model is built without data (on torch's meta device). No code of the checkpoint's is run: `auto_map` is not looked at.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from esdtool.names import canonical_name, without_root

if TYPE_CHECKING:
    from torch import nn

    from esdtool.checkpoint import Checkpoint

_COUNTS = re.compile(r"(?:n|num)_\w*(?:layer|block|expert|stage)s?|\w+_layers|depths?")
"""Settings that say how often a part of the model is repeated."""


_MAKES_A_LIST = frozenset({"num_labels", "num_hidden_groups"})
_MOST_LABELS = 100_000
"""transformers makes a name for each label, which takes time and memory."""


class ParameterKind(StrEnum):
    """The layer that a parameter is the weight of."""

    LINEAR = "linear"
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"
    OUTPUT_HEAD = "output-head"
    NORMALISATION = "normalisation"


ParameterKinds = Mapping[str, ParameterKind]
"""Kind by the parameter's name without wrappers and outer prefixes; a parameter of no such layer is not in it."""


def plain_name(parameter: str) -> str:
    """A parameter's name without wrappers and outer prefixes, in which a file and its model may differ.

    >>> plain_name("module.model.layers.0.fc1.weight")
    'layers.0.fc1.weight'
    """
    return ".".join(without_root(tuple(canonical_name(parameter).split("."))))


def kinds_of(checkpoint: Checkpoint) -> ParameterKinds:
    """Tell the kinds of a checkpoint's parameters, by the live model that it is of or by its configuration."""
    model = getattr(checkpoint, "model", None)
    if model is not None:
        return kinds_of_model(model)
    return kinds_of_architecture(checkpoint.config, num_tensors=len(checkpoint.tensors))


def kinds_of_model(model: nn.Module) -> ParameterKinds:
    """Tell the kind of every weight of a live model (also one without data)."""
    from torch import nn

    heads = {id(head) for head in _output_heads(model)}
    kinds: dict[str, ParameterKind] = {}
    for name, module in model.named_modules():
        kind: ParameterKind | None = None
        if id(module) in heads:
            kind = ParameterKind.OUTPUT_HEAD
        elif isinstance(module, nn.Linear | nn.Bilinear) or type(module).__name__ in _LINEAR_BY_NAME:
            kind = ParameterKind.LINEAR
        elif isinstance(module, nn.modules.conv._ConvNd):
            kind = ParameterKind.CONVOLUTION
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            kind = ParameterKind.EMBEDDING
        elif "norm" in type(module).__name__.lower():
            kind = ParameterKind.NORMALISATION
        if kind is not None:
            kinds[plain_name(f"{name}.weight" if name else "weight")] = kind
    return kinds


_LINEAR_BY_NAME = frozenset({"Conv1D"})
"""Layers that transformers and others define for themselves: a matrix, applied from the other side."""


def _output_heads(model: nn.Module) -> Iterator[nn.Module]:
    get = getattr(model, "get_output_embeddings", None)
    if get is not None:
        with contextlib.suppress(Exception):  # models that have none raise as they please
            head = get()
            if head is not None:
                yield head


def kinds_of_architecture(config: Mapping[str, Any], *, num_tensors: int) -> ParameterKinds:
    """Tell the kinds by the model that transformers has for a configuration.

    Importing transformers takes seconds: call this only where names do not tell.

    Args:
        config: what config.json holds.
        num_tensors: tensors of the checkpoint. A configuration that asks for more layers than these describes
            something else, and is not built.

    Returns:
        The kinds; empty where transformers is missing or does not have the architecture.
    """
    if not isinstance(config.get("model_type"), str) or _asks_for_too_much(config, num_tensors):
        return {}
    if importlib.util.find_spec("transformers") is None:
        return {}
    model = None
    # Whatever transformers makes of a foreign configuration: then it knows no more than the names do.
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        model = _built(config)
    return {} if model is None else kinds_of_model(model)


def _built(config: Mapping[str, Any]) -> nn.Module | None:
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        return None
    settings = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    model_class = getattr(transformers, name, None) if name.isidentifier() else None
    with torch.device("meta"):
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            model: nn.Module = model_class(settings)
            return model
        return transformers.AutoModel.from_config(settings, trust_remote_code=False)  # type: ignore[no-any-return]


def _asks_for_too_much(config: Mapping[str, Any], most: int) -> bool:
    """Return whether a count of parts, here or in a nested configuration, is larger than the checkpoint allows."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if _asks_for_too_much(value, most):
                return True
        elif _COUNTS.fullmatch(str(key)) or key in _MAKES_A_LIST:
            counts = value if isinstance(value, list) else [value]
            limit = _MOST_LABELS if key in _MAKES_A_LIST else most
            if sum(count for count in counts if isinstance(count, int)) > limit:
                return True
    return False
