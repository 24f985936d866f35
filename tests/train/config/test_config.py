from __future__ import annotations

import tomllib
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esdtool.errors import ConfigError
from esdtool.train.config.layers import section_choices
from esdtool.train.config.loading import (
    TrainConfig,
    check_batch,
    config_from_mapping,
    json_schema,
    load_config,
    load_run_config,
    to_toml,
)
from esdtool.train.policies import load_policies
from esdtool.train.policies.alphadecay import AlphaDecaySettings

MINIMAL = '[model]\npreset = "llama-1m"\n[tokenizer]\ntrain_vocab_size = 512\n[schedule]\nsteps = 200\n'


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_that_depend_on_other_keys_are_written_out(minimal: Path) -> None:
    config = load_config(minimal)
    assert config.schedule.warmup_steps == 20
    assert config.weight_decay.base == 0.1
    assert isinstance(config.weight_decay, AlphaDecaySettings)
    assert config.weight_decay.max_ratio == 5.0
    assert config.data.validation_fraction == 0.02
    assert config.eval.micro_size == config.batch.micro_size
    assert config.run.dir == "runs/run"


@pytest.mark.parametrize(("name", "base", "maximum"), [("adam", 1e-5, 3.0), ("adamw", 0.1, 5.0), ("muon", 0.1, 5.0)])
def test_published_decay_follows_the_optimizer(minimal: Path, name: str, base: float, maximum: float) -> None:
    config = load_config(minimal, [f"optimizer.name={name}"])
    decay = config.weight_decay
    assert isinstance(decay, AlphaDecaySettings)
    assert (config.base_decay, decay.base) == (base, base)
    assert (decay.min_ratio, decay.max_ratio) == (0.67, maximum)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optimizer.name=muon", "schedule.name=wsd"],
        ["data.source=huggingface", "data.dataset=allenai/c4", "data.validation_split=validation"],
        ["data.source=files", 'data.files=["a/*.txt", "b ü \\"quoted\\".jsonl"]', "weight_decay.exclude=^lm_head$"],
        ["model.from=some/where", "weight_decay.policy=file", "weight_decay.path=wd.json"],
        ["optimizer.max_grad_norm=1", "run.threads=2", "weight_decay.base=0"],
    ],
)
def test_the_resolved_whole_reads_back_unchanged(minimal: Path, tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(minimal, overrides)
    again = tmp_path / "again.toml"
    again.write_text(to_toml(config))
    assert load_config(again) == config
    jsonschema.validate(tomllib.loads(to_toml(config)), json_schema())


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.lr=3e-4", "optimizer", "lr", 3e-4),
        ("optimizer.lr = 1", "optimizer", "lr", 1.0),
        ("optimizer.name=adam", "optimizer", "name", "adam"),
        ('optimizer.name="adam"', "optimizer", "name", "adam"),
        ("optimizer.betas=[0.8, 0.95]", "optimizer", "betas", (0.8, 0.95)),
        ("logging.wandb=true", "logging", "wandb", True),
        ("run.dir=runs/a=b c", "run", "dir", "runs/a=b c"),
        ("data.validation_fraction=0.5", "data", "validation_fraction", 0.5),
        ("batch.global_size=1_024", "batch", "global_size", 1024),
    ],
)
def test_overrides_are_toml_or_bare_strings(
    minimal: Path, override: str, section: str, key: str, value: object
) -> None:
    assert getattr(getattr(load_config(minimal, [override]), section), key) == value


def test_a_single_glob_is_a_list_of_one(minimal: Path) -> None:
    assert load_config(minimal, ["data.source=files", "data.files=*.txt"]).data.files == ("*.txt",)


def test_later_files_and_overrides_win(minimal: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "uniform.toml"
    overlay.write_text('[weight_decay]\npolicy = "uniform"\nbase = 0.2\n')
    config = load_config([minimal, overlay], ["weight_decay.base=0.3"])
    assert (config.weight_decay.policy, config.weight_decay.base) == ("uniform", 0.3)
    assert config.schedule.steps == 200
    assert config.run.dir == "runs/run-uniform"


def test_a_later_choice_drops_what_belonged_to_the_earlier_one(tmp_path: Path) -> None:
    base = tmp_path / "base.toml"
    base.write_text(
        '[model]\npreset = "llama-60m"\n[tokenizer]\nname = "google-t5/t5-base"\n'
        '[schedule]\nname = "wsd"\nsteps = 20\ndecay_steps = 4\n[optimizer]\nname = "muon"\nmuon_lr = 1.0\n'
        '[data]\nsource = "huggingface"\ndataset = "allenai/c4"\nname = "en"\nvalidation_split = "validation"\n'
    )
    overrides = ["data.source=stdlib", "tokenizer.train_vocab_size=512", "model.from=a/checkpoint"]
    config = load_config(base, [*overrides, "schedule.name=cosine", "optimizer.name=adam"])
    assert (config.data.source, hasattr(config.data, "dataset")) == ("stdlib", False)
    assert config.tokenizer.name is None
    assert (config.model.preset, config.model.from_) == (None, "a/checkpoint")
    assert (config.schedule.name, hasattr(config.schedule, "decay_steps")) == ("cosine", False)
    assert (config.optimizer.name, hasattr(config.optimizer, "muon_lr")) == ("adam", False)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimiser.lr=1", "unknown section [optimiser]; did you mean [optimizer]?"),
        ("zzz.lr=1", "unknown section [zzz]; there are [model], [data], [tokenizer]"),
        ("optimizer.betes=1", "unknown key optimizer.betes; did you mean optimizer.betas?"),
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate; the keys of [optimizer] are name, lr"),
        ("model.form=x", "unknown key model.form; did you mean model.from?"),
        ("optimizer.lr=fast", 'optimizer.lr is the string "fast", but should be a valid number'),
        ("optimizer.lr=0", "optimizer.lr is 0, but should be greater than 0"),
        ("optimizer.lr=nan", "optimizer.lr is nan, but should be a finite number"),
        (  # a key of several types names them all
            "weight_decay.base=powerlines",
            "weight_decay.base is the string \"powerlines\", but should be a valid number or 'power-lines'",
        ),
        ("optimizer.lr=true", "optimizer.lr is true, but should be a valid number"),
        ("schedule.steps=1e4", "schedule.steps is 10000.0, but should be a valid integer"),
        ("schedule.steps=0", "schedule.steps is 0, but should be greater than or equal to 1"),
        ("optimizer.name=sgd", "optimizer.name is the string \"sgd\", but should be 'adamw', 'adam' or 'muon'"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1 is 1.0, but should be less than 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("logging.wandb=1", "logging.wandb is 1, but should be a valid boolean"),
        ("model.preset=llama-7m", "model.preset 'llama-7m' is not known; choose from llama-1m, "),
        ("weight_decay.policy=l2", "weight_decay.policy is the string \"l2\", but should be 'alphadecay', 'uniform'"),
        ("weight_decay.fit=powerlaw", 'weight_decay.fit is the string "powerlaw"'),
        ("weight_decay.base=-0.1", "weight_decay.base is -0.1, but should be greater than or equal to 0"),
        ("data.validation_fraction=1", "data.validation_fraction is 1, but should be less than 1"),
        ("run.dir=", 'run.dir is the string "", but should'),
    ],
)
def test_a_bad_key_or_value_is_named_with_where_it_came_from(minimal: Path, override: str, expected: str) -> None:
    message = complaint(minimal, override)
    assert expected in message
    assert override in message or "run.toml" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["batch.micro_size=24"], "batch.global_size 512 is not divisible by batch.micro_size 24"),
        (["schedule.warmup_steps=300"], "schedule.warmup_steps 300 is more than schedule.steps 200"),
        (
            ["schedule.name=wsd", "schedule.warmup_steps=150", "schedule.decay_steps=100"],
            "schedule.warmup_steps 150 + schedule.decay_steps 100 is more than schedule.steps 200",
        ),
        (["schedule.decay_steps=5"], 'schedule.decay_steps belongs to schedule.name = "wsd", but the name is "cosine"'),
        (["optimizer.muon_lr=1"], 'optimizer.muon_lr belongs to optimizer.name = "muon", but the name is "adamw"'),
        (["weight_decay.policy=file"], 'weight_decay.policy = "file" needs weight_decay.path'),
        (["weight_decay.path=x"], 'weight_decay.path belongs to weight_decay.policy = "file"'),
        (["weight_decay.max_ratio=0.5"], "weight_decay.min_ratio 0.67 is more than weight_decay.max_ratio 0.5"),
        (["weight_decay.min_ratio=6"], "weight_decay.min_ratio 6.0 is more than weight_decay.max_ratio, 5.0 for adamw"),
        (["data.files=a.txt"], 'data.files belongs to data.source = "files", but the source is "stdlib"'),
        (["data.dataset=c4"], 'data.dataset belongs to data.source = "huggingface", but the source is "stdlib"'),
        (["data.source=files"], 'data.source = "files" needs data.files'),
        (["data.source=files", "data.files=[]"], 'data.source = "files" needs data.files'),
        (["data.source=huggingface"], 'data.source = "huggingface" needs data.dataset'),
        (
            ["data.source=huggingface", "data.dataset=x", "data.validation_split=train"],
            'data.validation_split is data.split ("train")',
        ),
    ],
)
def test_an_impossible_combination_names_its_keys(minimal: Path, overrides: list[str], expected: str) -> None:
    assert expected in complaint(minimal, *overrides)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the section [model] is needed"),
        ('[model]\npreset = "llama-1m"\n', "the section [schedule] is needed"),
        (MINIMAL.replace("steps = 200", ""), "schedule.steps is needed"),
        (MINIMAL.replace('preset = "llama-1m"', ""), "one of model.preset, model.config and model.from is needed"),
        (MINIMAL.replace('"llama-1m"', '"llama-1m"\nfrom = "x"'), "model.preset and model.from exclude each other"),
        (
            MINIMAL.replace("train_vocab_size = 512", ""),
            "one of tokenizer.name, tokenizer.file and tokenizer.train_",
        ),
        (MINIMAL.replace("[tokenizer]", '[tokenizer]\nfile = "x"'), "tokenizer.file and tokenizer.train_vocab_size"),
        ("batch = 3\n" + MINIMAL, "batch must be a section [batch], not 3"),
        ("[model\n", "not valid TOML"),
        ("[model]\npreset = llama\n", "line 2"),
        ("a = 1\na = 2\n", "not valid TOML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    message = complaint(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_the_misspelt_key_is_reported_rather_than_the_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(MINIMAL.replace("steps = 200", "step = 200"))
    assert complaint(path).endswith("unknown key schedule.step; did you mean schedule.steps?")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in complaint(tmp_path / "none.toml")
    assert "Is a directory" in complaint(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    assert "not UTF-8" in complaint(tmp_path / "latin.toml")


@pytest.mark.parametrize("override", ["lr=1", "optimizer.lr", "=", "optimizer.=1", ".lr=1"])
def test_a_malformed_override_is_shown_how(minimal: Path, override: str) -> None:
    assert complaint(minimal, override) == f"--set {override}: expected section.key=value, e.g. --set optimizer.lr=3e-4"


def test_check_batch_counts_the_ranks() -> None:
    config = load_config_from("batch.global_size=512", "batch.micro_size=32")
    check_batch(config, 16)
    with pytest.raises(ConfigError, match=r"^batch.global_size 512 is not divisible by batch.micro_size 32 x 3 ranks$"):
        check_batch(config, 3)


def load_config_from(*overrides: str) -> TrainConfig:
    document: dict[str, dict[str, object]] = {key: dict(value) for key, value in tomllib.loads(MINIMAL).items()}
    for override in overrides:
        name, value = override.split("=")
        section, key = name.split(".")
        document.setdefault(section, {})[key] = int(value)
    return config_from_mapping(document)


@given(global_size=st.integers(1, 600), micro_size=st.integers(1, 40), world_size=st.integers(1, 9))
def test_accepted_batches_split_evenly(global_size: int, micro_size: int, world_size: int) -> None:
    sizes = [f"batch.global_size={global_size}", f"batch.micro_size={micro_size}"]
    try:
        check_batch(load_config_from(*sizes), world_size)
    except ConfigError as error:
        assert global_size % (micro_size * world_size)
        assert str(global_size) in str(error)  # noqa: PT017
    else:
        assert global_size % (micro_size * world_size) == 0


def test_every_key_is_documented() -> None:
    definitions = json_schema()["$defs"]
    undocumented = [
        f"{section}.{key}"
        for section, definition in definitions.items()
        for key, schema in definition["properties"].items()
        if not schema.get("description")
    ]
    assert not undocumented
    assert all(definition["additionalProperties"] is False for definition in definitions.values())


def test_a_config_cannot_be_changed(minimal: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(minimal).optimizer.lr = 1.0  # type: ignore[misc]


def test_score_options_are_those_of_the_section(minimal: Path) -> None:
    config = load_config(minimal, ["weight_decay.fit=farms", "weight_decay.farms_rows=64", "weight_decay.fast=true"])
    assert isinstance(config.weight_decay, AlphaDecaySettings)
    options = config.weight_decay.score_options()
    assert (options.fit, options.farms_rows, options.fast, options.k_fraction) == (("farms",), 64, True, 0.5)


FOREIGN = [
    (section, choice, key)
    for section, choices in section_choices().items()
    for choice in choices.models
    for key in sorted({key for other in choices.models for key in choices.keys_of(other)} - choices.keys_of(choice))
]
NEEDED = {"file": ["{section}.path=x"], "files": ["data.files=x"], "huggingface": ["data.dataset=x"]}


def test_every_section_with_a_choice_has_keys_of_its_own() -> None:
    assert set(section_choices()) == {"data", "optimizer", "schedule", "learning_rate", "weight_decay"}
    assert len(FOREIGN) > 80
    assert {section for section, _, _ in FOREIGN} == set(section_choices())


@pytest.mark.parametrize(("section", "choice", "key"), FOREIGN)
def test_a_key_of_another_choice_is_refused_and_says_whose_it_is(
    minimal: Path, section: str, choice: str, key: str
) -> None:
    choices = section_choices()[section]
    chosen = [
        f"{section}.{choices.selector}={choice}",
        *(each.format(section=section) for each in NEEDED.get(choice, [])),
    ]
    load_config(minimal, chosen)
    message = complaint(minimal, *chosen, f"{section}.{key}=1")
    assert message.startswith(f"--set {section}.{key}=1: {section}.{key} belongs to {section}.{choices.selector} = ")
    assert message.endswith(f', but the {choices.selector} is "{choice}"')
    owners = [other for other in choices.models if key in choices.models[other].model_fields]
    assert all(f'"{owner}"' in message for owner in owners)


@pytest.mark.parametrize("order", [1, -1])
def test_the_command_line_is_one_layer(minimal: Path, order: int) -> None:
    overrides = ["weight_decay.fit=ks", "weight_decay.policy=uniform"][::order]
    assert 'weight_decay.fit belongs to weight_decay.policy = "alphadecay", but the policy is "uniform"' in complaint(
        minimal, *overrides
    )


def test_keys_of_the_earlier_choice_are_dropped_with_a_note(minimal: Path, tmp_path: Path) -> None:
    minimal.write_text(MINIMAL + '[weight_decay]\nfit = "ks"\ninterval = 7\nbase = 0.2\n[optimizer]\nlr = 0.5\n')
    notes: list[str] = []
    config = load_config(minimal, ["weight_decay.policy=uniform"], on_note=notes.append)
    assert (config.weight_decay.policy, config.weight_decay.base, config.optimizer.lr) == ("uniform", 0.2, 0.5)
    assert notes == [
        f"{minimal}: weight_decay.fit, weight_decay.interval left out: "
        'not of weight_decay.policy = "uniform", which --set weight_decay.policy=uniform chooses'
    ]
    # What the other policy has too stays, and nothing is noted where nothing is dropped.
    notes.clear()
    config = load_config(minimal, ["weight_decay.policy=awd", "weight_decay.base=0.3"], on_note=notes.append)
    assert config.weight_decay.model_dump()["interval"] == 7
    assert [note.partition(" left out")[0] for note in notes] == [f"{minimal}: weight_decay.fit"]
    notes.clear()
    load_config(minimal, ["weight_decay.policy=alphadecay", "weight_decay.k_fraction=0.4"], on_note=notes.append)
    assert notes == []
    # In one file, nothing is dropped.
    minimal.write_text(MINIMAL + '[weight_decay]\npolicy = "uniform"\nfit = "ks"\n')
    assert "weight_decay.fit belongs to" in complaint(minimal)
    overlay = tmp_path / "overlay.toml"
    overlay.write_text('[weight_decay]\npolicy = "none"\ninterval = 3\n')
    with pytest.raises(ConfigError, match=rf'{overlay}: weight_decay\.interval belongs to .* but the policy is "none"'):
        load_config([minimal, overlay])
    # Not even by a key that nobody has.
    minimal.write_text(MINIMAL + "[weight_decay]\nintervall = 3\n")
    assert "unknown key weight_decay.intervall; did you mean" in complaint(minimal, "weight_decay.policy=uniform")


def test_the_configuration_of_a_run_of_an_earlier_version_is_read(minimal: Path) -> None:
    """These wrote the keys of every policy."""
    old = '[weight_decay]\npolicy = "uniform"\nbase = 0.2\ninterval = 500\nfit = "hill"\nawd_scale = 100.0\n'
    minimal.write_text(MINIMAL + old + '[data]\nsource = "stdlib"\nsplit = "train"\nstreaming = true\n')
    config = load_run_config(minimal)
    assert (config.weight_decay.policy, config.weight_decay.base, config.data.source) == ("uniform", 0.2, "stdlib")
    assert complaint(minimal)


def test_the_schema_knows_whose_key_it_is(minimal: Path) -> None:
    schema = json_schema()
    document = tomllib.loads(MINIMAL)
    for policy, settings in load_policies().items():
        section = {"policy": policy} | ({"path": "x"} if policy == "file" else {})
        jsonschema.validate(document | {"weight_decay": section}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document | {"weight_decay": section | {"nothing": 1}}, schema)
        if "fit" not in settings.model_fields:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(document | {"weight_decay": section | {"fit": "ks"}}, schema)
    jsonschema.validate(document | {"weight_decay": {"fit": "ks"}}, schema)


@pytest.mark.parametrize("value", ["3", "[1]", "{ a = 1 }", "true", "1.5", '""'])
@pytest.mark.parametrize("selector", ["weight_decay.policy", "data.source", "optimizer.name", "schedule.name"])
def test_a_choice_of_anything_is_one_line(minimal: Path, selector: str, value: str) -> None:
    message = complaint(minimal, f"{selector}={value}")
    assert message.startswith(f"--set {selector}={value}: {selector} is ")
    assert ", but should be '" in message


def test_the_seed_of_the_data_is_that_of_the_run_unless_given(minimal: Path) -> None:
    assert load_config(minimal, ["run.seed=3"]).data_seed == 3
    assert load_config(minimal, ["run.seed=3", "data.seed=5"]).data_seed == 5
    assert "seed" not in tomllib.loads(to_toml(load_config(minimal, ["run.seed=3"])))["data"]
