"""Files with tensors that are no model: said to be what they are, with what to do instead."""

from __future__ import annotations

import re
import struct

from esdtool.checkpoint.base import Checkpoint
from esdtool.checkpoint.stored_file import Place
from esdtool.errors import CheckpointError

_OPTIMIZER_STATES = frozenset(
    {
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "momentum_buffer",
        "square_avg",
        "acc_delta",
        "grad_avg",
        "exp_inf",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
    }
)
"""What torch's optimizers, and those made after them, call the moments that they keep of each parameter."""

OPTIMIZER_STATE = (
    "an optimizer's state, not a model: its matrices are moments of gradients; name the weight file that lies beside it"
)

_IMATRIX = re.compile(r".+\.(in_sum2?|counts)")
_CONTROL_VECTOR = re.compile(r"direction\.\d+")

_GGML_MAGICS = frozenset({b"lmgg", b"fmgg", b"tjgg", b"algg"})
"""First bytes of llama.cpp's formats from before GGUF."""
_LEGACY_IMATRIX = re.compile(r".*imatrix.*\.(dat|imatrix)|.+\.imatrix", re.IGNORECASE)


def refuse_other_tensors(checkpoint: Checkpoint) -> None:
    """Refuse a catalogue of tensors that are no weights.

    Raises:
        CheckpointError: for an optimizer's state, an importance matrix, a control vector, or DeepSpeed ZeRO-3's
            placeholders.
    """
    tensors = checkpoint.tensors
    matrices = [name for name, info in tensors.items() if len(info.shape) > 1]
    if matrices and all(name.rpartition(".")[2] in _OPTIMIZER_STATES for name in matrices):
        raise CheckpointError(f"{checkpoint.location}: {OPTIMIZER_STATE}")
    if tensors and all(_IMATRIX.fullmatch(name) for name in tensors):
        raise CheckpointError(
            f"{checkpoint.location}: an importance matrix of llama.cpp (imatrix), not a model: it holds statistics of "
            "activations; name the model that it was made for"
        )
    if tensors and all(_CONTROL_VECTOR.fullmatch(name) for name in tensors):
        raise CheckpointError(
            f"{checkpoint.location}: a control vector, not a model: one vector for each layer and no weight matrix; "
            "name the model that it steers"
        )
    empty = [name for name, info in tensors.items() if info.numel == 0 and name.endswith("weight")]
    if empty and not any(tensors[name].numel for name in matrices):
        raise CheckpointError(
            f"{checkpoint.location}: the weights are empty placeholders ({len(empty)}, the first is {empty[0]!r}): "
            "DeepSpeed ZeRO-3 keeps them partitioned over the ranks; join them with the zero_to_fp32.py in the "
            "checkpoint's folder, or save with stage3_gather_16bit_weights_on_model_save"
        )


def refuse_other_binary(path: Place, head: bytes) -> None:
    """Refuse a `.bin` file of another library by its first bytes.

    Raises:
        CheckpointError: for a model of CTranslate2, or of llama.cpp from before GGUF.
    """
    specification = _ctranslate2_specification(head)
    if specification is not None:
        raise CheckpointError(
            f"{path}: a CTranslate2 model ({specification}), whose format is not read; "
            "analyse the checkpoint that it was converted from"
        )
    if head[:4] in _GGML_MAGICS:
        raise CheckpointError(f"{path}: a GGML file from before GGUF, which is not read; convert the model to GGUF")


def other_suffix(path: Place) -> str | None:
    """Say what a file of a suffix that is not read is; None if that is not known."""
    if _LEGACY_IMATRIX.fullmatch(path.name):
        return "an importance matrix of llama.cpp (imatrix), not a model; name the model that it was made for"
    return None


def _ctranslate2_specification(head: bytes) -> str | None:
    """Name of the specification at the front of a CTranslate2 file: version, length and text, which ends in a zero."""
    if len(head) < 8:
        return None
    version, length = struct.unpack_from("<IH", head)
    text = head[6 : 6 + length - 1]
    if not 1 <= version <= 64 or not 2 <= length <= len(head) - 6 or head[6 + length - 1] != 0:
        return None
    return text.decode("ascii") if text.isalnum() and text.endswith(b"Spec") else None
