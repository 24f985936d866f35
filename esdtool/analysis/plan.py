"""The work of an analysis, known from headers alone."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from esdtool.analysis.execution import Batch, Limits, batches_of, in_turn, peak_bytes, read_bytes
from esdtool.analysis.pairing import Pairing, pair_modules
from esdtool.checkpoint import Checkpoint, from_model, from_state_dict, open_checkpoint
from esdtool.checkpoint.adapters import MergedCheckpoint, is_adapter, merged
from esdtool.checkpoint.remote.path import RemotePath
from esdtool.errors import CheckpointError, NothingToAnalyzeError, UsageError
from esdtool.modules import Selection, WeightModule, select_modules
from esdtool.modules.attention import Attention, LeftOutAttention, find_attention
from esdtool.modules.base import cost
from esdtool.modules.choice import ModuleChoice
from esdtool.modules.model_code import kinds_of
from esdtool.modules.sampling import sample_layers
from esdtool.spectra.cache import SpectrumCache
from esdtool.spectra.options import PairOptions, ScoreOptions
from esdtool.support.devices import resolve_device
from esdtool.support.threads import accelerator_workers, available_cores

_DIFFERENCE_BYTES = 17
"""Bytes per element of a float32 difference while it is made: four numbers and a mask."""

Readable = str | Path | torch.nn.Module | Mapping[str, torch.Tensor] | Checkpoint
"""What can be analysed: a path or Hub id, a live model, a state dict, or an open checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A checkpoint to subtract, and which of its modules corresponds to which."""

    checkpoint: Checkpoint
    pairing: Pairing

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the base, and how much of the two checkpoints has no counterpart."""
        lost = self.pairing.unmatched
        if not lost:
            return self.checkpoint.notes
        more = f"; {len(lost)} in all, see the list of what is skipped" if len(lost) > 1 else ""
        return (*self.checkpoint.notes, f"{lost[0].name}: {lost[0].reason}{more}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work of an analysis, known from headers alone."""

    checkpoint: Checkpoint
    selection: Selection
    options: ScoreOptions
    device: torch.device
    jobs: int
    base: Base | None = None
    """Whose weights are subtracted; None: the weights themselves are analysed."""
    parents: tuple[Base, ...] = ()
    """Checkpoints that were merged into this one, each with its counterparts of the modules."""
    merged_with: str | None = None
    """The checkpoint that an adapter is merged into."""
    choice: ModuleChoice = field(default_factory=ModuleChoice)
    """Which modules the user asked for."""
    cache: SpectrumCache | None = None
    """Where spectra are looked up and kept; None: all are computed."""
    memory: int | None = None
    """Bytes that the modules in flight may take together; None: no limit."""
    pairs: PairOptions = field(default_factory=PairOptions)
    """What is measured of the modules beside those of their base."""
    attention: tuple[Attention, ...] = ()
    """Attention blocks whose heads are analysed as well; empty where nobody asked."""
    left_out_attention: tuple[LeftOutAttention, ...] = ()
    """Attention blocks whose heads are not known."""
    estimated: frozenset[str] = frozenset()
    """Names of modules whose alpha is estimated to save time (`esdtool.analysis.budget`)."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks that the user should see."""
        lost = self.left_out_attention
        more = f"; {len(lost)} blocks in all" if len(lost) > 1 else ""
        heads = (f"no heads of {lost[0].name}: {lost[0].reason}{more}",) if lost else ()
        return (*self.checkpoint.notes, *(() if self.base is None else self.base.notes), *heads)

    @property
    def cost(self) -> float:
        """Predicted work in flops."""
        return sum(cost(module) for module in self.selection.modules)

    def batches(self, modules: Sequence[WeightModule]) -> list[Batch]:
        """Return the jobs, the most expensive first; of a remote checkpoint cheap and expensive ones in turn."""
        ordered = sorted(modules, key=cost, reverse=True)
        if isinstance(self.checkpoint.folder, RemotePath) and self.device.type == "cpu":
            # Bytes come over a network once, whatever number of modules they are for.
            parts: dict[tuple[str, tuple[int, int]], list[WeightModule]] = {}
            for module in ordered:
                parts.setdefault((module.parameter, module.rows), []).append(module)
            return in_turn([tuple(batch) for batch in parts.values()], jobs=self.jobs)
        return batches_of(ordered, together=self.device.type != "cpu", limits=self.limits)

    @property
    def limits(self) -> Limits:
        """How much is done at a time."""
        return Limits(
            jobs=self.jobs,
            memory=self.memory,
            read_ahead=not self.collective_reads,
            is_remote=isinstance(self.checkpoint.folder, RemotePath),
            beside=self._bytes_beside,
            vectors=self.options.vectors,
        )

    @property
    def collective_reads(self) -> bool:
        """Whether all ranks must read in one order: the checkpoint, or its base, is a sharded live model."""
        return self.checkpoint.collective_reads or (self.base is not None and self.base.checkpoint.collective_reads)

    @cached_property
    def _bytes_beside(self) -> Mapping[str, int]:
        """Bytes that the base adds to each module in flight, by the module's name."""
        if self.base is not None:
            pairs = self.base.pairing.base
            # The base's weight as it is stored; the difference, and up to three more copies while its error is taken.
            # Parents are read one at a time, beside the sum of their differences.
            times = 3 if self.parents else 1
            return {
                name: times * (read_bytes(other) + _DIFFERENCE_BYTES * math.prod(other.shape))
                + pair_bytes(other.matrix_shape, other.num_matrices, self.pairs)
                for name, other in pairs.items()
            }
        if not isinstance(self.checkpoint, MergedCheckpoint):
            return {}
        # An update is computed in float64 and added in float32.
        return {
            module.name: 16 * math.prod(module.stored_shape) + self._pair_bytes_of_merged(module)
            for module in self.selection.modules
            if module.parameter in self.checkpoint.updated
        }

    def _pair_bytes_of_merged(self, module: WeightModule) -> int:
        if not self.pairs.distances:
            return 0
        return 4 * math.prod(module.shape) + pair_bytes(module.matrix_shape, module.num_matrices, self.pairs)

    @property
    def bytes_to_fetch(self) -> int | None:
        """Predicted bytes of the modules' weights in a remote store; None for a checkpoint on this machine."""
        if not isinstance(self.checkpoint.folder, RemotePath):
            return None
        parts = {(module.parameter, module.rows): module.stored_shape[0] for module in self.selection.modules}
        return sum(
            self.checkpoint.stored_bytes(parameter) * (stop - start) // max(length, 1)
            for (parameter, (start, stop)), length in parts.items()
        )

    @property
    def peak_bytes(self) -> int:
        """Predicted peak memory of the modules in flight."""
        return peak_bytes(self.batches(self.selection.modules), self.limits)


def pair_bytes(shape: tuple[int, int], count: int, options: PairOptions) -> int:
    """Return the working memory of measuring a module against its base, beside both as they are stored.

    Args:
        shape: (rows, columns) of each matrix.
        count: matrices, which are put side by side.
        options: what is measured.
    """
    if not options.distances:
        return 0
    short, long = sorted((shape[0], shape[1] * count))
    copies = 8 * math.prod(shape) * count if count > 1 else 0
    # Three products, two sets of vectors and what the solver takes; two slices in float64.
    return 2 * copies + 8 * (8 * short**2 + 2 * short * min(long, max(short, 2048)))


def make_plan(
    source: Readable,
    options: ScoreOptions,
    *,
    choice: ModuleChoice | None = None,
    base: Readable | None = None,
    merged_from: Sequence[Readable] = (),
    device: str | torch.device = "auto",
    jobs: int | None = None,
    revision: str | None = None,
    cache: bool = True,
    memory: int | None = None,
    download: bool | None = None,
    pairs: PairOptions | None = None,
    per_head: bool = False,
) -> Plan:
    """Open the source and choose its modules, without reading weights.

    Args:
        source: a path or Hub id, a live model, a state dict, or an open checkpoint.
        options: what is computed of each module.
        choice: which modules; default all that are weight matrices.
        base: another checkpoint whose weights are subtracted, or that an adapter is merged into.
        merged_from: checkpoints that were merged into this one, whose differences from the base are compared.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        jobs: modules worked on at a time; default one per core on the CPU, up to four on an accelerator.
        revision: branch, tag or commit of a Hub checkpoint.
        cache: look up and keep the spectra of a path or Hub id in the user's cache.
        memory: bytes that the modules in flight may take together; None: no limit.
        download: whether models of the Hub are downloaded; see `esdtool.checkpoint.open_checkpoint`.
        pairs: what is measured of the modules beside those of `base`.
        per_head: analyse the heads of the attention blocks as well.

    Raises:
        CheckpointError: if the source or the base cannot be read.
        UsageError: if the device or `jobs` is none, if parents of a merge lack a base, or a pattern matches nothing.
        NothingToAnalyzeError: if the source holds no weight matrix.
    """
    choice = choice or ModuleChoice()
    chosen = resolve_device(device)
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs must be at least 1, not {jobs}")
    if merged_from and (base is None or len(merged_from) < 2):
        raise UsageError("the parents of a merge (merged_from) are two or more, and need the base that they share")
    checkpoint = _open(source, revision, download)
    other = None if base is None else _open(base, None, download)
    pairs = pairs or PairOptions()
    if pairs.distances and base is None:
        raise UsageError("distances are from a base: name it with --base")
    merged_with = None
    if other is not None and is_adapter(other):
        raise CheckpointError(f"{other.location}: an adapter, not a base: it holds updates of weights and no weights")
    if other is not None and is_adapter(checkpoint):
        merged_with, checkpoint, other = other.location, merged(checkpoint, other), None
    selection = _select(checkpoint, choice)
    paired = None
    if other is not None:
        paired, selection = _paired(checkpoint, selection, other, choice)
    if merged_from and paired is None:
        raise UsageError("the parents of a merge (merged_from) need a merged checkpoint, not an adapter")
    parents = tuple(_paired(checkpoint, selection, _open(parent, None, download), choice)[0] for parent in merged_from)
    if not selection.modules:
        raise NothingToAnalyzeError(
            f"{checkpoint.location}: no weight matrix to analyse among {len(checkpoint.tensors)} tensors"
            + _reasons(selection)
        )
    attention, left_out = _attention(checkpoint, selection, paired) if per_head else ((), ())
    available = available_cores() if chosen.type == "cpu" else accelerator_workers()
    if checkpoint.collective_reads or (other is not None and other.collective_reads):
        jobs = 1  # one thread, one order
    return Plan(
        checkpoint=checkpoint,
        selection=selection,
        options=options,
        device=chosen,
        jobs=min(jobs or available, len(selection.modules)),
        base=paired,
        parents=parents,
        merged_with=merged_with,
        choice=choice,
        attention=attention,
        left_out_attention=left_out,
        # What is in memory changes and is not met again.
        cache=SpectrumCache.of_user() if cache and isinstance(source, str | Path) else None,
        memory=memory,
        pairs=pairs,
    )


def _select(checkpoint: Checkpoint, choice: ModuleChoice) -> Selection:
    selection = select_modules(
        checkpoint.tensors.values(),
        config=checkpoint.config,
        include=choice.include,
        exclude=choice.exclude,
        split_fused=choice.split_fused,
        split=choice.split,
        kinds=functools.partial(kinds_of, checkpoint),
    )
    return selection if choice.sample_layers is None else sample_layers(selection, choice.sample_layers)


def _paired(
    checkpoint: Checkpoint, selection: Selection, base: Checkpoint, choice: ModuleChoice
) -> tuple[Base, Selection]:
    """Find the base's counterparts, and the selection without the modules that have none."""
    theirs = _select(base, choice.of_all)
    pairing = pair_modules(selection.modules, theirs.modules, location=checkpoint.location, base_location=base.location)
    matched = tuple(module for module in selection.modules if module.name in pairing.base)
    skipped = (*selection.skipped, *pairing.unmatched)
    return Base(checkpoint=base, pairing=pairing), Selection(modules=matched, skipped=skipped)


def _attention(
    checkpoint: Checkpoint, selection: Selection, base: Base | None
) -> tuple[tuple[Attention, ...], tuple[LeftOutAttention, ...]]:
    """Find the attention blocks, at least one whose heads are known."""
    if base is not None:
        raise UsageError("--per-head is for the weights of a model, not for differences: leave out --base")
    if not checkpoint.config:
        raise UsageError(
            f"{checkpoint.location}: --per-head needs the number of attention heads: put the model's config.json "
            "beside the weights"
        )
    found, left_out = find_attention(selection.modules, checkpoint.config)
    if not found and left_out:
        raise UsageError(f"{checkpoint.location}: --per-head: {left_out[0].name}: {left_out[0].reason}")
    if not found:
        raise UsageError(f"{checkpoint.location}: --per-head: none of the modules is a q, k, v or o projection")
    return found, left_out


def _open(source: Readable, revision: str | None, download: bool | None) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, torch.nn.Module):
        return from_model(source)
    if isinstance(source, Mapping):
        return from_state_dict(source)
    return open_checkpoint(source, revision=revision, download=download)


def _reasons(selection: Selection) -> str:
    """List the commonest reasons for leaving tensors out, for the message that none is left."""
    counts = Counter(tensor.reason for tensor in selection.skipped)
    if not counts:
        return ""
    return " (skipped: " + "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3)) + ")"
