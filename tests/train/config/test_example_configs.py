from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from esdtool.train.config.loading import TrainConfig, check_batch, json_schema, load_config
from esdtool.train.estimate import estimate
from esdtool.train.model import unallocated_model

FOLDER = Path(__file__).parents[3] / "examples" / "configs"
CONFIGS = sorted(FOLDER.glob("*.toml"))
OVERLAYS = sorted((FOLDER / "policies").glob("*.toml"))
PAPER = {"60m": (10_000, 1_000), "130m": (20_000, 2_000), "350m": (60_000, 6_000), "1b": (100_000, 10_000)}


def test_every_size_optimizer_and_policy_is_there() -> None:
    names = {f"llama-{size}-{optimizer}" for size in PAPER for optimizer in ("adam", "adamw")}
    assert {path.stem for path in CONFIGS} == names | {"quickstart", "stdlib-llama"}
    assert {path.stem for path in OVERLAYS} == {"none", "uniform", "awd", "adadecay", "alphadecay"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_valid_and_its_model_builds(path: Path) -> None:
    config = load_config(path)
    vocab_size = config.tokenizer.train_vocab_size or 32000
    model = unallocated_model(config, vocab_size=vocab_size)
    figures = estimate(config, vocab_size=vocab_size, world_size=1)
    assert figures.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.run.dir == f"runs/{path.stem}"


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_the_papers_settings(size: str, optimizer: str) -> None:
    config = load_config(FOLDER / f"llama-{size}-{optimizer}.toml")
    steps, warmup = PAPER[size]
    assert config.model.preset == f"llama-{size}"
    assert (config.schedule.name, config.schedule.steps, config.schedule.warmup_steps) == ("cosine", steps, warmup)
    assert config.schedule.min_lr_ratio == 0.1
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.betas) == (optimizer, 1e-3, (0.9, 0.999))
    assert config.optimizer.max_grad_norm is None
    assert (config.tokens_per_step, config.batch.sequence_length) == (131_072, 256)
    assert (config.data.dataset, config.data.name, config.data.packing) == ("allenai/c4", "en", "document")
    assert (config.data.streaming, config.data.validation_split) == (True, "validation")
    assert config.tokenizer.name == "google-t5/t5-base"
    assert config.precision.name == "bf16"
    decay = config.weight_decay
    assert (decay.policy, decay.assign, decay.interval, decay.min_ratio) == ("alphadecay", "linear", 500, 0.67)
    assert decay.max_ratio == (3.0 if optimizer == "adam" else 5.0)
    assert decay.base in ((1e-5, 5e-6, 1e-6) if optimizer == "adam" else (0.1, 0.05, 0.01))
    for ranks in (1, 2, 4, 8):
        check_batch(config, ranks)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_policy_fits_every_config(path: Path, overlay: Path) -> None:
    base, config = load_config(path), load_config([path, overlay])
    before, after = base.weight_decay.model_dump(), config.weight_decay.model_dump()
    assert after["policy"] == overlay.stem
    shared = before.keys() & after.keys() - {"policy"}
    assert shared >= {"base", "include", "exclude", "unlisted"}
    assert {key: after[key] for key in shared} == {key: before[key] for key in shared}
    same = {"weight_decay": base.weight_decay, "run": base.run}
    assert config.model_copy(update=same) == base


def test_the_quickstart_refreshes_several_times() -> None:
    config = load_config(FOLDER / "quickstart.toml")
    assert config.data.source == "stdlib"
    assert config.schedule.steps // config.weight_decay.interval >= 3


def test_the_quickstart_shows_every_key_with_its_default() -> None:
    """Each key stands there once, set or commented out, and what is called a default is the default."""
    text = (FOLDER / "quickstart.toml").read_text()
    set_there = tomllib.loads(text)
    assert list(set_there) == list(TrainConfig.model_fields)
    shown: dict[str, list[str]] = {}
    comments: dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            section = header[1]
        elif key := re.match(r"(?:# )?(\w+) = .*?# (.*)", line):
            shown.setdefault(section, []).append(key[1])
            comments[f"{section}.{key[1]}"] = key[2]
    schema = json_schema()
    for name, reference in schema["properties"].items():
        parts = [schema["$defs"][part["$ref"].rsplit("/", 1)[1]] for part in reference.get("oneOf", [reference])]
        properties = {key: described for part in reversed(parts) for key, described in part["properties"].items()}
        assert sorted(shown[name]) == sorted(properties), name
        for key, described in properties.items():
            default = described.get("default")
            if default is None or default == []:
                continue
            written = {True: "true", False: "false"}.get(default, default) if isinstance(default, bool) else default
            assert str(written).replace("_", "") in comments[f"{name}.{key}"].replace(",", "").replace(
                "1e-3", "0.001"
            ).replace("1e-8", "1e-08").replace("[0.9 0.999]", "[0.9, 0.999]"), f"{name}.{key}"


LLR = {"60m": (3_200, 1e-3), "130m": (5_200, 1e-3), "350m": (13_600, 1e-3), "1b": (40_000, 5e-4)}
RATES = sorted((FOLDER / "learning-rates").glob("*.toml"))


@pytest.mark.parametrize("size", LLR)
def test_the_settings_of_layer_wise_learning_rates(size: str) -> None:
    """Steps, batch and optimizer are the authors' YAML files'; ratios their commands'; rates their table's."""
    config = load_config(FOLDER / "llr" / f"llama-{size}-llr.toml")
    steps, lr = LLR[size]
    assert (config.schedule.steps, config.schedule.warmup_steps, config.schedule.min_lr_ratio) == (
        steps,
        steps // 10,
        0.1,
    )
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.max_grad_norm) == (lr, (0.9, 0.95), 1.0)
    assert (config.tokens_per_step, config.batch.sequence_length) == (524_288, 1024)
    rates = config.learning_rate
    assert (rates.policy, rates.interval, rates.glide, rates.fraction) == ("llr", 100, 50, 0.2)
    assert (rates.min_ratio, rates.max_ratio, rates.ends) == (1.0, 5.0, True)
    assert (config.weight_decay.policy, config.weight_decay.base) == ("uniform", 0.1)
    unallocated_model(config, vocab_size=32000)
    for ranks in (1, 2, 4, 8):
        check_batch(config, ranks)


def test_every_policy_of_learning_rates_is_there() -> None:
    assert {path.stem for path in RATES} == {"llr", "tempbalance", "uniform"}
    assert {path.stem for path in (FOLDER / "llr").glob("*.toml")} == {f"llama-{size}-llr" for size in LLR}
    base = load_config(FOLDER / "llama-60m-adamw.toml")
    for path in RATES:
        config = load_config([FOLDER / "llama-60m-adamw.toml", path])
        assert config.learning_rate.policy == path.stem
        assert config.model_copy(update={"learning_rate": base.learning_rate, "run": base.run}) == base
