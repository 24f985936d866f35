"""Describe how projections are arranged in one tensor: along which axis, in which order, contiguous or head by head.

A layout is a function from a `Fusion` (the matrix's shape, the model's sizes, its neighbours) to a `Split`. It
raises `UnknownLayoutError` where shape and configuration do not tell; then the tensor is skipped with the words of
the error, and never cut at a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from esdtool.support.words import dimensions

_NEED_CONFIG = "where one ends and the next begins is known only from config.json, which is missing"

_QUERY_KEY_VALUE = 3
"""Parts of a fused attention projection."""

_TOWERS = (
    ("vision_config", ("vision", "visual", "image")),
    ("audio_config", ("audio", "speech")),
    ("text_config", ("",)),  # everything else
)
"""Nested configurations, and what the names of the modules that they describe contain."""


class UnknownLayoutError(Exception):
    """A fused tensor cannot be split; the message says why."""

    def __init__(self, words: str, *, config_would_tell: bool = False) -> None:
        super().__init__(words)
        self.config_would_tell = config_would_tell
        """Whether a (more complete) config.json would tell."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Parts along one axis: in each of `groups` equal groups, `sizes` positions of part after part."""

    axis: int
    sizes: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """The facts about a fused tensor."""

    shape: tuple[int, ...]
    """Shape of the matrix (of one expert's matrix in a stack)."""
    parts: int
    """Number of parts."""
    config: Mapping[str, Any]
    """Sizes of the part of the model that the tensor belongs to; empty without a config.json."""
    neighbours: Mapping[str, tuple[int, ...]]
    """Shapes of the tensors beside it, by the last segment of their modules' names."""
    stacked: bool = False
    """Whether it is one expert's matrix out of a stack, which models store both ways round."""

    def size(self, *names: str) -> int | None:
        """A positive whole number of the configuration, under the first of its names that is there."""
        for name in names:
            value: Any = self.config
            for key in name.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    def need(self, *names: str) -> int:
        """Return the same as `size`, or fail if it is missing."""
        value = self.size(*names)
        if value is None:
            raise self.unsaid(f"config.json has no {names[0]}")
        return value

    def unsaid(self, what: str) -> UnknownLayoutError:
        """The error for sizes that the configuration does not give, or that there is no configuration to give."""
        return UnknownLayoutError(what if self.config else _NEED_CONFIG, config_would_tell=True)

    @property
    def heads(self) -> int | None:
        """Attention heads."""
        return self.size("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")

    @property
    def known_heads(self) -> int:
        """Number of heads; an error if it is missing."""
        heads = self.heads
        if heads is None:
            raise self.unsaid("config.json does not tell the number of heads")
        return heads

    @property
    def hidden(self) -> int | None:
        """Width of the residual stream."""
        return self.size("hidden_size", "n_embd", "d_model", "embed_dim", "dim")

    @property
    def head_dim(self) -> int | None:
        """Width of a head."""
        explicit = self.size("head_dim", "kv_channels", "attention_head_dim", "d_kv")
        if explicit is not None or self.hidden is None or self.heads is None:
            return explicit
        return self.hidden // self.heads

    @property
    def key_value_heads(self) -> int | None:
        """Heads that share keys and values (grouped-query attention)."""
        names = (
            "num_key_value_heads",
            "num_kv_heads",
            "n_head_kv",
            "n_kv_heads",
            "multi_query_group_num",
            "attn_config.kv_n_heads",
            "effective_n_kv_heads",
        )
        return self.size(*names) or self.heads

    def axis_of(self, length: int) -> int | None:
        """The axis of this length: rows of nn.Linear before columns of GPT-2's Conv1D."""
        return next((axis for axis in (0, 1) if self.shape[axis] == length), None)


Layout = Callable[[Fusion], Split]


def sizes_of(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    """The configuration of the tower that a module belongs to: a nested one, or the whole."""
    for key, words in _TOWERS:
        nested = config.get(key)
        if isinstance(nested, Mapping) and any(word in segment.lower() for segment in path for word in words):
            return nested
    return config


def equal(fusion: Fusion) -> Split:
    """Contiguous parts of one size, along the rows, or along the columns where only these are wider than the rest."""
    return _even(fusion, _wide_axis(fusion))


def stacked_rows(fusion: Fusion) -> Split:
    """Contiguous parts of one size along the rows."""
    return _even(fusion, 0)


def gate_up(fusion: Fusion) -> Split:
    """The two halves of a gated MLP's first matrix; the second one, `down`, tells which axis has them."""
    return _even(fusion, _gate_up_axis(fusion))


def gate_up_of_config(fusion: Fusion) -> Split:
    """Split like `gate_up`, if there are biases as in gpt-oss: never without knowing the model."""
    if not fusion.config:
        raise UnknownLayoutError(
            "whether its parts are halves or alternate is known only from config.json", config_would_tell=True
        )
    return gate_up(fusion)


def alternating(fusion: Fusion) -> Split:
    """Gate and up on alternate positions (gpt-oss: `[..., ::2]` and `[..., 1::2]`)."""
    axis = _gate_up_axis(fusion)
    return _even(fusion, axis, groups=fusion.shape[axis] // fusion.parts)


def alternating_rows(fusion: Fusion) -> Split:
    """Two parts on alternate rows (Zamba's Mamba: `view(-1, 2, ...)` of the projection's output)."""
    return _even(fusion, 0, groups=fusion.shape[0] // fusion.parts)


def _even(fusion: Fusion, axis: int, *, groups: int = 1) -> Split:
    """Parts of one size in each of `groups` equal groups."""
    each = fusion.shape[axis] // (fusion.parts * groups) if groups else 0
    return _checked(fusion, Split(axis=axis, sizes=(each,) * fusion.parts, groups=groups))


def _wide_axis(fusion: Fusion) -> int:
    """The columns (GPT-2's Conv1D) where they are as many times the rows as there are parts, else the rows."""
    rows, columns = fusion.shape[:2]
    return 1 if columns == fusion.parts * rows else 0


def _gate_up_axis(fusion: Fusion) -> int:
    first, second = fusion.shape[:2]
    for name in ("down_proj", "w2", "output_linear", "fc2", "w3", "Wo", "wo", "dense_4h_to_h", "weights_out", "ff_out"):
        down = fusion.neighbours.get(name)
        if down is None or len(down) < 2:
            continue
        candidates = {
            # nn.Linear: [2 I, H] beside [H, I]; the stacks of Llama 4 and gpt-oss: [H, 2 I] beside [I, H]
            (2 * down[-1], down[-2]): 0,
            (down[-1], 2 * down[-2]): 1,
        }
        if (first, second) in candidates:
            return candidates[first, second]
    if fusion.stacked:
        raise UnknownLayoutError("which of its sides holds both is told by down_proj, which is not beside it")
    return 0


def query_key_value(fusion: Fusion) -> Split:
    """All queries, then all keys, then all values; with grouped-query attention the last two are smaller."""
    heads, key_value, width = fusion.heads, fusion.key_value_heads, fusion.head_dim
    if heads and key_value and width:
        sizes = (heads * width, key_value * width, key_value * width)
        axis = fusion.axis_of(sum(sizes))
        if axis is not None:
            return Split(axis=axis, sizes=sizes)
    rows, columns = fusion.shape[:2]
    # A configuration of this width is this tensor's own; one of another width is of another tower.
    own = heads and width and fusion.hidden in (rows, columns)
    if not own and (rows == 3 * columns or columns == 3 * rows):
        return equal(fusion)
    if not (heads and width):
        raise fusion.unsaid("config.json does not tell the heads' sizes")
    raise _misfit(fusion, f"{heads} heads and {key_value} key-value heads of {width}")


def query_key_value_of_config(fusion: Fusion) -> Split:
    """Split like `query_key_value`, for a name that other layouts use too: never by the shape alone."""
    if not fusion.config:
        raise UnknownLayoutError(_NEED_CONFIG, config_would_tell=True)
    return query_key_value(fusion)


def per_head(fusion: Fusion) -> Split:
    """Head after head, each with all parts: view(heads, 3, head_dim, hidden) of GPT-NeoX and BLOOM, and the like."""
    heads, axis = fusion.known_heads, _wide_axis(fusion)
    if fusion.shape[axis] % (heads * fusion.parts):
        raise _misfit(fusion, f"{heads} heads")
    return _even(fusion, axis, groups=heads)


def per_key_value_head(fusion: Fusion) -> Split:
    """Group after group: the queries of the group, its key, its value (InternLM2, Falcon's new decoder)."""
    heads, groups = fusion.known_heads, fusion.key_value_heads or 0
    return _grouped(fusion, heads, groups, f"{heads} heads in {groups} groups")


def _one_key_value_head(fusion: Fusion) -> Split:
    """All queries, then one key and one value (multi-query attention)."""
    heads = fusion.known_heads
    return _grouped(fusion, heads, 1, f"{heads} heads and one key-value head")


def _grouped(fusion: Fusion, heads: int, groups: int, words: str) -> Split:
    """`groups` groups of rows: queries, a key, a value."""
    if not groups or heads % groups or fusion.shape[0] % (heads + 2 * groups):
        raise _misfit(fusion, words)
    width = fusion.shape[0] // (heads + 2 * groups)
    return Split(axis=0, sizes=(heads // groups * width, width, width), groups=groups)


def falcon(fusion: Fusion) -> Split:
    """Falcon's three layouts, told apart by its configuration."""
    if not fusion.config:
        raise UnknownLayoutError(_NEED_CONFIG, config_would_tell=True)
    if fusion.config.get("new_decoder_architecture"):
        return per_key_value_head(fusion)
    if fusion.config.get("multi_query"):
        return _one_key_value_head(fusion)
    return per_head(fusion)


def bigcode(fusion: Fusion) -> Split:
    """GPT-BigCode (SantaCoder, StarCoder): one key-value head, or head after head."""
    if fusion.config.get("multi_query", True):
        return _one_key_value_head(fusion)
    return per_head(fusion)


def chatglm(fusion: Fusion) -> Split:
    """ChatGLM: contiguous with multi-query attention (2 and later), head after head without it (the first one)."""
    return query_key_value(fusion) if fusion.config.get("multi_query_attention") else per_head(fusion)


def codegen(fusion: Fusion) -> Split:
    """CodeGen: four groups (the shards of its first training), each with its queries, values and keys."""
    return _checked(fusion, Split(axis=0, sizes=(fusion.shape[0] // 12,) * 3, groups=4))


def unknown(fusion: Fusion) -> Split:
    """A name that models use for several layouts, and a model that is not known."""
    if not fusion.config:
        raise UnknownLayoutError(_NEED_CONFIG, config_would_tell=True)
    raise UnknownLayoutError(f"the layout of model_type {fusion.config.get('model_type')!r} is not known")


def thirds_of_columns(fusion: Fusion) -> Split:
    """Queries, keys and values of a transposed matrix [hidden, 3 * hidden] (GPT-2's Conv1D), and of no other."""
    if fusion.shape[1] != fusion.parts * fusion.shape[0]:
        return unknown(fusion)
    return equal(fusion)


def equal_without_config(fusion: Fusion) -> Split:
    """Contiguous parts of one size where there is no config.json, which would tell whether this model has others.

    Queries, keys and values must be three times as wide as the rest of the model: grouped queries are not to be
    told from a shape.
    """
    rows, columns = fusion.shape[:2]
    if fusion.config or (fusion.parts == _QUERY_KEY_VALUE and rows != 3 * columns and columns != 3 * rows):
        return unknown(fusion)
    return equal(fusion)


def interleaved(fusion: Fusion) -> Split:
    """Rows of the parts in turn: row 0 is a query's, row 1 a key's, row 2 a value's (LightGlue)."""
    if fusion.shape[0] % fusion.parts:
        raise _misfit(fusion, f"{fusion.parts} parts of one size")
    return _even(fusion, 0, groups=fusion.shape[0] // fusion.parts)


def attention_beside_mlp(fusion: Fusion) -> Split:
    """Queries, keys, values and the MLP's first matrix, as parallel blocks have them (Flux).

    The second matrix of the block, [hidden, hidden + mlp], takes what attention and MLP give.
    """
    second, hidden = fusion.neighbours.get("linear2"), fusion.shape[1]
    if second is None or len(second) < 2:
        raise UnknownLayoutError("linear2, whose width tells that of the MLP, is not beside it")
    return _checked(fusion, Split(axis=0, sizes=(hidden, hidden, hidden, second[1] - hidden)))


def contiguous_heads(fusion: Fusion, *, heads: int, key_value_heads: int) -> Split:
    """All queries, then all keys, then all values, with as many heads as the caller says."""
    axis = _wide_axis(fusion)
    width, rest = divmod(fusion.shape[axis], heads + 2 * key_value_heads)
    if rest:
        raise _misfit(fusion, f"{heads} heads and twice {key_value_heads} key-value heads")
    return _checked(fusion, Split(axis=axis, sizes=(heads * width, key_value_heads * width, key_value_heads * width)))


def grouped_heads(fusion: Fusion, *, heads: int, key_value_heads: int) -> Split:
    """Group after group of heads, each with its queries, its key and its value, as many as the caller says."""
    return _grouped(fusion, heads, key_value_heads, f"{heads} heads in {key_value_heads} groups")


def latent_rope(fusion: Fusion) -> Split:
    """The compressed latent of keys and values, then the rotary key that all heads share (DeepSeek's MLA)."""
    up = fusion.neighbours.get("kv_b_proj") or fusion.neighbours.get("wkv_b")
    latent = up[1] if up is not None else fusion.need("kv_lora_rank")
    if latent >= fusion.shape[0]:
        raise _misfit(fusion, f"a latent of {latent}")
    return Split(axis=0, sizes=(latent, fusion.shape[0] - latent))


def latent_key_value(fusion: Fusion) -> Split:
    """Head after head, each with its key (without the rotary part) and its value (DeepSeek's MLA)."""
    key, value = fusion.need("qk_nope_head_dim"), fusion.need("v_head_dim")
    if fusion.shape[0] % (key + value):
        raise _misfit(fusion, f"heads of {key} + {value}")
    return Split(axis=0, sizes=(key, value), groups=fusion.shape[0] // (key + value))


def mamba2(fusion: Fusion) -> Split:
    """Gate z, then what the convolution takes (x, B, C), then the step sizes: as wide as its neighbours say."""
    out, conv, decay = (
        next((shape for name in names if (shape := fusion.neighbours.get(name)) is not None), None)
        for names in (("out_proj", "ssm_out"), ("conv1d", "ssm_conv1d"), ("A_log",))
    )
    if out is None or conv is None or len(out) < 2:
        raise UnknownLayoutError("the output and the convolution, which tell where its parts end, are not beside it")
    inner, state = out[1], (conv[0] - out[1]) // 2
    steps = fusion.shape[0] - 2 * inner - 2 * state if decay is None else decay[0]
    return _checked(fusion, Split(axis=0, sizes=(inner, inner, state, state, steps)))


def gated_delta(fusion: Fusion) -> Split:
    """Qwen3-Next's linear attention: by key head, its query, key, and its share of the values and of the gate."""
    heads, value_heads = fusion.need("linear_num_key_heads"), fusion.need("linear_num_value_heads")
    key, value = fusion.need("linear_key_head_dim"), fusion.need("linear_value_head_dim")
    share = value_heads // heads
    return _checked(fusion, Split(axis=0, sizes=(key, key, share * value, share * value), groups=heads))


def gated_delta_contiguous(fusion: Fusion) -> Split:
    """The same with contiguous queries, keys and values (Qwen3.5)."""
    keys = fusion.need("linear_num_key_heads") * fusion.need("linear_key_head_dim")
    values = fusion.need("linear_num_value_heads") * fusion.need("linear_value_head_dim")
    return _checked(fusion, Split(axis=0, sizes=(keys, keys, values)))


def by_key_head(fusion: Fusion) -> Split:
    """Equal parts for each of the linear attention's key heads."""
    return _even(fusion, 0, groups=fusion.need("linear_num_key_heads"))


def _checked(fusion: Fusion, split: Split) -> Split:
    """The split itself, if its parts fill the tensor."""
    if split.groups * sum(split.sizes) != fusion.shape[split.axis] or min(split.sizes) <= 0:
        raise _misfit(fusion, f"{split.groups} x {'+'.join(map(str, split.sizes))} of them")
    return split


def _misfit(fusion: Fusion, expected: str) -> UnknownLayoutError:
    return UnknownLayoutError(f"its shape {dimensions(fusion.shape)} does not fit {expected}")
