"""Choose the parameters that AlphaDecay manages, and prepare their optimizers."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from esdtool.assignment.options import OptimizerName, Unlisted, check_base
from esdtool.assignment.scope import Patterns, Scope, choose, names_of
from esdtool.errors import AssignmentError, NothingToAnalyzeError, UsageError
from esdtool.modules import SkipKind, WeightModule, select_modules
from esdtool.modules.model_code import kinds_of
from esdtool.optim import groups
from esdtool.optim.parameters import LiveModel


@dataclass(frozen=True, kw_only=True)
class Managed:
    """The modules whose decays change during training."""

    live: LiveModel
    optimizers: tuple[Optimizer, ...]
    modules: Mapping[str, tuple[WeightModule, ...]]
    """By parameter name, in the model's natural order: one, or those that a fused parameter holds."""
    skipped: Mapping[str, str]
    """Matrices that are left out although they could be scored, or hold several in one; each with the reason."""
    bases: Mapping[str, float]
    """Base decay of each parameter in `modules`."""
    scope: Scope[WeightModule]
    """The modules that could be assigned by their names, and those that could not."""
    unlisted: Mapping[nn.Parameter, float]
    """Decay of the other optimized parameters of the model; empty if they keep their optimizer's."""

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

    def split_groups(self, *, allowed: bool) -> None:
        """Give every module's weight a parameter group of its own; see `groups.split`."""
        keys: dict[nn.Parameter, Hashable] = {**self.unlisted}
        keys |= {self.parameter(name): name for name in self.modules}
        for optimizer in self.optimizers:
            groups.split(
                optimizer,
                keys.get,
                allowed=allowed,
                name_of=lambda parameter: self.live.names.get(parameter, ("a parameter of another model",))[0],
            )

    def write(self, decays: Mapping[str, float]) -> None:
        """Write the modules' decays, and those of the unlisted parameters, to the optimizers.

        Raises:
            AssignmentError: if a module's weight is in no optimizer any more, so that its decay would go nowhere.
        """
        values = {self.parameter(name): decay for name, decay in decays.items()} | dict(self.unlisted)
        held = {
            parameter
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        lost = next((name for name in self.modules if self.parameter(name) not in held), None)
        if lost is not None:
            raise AssignmentError(
                f"{lost} is no longer in the optimizer: parameters were replaced (by sharding, say) "
                "after AlphaDecay was built; build AlphaDecay after that"
            )
        for optimizer in self.optimizers:
            groups.set_decays(optimizer, values.get)


def manage(
    live: LiveModel,
    optimizers: tuple[Optimizer, ...],
    weight_decay: float | Sequence[float | None] | None,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    unlisted: Unlisted,
) -> Managed:
    """Choose the modules of a live model. Nothing is changed yet.

    Args:
        live: the model.
        optimizers: those that train it.
        weight_decay: base decay. None takes each parameter group's own; a sequence holds one per optimizer.
        include: regular expressions on names; if given, exactly the matching matrices are assigned.
        exclude: regular expressions on names to leave out.
        unlisted: decay of all other parameters of the model.

    Raises:
        UsageError: for a pattern that matches nothing or a base decay that is none.
        AssignmentError: if the optimizers hold none of the model's parameters, or the weights have no data.
        NothingToAnalyzeError: if no module is left.
    """
    held = groups.optimized(optimizers)
    if not any(parameter in held for parameter in live.names):
        raise AssignmentError(groups.FOREIGN)
    modules, skipped, scope = _choose(live, held, tuple(include), tuple(exclude))
    bases = _bases(optimizers, weight_decay)
    mine = {live.parameters[name] for name in modules}
    others = [parameter for parameter in held if parameter in live.names and parameter not in mine]
    return Managed(
        live=live,
        optimizers=optimizers,
        modules=modules,
        skipped=skipped,
        scope=scope,
        bases={name: bases[live.parameters[name]] for name in modules},
        unlisted={}
        if unlisted == "keep"
        else {parameter: 0.0 if unlisted == "no-decay" else bases[parameter] for parameter in others},
    )


def _choose(
    live: LiveModel, held: Mapping[nn.Parameter, object], include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, tuple[WeightModule, ...]], dict[str, str], Scope[WeightModule]]:
    """Choose the modules by parameter name, and tell the reason for the others, and what names alone decided."""
    checkpoint = live.checkpoint
    # With `include` also what is not scored otherwise, such as embeddings.
    selection = select_modules(
        checkpoint.tensors.values(),
        config=checkpoint.config,
        include=include,
        kinds=functools.partial(kinds_of, checkpoint),
    )
    patterns = Patterns.checked(
        include,
        exclude,
        [*checkpoint.tensors, *(name for module in selection.modules for name in names_of(module))],
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
            raise AssignmentError(f"{name}: no data (meta device): load the weights before AlphaDecay is built")
        else:
            chosen[name] = (*chosen.get(name, ()), module)
    skipped = {name: reason for name, reason in skipped.items() if name not in chosen}
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:2])
        raise NothingToAnalyzeError(
            "the model has no weight matrix that AlphaDecay could assign" + (f" ({reasons})" if reasons else "")
        )
    return chosen, skipped, scope


def _bases(
    optimizers: Sequence[Optimizer], weight_decay: float | Sequence[float | None] | None
) -> dict[nn.Parameter, float]:
    """Find the base decay of every optimized parameter."""
    given = list(weight_decay) if isinstance(weight_decay, Sequence) else [weight_decay] * len(optimizers)
    if len(given) != len(optimizers):
        raise UsageError(f"{len(given)} base weight decays for {len(optimizers)} optimizers")
    bases: dict[nn.Parameter, float] = {}
    for optimizer, base in zip(optimizers, given, strict=True):
        for group in optimizer.param_groups:
            value = group.get("weight_decay", 0.0) if base is None else base
            check_base(value, "weight_decay")
            bases |= dict.fromkeys(group["params"], float(value))
    return bases
