"""Pickles that hold code, other archives, damage: refused in one line, and never run."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from esdtool.checkpoint import open_checkpoint
from esdtool.errors import CheckpointError
from tests.checkpoint.messages import message

SAFE_COPY = "re-save its state dict with torch.save(model.state_dict(), ...) or as safetensors"


class MakesFolder:
    """Pickles to a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, new_format):
    marker = tmp_path / "was-run"
    path = tmp_path / "evil.bin"
    torch.save({"w": torch.zeros(2), "x": MakesFolder(marker)}, path, _use_new_zipfile_serialization=new_format)
    call = f"{os.mkdir.__module__}.mkdir"
    assert message(path) == f"{path}: refused: its pickle calls code ({call}), which is never run; {SAFE_COPY}"
    assert not marker.exists()


def test_plain_pickle_with_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was-run"
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(MakesFolder(marker), protocol=2))
    assert message(path).startswith(f"{path}: ")
    assert not marker.exists()


def test_whole_module_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    expected = (
        f"{path}: refused: its pickle calls code (torch.nn.modules.linear.Linear), which is never run; {SAFE_COPY}"
    )
    assert message(path) == expected


def zip_with(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (("m/data.pkl", "m/constants.pkl"), f"refused: a TorchScript archive holds code; {SAFE_COPY}"),
        (("m/archive_format",), f"refused: a torch.export archive holds a program; {SAFE_COPY}"),
        (("letters.txt",), "a zip archive, but not one that torch.save wrote"),
    ],
)
def test_other_archives(tmp_path, records, expected):
    path = tmp_path / "m.pt"
    zip_with(path, *records)
    assert message(path) == f"{path}: {expected}"


def test_truncated_zip(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-30])
    assert message(path) == (
        f"{path}: truncated: a zip archive without its directory at the end; download or copy it again"
    )


def test_damage_anywhere_in_a_file_is_one_line(tmp_path):
    """Flipped bytes give an error of one line or other numbers, never any other exception."""
    generator = random.Random(0)
    for name in ("w.pt", "w.safetensors"):
        path = tmp_path / name
        tensors = {"a.weight": torch.ones(3, 2), "b": torch.zeros(4)}
        torch.save(tensors, path) if name == "w.pt" else save_file(tensors, path)
        content = path.read_bytes()
        for _ in range(200):
            damaged = bytearray(content)
            for _ in range(generator.choice([1, 4])):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            path.write_bytes(damaged)
            text = str(path)
            try:
                checkpoint = open_checkpoint(path)
                for tensor in checkpoint.tensors:
                    checkpoint.read(tensor)
            except CheckpointError as error:
                text = str(error)
            assert text.startswith(str(path))
            assert "\n" not in text


def test_text_in_the_place_of_a_pickle(tmp_path):
    path = tmp_path / "w.bin"
    path.write_text("<html>404</html>")
    assert message(path).startswith(f"{path}: not a file that torch.save wrote, or damaged: ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"epoch": 3, "name": "x"}, "holds no tensors; is it the checkpoint's weight file?"),
        (
            {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{}]}},
            "holds no tensors of a model, only 'optimizer'; is it the checkpoint's weight file?",
        ),
        (torch.zeros(2), "holds one bare tensor without a name; save it as {name: tensor}"),
    ],
)
def test_pickle_without_a_models_tensors(tmp_path, content, expected):
    path = tmp_path / "w.pt"
    torch.save(content, path)
    assert message(path) == f"{path}: {expected}"


def test_tensor_saved_without_data(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.empty(2, device="meta")}, path)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("w")
    assert str(caught.value) == f"{path}: tensor 'w': saved without data (meta device)"


def test_dtype_that_torch_cannot_hold(tmp_path, raw_safetensors):
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw_safetensors({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"\0" * 3))
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["w"].dtype == "float6_e2m3fn"
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("w")
    assert str(caught.value) == f"{path}: tensor 'w': cannot read: Dtype not understood: F6_E2M3"
