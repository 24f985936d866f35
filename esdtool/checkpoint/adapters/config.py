"""Read the configuration of an adapter: `adapter_config.json` of PEFT, and the file of the same name of MLX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError

from esdtool.checkpoint.adapters.patterns import AdapterPatterns, PatternError
from esdtool.checkpoint.base import Checkpoint
from esdtool.checkpoint.jsonfiles import read_json_object
from esdtool.errors import CheckpointError

FILE_NAME = "adapter_config.json"

_NullIsEmpty = BeforeValidator(lambda value: {} if value is None else value)


class BlockDiagonal(BaseModel):
    """The factors of a BD-LoRA adapter that are block-diagonal."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    nblocks: PositiveInt = 1
    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None


class MLXParameters(BaseModel):
    """MLX's own settings of a LoRA adapter."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    scale: FiniteFloat = 1.0


class AdapterConfig(BaseModel):
    """The settings that an update depends on. Keys that change nothing about it are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    peft_type: str | None = None
    r: PositiveInt | None = None
    lora_alpha: FiniteFloat | None = None
    alpha: FiniteFloat | None = None
    """Scale of LoHa and LoKr."""
    rank_pattern: Annotated[dict[str, Any], _NullIsEmpty] = Field(default_factory=dict)
    """Ranks by pattern of a module's name; AdaLoRA keeps a list of booleans for each tensor here."""
    alpha_pattern: Annotated[dict[str, FiniteFloat], _NullIsEmpty] = Field(default_factory=dict)
    use_rslora: bool | None = None
    use_qalora: bool | None = None
    use_bdlora: BlockDiagonal | None = None
    fan_in_fan_out: bool | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    token_indices: list[int] | None = None
    projection_prng_key: int | None = None
    lora_parameters: MLXParameters | None = None

    @property
    def known(self) -> bool:
        """Whether there was a configuration at all."""
        return bool(self.model_fields_set)


class Scales:
    """The rank and alpha of each module as PEFT finds them: the first pattern that matches, else the default."""

    def __init__(self, config: AdapterConfig, location: str) -> None:
        """Compile the patterns.

        Raises:
            CheckpointError: if one is no regular expression.
        """
        self._location = location
        self.config = config
        ranks = config.rank_pattern if (config.peft_type or "").upper() != "ADALORA" else {}
        for key, value in ranks.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{location}: {FILE_NAME}: rank_pattern.{key}: not a positive whole number")
        try:
            self._ranks, self._alphas = AdapterPatterns(ranks), AdapterPatterns(config.alpha_pattern)
        except PatternError as error:
            raise CheckpointError(f"{location}: {FILE_NAME}: {error}") from error

    def rank(self, module: str) -> int | None:
        """Return the rank of a module by the configuration; None if it does not say."""
        found: int | None = self._value(self._ranks, module, self.config.r)
        return found

    def alpha(self, module: str, default: float | None) -> float | None:
        """Return the alpha of a module by the configuration."""
        found: float | None = self._value(self._alphas, module, default)
        return found

    def _value(self, patterns: AdapterPatterns, module: str, default: Any) -> Any:
        try:
            return patterns.value(module, default)
        except PatternError as error:
            raise CheckpointError(f"{self._location}: {FILE_NAME}: {error}") from error


def read_adapter_config(checkpoint: Checkpoint) -> AdapterConfig:
    """Read the configuration of the adapter in a checkpoint; an empty one if there is none.

    It is the checkpoint's own configuration, or the `adapter_config.json` in its folder where `config.json` describes
    the model around the adapter.

    Raises:
        CheckpointError: if a value is of a wrong type or range; the message names the key.
    """
    own: Mapping[str, Any] = checkpoint.adapter_config or checkpoint.config
    place = checkpoint.location
    if not _describes_adapter(own):
        beside = None if checkpoint.folder is None else checkpoint.folder / FILE_NAME
        if beside is None or not beside.is_file():
            return AdapterConfig()
        own, place = read_json_object(beside), str(checkpoint.folder)
    try:
        return AdapterConfig.model_validate(dict(own))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{place}: {FILE_NAME}: {where}: {first['msg']}") from error


def _describes_adapter(config: Mapping[str, Any]) -> bool:
    return any(key in config for key in ("peft_type", "lora_alpha", "lora_parameters"))
