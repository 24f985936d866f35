"""`llama-quantize`: a file for llama.cpp's `llama-quantize --tensor-type-file`.

One `pattern=type` a line; the tool splits at white space and knows no comments, so that the command is not in it. Names
are those of GGUF files: those of the source if it is one, otherwise made from role and block.
"""

from __future__ import annotations

from typing import Final

from esdtool.assignment.allocation import Allocation, ParameterValues
from esdtool.assignment.writer import WriteOptions, Writer, anchored, collapsed
from esdtool.errors import UsageError

TYPES: Final = {1: "iq1_s", 2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0", 16: "f16"}
"""The type of llama.cpp that stands for each width. Types hold scales as well, so that they take somewhat more."""

GGUF_NAMES: Final = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_proj+k_proj+v_proj": "attn_qkv",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
"""llama.cpp's names of the matrices of a decoder block by role."""


def _write(allocation: Allocation, options: WriteOptions) -> str:
    del options
    bits = allocation.values("bits")
    wrong = next((width for width in bits.values() if width not in TYPES), None)
    if wrong is not None:
        raise UsageError(f"llama-quantize has no type of {wrong} bits; choose widths from {', '.join(map(str, TYPES))}")
    types = {_gguf_name(name, allocation.parameters[name]): TYPES[width] for name, width in bits.items()}
    if len(types) < len(bits):
        raise UsageError("llama-quantize: several parameters have one name in GGUF files: analyse the GGUF file itself")
    return "".join(f"{anchored(names)}={kind}\n" for kind, names in collapsed(types).items())


def _gguf_name(name: str, entry: ParameterValues) -> str:
    """Return a parameter's name in GGUF files."""
    if name.startswith("blk."):
        return name
    short = GGUF_NAMES.get(entry.role or "")
    if short is None or entry.layer is None or ".experts" in name:
        raise UsageError(
            f"{name}: its name in GGUF files is not known (role {entry.role}): analyse the GGUF file itself, or leave "
            "it out with --exclude"
        )
    return f"blk.{entry.layer}.{short}.weight"


WRITER = Writer(carries=frozenset({"bits"}), write=_write, reader="llama.cpp's llama-quantize")
