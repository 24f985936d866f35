"""The reference of training configurations and sweeps, from their pydantic models."""

from __future__ import annotations

import inspect

from esdtool.train.config.files import TrainConfig
from esdtool.train.config.presets import PRESETS
from esdtool.train.sweep.plan import SweepSettings
from generator import schema as schemas
from generator.markdown import NOTICE

INTRODUCTION = """# Training configuration

What `esdtool train CONFIG.toml` reads: a TOML file with the sections below. Of several files, keys of later ones
replace those of earlier ones, and `--set section.key=value` comes last.
[quickstart.toml](../../examples/configs/quickstart.toml) shows every key in place;
`esdtool train CONFIG.toml --print-config` prints the resolved whole, and `esdtool schema train` the JSON Schema, for
editors. An unknown key, a wrong type or an impossible combination is refused in one line that names the key and where
it came from.

Keys without a default are unset, or have one that depends on another key, as their text says.
"""

SWEEP = """
## Sweeps

What `esdtool sweep SWEEP.toml` reads: one `[sweep]`, and one or several `[[grid]]`.

### `[sweep]`

"""


GRID = """
### `[[grid]]`

Keys of a training configuration. A list is a list of alternatives, and the runs are all combinations of them; a key
that takes a list itself needs a list of lists. `name` names the runs. `run.dir` and `run.seed` are the sweep's own.

```toml
[sweep]
config = "examples/configs/quickstart.toml"
seeds = [0, 1, 2]

[[grid]]
weight_decay.policy = ["alphadecay", "uniform"]
weight_decay.base = [0.05, 0.1]

[[grid]]
weight_decay.policy = "none"
```

are five settings with three seeds each, 15 runs.
"""


def page() -> str:
    """The whole page."""
    schema = TrainConfig.model_json_schema(by_alias=True)
    text = [NOTICE, INTRODUCTION]
    for name, prop in schema["properties"].items():
        part = schemas.definition(schema, prop)
        assert part is not None
        words = inspect.cleandoc(part["description"]).split("] ", 1)[1]
        text.append(f"\n## `[{name}]`\n\n{words}\n\n{schemas.fields(schema, part, defaults=True, head='key')}")
    text.append(f"\nPresets of `model.preset`: {', '.join(f'`{name}`' for name in PRESETS)}.\n")
    sweep = SweepSettings.model_json_schema()
    return "".join([*text, SWEEP, schemas.fields(sweep, sweep, defaults=True, head="key"), GRID])
