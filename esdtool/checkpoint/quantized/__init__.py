"""De-quantisation: checkpoints that store codes and scales as checkpoints of the weights for which they stand.

One file for each group of formats, with a `find_*` function that recognises a tensor of codes from the catalogue, and
a class that reads it. `scales` tells which scale belongs to which weight, `bits` unpacks, `roundoff` estimates the
rounding error. To teach esdtool a new format, add a file of that kind and name its function in
`wrapper`, where `dequantized` is.
"""

from __future__ import annotations
