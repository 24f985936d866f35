"""De-quantise checkpoints that store codes and scales, so that they read as checkpoints of weights.

One file for each group of formats, with a `find_*` function that recognises a tensor of codes from the catalogue, and
a class that reads it. `scales` determines which scale belongs to which weight, `bits` unpacks codes, and `roundoff`
estimates the rounding error. To add a format, add a file of that kind and name its function in `wrapper`, where
`dequantized` is.
"""

from __future__ import annotations
