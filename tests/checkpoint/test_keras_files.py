"""Keras files by hand: the layouts of older versions, and files that are broken."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.nn import functional

from esdtool.checkpoint import open_checkpoint
from esdtool.errors import CheckpointError, MissingExtraError
from esdtool.modules import select_modules
from tests.checkpoint.keras_arrays import Array, normal


def keras2(path: Path, layers: dict[str, dict[str, Array]], *, root: str = "", config: Any = None) -> Path:
    """A file in the layout of Keras 2: a group for each layer, which lists the names of its weights."""
    with h5py.File(path, "w") as file:
        group = file.create_group(root) if root else file
        group.attrs["layer_names"] = [name.encode() for name in layers]
        for layer, weights in layers.items():
            made = group.create_group(layer)
            made.attrs["weight_names"] = [name.encode() for name in weights]
            for name, array in weights.items():
                made.create_dataset(name, data=array)
        if config is not None:
            file.attrs["model_config"] = json.dumps(config)
    return path


def test_keras_2(tmp_path: Path) -> None:
    layers = {
        "dense": {"dense/kernel:0": normal(5, 7), "dense/bias:0": normal(7)},
        "conv": {"conv/kernel:0": normal(3, 2, 4, 6)},
        "bidirectional": {
            "bidirectional/forward_lstm/lstm_cell/kernel:0": normal(5, 12),
            "bidirectional/forward_lstm/lstm_cell/recurrent_kernel:0": normal(3, 12),
        },
        "short": {"kernel:0": normal(2, 9)},
        "empty": {},
    }
    for root in ("", "model_weights"):
        path = keras2(tmp_path / "model.h5", layers, root=root)
        if root:
            with h5py.File(path, "a") as file:
                file.create_dataset("optimizer_weights/Adam/m/dense/kernel:0", data=normal(5, 7))
        checkpoint = open_checkpoint(path)
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            "dense.weight": (7, 5),
            "dense.bias": (7,),
            "conv.weight": (6, 4, 3, 2),
            "bidirectional.forward_lstm.lstm_cell.weight_ih_l0": (12, 5),
            "bidirectional.forward_lstm.lstm_cell.weight_hh_l0": (12, 3),
            "short.weight": (9, 2),
        }
        np.testing.assert_array_equal(checkpoint.read("dense.weight").numpy(), layers["dense"]["dense/kernel:0"].T)
        kernel = layers["conv"]["conv/kernel:0"]
        np.testing.assert_array_equal(checkpoint.read("conv.weight").numpy(), kernel.transpose(3, 2, 0, 1))
        assert any("optimizer's state (1 tensor)" in note for note in checkpoint.notes) == bool(root)


def test_classes_from_the_configuration(tmp_path: Path) -> None:
    """A whole model of Keras 2 names the class of each layer: a kernel of three dimensions is a convolution's."""
    config = {
        "class_name": "Sequential",
        "config": {
            "layers": [
                {"class_name": "Conv1D", "config": {"name": "a"}},
                {"class_name": "EinsumDense", "config": {"name": "b", "equation": "abde,def->abf"}},
                {"class_name": "DepthwiseConv2D", "config": {"name": "c"}},
                {"class_name": "Conv2DTranspose", "config": {"name": "d"}},
            ]
        },
    }
    layers = {
        "a": {"a/kernel:0": normal(3, 4, 6)},
        "b": {"b/kernel:0": normal(2, 5, 8)},
        "c": {"c/depthwise_kernel:0": normal(3, 3, 4, 2)},
        "d": {"d/kernel:0": normal(3, 3, 4, 5)},
    }
    checkpoint = open_checkpoint(keras2(tmp_path / "m.h5", layers, root="model_weights", config=config))
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        "a.weight": (6, 4, 3),
        "b.weight": (8, 10),
        "c.weight": (8, 1, 3, 3),
        "d.weight": (4, 5, 3, 3),
    }
    x = normal(1, 3, 2, 5)
    expected = np.einsum("abde,def->abf", x, layers["b"]["b/kernel:0"])
    found = functional.linear(torch.from_numpy(x).flatten(2), checkpoint.read("b.weight"))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert checkpoint.notes == ()


def test_names_of_transformers(tmp_path: Path) -> None:
    """`tf_model.h5`: everything in the group of the base model; `layer_._0` for `layer.0`; config.json beside it."""
    base = "tf_bert_model/bert/encoder/layer_._2"
    layers = {
        "bert": {
            f"{base}/attention/self/query/kernel:0": normal(4, 4),
            f"{base}/output/dense/kernel:0": normal(8, 4),
            "tf_bert_model/bert/embeddings/word_embeddings/weight:0": normal(9, 4),
        }
    }
    path = keras2(tmp_path / "tf_model.h5", layers)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for location in (path, tmp_path):
        checkpoint = open_checkpoint(location)
        assert checkpoint.model_type == "bert"
        selection = select_modules(checkpoint.tensors.values(), config=checkpoint.config)
        assert [(module.role, module.layer, module.shape) for module in selection.modules] == [
            ("q_proj", 2, (4, 4)),
            ("down_proj", 2, (4, 8)),
        ]
        assert [tensor.reason for tensor in selection.skipped] == ["token embedding"]


def test_layers_of_early_keras_3(tmp_path: Path) -> None:
    """Without the layers' names as attributes, in both spellings of the group."""
    for container in ("layers", "_layer_checkpoint_dependencies"):
        path = tmp_path / f"{container}.weights.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset(f"{container}/dense_1/vars/0", data=normal(5, 7))
            file.create_dataset(f"{container}/dense_1/vars/1", data=normal(7))
            file.create_dataset(f"{container}/embedding/vars/0", data=normal(9, 5))
            file.create_dataset(f"{container}/gru/cell/vars/0", data=normal(5, 9))
            file.create_dataset(f"{container}/gru/cell/vars/1", data=normal(3, 9))
        checkpoint = open_checkpoint(path)
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            "dense_1.weight": (7, 5),
            "dense_1.bias": (7,),
            "embedding.embeddings": (9, 5),
            "gru.cell.weight_ih_l0": (9, 5),
            "gru.cell.weight_hh_l0": (9, 3),
        }
        rows = torch.from_numpy(normal(3, 9)).T
        assert checkpoint.read("gru.cell.weight_hh_l0").equal(torch.cat([rows[3:6], rows[:3], rows[6:]]))


def test_types(tmp_path: Path) -> None:
    """Half precision, bfloat16 as Keras marks it, integers, big-endian floats; text is left out with a note."""
    path = tmp_path / "m.weights.h5"
    original = torch.from_numpy(normal(5, 7)).bfloat16()
    with h5py.File(path, "w") as file:
        marked = file.create_dataset("a/vars/0", data=original.view(torch.int16).numpy().view("V2"))
        marked.attrs["dtype"] = "bfloat16"
        file.create_dataset("b/vars/0", data=normal(5, 7).astype(np.float16))
        file.create_dataset("c/vars/0", data=normal(5, 7).astype(">f4"))
        file.create_dataset("d/vars/0", data=np.array([3, 4], dtype=np.uint32))
        file.create_dataset("e", data="text")
    checkpoint = open_checkpoint(path)
    assert {name: info.dtype for name, info in checkpoint.tensors.items()} == {
        "a.weight": "bfloat16",
        "b.weight": "float16",
        "c.weight": "float32",
        "d.vars.0": "uint32",
    }
    assert checkpoint.read("a.weight").equal(original.T)
    np.testing.assert_array_equal(checkpoint.read("b.weight").numpy(), normal(5, 7).astype(np.float16).T)
    np.testing.assert_array_equal(checkpoint.read("c.weight").numpy(), normal(5, 7).T)
    assert checkpoint.read("d.vars.0").tolist() == [3, 4]
    assert checkpoint.notes[0] == f"{path}: left out 1 datasets that are no numbers: e"


def test_several_in_a_folder(tmp_path: Path) -> None:
    for name in ("a.h5", "b.keras"):
        keras2(tmp_path / name, {"dense": {"dense/kernel:0": normal(2, 3)}})
    with pytest.raises(CheckpointError, match=r"2 models: a.h5, b.keras; name one of these files"):
        open_checkpoint(tmp_path)
    (tmp_path / "b.keras").unlink()
    assert set(open_checkpoint(tmp_path).tensors) == {"dense.weight"}


def _archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return path


def test_broken_files(tmp_path: Path) -> None:
    good = keras2(tmp_path / "good.h5", {"dense": {"dense/kernel:0": normal(200, 300)}}).read_bytes()
    contents = {
        "": "empty file",
        "text, not HDF5": "not an HDF5 file, or truncated",
    }
    path = tmp_path / "x.h5"
    for content, message in contents.items():
        path.write_text(content)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: {message}")
        assert "\n" not in str(caught.value)
    for size in (9, 100, 3000, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(CheckpointError, match=r"x.h5: not an HDF5 file, or truncated"):
            open_checkpoint(path)


def test_broken_archives(tmp_path: Path) -> None:
    path = _archive(tmp_path / "x.keras", config__json=b"{}")
    with pytest.raises(CheckpointError, match=r"x.keras: a zip archive without model.weights.h5"):
        open_checkpoint(path)
    _archive(path, model__weights__h5=b"nothing", config__json=b"{}")
    with pytest.raises(CheckpointError, match=r"x.keras: not an HDF5 file, or truncated"):
        open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(CheckpointError, match=r"x.keras: truncated or damaged zip archive"):
        open_checkpoint(path)


def test_configuration_that_is_nonsense(tmp_path: Path) -> None:
    """It only helps to tell classes: without it the names do."""
    weights = keras2(tmp_path / "w.h5", {"dense": {"dense/kernel:0": normal(2, 3)}}).read_bytes()
    for config in (b"not JSON", b"[1, 2]", b'{"class_name": 3, "config": {"name": []}}', b"[" * 100000):
        path = _archive(tmp_path / "x.keras", model__weights__h5=weights, config__json=config)
        assert open_checkpoint(path).tensors["dense.weight"].shape == (3, 2)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = keras2(tmp_path / "m.h5", {"dense": {"dense/kernel:0": normal(2, 3)}})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: reading a Keras file needs an optional extra: pip install 'esdtool[keras]'"
