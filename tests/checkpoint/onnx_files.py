"""ONNX models for the tests: built, saved and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_of(nodes: list[Any], initialisers: list[Any], **graph: Any) -> Any:
    built = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializer=initialisers,
        **graph,
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(built, opset_imports=imports, ir_version=10)


def saved(tmp_path: Path, nodes: list[Any], tensors: dict[str, Array], **graph: Any) -> Path:
    initialisers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    onnx.save(model_of(nodes, initialisers, **graph), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def run(path: Path, x: Array) -> Array:
    result: Array = ReferenceEvaluator(str(path)).run(None, {"x": x})[0]
    return result
