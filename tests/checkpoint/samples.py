"""One small checkpoint of each container, written by the library that defines it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import h5py
import numpy as np
import onnx
import torch
import torch.distributed.checkpoint as dcp
from gguf import GGMLQuantizationType as Type
from onnx import helper, numpy_helper
from safetensors.torch import save_file

from tests.checkpoint.gguf_files import writer_to
from tests.checkpoint.keras_arrays import normal
from tests.checkpoint.onnx_files import model_of


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.q_proj.weight": torch.randn(6, 32, generator=generator) for i in range(2)}


def safetensors(folder: Path) -> Path:
    save_file(tensors(), folder / "m.safetensors")
    return folder / "m.safetensors"


def torch_zip(folder: Path) -> Path:
    torch.save(tensors(), folder / "m.pt")
    return folder / "m.pt"


def torch_legacy(folder: Path) -> Path:
    torch.save(tensors(), folder / "m.bin", _use_new_zipfile_serialization=False)
    return folder / "m.bin"


def gguf_model(folder: Path) -> Path:
    weights = np.stack([normal(32) for _ in range(6)])
    return writer_to(folder)(
        {
            "blk.0.attn_q.weight": (gguf.quantize(weights, Type.Q8_0), Type.Q8_0),
            "blk.0.ffn_up.weight": weights,
        },
        sizes={"block_count": 1, "words": ["a", "bc"]},
    )  # fmt: skip


def onnx_model() -> onnx.ModelProto:
    weight = numpy_helper.from_array(normal(32, 6), "fc.weight")
    return model_of([helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="/fc/MatMul")], [weight])


def onnx_inline(folder: Path) -> Path:
    weight = numpy_helper.from_array(normal(32, 6), "fc.weight")
    onnx.save(
        model_of([helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="/fc/MatMul")], [weight]),
        folder / "m.onnx",
    )
    return folder / "m.onnx"


def onnx_external(folder: Path) -> Path:
    onnx.save(onnx_model(), folder / "m.onnx", save_as_external_data=True, location="m.onnx_data", size_threshold=0)
    return folder / "m.onnx"


def keras_h5(folder: Path) -> Path:
    with h5py.File(folder / "m.weights.h5", "w") as file:
        for layer in range(2):
            file[f"layers/dense_{layer}/vars/0"] = normal(32, 6)
    return folder / "m.weights.h5"


def distributed(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "torch.distributed is unavailable": on purpose
        dcp.save(tensors(), checkpoint_id=folder, no_dist=True)
    return folder / ".metadata"


WRITERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": safetensors,
    "torch-zip": torch_zip,
    "torch-legacy": torch_legacy,
    "gguf": gguf_model,
    "onnx": onnx_inline,
    "onnx-external": onnx_external,
    "keras": keras_h5,
    "distributed": distributed,
}

DATA = {"onnx-external": "m.onnx_data", "distributed": "__0_0.distcp"}
"""The file with the elements, where it is not the one that is opened."""
