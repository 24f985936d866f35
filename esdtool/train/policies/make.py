"""The policy that a configuration asks for."""

from __future__ import annotations

from esdtool.errors import ConfigError
from esdtool.train.policies.base import Constant, Policy, Target
from esdtool.train.policies.gradient import AdaDecay, AdaDecayParameter, Awd


def make_policy(target: Target, *, resuming: bool) -> Policy:
    """The policy of [weight_decay].

    Args:
        target: what it works on.
        resuming: a state will be loaded at once, so that the initial spectra need not be computed.

    Raises:
        ConfigError, AssignmentError, UsageError: if its settings do not fit the model.
    """
    settings = target.config.weight_decay
    match settings.policy:
        case "uniform":
            return Constant(target, target.config.base_decay)
        case "none":
            return Constant(target, 0.0)
        case "awd":
            return Awd(target)
        case "adadecay":
            return AdaDecayParameter(target) if settings.adadecay_rule == "parameter" else AdaDecay(target)
        case "file":
            from esdtool.train.policies.spectral import FromFile

            return FromFile(target)
        case "alphadecay":
            from esdtool.train.policies.spectral import Spectral

            return Spectral(target, resuming=resuming)
    raise ConfigError(f"weight_decay.policy {settings.policy!r} is not known")
