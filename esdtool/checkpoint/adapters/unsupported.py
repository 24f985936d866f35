"""The kinds of adapters that are refused by name, and why: most change no matrix by an addition."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_MERGE = "merge it into its base with PEFT (merge_and_unload), save that, and analyse it, or its difference with --base"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A kind of adapter of which no update is computed."""

    name: str
    """The kind in its authors' words."""
    reason: str
    """Why, and what to do, as the end of a sentence."""


def _multiplies(name: str) -> Refusal:
    return Refusal(name=name, reason=f"it multiplies the base's weights or activations and adds no matrix; {_MERGE}")


def _prompt(name: str) -> Refusal:
    return Refusal(name=name, reason="it adds to the input and changes no weight matrix; analyse the base model itself")


def _vectors(name: str) -> Refusal:
    return Refusal(name=name, reason="it changes vectors alone, no weight matrix; analyse the base model itself")


def _routed(name: str) -> Refusal:
    return Refusal(
        name=name,
        reason="a router mixes its updates differently for each input, so no one matrix acts; analyse each part alone",
    )


def _not_computed(name: str) -> Refusal:
    return Refusal(name=name, reason=f"esdtool does not compute its update; {_MERGE}")


REFUSED: dict[str, Refusal] = {
    "IA3": _multiplies("IA3"),
    "OFT": _multiplies("OFT"),
    "BOFT": _multiplies("BOFT"),
    "HRA": _multiplies("HRA"),
    "ROAD": _multiplies("RoAd"),
    "PSOFT": _multiplies("PSOFT"),
    "HIRA": _multiplies("HiRA"),
    "GLORA": _multiplies("GLoRA"),
    "DEFT": _multiplies("DEFT"),
    "OSF": _multiplies("OSF"),
    "PROMPT_TUNING": _prompt("prompt tuning"),
    "MULTITASK_PROMPT_TUNING": _prompt("multitask prompt tuning"),
    "P_TUNING": _prompt("p-tuning"),
    "PREFIX_TUNING": _prompt("prefix tuning"),
    "ADAPTION_PROMPT": _prompt("LLaMA-Adapter"),
    "CPT": _prompt("CPT"),
    "CARTRIDGE": _prompt("cartridges"),
    "LN_TUNING": _vectors("LayerNorm tuning"),
    "BEFT": _vectors("BEFT"),
    "XLORA": _routed("X-LoRA"),
    "POLY": _routed("Polytropon"),
    "LILY": _routed("Lily"),
    "SHADOW": _routed("Shadow"),
    "ADAMSS": _not_computed("AdaMSS"),
    "C3A": _not_computed("C3A"),
    "DELORA": _not_computed("DeLoRA"),
    "FOURIERFT": _not_computed("FourierFT"),
    "FROD": _not_computed("FROD"),
    "GRALORA": _not_computed("GraLoRA"),
    "MISS": _not_computed("MiSS"),
    "BONE": _not_computed("Bone"),
    "PEANUT": _not_computed("PEANuT"),
    "PVERA": _not_computed("PVeRA"),
    "RANDLORA": _not_computed("RandLoRA"),
    "SHIRA": _not_computed("SHiRA"),
    "SUPERTUNING": _not_computed("SuperTuning"),
    "TINYLORA": _not_computed("TinyLoRA"),
    "UNILORA": _not_computed("Uni-LoRA"),
    "VBLORA": _not_computed("VB-LoRA"),
    "WAVEFT": _not_computed("WaveFT"),
}
"""By PEFT's name of the kind (`peft_type`)."""

COMPUTED = frozenset({"LORA", "ADALORA", "LOHA", "LOKR", "VERA", "TRAINABLE_TOKENS"})
"""PEFT's names of the kinds in `esdtool.checkpoint.adapters.kinds`."""

_BY_TENSOR: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r".+\.ia3_l(\..+)?", "IA3"),
        (r".+\.boft_[Rs](\..+)?", "BOFT"),
        (r".+\.(oft_R|oft_r|oft_blocks|oft_diag)(\..+)?", "OFT"),
        (r".+\.hra_u(\..+)?", "HRA"),
        (r".+\.road_(theta|alpha)(\..+)?", "ROAD"),
        (r".+\.psoft_R\..+", "PSOFT"),
        (r".+\.hira_[AB](\..+)?", "HIRA"),
        (r".+\.glora_[A-E]\..+", "GLORA"),
        (r".+\.deft_[PR](\..+)?", "DEFT"),
        (r".+\.osf_svd_params\..+", "OSF"),
        (r"(.+\.)?prompt_embeddings|prompt_encoder\..+", "PROMPT_TUNING"),
        (r".+\.adaption_prompt(\..+)?", "ADAPTION_PROMPT"),
        (r".+\.ln_tuning_layers\..+", "LN_TUNING"),
        (r".+\.beft_bias(\..+)?", "BEFT"),
        (r".+\.poly_lora_[AB](\..+)?", "POLY"),
        (r".*internal_xlora_classifier\..+", "XLORA"),
        (r".+\.lily_[AB](\..+)?", "LILY"),
        (r".+\.shadow_(down|up)\..+", "SHADOW"),
        (r".+\.adamss_[AB]\..+", "ADAMSS"),
        (r".+\.c3a_kernel(\..+)?", "C3A"),
        (r".+\.delora_[AB](\..+)?", "DELORA"),
        (r".+\.fourierft_spectrum(\..+)?", "FOURIERFT"),
        (r".+\.frod_lambda_l(\..+)?", "FROD"),
        (r".+\.gralora_[AB](\..+)?", "GRALORA"),
        (r".+\.miss_block(\..+)?", "MISS"),
        (r".+\.bone_block(\..+)?|.+\.bone_(\..+)?", "BONE"),
        (r".+\.peanut_[AB]\..+", "PEANUT"),
        (r".+\.pvera_lambda_[bd](\..+)?", "PVERA"),
        (r".+\.randlora_(lambda|gamma)(\..+)?", "RANDLORA"),
        (r".+\.shira_weight(\..+)?", "SHIRA"),
        (r".+\.supertuning_values(\..+)?", "SUPERTUNING"),
        (r".+\.tinylora_[ABP](\..+)?", "TINYLORA"),
        (r".+\.unilora_theta_d(\..+)?", "UNILORA"),
        (r".+\.vblora_logits_[AB](\..+)?", "VBLORA"),
        (r".+\.waveft_spectrum(\..+)?", "WAVEFT"),
    )
)


def refusal_of_type(peft_type: str) -> Refusal | None:
    """Return why an adapter of this `peft_type` is refused; None if its updates are computed."""
    kind = peft_type.rpartition(".")[2].upper()
    if kind in COMPUTED:
        return None
    return REFUSED.get(kind) or _not_computed(peft_type)


def refusal_of_tensors(names: Iterable[str]) -> tuple[Refusal, str] | None:
    """Return why an adapter is refused by the names of its tensors, and the first such name; None if none tells."""
    for name in names:
        for pattern, kind in _BY_TENSOR:
            if pattern.fullmatch(name):
                return REFUSED[kind], name
    return None
