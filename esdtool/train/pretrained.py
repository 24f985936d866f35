"""Configurations, weights and tokenizers that transformers reads from a folder or the Hub, never running their code.

A checkpoint may bring Python files and ask, by `auto_map`, to have them run. transformers would then ask for permission
on stdin; esdtool refuses instead, and says so. It also refuses a configuration that would build modules without end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from esdtool.errors import ConfigError, MissingExtraError
from esdtool.train.quiet import quiet_transformers, whole_message

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_MOST_MODULES: Final = 10_000
"""Layers, experts or stages that a model may have: ten times the deepest one published."""
_COUNT_KEY: Final = re.compile(r"(?:^|_)(?:layers?|experts?|stages?|depth)(?:$|_)|^depths?$")
_NO_COUNT: Final = re.compile(r"norm|dim|size|eps|drop|init|id$|idx|types?$|token")


def read_architecture(path: str, what: str) -> PretrainedConfig:
    """Return the transformers configuration of a folder, of a config.json or of a Hub id.

    Args:
        path: where it lies.
        what: how messages begin, e.g. `model.from runs/x/final`.

    Raises:
        ConfigError: if it cannot be read, needs code of its own, or is of an absurd size.
        MissingExtraError: if transformers is not installed.
    """
    transformers = import_transformers()
    document: dict[str, Any] = {}
    try:
        with quiet_transformers():
            document, _ = transformers.PretrainedConfig.get_config_dict(path)
            _check_counts(document, what)
            architecture: PretrainedConfig = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, RecursionError, or any of the Hub client's
        raise _refusal(f"{what}: cannot read the model configuration", error, document) from error
    return architecture


def build_random(architecture: PretrainedConfig, what: str) -> PreTrainedModel:
    """Return a causal language model of an architecture, with weights drawn from torch's generator.

    Raises:
        ConfigError: if transformers knows no such model, or cannot build it.
    """
    transformers = import_transformers()
    try:
        with quiet_transformers():
            model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=False
            )
    except Exception as error:  # ValueError, ImportError, RuntimeError, or whatever absurd sizes lead to
        raise _refusal(f"{what}: cannot build a causal language model", error, architecture.to_dict()) from error
    return model


def load_model(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, list[str]]:
    """Return a causal language model with its weights, and the names of the weights that the checkpoint lacks.

    Args:
        path: folder or Hub id.
        dtype: of the weights; None: as the checkpoint says.

    Raises:
        ConfigError: if it cannot be loaded; the message begins with what is wrong, not with the path.
    """
    transformers = import_transformers()
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    document: dict[str, Any] = {}
    try:
        with quiet_transformers():
            document, _ = transformers.PretrainedConfig.get_config_dict(path)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, trust_remote_code=False, **options
            )
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, or any of the Hub client's
        raise _refusal("cannot load the weights", error, document) from error
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    return model, sorted(report["missing_keys"])


def load_fast_tokenizer(path: str, what: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder or a Hub id, in its fast form.

    Raises:
        ConfigError: if it cannot be loaded, needs code of its own, or has no fast form.
        MissingExtraError: if transformers is not installed.
    """
    transformers = import_transformers()
    document: dict[str, Any] = {}
    try:
        with quiet_transformers():
            from transformers.models.auto.tokenization_auto import get_tokenizer_config

            document = get_tokenizer_config(path)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, or any of the Hub client's
        raise _refusal(f"{what}: cannot load", error, document) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(f"{what}: it has no fast form (tokenizer.json); convert it with transformers first")
    return cast("PreTrainedTokenizerFast", tokenizer)


def import_transformers() -> Any:
    """Return the transformers package.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("`esdtool train`", "train") from error
    return transformers


def _refusal(what: str, error: Exception, document: object) -> ConfigError:
    """Return the error that a user sees: own code is named as the reason wherever the files ask for it."""
    if isinstance(document, dict) and document.get("auto_map"):
        return ConfigError(
            f"{what}: it brings Python code of its own (auto_map), which esdtool does not run; "
            "use a checkpoint whose architecture transformers itself has"
        )
    return ConfigError(f"{what}: {whole_message(error)[:300]}")


def _check_counts(document: object, what: str) -> None:
    if not isinstance(document, dict):
        raise ConfigError(f"{what}: cannot read the model configuration: it is no JSON object")
    for key, value in _numbers(document):
        if value > _MOST_MODULES and _COUNT_KEY.search(key) and not _NO_COUNT.search(key):
            raise ConfigError(
                f"{what}: its configuration asks for {key} = {value}: at most {_MOST_MODULES:,} are built"
            )


def _numbers(document: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield every integer of a configuration and of those inside it, by its own key."""
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield str(key), value
        elif isinstance(value, list):
            yield from ((str(key), each) for each in value if isinstance(each, int))
