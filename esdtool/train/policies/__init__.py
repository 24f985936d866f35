"""Weight-decay policies, one file each.

Every module of this package defines `POLICY`, the policy's settings: a subclass of
`esdtool.train.policy.PolicySettings` whose `start` makes the policy. It is found by itself: a file adds a policy.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final, get_args

from esdtool.train.config.one_of import OneOf
from esdtool.train.policy import PolicySettings

DEFAULT: Final = "alphadecay"
_FIRST: Final = (DEFAULT, "uniform", "none", "awd", "adadecay", "file")
"""The order in messages and in the reference; further policies follow by name."""


@functools.cache
def load_policies() -> Mapping[str, type[PolicySettings]]:
    """Return the settings of every policy, by the policy's name."""
    found: dict[str, type[PolicySettings]] = {}
    for module in pkgutil.iter_modules(__path__):
        settings = importlib.import_module(f"{__name__}.{module.name}").POLICY
        found[get_args(settings.model_fields["policy"].annotation)[0]] = settings
    order = [*_FIRST, *sorted(set(found) - set(_FIRST))]
    return MappingProxyType({name: found[name] for name in order})


WeightDecaySettings = Annotated[PolicySettings, OneOf("policy", default=DEFAULT, models=load_policies)]
"""[weight_decay] Which decay every parameter gets, and when it changes."""
