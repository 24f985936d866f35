"""Learning-rate policies, one file each.

Every module of this package defines `POLICY`, the policy's settings: a subclass of
`esdtool.train.learning_rate.LearningRateSettings`. It is found by itself: a file adds a policy.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final, get_args

from esdtool.train.config.one_of import OneOf
from esdtool.train.learning_rate import LearningRateSettings

DEFAULT: Final = "uniform"
_FIRST: Final = (DEFAULT, "llr", "tempbalance", "file")
"""The order in messages and in the reference; further policies follow by name."""


@functools.cache
def load_learning_rates() -> Mapping[str, type[LearningRateSettings]]:
    """Return the settings of every policy, by the policy's name."""
    found: dict[str, type[LearningRateSettings]] = {}
    for module in pkgutil.iter_modules(__path__):
        settings = importlib.import_module(f"{__name__}.{module.name}").POLICY
        found[get_args(settings.model_fields["policy"].annotation)[0]] = settings
    order = [*_FIRST, *sorted(set(found) - set(_FIRST))]
    return MappingProxyType({name: found[name] for name in order})


LearningRatePolicySettings = Annotated[
    LearningRateSettings, OneOf("policy", default=DEFAULT, models=load_learning_rates)
]
"""[learning_rate] Multiples of the learning rate of [schedule], module by module."""
