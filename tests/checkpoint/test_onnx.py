"""ONNX files: names, orientation and values, checked by running the graph with ONNX's reference evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from esdtool.checkpoint import open_checkpoint
from esdtool.modules import select_modules
from tests.checkpoint.onnx_files import Array, model_of, normal, run, saved

LINEAR = [
    # (nodes, shape of the stored matrix): each computes y = x W^T for a weight W [7, 5].
    ([helper.make_node("MatMul", ["x", "w"], ["y"], name="/enc/layer.0/query/MatMul")], (5, 7)),
    ([helper.make_node("Gemm", ["x", "w"], ["y"], name="/enc/layer.0/query/Gemm", transB=1)], (7, 5)),
    ([helper.make_node("Gemm", ["x", "w"], ["y"], name="/enc/layer.0/query/Gemm")], (5, 7)),
    (
        [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"], name="/enc/layer.0/query/MatMul_3"),
        ],
        (7, 5),
    ),
    (
        [
            helper.make_node("Identity", ["w"], ["t"]),
            helper.make_node("MatMul", ["x", "t"], ["y"], name="/enc/layer.0/query/MatMul"),
        ],
        (5, 7),
    ),
]


@pytest.mark.parametrize(("nodes", "stored"), LINEAR)
@pytest.mark.parametrize("name", ["onnx::MatMul_123", "42", "val_7"])
def test_linear_maps_are_out_in(tmp_path: Path, nodes: list[Any], stored: tuple[int, int], name: str) -> None:
    weight = normal(*stored)
    renamed = []
    for node in nodes:
        copy = type(node).FromString(node.SerializeToString())
        copy.input[:] = [name if key == "w" else key for key in node.input]
        renamed.append(copy)
    path = saved(tmp_path, renamed, {name: weight})
    checkpoint = open_checkpoint(path)
    assert {key: info.shape for key, info in checkpoint.tensors.items()} == {"enc.layer.0.query.weight": (7, 5)}
    x = normal(3, 5, seed=1)
    read = checkpoint.read("enc.layer.0.query.weight")
    np.testing.assert_allclose((torch.from_numpy(x) @ read.T).numpy(), run(path, x), rtol=1e-5)
    assert checkpoint.read_rows("enc.layer.0.query.weight", 2, 5).equal(read[2:5])


def test_multiplied_from_the_left(tmp_path: Path) -> None:
    path = saved(tmp_path, [helper.make_node("MatMul", ["1", "x"], ["y"], name="/a/MatMul")], {"1": normal(7, 5)})
    x = normal(5, 3, seed=1)
    read = open_checkpoint(path).read("a.weight")
    np.testing.assert_allclose((read @ torch.from_numpy(x)).numpy(), run(path, x), rtol=1e-5)


@pytest.mark.parametrize("kernel", [(3,), (3, 2)])
def test_convolutions(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    x = normal(1, 5, *(9 for _ in kernel), seed=1)
    plain = saved(tmp_path, [helper.make_node("Conv", ["x", "1"], ["y"], name="/c/Conv")], {"1": normal(4, 5, *kernel)})
    checkpoint = open_checkpoint(plain)
    read = checkpoint.read("c.weight")
    assert read.shape == checkpoint.tensors["c.weight"].shape == (4, 5, *kernel)
    convolve = functional.conv1d if len(kernel) == 1 else functional.conv2d
    np.testing.assert_allclose(convolve(torch.from_numpy(x), read).numpy(), run(plain, x), rtol=1e-4, atol=1e-5)

    turned = saved(
        tmp_path,
        [helper.make_node("ConvTranspose", ["x", "1"], ["y"], name="/c/ConvTranspose")],
        {"1": normal(5, 4, *kernel)},
    )
    read = open_checkpoint(turned).read("c.weight")
    assert read.shape == (4, 5, *kernel)
    convolve = functional.conv_transpose1d if len(kernel) == 1 else functional.conv_transpose2d
    expected = convolve(torch.from_numpy(x), read.transpose(0, 1))
    np.testing.assert_allclose(expected.numpy(), run(turned, x), rtol=1e-4, atol=1e-5)


def test_names(tmp_path: Path) -> None:
    """Real names stay; two products in one module are told apart; what no node uses as a weight is as stored."""
    scoped = helper.make_node("MatMul", ["x", "val_3"], ["d"], name="node_MatMul_9")
    scoped.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'layers.1', 'layers.1.fc2', 'linear_1']")
    nodes = [
        helper.make_node("MatMul", ["x", "layers.0.fc1.weight"], ["a"], name="/layers.0/fc1/MatMul"),
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["b"], name="/mix/MatMul"),
        helper.make_node("MatMul", ["x", "onnx::MatMul_2"], ["c"], name="/mix/MatMul_1"),
        scoped,
        helper.make_node("MatMul", ["x", "layers.0.attn.q_proj.MatMul.weight"], ["e"], name="/q/MatMul"),
        helper.make_node("MatMul", ["x", "77"], ["f"], name="MatMul_77"),
        helper.make_node("Add", ["x", "onnx::Add_5"], ["y"], name="/layers.0/Add"),
    ]
    tensors = {
        name: normal(5, 7)
        for name in (
            "layers.0.fc1.weight",
            "onnx::MatMul_1",
            "onnx::MatMul_2",
            "val_3",
            "layers.0.attn.q_proj.MatMul.weight",
            "77",
            "onnx::Add_5",
            "unused",
        )
    }
    checkpoint = open_checkpoint(saved(tmp_path, nodes, tensors))
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        "layers.0.fc1.weight": (7, 5),
        "mix.MatMul.weight": (7, 5),
        "mix.MatMul_1.weight": (7, 5),
        "layers.1.fc2.weight": (7, 5),
        "layers.0.attn.q_proj.weight": (7, 5),
        "77": (7, 5),
        "onnx::Add_5": (5, 7),
        "unused": (5, 7),
    }


def test_names_of_tensorflow(tmp_path: Path) -> None:
    """A kernel of any name is a convolution's, for the graph says so; a constant has the name of its node."""
    nodes = [
        helper.make_node("Conv", ["x", "net/Conv_0/transpose:0"], ["a"], name="net/Conv_0/Conv2D"),
        helper.make_node("MatMul", ["a", "net/Const_24:0"], ["b"], name="net/Dense_1/MatMul"),
        helper.make_node("MatMul", ["b", "const_fold_opt__7"], ["y"], name="net/Dense_2/MatMul"),
    ]
    arrays = {"net/Conv_0/transpose:0": normal(4, 3, 2, 2), "net/Const_24:0": normal(4, 6)}
    checkpoint = open_checkpoint(saved(tmp_path, nodes, {**arrays, "const_fold_opt__7": normal(6, 8)}))
    modules = select_modules(checkpoint.tensors.values()).modules
    assert {(module.parameter, module.kind, module.shape) for module in modules} == {
        ("net/Conv_0/transpose:0.weight", "conv", (4, 3, 2, 2)),
        ("net.Dense_1.weight", "linear", (6, 4)),
        ("net.Dense_2.weight", "linear", (8, 6)),
    }


def test_shared_weight_appears_once(tmp_path: Path) -> None:
    """A tied embedding: [vocabulary, width] for Gather, and transposed for the head."""
    nodes = [
        helper.make_node("Gather", ["wte.weight", "x"], ["h"], name="/wte/Gather"),
        helper.make_node("Transpose", ["wte.weight"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["y"], name="/lm_head/MatMul"),
        helper.make_node("MatMul", ["h", "5"], ["z"], name="/a/MatMul"),
        helper.make_node("MatMul", ["h", "5"], ["w"], name="/b/MatMul"),
    ]
    checkpoint = open_checkpoint(saved(tmp_path, nodes, {"wte.weight": normal(9, 4), "5": normal(4, 6)}))
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    assert shapes == {"wte.weight": (9, 4), "a.weight": (6, 4)}
    selection = select_modules(checkpoint.tensors.values())
    assert [(tensor.name, tensor.reason) for tensor in selection.skipped] == [("wte.weight", "token embedding")]


def test_constant_nodes_and_inner_graphs(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "9"], ["i"], name="/then/MatMul")],
        "inner",
        [],
        [helper.make_tensor_value_info("i", TensorProto.FLOAT, None)],
        initializer=[numpy_helper.from_array(normal(5, 7), "9")],
    )
    nodes = [
        helper.make_node("Constant", [], ["/fc/Constant_output_0"], value=numpy_helper.from_array(normal(5, 7))),
        helper.make_node("MatMul", ["x", "/fc/Constant_output_0"], ["y"], name="/fc/MatMul"),
        helper.make_node("If", ["flag"], ["z"], then_branch=inner, else_branch=inner),
    ]
    flag = {"flag": np.array(True)}
    checkpoint = open_checkpoint(saved(tmp_path, nodes, flag))
    assert {name: info.shape for name, info in checkpoint.tensors.items() if info.shape} == {
        "fc.weight": (7, 5),
        "then.weight": (7, 5),
    }
    assert checkpoint.notes == (f"{tmp_path / 'm.onnx'}: left out 1 tensor of a name that another graph uses, too: 9",)


def quantised(tmp_path: Path, codes: Any, scale: Array, zero: Any | None, **attributes: Any) -> Path:
    names = ["w_q", "w_scale", *(["w_zero"] if zero is not None else [])]
    nodes = [
        helper.make_node("DequantizeLinear", names, ["w"], **attributes),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="/layers.0/fc1/MatMul"),
    ]
    made = [numpy_helper.from_array(scale, "w_scale")]
    for name, value in (("w_q", codes), ("w_zero", zero)):
        if value is not None:
            number, array = value
            made.append(helper.make_tensor(name, number, array.shape, array.ravel()))
    onnx.save(model_of(nodes, made), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("scheme", ["tensor", "column", "row", "block", "int4"])
def test_de_quantised(tmp_path: Path, scheme: str) -> None:
    generator = np.random.default_rng(3)
    shape = (8, 6)
    number, low, high = (TensorProto.INT4, -8, 8) if scheme == "int4" else (TensorProto.INT8, -128, 128)
    codes = generator.integers(low, high, shape)
    scales = {"tensor": (), "column": (6,), "row": (8,), "block": (2, 6), "int4": (6,)}[scheme]
    attributes: dict[str, int] = {"axis": 0 if scheme in ("row", "block") else 1}
    if scheme == "block":
        attributes["block_size"] = 4
    scale = generator.uniform(0.01, 0.1, scales).astype(np.float32)
    zero = generator.integers(low // 2, high // 2, scales)
    path = quantised(tmp_path, (number, codes), scale, (number, zero), **attributes)
    checkpoint = open_checkpoint(path)
    info = checkpoint.tensors["w_q"]
    assert (info.shape, info.dtype) == ((6, 8), "float32")
    assert info.quantization == ("onnx int4" if scheme == "int4" else "onnx int8")
    read = checkpoint.read("w_q")
    expected = run(path, np.eye(8, dtype=np.float32))  # the identity through the graph is the weight, [in, out]
    np.testing.assert_allclose(read.T.numpy(), expected, rtol=1e-6)
    assert checkpoint.read_rows("w_q", 1, 3).equal(read[1:3])
    assert checkpoint.notes == (f"{path}: left out the scales and zero points of quantised tensors: 2 in all",)
    modules = select_modules(checkpoint.tensors.values()).modules
    assert [(module.name, module.dtype) for module in modules] == [("w_q", info.quantization)]


def test_codes_that_nodes_compute_with(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMulInteger", ["x", "onnx::MatMul_1_quantized"], ["y"], name="/fc1/MatMul_quant"),
        helper.make_node("MatMulNBits", ["x", "a.weight_Q4", "s"], ["z"], domain="com.microsoft", K=4, N=3, bits=4),
    ]
    codes = np.arange(12, dtype=np.int8).reshape(4, 3)
    packed = np.arange(12, dtype=np.uint8).reshape(3, 1, 4)
    scales = normal(3)
    path = saved(tmp_path, nodes, {"onnx::MatMul_1_quantized": codes, "a.weight_Q4": packed, "s": scales})
    checkpoint = open_checkpoint(path)
    assert checkpoint.read("fc1.weight").tolist() == codes.tolist()
    assert checkpoint.notes == (
        f"{path}: left out the scales and zero points of quantised tensors: 1 in all",
        f"{path}: 2 weights of nodes that compute with integers (MatMulInteger, QLinearMatMul, MatMulNBits and the "
        "like): listed as codes and not scored",
    )
    assert set(checkpoint.tensors) == {"fc1.weight", "a.weight_Q4"}
    assert select_modules(checkpoint.tensors.values()).modules == ()


def test_sparse_is_left_out(tmp_path: Path) -> None:
    values = numpy_helper.from_array(normal(2), "s")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 3]), "i"), [2, 2])
    path = saved(
        tmp_path, [helper.make_node("Identity", ["x"], ["y"])], {"w": normal(2, 2)}, sparse_initializer=[sparse]
    )
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == {"w"}
    assert checkpoint.notes == (f"{path}: left out 1 tensor stored as sparse: s",)


def test_weights_of_local_functions(tmp_path: Path) -> None:
    body = helper.make_function(
        "local",
        "Linear",
        ["a", "b"],
        ["c"],
        [helper.make_node("MatMul", ["a", "b"], ["c"], name="m")],
        [helper.make_opsetid("", 21)],
    )
    call = helper.make_node("Linear", ["x", "fc.weight"], ["y"], domain="local", name="/fc/Linear")
    built = model_of([call], [numpy_helper.from_array(normal(5, 7), "fc.weight")])
    built.functions.append(body)
    built.opset_import.append(helper.make_opsetid("local", 1))
    onnx.save(built, tmp_path / "m.onnx")
    assert open_checkpoint(tmp_path).tensors["fc.weight"].shape == (7, 5)


def test_attention_of_a_bert(tmp_path: Path) -> None:
    """Exported names give the roles that torch's give."""
    base = "/bert/encoder/layer.3"
    paths = {
        "q_proj": "attention/self/query",
        "k_proj": "attention/self/key",
        "v_proj": "attention/self/value",
        "o_proj": "attention/output/dense",
        "up_proj": "intermediate/dense",
        "down_proj": "output/dense",
    }
    nodes = [
        helper.make_node("MatMul", ["x", f"onnx::MatMul_{i}"], [f"y{i}"], name=f"{base}/{path}/MatMul")
        for i, path in enumerate(paths.values())
    ]
    checkpoint = open_checkpoint(saved(tmp_path, nodes, {f"onnx::MatMul_{i}": normal(4, 4) for i in range(6)}))
    modules = select_modules(checkpoint.tensors.values()).modules
    assert {(module.role, module.layer) for module in modules} == {(role, 3) for role in paths}
