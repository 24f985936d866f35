"""The choice of the tables of rules that hold for a checkpoint, and of the families that it belongs to.

A family is established by `model_type` of config.json or by a name that only its models have. Without one the general
tables still apply, but then nothing more than a name and a shape tells what a tensor is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from esdtool.modules import general
from esdtool.modules.rules import Family, Table, compile_pattern
from esdtool.names import Segments

GENERAL_MODEL_TYPES = frozenset(
    name
    for group in (
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "olmo", "olmo2", "smollm3"),
        ("granite", "stablelm", "starcoder2", "phi", "gpt_neo", "gptj", "ernie4_5", "cohere", "helium"),
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "albert", "distilbert", "deberta-v2", "layoutlm"),
        ("mobilebert", "mpnet", "reformer"),
        ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "whisper", "wav2vec2", "hubert", "opt"),
        ("vit", "deit", "dinov2", "swin", "convnext", "convnextv2"),
        ("clip", "clip_text_model", "clip_vision_model", "siglip", "siglip_text_model", "siglip_vision_model"),
        ("llava", "paligemma"),
        ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "phimoe", "glm4_moe"),
        ("ernie4_5_moe", "granitemoe", "granitemoeshared", "jetmoe", "llama4", "llama4_text", "dbrx"),
        ("mamba", "mamba2", "jamba", "bamba", "falcon_h1", "falcon_mamba", "zamba", "zamba2", "lfm2", "qwen3_next"),
    )
    for name in group
)
"""Values of `model_type` whose names are those of the general tables; families with names of their own say theirs."""

SIGNATURES = (
    "layers.#.self_attn.q_proj",  # LLaMA and its kin, BART, OPT, CLIP
    "layers.#.attention.q_proj",  # ViT since transformers 5
    "layers.#.attention.wq",  # LLaMA as Meta stores it
    "layer.#.attention.self.query",  # BERT
    "layer.#.attention.attention.query",  # ViT before transformers 5
    "layer.#.attention.q_lin",  # DistilBERT
    "albert_layers.#.attention.query",
    "block.#.layer.#.SelfAttention.q",  # T5
    "h.#.attn.c_attn",  # GPT-2
    "h.#.attn.attention.q_proj",  # GPT-Neo
    "layers.#.self_attn.in_proj_weight",  # torch.nn.Transformer
    "resblocks.#.attn.in_proj_weight",  # CLIP as OpenAI and open_clip store it
    "blocks.#.attn.qkv",  # timm
    "blocks.#.attn.query",  # Whisper as OpenAI stores it
    "transformer_blocks.#.attn1|attn2|attn.to_q",  # diffusers, latent diffusion
    "trf_blocks.#.att.W_query",
    "mixer.A_log",  # Mamba
)
"""Names that only one kind of model has; each establishes what the general names beside it mean."""


def common_root(paths: Iterable[Segments]) -> int:
    """Count the segments that all names begin with: the attribute under which somebody's class holds the model.

    >>> common_root([("net", "layers", "0", "fc1"), ("net", "head")])
    1

    A numbered part of a model, such as its only block, is not taken for the model.
    """
    every = [path for path in paths if path]
    if len(every) < 2:
        return 0
    shared = 0
    for segments in zip(*(path[:-1] for path in every), strict=False):
        if len(set(segments)) > 1 or segments[0].isdecimal():
            break
        shared += 1
    following = {path[shared] for path in every}
    if all(segment.isdecimal() for segment in following):
        shared = max(0, shared - 1)
        following = {path[shared] for path in every}
    return shared if len(following) > 1 else 0


@dataclass(frozen=True, kw_only=True)
class Established:
    """The tables that hold for a checkpoint, in order of precedence, and whether any family is known."""

    tables: tuple[Table, ...]
    is_established: bool


def established_tables(
    families: Iterable[Family], *, model_types: frozenset[str], kinds: frozenset[Segments]
) -> Established:
    """Choose the tables that hold for the checkpoint.

    Args:
        families: all families, those that hold for certain models only before the others.
        model_types: what config.json says, for the whole and for its parts.
        kinds: the names of all modules, with 0 for every number.

    Returns:
        Tables of the families that config.json names, of those that a name shows, of those that hold for any model,
        then the general ones.
    """
    names = [".".join(kind) for kind in kinds]

    def found(pattern: str) -> bool:
        regex = compile_pattern(pattern)
        return any(regex.search(name) for name in names)

    known = bool(model_types & GENERAL_MODEL_TYPES) or any(found(pattern) for pattern in SIGNATURES)
    configured, marked, unconditional = [], [], []
    for family in families:
        name = f"family {family.name}"
        if family.model_types & model_types:
            configured.append(Table(name=name, rules=family.rules, is_established=True))
        elif any(found(marker) for marker in family.markers):
            marked.append(Table(name=name, rules=family.rules, is_established=True))
        elif not family.model_types:
            unconditional.append(Table(name=name, rules=family.rules))
    return Established(
        tables=(
            *configured,
            *marked,
            *unconditional,
            Table(name="not scored", rules=general.NOT_SCORED),
            Table(name="several in one", rules=general.MANY_IN_ONE),
            Table(name="roles", rules=general.ROLES),
        ),
        is_established=known or bool(configured or marked),
    )
