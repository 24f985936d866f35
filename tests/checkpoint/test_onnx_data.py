"""ONNX: where the elements of a tensor lie, how they are coded, and files that are broken."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from esdtool.checkpoint import open_checkpoint
from esdtool.errors import CheckpointError, MissingExtraError
from tests.checkpoint.onnx_files import Array, model_of, normal, saved


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize(
    "dtype",
    [
        "FLOAT",
        "DOUBLE",
        "FLOAT16",
        "BFLOAT16",
        "FLOAT8E4M3FN",
        "FLOAT8E5M2",
        "INT8",
        "UINT8",
        "INT16",
        "UINT16",
        "INT32",
        "INT64",
        "UINT32",
        "UINT64",
        "BOOL",
    ],
)
def test_data_types(tmp_path: Path, dtype: str, raw: bool) -> None:
    """Against onnx's own decoder; exactly representable values, so that no rounding enters."""
    values = np.array([[0, 1, 2], [4, 8, 16]]) if dtype != "BOOL" else np.array([[0, 1, 1], [1, 0, 1]])
    number = TensorProto.DataType.Value(dtype)
    proto = helper.make_tensor("t", number, (2, 3), values.astype(helper.tensor_dtype_to_np_dtype(number)).ravel())
    if raw:
        proto = numpy_helper.from_array(numpy_helper.to_array(proto), "t")
    assert proto.HasField("raw_data") == raw
    path = tmp_path / "m.onnx"
    onnx.save(model_of([helper.make_node("Identity", ["x"], ["y"])], [proto]), path)
    checkpoint = open_checkpoint(path)
    read = checkpoint.read("t")
    assert str(read.dtype) == f"torch.{checkpoint.tensors['t'].dtype}"
    assert read.double().numpy().tolist() == values.tolist()
    assert checkpoint.read_rows("t", 1, 2).double().numpy().tolist() == values[1:].tolist()


def external(tmp_path: Path, location: str = "m.onnx_data") -> tuple[Path, dict[str, Array]]:
    tensors = {"layers.0.fc1.weight": normal(7, 5), "onnx::MatMul_1": normal(5, 9, seed=1), "bias": normal(3)}
    nodes = [
        helper.make_node("Gemm", ["x", "layers.0.fc1.weight"], ["a"], name="/f/Gemm", transB=1),
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"], name="/layers.0/fc2/MatMul"),
    ]
    built = model_of(nodes, [numpy_helper.from_array(array, name) for name, array in tensors.items()])
    path = tmp_path / "m.onnx"
    onnx.save(built, path, save_as_external_data=True, location=location, size_threshold=0)
    return path, tensors


def test_external_data(tmp_path: Path) -> None:
    path, tensors = external(tmp_path)
    for location in (path, tmp_path):
        checkpoint = open_checkpoint(location)
        assert checkpoint.files == ("m.onnx_data",)
        assert checkpoint.read("layers.0.fc1.weight").numpy().tobytes() == tensors["layers.0.fc1.weight"].tobytes()
        rows = checkpoint.read_rows("layers.0.fc1.weight", 2, 4)
        assert rows.numpy().tobytes() == tensors["layers.0.fc1.weight"][2:4].tobytes()
        np.testing.assert_array_equal(checkpoint.read("layers.0.fc2.weight").numpy(), tensors["onnx::MatMul_1"].T)
        np.testing.assert_array_equal(checkpoint.read("bias").numpy(), tensors["bias"])


def test_external_data_missing_or_short(tmp_path: Path) -> None:
    path, _ = external(tmp_path)
    checkpoint = open_checkpoint(path)
    data = tmp_path / "m.onnx_data"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(
        CheckpointError, match=r"m.onnx_data: tensor 'layers.0.fc2.weight': cannot read: the file has become shorter"
    ):
        checkpoint.read("layers.0.fc2.weight")
    with pytest.raises(CheckpointError, match=r"m.onnx_data: truncated: tensor 'layers.0.fc1.weight' ends at byte"):
        open_checkpoint(path)
    data.unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: its external data m.onnx_data is missing; copy it beside the model"


@pytest.mark.parametrize("location", ["../m.data", "/etc/passwd", "a/../../b", ""])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    path, _ = external(tmp_path)
    built = onnx.load(path, load_external_data=False)
    built.graph.initializer[0].external_data[0].value = location
    path.write_bytes(built.SerializeToString())
    with pytest.raises(CheckpointError, match=r"refused: its data in .* lies outside the model's folder"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"not protobuf at all, but a text", "not an ONNX file"),
        (b"\x08\x0a", "not an ONNX file: there is no graph in it"),
    ],
)
def test_not_onnx(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_truncated(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = saved(tmp_path, nodes, {"w": normal(30, 30)})
    whole = path.read_bytes()
    for size in range(10, len(whole), 171):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"m.onnx: (not an ONNX file|.*damaged)"):
            open_checkpoint(path)


def test_data_of_the_wrong_size(tmp_path: Path) -> None:
    proto = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], raw_data=bytes(12))
    path = tmp_path / "m.onnx"
    onnx.save(model_of([helper.make_node("Identity", ["x"], ["y"])], [proto]), path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: tensor 'w': damaged: 12 bytes of data, not 64"


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, [helper.make_node("Identity", ["x"], ["y"])], {"w": normal(2, 2)})
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: reading an ONNX file needs an optional extra: pip install 'esdtool[onnx]'"
