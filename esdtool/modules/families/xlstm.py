"""Names of xLSTM and Vision-LSTM: projections [heads, out / heads, in / heads], blocks on the diagonal."""

from __future__ import annotations

from esdtool.modules.reasons import DEPTHWISE
from esdtool.modules.rules import Family, score, skip

_CELL = "xlstm|layer|mlstm|slstm|mlstm_layer|slstm_layer"

FAMILY = Family(
    name="xlstm",
    model_types=frozenset({"xlstm"}),
    marker="blocks.#.xlstm.*",
    more_markers=("layer.mlstm_cell.**", "xlstm_block_stack.**", "xlstm.slstm_cell.**"),
    rules=(
        score(f"{_CELL}.q_proj", "q_proj", headwise=True),
        score(f"{_CELL}.k_proj", "k_proj", headwise=True),
        score(f"{_CELL}.v_proj", "v_proj", headwise=True),
        score(f"{_CELL}.fgate", "forget_gate", headwise=True),
        score(f"{_CELL}.igate", "input_gate", headwise=True),
        score(f"{_CELL}.zgate", "cell_gate", headwise=True),
        score(f"{_CELL}.ogate", "output_gate", headwise=True),
        score("proj_up", "up_proj"),
        score("proj_down", "down_proj"),
        skip("conv1d.conv", DEPTHWISE),
    ),
)
