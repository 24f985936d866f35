"""State-space layers: Mamba, Mamba-2, Jamba, Zamba, Falcon-H1, Bamba, and the short convolutions of LFM2."""

from __future__ import annotations

from esdtool.modules import layouts
from esdtool.modules.reasons import DECAY_RATES, DEPTHWISE, STATE_SPACE
from esdtool.modules.rules import Family, fused, score, skip

_MIXER = "mixer|mamba|ssm"

FAMILY = Family(
    name="mamba",
    rules=(
        # Mamba, Jamba: the halves x and z; Zamba: on alternate rows; Mamba-2: z, x, B, C and the step sizes.
        fused(f"{_MIXER}.in_proj", "in_proj_x", "in_proj_z", beside="x_proj"),
        fused(f"{_MIXER}.in_proj", "in_proj_x", "in_proj_z", layout=layouts.alternating_rows, beside="x_proj_weight"),
        fused(
            f"{_MIXER}.in_proj",
            *("in_proj_z", "in_proj_x", "in_proj_B", "in_proj_C", "in_proj_dt"),
            layout=layouts.mamba2,
            beside="A_log",
        ),
        # One projection to the step sizes, B and C; too few rows each to be worth a spectrum of their own.
        score(f"{_MIXER}.x_proj", "x_proj"),
        fused("conv.in_proj", "in_proj_B", "in_proj_C", "in_proj_x"),
        skip("A_log", DECAY_RATES),
        skip("mixer|mamba|ssm.D|dt_bias", STATE_SPACE),
        skip(
            "mixer|mamba|ssm|linear_attn.conv1d",
            DEPTHWISE,
        ),
    ),
)
