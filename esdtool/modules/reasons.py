"""Define the reasons for leaving out tensors that several rule tables share."""

from __future__ import annotations

from esdtool.modules.skipped import SkipKind, SkipReason

NORM_OR_BIAS = SkipReason(kind=SkipKind.VECTOR, words="1-D (norm or bias)")
NORM_MATRIX = SkipReason(kind=SkipKind.NO_MATRIX, words="normalisation scale stored as a matrix")
BIAS_MATRIX = SkipReason(kind=SkipKind.NO_MATRIX, words="bias stored as a matrix")
SCALE_MATRIX = SkipReason(kind=SkipKind.NO_MATRIX, words="scale stored as a matrix")
DEPTHWISE = SkipReason(
    kind=SkipKind.NO_MATRIX, words="depthwise convolution: one filter for each channel, no matrix between channels"
)
TOKEN_EMBEDDING = SkipReason(kind=SkipKind.TOKEN_EMBEDDING, words="token embedding")
TOKEN_TYPES = SkipReason(kind=SkipKind.EMBEDDING, words="token-type embedding")
POSITIONS = SkipReason(kind=SkipKind.EMBEDDING, words="position table")
LEARNED_TOKENS = SkipReason(kind=SkipKind.EMBEDDING, words="learned tokens")
PATCH_EMBEDDING = SkipReason(kind=SkipKind.EMBEDDING, words="patch embedding")
EMBEDDING = SkipReason(kind=SkipKind.EMBEDDING, words="embedding")
LM_HEAD = SkipReason(kind=SkipKind.OUTPUT_HEAD, words="language-model head")
CTC_HEAD = SkipReason(kind=SkipKind.OUTPUT_HEAD, words="output head (CTC)")
OUTPUT_HEAD = SkipReason(kind=SkipKind.OUTPUT_HEAD, words="output head")
ROUTER = SkipReason(kind=SkipKind.ROUTER, words="router")
QUANT_SCALE = SkipReason(kind=SkipKind.QUANTIZATION, words="scale or zero point of quantised weights")
QUANT_CODES = SkipReason(kind=SkipKind.QUANTIZATION, words="codes of quantised weights that could not be de-quantised")
LORA = SkipReason(
    kind=SkipKind.ADAPTER, words="LoRA factor without its counterpart: only the product B A is a weight update"
)
REPARAMETRISED = SkipReason(
    kind=SkipKind.REPARAMETRIZATION, words="part of a parametrised weight: the weight itself is not stored"
)
ROTARY = SkipReason(kind=SkipKind.BUFFER, words="rotary frequencies")
INDEX_BUFFER = SkipReason(kind=SkipKind.BUFFER, words="index buffer")
MASK = SkipReason(kind=SkipKind.BUFFER, words="mask or index buffer")
RUNNING_STATISTICS = SkipReason(kind=SkipKind.BUFFER, words="running statistics of a normalisation")
DECAY_RATES = SkipReason(
    kind=SkipKind.TABLE, words="state-space parameter: a table of decay rates, not a weight matrix"
)
STATE_SPACE = SkipReason(kind=SkipKind.TABLE, words="state-space parameter: not a weight matrix")
TIME_MIXING = SkipReason(kind=SkipKind.TABLE, words="time-mixing vector")
CODEBOOK = SkipReason(kind=SkipKind.TABLE, words="codebook of a vector quantiser: a table of vectors to look up")
FILTER_BANK = SkipReason(kind=SkipKind.TABLE, words="filter bank or transform, fixed by a formula")
TIME_TABLE = SkipReason(
    kind=SkipKind.TABLE, words="time-mixing table: one number for each channel of each head, not a weight matrix"
)
VALUE_EMBEDDING = SkipReason(kind=SkipKind.EMBEDDING, words="value embedding: a table of token vectors")
ACTIVATION_STATISTICS = SkipReason(kind=SkipKind.BUFFER, words="statistics of activations")
OPTIMIZER_STATE = SkipReason(kind=SkipKind.COPY, words="optimizer state, not a weight")
LOW_RANK_FACTOR = SkipReason(
    kind=SkipKind.ADAPTER, words="factor of a low-rank update of the weight beside it, not a weight by itself"
)
