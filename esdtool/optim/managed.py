"""Choose the parameters that a live schedule manages, and prepare their optimizers."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from esdtool.assignment.options import OptimizerName
from esdtool.assignment.scope import Patterns, Scope, choose, names_of
from esdtool.errors import AssignmentError, NothingToAnalyzeError, UsageError
from esdtool.modules import SkipKind, WeightModule, select_modules
from esdtool.modules.model_code import kinds_of
from esdtool.optim import groups
from esdtool.optim.adapters import Adapters, trained_adapters
from esdtool.optim.parameters import LiveModel


@dataclass(frozen=True, kw_only=True)
class Managed:
    """The modules whose values change during training."""

    by: str
    """Name of the schedule, for messages."""
    live: LiveModel
    optimizers: tuple[Optimizer, ...]
    modules: Mapping[str, tuple[WeightModule, ...]]
    """By parameter name, in the model's natural order: one, or those that a fused parameter holds."""
    ends: tuple[str, ...]
    """Token embeddings and output heads that are trained and no modules, by name; tied ones under the first."""
    skipped: Mapping[str, str]
    """Matrices that are left out although they could be scored, or hold several in one; each with the reason."""
    scope: Scope[WeightModule]
    """The modules that could be assigned by their names, and those that could not."""

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter of a name."""
        return self.live.parameters[name]

    def kind_of_decay(self, *, needed: bool) -> OptimizerName:
        """`adam` if the optimizers of the modules decay by L2, `adamw` if they do not.

        Raises:
            UsageError: if both occur and the published ratios are `needed`.
        """
        mine = {self.parameter(name) for name in self.modules}
        l2 = [
            groups.is_l2(optimizer)
            for optimizer in self.optimizers
            if any(parameter in mine for group in optimizer.param_groups for parameter in group["params"])
        ]
        if needed and any(l2) and not all(l2):
            raise UsageError(
                "the optimizers mix L2 and decoupled weight decay, whose published ratios differ: give max_ratio"
            )
        return "adam" if all(l2) else "adamw"

    def split_groups(self, others: Mapping[nn.Parameter, Hashable], *, allowed: bool, values: str) -> None:
        """Give every module's weight a parameter group of its own; see `groups.split`.

        Args:
            others: keys of further parameters: those of one key share a group, apart from parameters without a key.
            allowed: False if no group may be split.
            values: what the parameters of a group share, for the messages.
        """
        keys: dict[nn.Parameter, Hashable] = {**others}
        keys |= {self.parameter(name): name for name in self.modules}
        for optimizer in self.optimizers:
            groups.split(
                optimizer,
                keys.get,
                allowed=allowed,
                values=values,
                name_of=lambda parameter: self.live.names.get(parameter, ("a parameter of another model",))[0],
            )

    def check_held(self, names: Iterable[str]) -> None:
        """Refuse parameters that are in no optimizer any more, so that their values would go nowhere.

        Raises:
            AssignmentError: naming the first.
        """
        held = {
            parameter
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        lost = next((name for name in names if self.parameter(name) not in held), None)
        if lost is not None:
            raise AssignmentError(
                f"{lost} is no longer in the optimizer: parameters were replaced (by sharding, say) "
                f"after {self.by} was built; build {self.by} after that"
            )


def manage(
    live: LiveModel,
    optimizers: tuple[Optimizer, ...],
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    by: str,
) -> Managed:
    """Choose the modules of a live model. Nothing is changed yet.

    Args:
        live: the model.
        optimizers: those that train it.
        include: regular expressions on names; if given, exactly the matching matrices are assigned.
        exclude: regular expressions on names to leave out.
        by: name of the schedule, for messages.

    Raises:
        UsageError: for a pattern that matches nothing.
        AssignmentError: if the optimizers hold none of the model's parameters, or the weights have no data.
        NothingToAnalyzeError: if no module is left.
    """
    held = groups.optimized(optimizers)
    if not any(parameter in held for parameter in live.names):
        raise AssignmentError(groups.FOREIGN)
    modules, ends, skipped, scope = _choose(live, held, tuple(include), tuple(exclude), by)
    return Managed(by=by, live=live, optimizers=optimizers, modules=modules, ends=ends, skipped=skipped, scope=scope)


def _choose(
    live: LiveModel, held: Mapping[nn.Parameter, object], include: Sequence[str], exclude: Sequence[str], by: str
) -> tuple[dict[str, tuple[WeightModule, ...]], tuple[str, ...], dict[str, str], Scope[WeightModule]]:
    """Choose the modules by parameter name, the ends, the reason for the others, and what names alone decided."""
    checkpoint = live.checkpoint
    kinds = functools.partial(kinds_of, checkpoint)
    # With `include` also what is not scored otherwise, such as embeddings.
    selection = select_modules(
        checkpoint.tensors.values(),
        config=checkpoint.config,
        include=include,
        kinds=kinds,
        prefix="",
    )
    patterns = Patterns.checked(
        include,
        exclude,
        [*checkpoint.tensors, *(name for module in selection.modules for name in names_of(module))],
        prefix="",
        what="tensor name",
    )
    scope = choose(selection.modules, patterns)
    chosen: dict[str, tuple[WeightModule, ...]] = {}
    skipped = {tensor.name: tensor.reason for tensor in selection.skipped if tensor.kind is SkipKind.SEVERAL_MATRICES}
    skipped |= {left.module.parameter: left.reason for left in scope.left_out}
    for module in scope.assigned:
        name = module.parameter
        parameter = live.parameters.get(name)
        if parameter is None:
            skipped[name] = "a buffer, not a parameter"
        elif not parameter.requires_grad:
            skipped[name] = "frozen: requires_grad is False"
        elif parameter not in held:
            skipped[name] = "in no optimizer"
        elif tied := next((other for other in live.names[parameter] if other in chosen and other != name), None):
            skipped[name] = f"tied to {tied}"
        elif parameter.is_meta:
            raise AssignmentError(f"{name}: no data (meta device): load the weights before {by} is built")
        else:
            chosen[name] = (*chosen.get(name, ()), module)
    skipped = {name: reason for name, reason in skipped.items() if name not in chosen}
    if not chosen:
        if (adapters := trained_adapters(live)) is not None:
            raise NothingToAnalyzeError(_only_adapters(adapters, by))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:2])
        raise NothingToAnalyzeError(
            f"the model has no weight matrix that {by} could assign" + (f" ({reasons})" if reasons else "")
        )
    # With `include`, whatever does not match is left out for that reason, the ends too.
    others = (
        select_modules(checkpoint.tensors.values(), config=checkpoint.config, kinds=kinds) if include else selection
    )
    ends = [
        tensor.name
        for tensor in others.skipped
        if tensor.kind in (SkipKind.TOKEN_EMBEDDING, SkipKind.OUTPUT_HEAD)
        and len(tensor.shape) == 2
        and not any(pattern.search(tensor.name) for pattern in patterns.exclude)
    ]
    return chosen, _ends(live, held, ends, chosen), skipped, scope


def _only_adapters(adapters: Adapters, by: str) -> str:
    """Say why a schedule does not act on adapters, and what to do."""
    name, *others = adapters.stored
    rank = adapters.checkpoint.tensors[name].rank
    return (
        f"the base of this model is frozen, and what is trained are adapters ({len(others) + 1} updates, the first of "
        f"{name}" + (f", of rank {rank}" if rank is not None else "") + f"): {by} does not act on updates, whose few "
        "eigenvalues give no alpha to follow. Leave the factors to the optimizer's own settings, follow the updates "
        "with esdtool.SpectralMonitor, or merge them and train all weights"
    )


def _ends(
    live: LiveModel, held: Mapping[nn.Parameter, object], names: Iterable[str], chosen: Iterable[str]
) -> tuple[str, ...]:
    """List the trained ones of the named embeddings and heads that are no modules; tied ones once."""
    taken = {live.parameters[name] for name in chosen}
    ends: dict[nn.Parameter, str] = {}
    for name in names:
        parameter = live.parameters.get(name)
        if parameter is not None and parameter.requires_grad and parameter in held and parameter not in taken:
            ends.setdefault(parameter, name)
    return tuple(ends.values())
