"""Forms in which trainers and other tools read an assignment, one file each.

Every module of this package defines `WRITER`, an `esdtool.assignment.writer.Writer`: `llama_quantize.py` is
`--format llama-quantize`. The names stand in `esdtool.assignment.options.AssignmentFormat` too, for the command line.
"""

from __future__ import annotations

import pkgutil

FORMAT_NAMES = tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)))
"""The names of all forms."""
