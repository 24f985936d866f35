"""`spectrum-json`: the scores that axolotl's spectrum plugin looks for, from which it chooses by itself.

It reads `model_snr_results/snr_results_SLUG.json` in the working directory, SLUG being the model's name with hyphens
for slashes and underscores. JSON has no comments, and every key is a module there, so that the command is not in it.
"""

from __future__ import annotations

import json

from esdtool.assignment.allocation import Allocation, ValueDetail
from esdtool.assignment.writer import WriteOptions, Writer
from esdtool.names import module_name, module_path


def slug(model: str) -> str:
    """Return a model's name as it stands in the name of the plugin's file.

    >>> slug("org/my_model-1B")
    'org-my-model-1B'
    """
    return model.replace("/", "-").replace("_", "-")


def _write(allocation: Allocation, options: WriteOptions) -> str:
    del options
    scores = {}
    for name in allocation.values("train"):
        entry = allocation.parameters[name]
        score = entry.details.get("train", ValueDetail()).score
        if score is not None:
            path = module_path(name)
            numbers = [index for index, segment in enumerate(path) if segment.isdecimal()]
            kind = ".".join(path[numbers[0] + 1 :]) if numbers else ".".join(path)
            scores[module_name(name)] = {"snr": score, "type": kind}
    return json.dumps(scores, indent=4) + "\n"


WRITER = Writer(carries=frozenset({"train"}), write=_write, reader="axolotl's spectrum plugin")
