"""Keras files: written by Keras itself (on torch, without TensorFlow), and by hand in the layouts of older versions."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from esdtool.checkpoint import open_checkpoint
from esdtool.modules import select_modules

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
