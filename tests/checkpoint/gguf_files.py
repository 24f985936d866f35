"""What the tests of GGUF files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Writer = Callable[..., Path]


def writer_to(tmp_path: Path) -> Writer:
    """Writes arrays, or (bytes, type) of quantised ones, with the metadata of an architecture."""

    def build(
        tensors: dict[str, Any],
        name: str = "m.gguf",
        arch: str = "llama",
        sizes: dict[str, Any] | None = None,
        **more: Any,
    ) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, arch, **more)
        for key, value in (sizes or {}).items():
            add = writer.add_array if isinstance(value, list) else writer.add_uint32
            add(f"{arch}.{key}", value)
        for tensor, value in tensors.items():
            data, kind = value if isinstance(value, tuple) else (value, None)
            writer.add_tensor(tensor, np.ascontiguousarray(data), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return build


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.02 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)
