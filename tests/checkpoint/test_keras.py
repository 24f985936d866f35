"""Keras files: written by Keras itself (on torch, without TensorFlow), and by hand in the layouts of older versions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from esdtool.checkpoint import open_checkpoint
from esdtool.errors import CheckpointError, MissingExtraError
from esdtool.modules import select_modules

Array = np.ndarray[Any, Any]

WRITE_MODELS = """
import sys
import keras, numpy as np
from keras import layers as L

keras.utils.set_random_seed(0)
folder = sys.argv[1]
inputs = keras.Input((12,), dtype="int32")
made = {
    "embedding": L.Embedding(50, 16),
    "mixer": L.MultiHeadAttention(4, 3, name="mixer"),
    "conv1d": L.Conv1D(24, 3),
    "up": L.Conv1DTranspose(20, 2, name="up"),
    "depthwise_conv1d": L.DepthwiseConv1D(3, depth_multiplier=2),
    "separable_conv1d": L.SeparableConv1D(14, 3),
    "heads": L.EinsumDense("abc,cde->abde", output_shape=(None, 2, 5), name="heads"),
    "reshape": L.Reshape((-1, 10)),
    "batch_normalization": L.BatchNormalization(),
    "lstm": L.LSTM(9, return_sequences=True),
    "gru": L.GRU(8, return_sequences=True),
    "both": L.Bidirectional(L.LSTM(6), name="both"),
    "inner": keras.Sequential([L.Dense(7), L.Dense(6, use_bias=False)], name="inner"),
    "answer": L.Dense(3, name="answer"),
}
x, seen = inputs, {}
for name, layer in made.items():
    seen[name] = [x]
    x = layer(x, x) if name == "mixer" else layer(x)
    seen[name].append(x)
model = keras.Model(inputs, x)
model.compile("adam", "mse")
tokens = np.random.default_rng(0).integers(0, 50, (4, 12))
model.fit(tokens, np.zeros((4, 3)), verbose=0)
# What goes into each layer and what comes out of it.
outputs = keras.Model(inputs, seen)(tokens)
arrays = {f"{name}/{i}": pair[i].detach().cpu().numpy() for name, pair in outputs.items() for i in (0, 1)}
for weight in model.weights:
    arrays["w:" + weight.path] = weight.value.detach().cpu().numpy()
np.savez(folder + "/truth.npz", **arrays)
model.save(folder + "/whole.keras")
model.save(folder + "/whole.h5")
model.save_weights(folder + "/only.weights.h5")

class Sub(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = L.Dense(5)
        self.blocks = [L.Dense(4), L.Dense(4)]
        self.convolution = L.Conv1D(6, 2, name="any_name")
    def call(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.convolution(x)

sub = Sub()
sub(np.zeros((2, 3, 7)))
sub.save_weights(folder + "/sub.weights.h5")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that Keras 3 wrote, and what each layer computed. Another process: Keras fixes its backend on import."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("needs keras, of the test extra, to write the files")
    folder = tmp_path_factory.mktemp("keras")
    environment = {**os.environ, "KERAS_BACKEND": "torch", "CUDA_VISIBLE_DEVICES": "", "KERAS_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", WRITE_MODELS, str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


KINDS = ["whole.keras", "whole.h5", "only.weights.h5"]


@pytest.mark.parametrize("name", KINDS)
def test_layers_compute_the_same(written: Path, name: str) -> None:
    """torch's own layers with the weights as read give what Keras's layers gave."""
    truth = {key: torch.from_numpy(value) for key, value in np.load(written / "truth.npz").items()}
    checkpoint = open_checkpoint(written / name)
    read = {key: checkpoint.read(key) for key in checkpoint.tensors}
    assert all(tensor.shape == checkpoint.tensors[key].shape for key, tensor in read.items())
    cell = (
        {"whole.h5": ".lstm_cell", "gru": ".gru_cell"} if name == "whole.h5" else {"whole.h5": ".cell", "gru": ".cell"}
    )

    def close(found: torch.Tensor, layer: str) -> None:
        torch.testing.assert_close(found, truth[f"{layer}/1"], rtol=1e-4, atol=1e-5)

    def given(layer: str) -> torch.Tensor:
        return truth[f"{layer}/0"]

    close(functional.embedding(given("embedding").long(), read["embedding.embeddings"]), "embedding")
    channels = given("conv1d").transpose(1, 2)
    close(functional.conv1d(channels, read["conv1d.weight"], truth["w:conv1d/bias"]).transpose(1, 2), "conv1d")
    up = functional.conv_transpose1d(given("up").transpose(1, 2), read["up.weight"].transpose(0, 1), truth["w:up/bias"])
    close(up.transpose(1, 2), "up")
    depthwise = functional.conv1d(
        given("depthwise_conv1d").transpose(1, 2),
        read["depthwise_conv1d.weight"],
        truth["w:depthwise_conv1d/bias"],
        groups=20,
    )
    close(depthwise.transpose(1, 2), "depthwise_conv1d")
    separable = given("separable_conv1d").transpose(1, 2)
    separable = functional.conv1d(separable, read["separable_conv1d.depthwise.weight"], groups=separable.shape[1])
    separable = functional.conv1d(
        separable, read["separable_conv1d.pointwise.weight"], truth["w:separable_conv1d/bias"]
    )
    close(separable.transpose(1, 2), "separable_conv1d")
    close(functional.linear(given("answer"), read["answer.weight"], truth["w:answer/bias"]), "answer")
    inner = functional.linear(given("inner"), read["inner.dense.weight"], truth["w:inner/dense/bias"])
    close(functional.linear(inner, read["inner.dense_1.weight"]), "inner")
    if name != "only.weights.h5":  # its equation is in the configuration alone
        close(functional.linear(given("heads"), read["heads.weight"]).unflatten(-1, (2, 5)), "heads")

    lstm = nn.LSTM(10, 9, batch_first=True)
    lstm.weight_ih_l0.data, lstm.weight_hh_l0.data = (
        read[f"lstm{cell['whole.h5']}.weight_{x}_l0"] for x in ("ih", "hh")
    )
    lstm.bias_ih_l0.data, lstm.bias_hh_l0.data = truth["w:lstm/lstm_cell/bias"], torch.zeros(36)
    close(lstm(given("lstm"))[0].detach(), "lstm")
    gru = nn.GRU(9, 8, batch_first=True)
    gru.weight_ih_l0.data, gru.weight_hh_l0.data = (read[f"gru{cell['gru']}.weight_{x}_l0"] for x in ("ih", "hh"))
    swapped = [torch.cat([b[8:16], b[:8], b[16:]]) for b in truth["w:gru/gru_cell/bias"]]
    gru.bias_ih_l0.data, gru.bias_hh_l0.data = swapped
    close(gru(given("gru"))[0].detach(), "gru")

    attention = nn.MultiheadAttention(16, 4, batch_first=True, kdim=16, vdim=16)
    tokens = given("mixer")
    projected = {
        part: functional.linear(tokens, read[f"mixer.{part}.weight"], truth[f"w:mixer/{part}/bias"].flatten())
        for part in ("query", "key", "value")
    }
    assert attention.num_heads == 4
    q, k, v = (tensor.unflatten(-1, (4, 3)).transpose(1, 2) for tensor in projected.values())
    mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    close(
        functional.linear(mixed, read["mixer.attention_output.weight"], truth["w:mixer/attention_output/bias"]), "mixer"
    )


@pytest.mark.parametrize("name", KINDS)
def test_rows_and_notes(written: Path, name: str) -> None:
    checkpoint = open_checkpoint(written / name)
    for key, info in checkpoint.tensors.items():
        if info.shape:
            assert checkpoint.read_rows(key, 1, 5).equal(checkpoint.read(key)[1:5]), key
    notes = [note.removeprefix(f"{written / name}: ") for note in checkpoint.notes]
    assert notes[0].startswith("left out the optimizer's state (")
    guess = (
        "the file does not tell class or equation of 1 layer (heads): a 2-D array is taken for a dense kernel, "
        "[in, out]; one of 3 dimensions is kept as it is"
    )
    assert notes[1:] == ([guess] if name == "only.weights.h5" else [])
    assert ("heads.kernel" in checkpoint.tensors) == (name == "only.weights.h5")


@pytest.mark.parametrize("name", KINDS)
def test_roles(written: Path, name: str) -> None:
    checkpoint = open_checkpoint(written / name)
    selection = select_modules(checkpoint.tensors.values())
    roles = {module.name: module.role for module in selection.modules}
    assert {f"mixer.{part}" for part in ("query", "key", "value", "attention_output")} <= set(roles)
    assert {module.kind for module in selection.modules if module.parameter == "conv1d.weight"} == {"conv"}
    gates = {module.role for module in selection.modules if module.parameter.startswith("gru.")}
    assert gates == {"reset_gate", "update_gate", "new_gate"}
    reasons = {tensor.name: tensor.reason for tensor in selection.skipped}
    assert reasons["embedding.embeddings"] == "token embedding"
    assert "depthwise" in reasons["depthwise_conv1d.weight"]
    assert "depthwise" in reasons["separable_conv1d.depthwise.weight"]


def test_subclassed_model(written: Path) -> None:
    """Attributes give the names; the layers' default names their classes; a Conv1D of another name stays as it is."""
    path = written / "sub.weights.h5"
    checkpoint = open_checkpoint(path)
    assert {name: info.shape for name, info in checkpoint.tensors.items() if len(info.shape) > 1} == {
        "first.weight": (5, 7),
        "blocks.dense.weight": (4, 5),
        "blocks.dense_1.weight": (4, 4),
        "convolution.kernel": (2, 4, 6),
    }
    assert checkpoint.notes == (
        f"{path}: the file does not tell class or equation of 1 layer (convolution): a 2-D array is taken for a "
        "dense kernel, [in, out]; one of 3 dimensions is kept as it is",
    )
    reasons = {tensor.name: tensor.reason for tensor in select_modules(checkpoint.tensors.values()).skipped}
    assert "unknown layout" in reasons["convolution.kernel"]


def test_compressed_archive(written: Path, tmp_path: Path) -> None:
    """Someone packs the archive again: the same tensors."""
    path = tmp_path / "packed.keras"
    with zipfile.ZipFile(written / "whole.keras") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    expected, checkpoint = open_checkpoint(written / "whole.keras"), open_checkpoint(path)
    assert checkpoint.tensors.keys() == expected.tensors.keys()
    assert all(checkpoint.read(name).equal(expected.read(name)) for name in expected.tensors)


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


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


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
        assert any("optimizer's state (1 tensors)" in note for note in checkpoint.notes) == bool(root)


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
