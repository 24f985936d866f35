"""ResNet and RegNet as transformers has them: the head is the second of a Sequential."""

from __future__ import annotations

from esdtool.modules.reasons import OUTPUT_HEAD
from esdtool.modules.rules import Family, skip

FAMILY = Family(
    name="resnet",
    model_types=frozenset({"resnet", "regnet"}),
    marker="encoder.stages.#.layers.#.layer.#.convolution",
    rules=(skip("^classifier.#", OUTPUT_HEAD),),
)
