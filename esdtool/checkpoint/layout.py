"""Find the files that hold the weights in a listing of a folder or of a Hub repository, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from esdtool.checkpoint.formats import container_of, load_containers, weight_suffixes
from esdtool.checkpoint.slices import CONSOLIDATED
from esdtool.errors import CheckpointError
from esdtool.support.words import listed

INDEX_SUFFIX = ".index.json"
DCP_METADATA = ".metadata"
_UNREAD_SUFFIXES = (".ggml", ".msgpack", ".npz", ".tflite", ".mlmodel", ".nemo")
"""Weights of kinds that are not read, unless a container is added for them."""

_GROUPS: dict[str, tuple[str, ...]] = {
    stem: (
        f"{stem}.safetensors",
        f"{stem}.safetensors{INDEX_SUFFIX}",
        f"{pickled}.bin",
        f"{pickled}.bin{INDEX_SUFFIX}",
    )
    for stem, pickled in (
        ("model", "pytorch_model"),
        ("diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("adapter_model", "adapter_model"),
    )
}
"""The names of one model's weights, the preferred first: safetensors before pickles, one file before shards."""

KNOWN_NAMES: tuple[str, ...] = tuple(name for names in _GROUPS.values() for name in names)
"""Every file name that stands for a whole set of weights."""

_SHARD = re.compile(
    r"(?P<stem>.+?)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})(?P<suffix>\.safetensors|\.bin)", re.IGNORECASE
)
_STATE = re.compile(
    # What trainers leave beside the weights: transformers, accelerate, DeepSpeed.
    r"training_args\.bin|optimizer(_\d+)?\.(bin|pt|pth)|optimizer_state.*\.(bin|pt|pth)|(lr_)?scheduler(_\d+)?\.(bin|pt|pth)"
    r"|sampler(_\d+)?\.bin|(grad_)?scaler(_\d+)?\.(bin|pt|pth)|rng_state(_\d+)?\.(pth|pt)|random_states.*"
    r"|.*optim_states\.pt|trainer_state\.(bin|pt)|dl_state_dict(_\d+)?\.bin",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class WeightChoice:
    """The files to open in a folder."""

    kind: Literal["single", "index", "dcp"]
    """One weight file, an index of shards, or a torch.distributed.checkpoint folder."""
    file: str
    """Name of the weight file, of the index, or `.metadata`."""
    config: str
    """Name of the configuration that belongs to it; it may be missing."""
    beside: tuple[str, ...] = ()
    """Further files of the folder that `file` needs: the other shards of a GGUF set, an ONNX model's external data."""
    unread: tuple[str, ...] = ()
    """Further weight files of the folder; an index may name some of them as its shards."""

    def notes(self, location: str, shards: Iterable[str] = ()) -> tuple[str, ...]:
        """For the user: which weight files of the folder are not read."""
        unread = sorted(set(self.unread) - set(shards))
        return (f"{location}: {self.file} is read; not read: {listed(unread, 8)}",) if unread else ()


def is_weight_file(name: str) -> bool:
    """Return whether a file's name says that it may hold weights, rather than a trainer's state.

    >>> [is_weight_file(name) for name in ("model.safetensors", "training_args.bin", "config.json")]
    [True, False, False]
    """
    return name.lower().endswith(weight_suffixes()) and not _STATE.fullmatch(name)


def unread_suffixes() -> tuple[str, ...]:
    """Ends of the names of weight files that are known and not read."""
    return tuple(suffix for suffix in _UNREAD_SUFFIXES if suffix not in weight_suffixes())


def has_known_name(name: str) -> bool:
    """Return whether a single file is named as in a Hugging Face folder, so that `config.json` beside it is its own.

    >>> [has_known_name(name) for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "best.pt")]
    [True, True, False]
    """
    shard = _SHARD.fullmatch(name)
    if shard:
        return f"{shard['stem']}{shard['suffix']}" in KNOWN_NAMES
    return name in KNOWN_NAMES or any(name in container.known_names for container in load_containers())


def config_name(weights: str) -> str:
    """Name of the configuration that goes with a weight file."""
    return "adapter_config.json" if weights.startswith("adapter_model.") else "config.json"


def choose_weights(names: Iterable[str], *, location: str) -> WeightChoice:
    """Choose the weights among the files at the top of a folder.

    A known name wins over torch.distributed.checkpoint, and that over a file of any other
    name, which must be the only one, and that over the formats of other libraries (GGUF, ONNX,
    Keras), of which there must be one model. What is passed over is in `unread`.

    Args:
        names: file names, without folders.
        location: the folder, for messages.

    >>> choose_weights(["config.json", "model.safetensors", "pytorch_model.bin"], location="x").notes("x")
    ('x: model.safetensors is read; not read: pytorch_model.bin',)

    Raises:
        CheckpointError: if there are no weights, or several that do not belong together.
    """
    names = sorted(names)
    groups = [present for group in _GROUPS.values() if (present := [name for name in group if name in names])]
    if len(groups) > 1:
        choices = ", ".join(group[0] for group in groups)
        raise CheckpointError(f"{location}: weights of different things: {choices}; name one of these files")
    weights = [name for name in names if is_weight_file(name)]
    if groups:
        chosen = groups[0][0]
        shards = [name for name in weights if _SHARD.fullmatch(name) and has_known_name(name)]
        # The shards of an index that is read are no leftovers, nor need the other format's be listed one by one.
        others = [*groups[0][1:], *(name for name in weights if name not in KNOWN_NAMES and name not in shards)]
        others += [DCP_METADATA] if DCP_METADATA in names else []
        return _choice(chosen, others)
    if DCP_METADATA in names:
        return _choice(DCP_METADATA, weights)
    if not weights:
        raise CheckpointError(f"{location}: no weights{_looked_for(names)}")
    foreign = [name for name in weights if (container := container_of(name)) is not None and container.foreign]
    weights = [name for name in weights if name not in foreign]
    if not weights:
        return _choose_foreign(foreign, names, location)
    if len(weights) > 1 and all(CONSOLIDATED.fullmatch(name) for name in weights):
        chosen, *beside = weights
        return WeightChoice(kind="single", file=chosen, config=config_name(chosen), beside=tuple(beside))
    if len(weights) > 1:
        raise CheckpointError(
            f"{location}: {len(weights)} weight files and no index that joins them: {listed(weights, 8)}; "
            "name one of them, or restore the .index.json"
        )
    shard = _SHARD.fullmatch(weights[0])
    if shard and int(shard["count"]) > 1:
        raise CheckpointError(
            f"{location}: {weights[0]} is one of {int(shard['count'])} shards and there is no index; "
            "restore the others and the .index.json, or name this file to read it alone"
        )
    return _choice(weights[0], foreign)


def _choose_foreign(weights: list[str], names: list[str], location: str) -> WeightChoice:
    """Choose among files of other libraries' containers, where there is nothing else; they must be of one model."""
    models: dict[str, list[str]] = {}
    for name in weights:
        container = container_of(name)
        models.setdefault(container.model_of(name) if container else name, []).append(name)
    if len(models) > 1:
        firsts = [parts[0] for parts in models.values()]
        raise CheckpointError(f"{location}: {len(models)} models: {listed(firsts, 8)}; name one of these files")
    chosen, *parts = weights
    container = container_of(chosen)
    companions = container.companions(chosen, names) if container else ()
    return WeightChoice(kind="single", file=chosen, config=config_name(chosen), beside=(*parts, *companions))


def _choice(chosen: str, others: Iterable[str]) -> WeightChoice:
    kind: Literal["single", "index", "dcp"] = (
        "dcp" if chosen == DCP_METADATA else "index" if chosen.endswith(INDEX_SUFFIX) else "single"
    )
    return WeightChoice(kind=kind, file=chosen, config=config_name(chosen), unread=tuple(others))


def _looked_for(names: Iterable[str]) -> str:
    known = ", ".join(names[0] for names in _GROUPS.values())
    text = (
        f": looked for {known}, pytorch_model.bin, their .index.json, {DCP_METADATA} (torch.distributed.checkpoint), "
        f"and any other {', '.join(weight_suffixes())} file"
    )
    unread = [name for name in names if name.lower().endswith(unread_suffixes())]
    return text + (f"; found {listed(unread, 8)}, of a format that is not read" if unread else "")
