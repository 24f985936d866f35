"""State-space layers: Mamba, Mamba-2, Jamba, Zamba, Falcon-H1, Bamba, and the short convolutions of LFM2."""

from __future__ import annotations

from esdtool.modules.rules import Family, fused, skip

FAMILY = Family(
    name="mamba",
    rules=(
        fused("mixer|mamba|ssm.in_proj", "x_proj", "z_proj"),
        fused("mixer|mamba|ssm.x_proj", "dt", "B", "C"),
        fused("mixer|mamba|ssm.x_proj_weight", "dt", "B", "C"),
        fused("conv.in_proj", "B", "C", "x"),
        skip("A_log", "state-space parameter A_log: a table of decay rates, not a weight matrix"),
        skip("mixer|mamba|ssm.D|dt_bias", "state-space parameter: not a weight matrix"),
        skip(
            "mixer|mamba|ssm|linear_attn.conv1d",
            "depthwise convolution: one filter for each channel, no matrix between channels",
        ),
    ),
)
