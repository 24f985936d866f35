"""The reference of training configurations and sweeps, from their pydantic models."""

from __future__ import annotations

import inspect

from esdtool.train.config.layers import section_choices
from esdtool.train.config.loading import TrainConfig
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

Which keys `[data]`, `[optimizer]`, `[schedule]`, `[learning_rate]` and `[weight_decay]` have depends on what they
choose. A key of another choice is refused; only what an earlier file gave for its own choice is left out, with a note,
when a later file or `--set` chooses otherwise.

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
that takes a list itself needs a list of lists. A key that only some of the policies (sources, optimizers, schedules) of
one `[[grid]]` have is for these. `name` names the runs. `run.dir` and `run.seed` are the sweep's own.

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


def _words(part: schemas.Schema) -> str:
    """The description of a section, without its name in brackets."""
    return inspect.cleandoc(part["description"]).split("] ", 1)[1]


def _choices(schema: schemas.Schema, name: str, prop: schemas.Schema) -> str:
    """A section of which one key decides what others there are: first those of all choices, then each one's own."""
    choices = section_choices()[name]
    models = dict(zip(choices.models, (schemas.resolve(schema, part) for part in prop["oneOf"]), strict=True))
    first = models[choices.default]["properties"]
    selector = {
        "enum": list(models),
        "default": choices.default,
        "description": " ".join(model["properties"][choices.selector]["description"] for model in models.values()),
    }
    common = {choices.selector: selector} | {
        key: first[key] for key in first if key in choices.common and key != choices.selector
    }
    text = [f"\n## `[{name}]`\n\n{_words(prop)}\n\n"]
    text.append(schemas.fields(schema, {"properties": common}, defaults=True, head="key"))
    for choice, model in models.items():
        own = {key: value for key, value in model["properties"].items() if key not in choices.common}
        if own:
            text.append(f'\n### `{choices.selector} = "{choice}"`\n\n{inspect.cleandoc(model["description"])}\n\n')
            text.append(schemas.fields(schema, {"properties": own}, defaults=True, head="key"))
    return "".join(text)


def page() -> str:
    """The whole page."""
    schema = TrainConfig.model_json_schema(by_alias=True)
    text = [NOTICE, INTRODUCTION]
    for name, prop in schema["properties"].items():
        if name in section_choices():
            text.append(_choices(schema, name, prop))
            continue
        part = schemas.definition(schema, prop)
        assert part is not None
        text.append(f"\n## `[{name}]`\n\n{_words(part)}\n\n{schemas.fields(schema, part, defaults=True, head='key')}")
    text.append(f"\nPresets of `model.preset`: {', '.join(f'`{name}`' for name in PRESETS)}.\n")
    sweep = SweepSettings.model_json_schema()
    return "".join([*text, SWEEP, schemas.fields(sweep, sweep, defaults=True, head="key"), GRID])
