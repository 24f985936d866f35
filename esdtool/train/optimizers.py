"""Optimizers, with one parameter group for each module that may get a decay of its own."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from esdtool.assignment.fused import joined_roles
from esdtool.assignment.scope import Patterns, Scope, choose
from esdtool.checkpoint import from_model
from esdtool.errors import ConfigError
from esdtool.modules import WeightModule, select_modules
from esdtool.modules.blocks import find_blocks
from esdtool.modules.model_code import kinds_of
from esdtool.names import module_name
from esdtool.train.base_decay import base_decay
from esdtool.train.config.sections import MuonSettings
from esdtool.train.config.train_config import TrainConfig
from esdtool.train.parameter_groups import Group, trainable


def scored_modules(model: nn.Module, config: TrainConfig) -> tuple[WeightModule, ...]:
    """Choose the modules that get a decay of their own: those of `decay_scope` that are not frozen.

    Raises:
        ConfigError: if an expression is none or matches no module's name.
    """
    return trained_modules(model, decay_scope(model, config))


def trained_modules(model: nn.Module, scope: Scope[WeightModule]) -> tuple[WeightModule, ...]:
    """List the assigned modules that are trained, one for each parameter."""
    parameters = trainable(model)
    return whole_parameters(module for module in scope.assigned if module.parameter in parameters)


def decay_scope(model: nn.Module, config: TrainConfig) -> Scope[WeightModule]:
    """Decide which modules get a decay of their own, and why the others do not.

    They are those that `esdtool assign` assigns: the matrices of the model's blocks, or with `include` exactly the
    matching modules, less those that `exclude` matches.

    Raises:
        ConfigError: if an expression is none or matches no module's name.
    """
    return _scope(model, config.weight_decay.include, config.weight_decay.exclude, section="weight_decay")


def rate_modules(model: nn.Module, config: TrainConfig) -> tuple[WeightModule, ...]:
    """Choose the modules that may get a learning rate of their own, in the way of `decay_scope`.

    Raises:
        ConfigError: if an expression is none or matches no module's name.
    """
    settings = config.learning_rate
    include, exclude = getattr(settings, "include", ()), getattr(settings, "exclude", ())
    return trained_modules(model, _scope(model, include, exclude, section="learning_rate"))


def _scope(model: nn.Module, include: Sequence[str], exclude: Sequence[str], *, section: str) -> Scope[WeightModule]:
    """Choose modules by the expressions of a section."""
    checkpoint = from_model(model)
    tensors = list(checkpoint.tensors.values())
    matrices = [tensor.name for tensor in tensors if len(tensor.shape) >= 2]
    patterns = Patterns.checked(
        include,
        exclude,
        map(module_name, matrices),
        prefix=f"{section}.",
        what="module",
        error=ConfigError,
    )
    wanted = [
        f"^{re.escape(name)}$"
        for name in matrices
        if any(pattern.search(module_name(name)) for pattern in patterns.include)
    ]
    modules = select_modules(
        tensors, config=checkpoint.config, include=wanted, kinds=functools.partial(kinds_of, checkpoint)
    ).modules
    return choose(modules, patterns, names=lambda module: (module_name(module.parameter),))


def whole_parameters(modules: Iterable[WeightModule]) -> tuple[WeightModule, ...]:
    """One module for each parameter: what an optimizer can give a decay of its own."""
    members: dict[str, list[WeightModule]] = defaultdict(list)
    for module in modules:
        members[module.parameter].append(module)
    return tuple(
        found[0]
        if found[0].view is None
        else replace(
            found[0],
            name=module_name(parameter),
            role=joined_roles(module.role for module in found),
            shape=found[0].stored_shape,
            expert=None,
            view=None,
            parameter_shape=None,
        )
        for parameter, found in members.items()
    )


def build_optimizers(
    model: nn.Module, config: TrainConfig, modules: Sequence[WeightModule]
) -> list[torch.optim.Optimizer]:
    """The optimizers of [optimizer]: one, or Muon and AdamW.

    Each of `modules` is a group of its own, all other parameters are one; every group starts
    with the base decay, but with `weight_decay.unlisted = "no-decay"` the others have 0.
    """
    settings = config.optimizer
    parameters = trainable(model)
    own = {module.parameter for module in modules}
    base = base_decay(config, model)
    rest_decay = 0.0 if config.weight_decay.unlisted == "no-decay" else base
    blocks = find_blocks((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    to_muon = {
        name
        for name, parameter in parameters.items()
        if isinstance(settings, MuonSettings) and parameter.ndim == 2 and blocks.layer(name) is not None
    }

    def groups(names: list[str]) -> list[Group]:
        alone = [{"params": [parameters[name]], "weight_decay": base} for name in names if name in own]
        rest = [parameters[name] for name in names if name not in own]
        return alone + ([{"params": rest, "weight_decay": rest_decay}] if rest else [])

    optimizers: list[torch.optim.Optimizer] = []
    if to_muon:
        assert isinstance(settings, MuonSettings)
        optimizers.append(
            torch.optim.Muon(
                groups([name for name in parameters if name in to_muon]),
                lr=settings.muon_lr or settings.lr,
                momentum=settings.muon_momentum,
                weight_decay=base,
                # Updates of the same RMS as AdamW's, so that its learning rates carry over.
                adjust_lr_fn="match_rms_adamw",
            )
        )
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    rest = groups([name for name in parameters if name not in to_muon])
    if rest:
        on_gpu = all(parameter.is_cuda for parameter in parameters.values())
        optimizers.append(
            kind(rest, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=base, fused=on_gpu or None)
        )
    return optimizers


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], config: TrainConfig, factor: float) -> None:
    """Set every group to its peak learning rate times `factor`."""
    settings = config.optimizer
    for optimizer in optimizers:
        own = settings.muon_lr if isinstance(settings, MuonSettings) and _is_muon(optimizer) else None
        peak = own or settings.lr
        for group in optimizer.param_groups:
            group["lr"] = peak * factor


def _is_muon(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.Muon)
