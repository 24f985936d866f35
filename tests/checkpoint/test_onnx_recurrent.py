"""Recurrent weights in ONNX files against torch's modules, and against ONNX' own reference implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import esdtool
from esdtool.checkpoint import open_checkpoint

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

INPUTS, HIDDEN, STEPS = 24, 16, 5
TO_ONNX = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""Of each gate of ONNX, its position in torch."""


def _gates(tensor: torch.Tensor, kind: str) -> np.ndarray[Any, Any]:
    order = TO_ONNX[kind]
    return tensor.detach().unflatten(0, (len(order), -1))[list(order)].flatten(0, 1).numpy()


def _model(kind: str, *, bidirectional: bool, name: str = "/rnn/", through: str | None = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = getattr(nn, kind)(INPUTS, HIDDEN, bidirectional=bidirectional)
    ends = ["", "_reverse"] if bidirectional else [""]

    def stacked(part: str) -> np.ndarray[Any, Any]:
        return np.stack([_gates(getattr(module, f"{part}_l0{end}"), kind) for end in ends])

    bias = np.concatenate([stacked("bias_ih"), stacked("bias_hh")], axis=1)
    initializers = {"W": stacked("weight_ih"), "R": stacked("weight_hh"), "B": bias}
    nodes = []
    used = "W"
    if through is not None:
        nodes.append(helper.make_node(through, ["W"], ["W2"], **({"to": 1} if through == "Cast" else {})))
        used = "W2"
    attributes = {"hidden_size": HIDDEN, "direction": "bidirectional" if bidirectional else "forward"}
    if kind == "GRU":
        attributes["linear_before_reset"] = 1
    nodes.append(helper.make_node(kind, ["x", used, "R", "B"], ["y"], name=f"{name}{kind}", **attributes))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [STEPS, 1, INPUTS])],
        [helper.make_tensor_value_info("y", 1, [STEPS, len(ends), 1, HIDDEN])],
        [numpy_helper.from_array(array, key) for key, array in initializers.items()],
    )
    return module, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize("kind", TO_ONNX)
def test_the_gates_of_the_test_are_those_of_onnx(kind: str) -> None:
    module, model = _model(kind, bidirectional=False)
    x = torch.randn(STEPS, 1, INPUTS)
    (found,) = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found[:, 0], module(x)[0].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", TO_ONNX)
@pytest.mark.parametrize("through", [None, "Identity", "Cast"])
def test_recurrent_weights_are_torchs(kind: str, bidirectional: bool, through: str | None, tmp_path: Path) -> None:
    module, model = _model(kind, bidirectional=bidirectional, through=through)
    onnx.save(model, tmp_path / "m.onnx")
    checkpoint = open_checkpoint(tmp_path / "m.onnx")
    weights = {f"rnn.{name}": tensor for name, tensor in module.state_dict().items() if "weight" in name}
    assert set(checkpoint.tensors) == {*weights, "rnn.bias_l0"}
    for name, tensor in weights.items():
        assert checkpoint.read(name).equal(tensor)
        assert checkpoint.read_rows(name, 3, 9).equal(tensor[3:9])
    found = esdtool.analyze(tmp_path / "m.onnx", min_eigs=4, cache=False)
    direct = esdtool.analyze({f"rnn.{name}": tensor for name, tensor in module.state_dict().items()}, min_eigs=4)
    assert {m.name: m.alpha for m in found.modules} == pytest.approx({m.name: m.alpha for m in direct.modules})
    assert [tensor.reason for tensor in found.skipped] == ["bias stored as a matrix"]


def test_integers_of_onnxruntime_are_dequantised(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    codes = {"W": (INPUTS, 4 * HIDDEN), "R": (HIDDEN, 4 * HIDDEN)}
    integers = {key: generator.integers(-127, 128, (1, *shape)).astype(np.int8) for key, shape in codes.items()}
    scales = {key: generator.uniform(0.01, 0.02, (1, 4 * HIDDEN)).astype(np.float32) for key in codes}
    zeros = {key: np.full((1, 4 * HIDDEN), 3, dtype=np.int8) for key in codes}
    held = {**integers, **{f"{key}_s": scales[key] for key in codes}, **{f"{key}_z": zeros[key] for key in codes}}
    node = helper.make_node(
        "DynamicQuantizeLSTM",
        ["x", "W", "R", "", "", "", "", "", "W_s", "W_z", "R_s", "R_z"],
        ["y"],
        name="/rnn/DynamicQuantizeLSTM",
        domain="com.microsoft",
        hidden_size=HIDDEN,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", 1, [5, 1, INPUTS])],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(array, key) for key, array in held.items()],
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    checkpoint = open_checkpoint(tmp_path / "m.onnx")
    assert set(checkpoint.tensors) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    for key, name in (("W", "rnn.weight_ih_l0"), ("R", "rnn.weight_hh_l0")):
        whole = ((integers[key][0].astype(np.float64) - zeros[key][0]) * scales[key][0]).T
        expected = whole.reshape(4, HIDDEN, -1)[[0, 2, 3, 1]].reshape(whole.shape)
        np.testing.assert_allclose(checkpoint.read(name).numpy(), expected, rtol=1e-5)
        assert checkpoint.tensors[name].quantization == "onnx int8"


def test_layers_of_one_module_are_numbered(tmp_path: Path) -> None:
    arrays = {"W": (1, 4 * HIDDEN, HIDDEN), "R": (1, 4 * HIDDEN, HIDDEN)}
    nodes, held = [], []
    for layer, name in enumerate(("/net/rnn/LSTM", "/net/rnn/LSTM_1")):
        held += [
            numpy_helper.from_array(
                np.random.default_rng(layer).standard_normal(shape).astype(np.float32), f"{key}{layer}"
            )
            for key, shape in arrays.items()
        ]
        nodes.append(
            helper.make_node("LSTM", ["x", f"W{layer}", f"R{layer}"], [f"y{layer}"], name=name, hidden_size=HIDDEN)
        )
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, None)], [helper.make_tensor_value_info("y1", 1, None)], held
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    names = [f"net.rnn.weight_{part}_l{layer}" for layer in range(2) for part in ("ih", "hh")]
    assert set(open_checkpoint(tmp_path / "m.onnx").tensors) == set(names)
