"""Files that are no model are said to be what they are; slices are joined or refused; more suffixes open."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import esdtool
from esdtool.checkpoint import from_state_dict, open_checkpoint
from esdtool.errors import CheckpointError

Tensors = dict[str, torch.Tensor]


def _refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adadelta])
def test_an_optimizer_state_is_no_model(make: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    model = nn.Linear(16, 16)
    optimizer = make(model.parameters())
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    _refused(tmp_path / "state.pt", "an optimizer's state", "name the weight file")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "both.pt")
    assert "weight" in open_checkpoint(tmp_path / "both.pt").tensors


def test_moments_under_parameter_names_are_no_model(tmp_path: Path) -> None:
    moments = {f"layers.0.q.weight.{name}": torch.randn(32, 32) for name in ("exp_avg", "exp_avg_sq")}
    save_file(moments | {"layers.0.q.weight.step": torch.tensor(3.0)}, tmp_path / "state.safetensors")
    _refused(tmp_path / "state.safetensors", "an optimizer's state")


def test_zero3_placeholders_are_named(tmp_path: Path) -> None:
    names = [f"layers.{index}.{leaf}.weight" for index in range(2) for leaf in "qk"]
    weights: Tensors = {name: torch.empty(0) for name in names} | {"rotary.inv_freq": torch.ones(8)}
    torch.save({"module": weights}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    _refused(tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt", "placeholders (4", "ZeRO-3", "zero_to_fp32.py")
    lora = {f"base_model.model.q.lora_{side}.weight": torch.empty(0) for side in "AB"}
    save_file(lora, tmp_path / "adapter_model.safetensors")
    _refused(tmp_path / "adapter_model.safetensors", "ZeRO-3")


def test_llama_cpps_other_files_are_named(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")

    def write(name: str, tensors: Tensors) -> Path:
        writer = gguf.GGUFWriter(str(tmp_path / name), "llama")
        for tensor, value in tensors.items():
            writer.add_tensor(tensor, value.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    statistics = {
        f"blk.0.attn_q.weight.{leaf}": torch.rand(1, width) for leaf, width in (("in_sum2", 64), ("counts", 1))
    }
    _refused(write("imatrix.gguf", statistics), "importance matrix")
    _refused(write("vector.gguf", {f"direction.{layer}": torch.rand(64) for layer in range(1, 3)}), "control vector")
    (tmp_path / "model.imatrix").write_bytes(b"\x01\x00\x00\x00")
    _refused(tmp_path / "model.imatrix", "importance matrix")


def test_other_librarys_binaries_are_named(tmp_path: Path) -> None:
    name = b"TransformerDecoderSpec"
    (tmp_path / "model.bin").write_bytes(struct.pack("<IH", 6, len(name) + 1) + name + b"\0" + bytes(64))
    _refused(tmp_path / "model.bin", "CTranslate2 model (TransformerDecoderSpec)", "converted from")
    (tmp_path / "ggml.bin").write_bytes(b"lmgg" + bytes(64))
    _refused(tmp_path / "ggml.bin", "GGML", "GGUF")


@pytest.mark.parametrize("name", ["best.pth.tar", "best.pt.tar", "last.ckpt", "ckpt.pt", "weights.pt2", "LAST.PTH.TAR"])
def test_the_names_that_trainers_use_open(name: str, tmp_path: Path) -> None:
    weight = torch.randn(64, 48)
    torch.save({"state_dict": {"module.layers.0.q.weight": weight}, "epoch": 1}, tmp_path / name)
    assert open_checkpoint(tmp_path / name).read("module.layers.0.q.weight").equal(weight)
    assert open_checkpoint(tmp_path).read("module.layers.0.q.weight").equal(weight)


class _Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 24, dtype=torch.bfloat16)])
        self.layers[0].weight = nn.Parameter(torch.randn(24, 24).T)
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x).bfloat16())


def _exported(folder: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = _Exported().eval()
    torch.export.save(torch.export.export(model, (torch.randn(2, 24),)), folder / "model.pt2")
    return model, folder / "model.pt2"


@pytest.mark.filterwarnings("ignore")
def test_an_exported_programs_weights_are_read_and_its_program_is_not(tmp_path: Path) -> None:
    model, path = _exported(tmp_path)
    checkpoint = open_checkpoint(path)
    assert any("its program is not" in note for note in checkpoint.notes)
    for name, tensor in model.state_dict().items():
        assert checkpoint.read(name).equal(tensor)
        assert checkpoint.read_rows(name, 1, 2).equal(tensor[1:2])
        assert checkpoint.read(name).dtype == tensor.dtype


CONFIG = "m/data/weights/model_weights_config.json"


def _meta(**changes: object) -> dict[str, object]:
    ints = {"sizes": [4, 4], "strides": [4, 1], "storage_offset": 0} | changes
    return {
        "dtype": changes.get("dtype", 7),
        "sizes": [{"as_int": size} for size in ints["sizes"]],
        "strides": [{"as_int": stride} for stride in ints["strides"]],
        "storage_offset": {"as_int": ints["storage_offset"]},
    }


@pytest.mark.parametrize(
    "entry",
    [
        {"path_name": "w", "tensor_meta": _meta(sizes=[60000, 60000], strides=[0, 0])},
        {"path_name": "w", "tensor_meta": _meta(storage_offset=1)},
        {"path_name": "w", "tensor_meta": _meta(strides=[1])},
        {"path_name": "w", "tensor_meta": _meta(sizes=[-1, 4])},
        {"path_name": "w", "tensor_meta": _meta(dtype=99)},
        {"path_name": "../../w", "tensor_meta": _meta()},
        {"path_name": "w", "tensor_meta": "x"},
        [],
        None,
    ],
)
def test_a_damaged_archive_is_one_line(entry: object, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr(CONFIG, json.dumps({"config": {"p.weight": entry}}))
        archive.writestr("m/data/weights/w", bytes(64))
    words = (
        "refused: 14400000000 bytes" if isinstance(entry, dict) and "60000" in str(entry) else "damaged torch.export"
    )
    _refused(path, words)


def test_a_compressed_archive_is_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    weight = torch.randn(4, 4)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CONFIG, json.dumps({"config": {"p.weight": {"path_name": "w", "tensor_meta": _meta()}}}))
        archive.writestr("m/data/weights/w", weight.numpy().tobytes())
    assert open_checkpoint(path).read("p.weight").equal(weight)


WIDTH, HIDDEN, VOCABULARY, RANKS = 32, 48, 40, 4


def _llama() -> Tensors:
    torch.manual_seed(0)
    model = {"tok_embeddings.weight": torch.randn(VOCABULARY, WIDTH), "norm.weight": torch.randn(WIDTH)}
    model |= {"output.weight": torch.randn(VOCABULARY, WIDTH), "rope.freqs": torch.randn(8)}
    for layer in range(2):
        shapes = {"wq": (WIDTH, WIDTH), "wk": (16, WIDTH), "wv": (16, WIDTH), "wo": (WIDTH, WIDTH)}
        model |= {f"layers.{layer}.attention.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
        shapes = {"w1": (HIDDEN, WIDTH), "w2": (WIDTH, HIDDEN), "w3": (HIDDEN, WIDTH)}
        model |= {f"layers.{layer}.feed_forward.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
        model |= {f"layers.{layer}.{name}.weight": torch.randn(WIDTH) for name in ("attention_norm", "ffn_norm")}
    return model


def _cut(model: Tensors, folder: Path, *, vocabulary: bool) -> None:
    for rank in range(RANKS):
        part: Tensors = {}
        for name, tensor in model.items():
            leaf = name.split(".")[-2]
            axis = {"wo": 1, "w2": 1, "tok_embeddings": 0 if vocabulary else 1}.get(leaf, 0)
            part[name] = tensor if tensor.ndim == 1 else tensor.chunk(RANKS, dim=axis)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")


@pytest.mark.parametrize("vocabulary", [False, True])
def test_metas_slices_are_joined(vocabulary: bool, tmp_path: Path) -> None:
    model = _llama()
    _cut(model, tmp_path, vocabulary=vocabulary)
    for place in (tmp_path, tmp_path / "consolidated.00.pth", tmp_path / "consolidated.02.pth"):
        checkpoint = open_checkpoint(place)
        assert set(checkpoint.tensors) == set(model)
        for name, tensor in model.items():
            assert checkpoint.tensors[name].shape == tuple(tensor.shape)
            assert checkpoint.read(name).equal(tensor)
            assert checkpoint.read_rows(name, 3, 7).equal(tensor[3:7])
        assert any("joined from 4" in note for note in checkpoint.notes)
    assert len(esdtool.analyze(tmp_path, min_eigs=4, cache=False).modules) == 14


def test_a_slice_without_the_others_is_refused(tmp_path: Path) -> None:
    _cut(_llama(), tmp_path, vocabulary=False)
    (tmp_path / "consolidated.01.pth").unlink()
    _refused(tmp_path / "consolidated.02.pth", "tensor-parallel slice", "consolidated.01.pth")
    for rank in (2, 3):
        (tmp_path / f"consolidated.{rank:02d}.pth").unlink()
    _refused(tmp_path / "consolidated.00.pth", "one of 4 tensor-parallel slices")
    torch.save(_llama(), tmp_path / "consolidated.00.pth")  # the smallest models come in one file
    assert open_checkpoint(tmp_path).read("layers.0.attention.wo.weight").shape == (WIDTH, WIDTH)


def test_slices_of_different_models_are_refused(tmp_path: Path) -> None:
    _cut(_llama(), tmp_path, vocabulary=False)
    torch.save({"other.weight": torch.randn(4, 4)}, tmp_path / "consolidated.03.pth")
    _refused(tmp_path / "consolidated.00.pth", "not of one model")


@pytest.mark.parametrize(
    "pattern", ["mp_rank_{:02d}_model_states.pt", "mp_rank_{:02d}/model.pt", "tp_rank_{:02d}/w.pt"]
)
def test_other_ranks_are_refused(pattern: str, tmp_path: Path) -> None:
    for rank in range(2):
        path = tmp_path / pattern.format(rank)
        path.parent.mkdir(exist_ok=True)
        torch.save({"module": {"q.weight": torch.randn(64, 64)}}, path)
        if not rank:
            assert open_checkpoint(path).read("q.weight").shape == (64, 64)  # alone it is the whole model
    _refused(tmp_path / pattern.format(0), "one of 2 tensor-parallel slices")
    _refused(tmp_path / pattern.format(1), "one of 2 tensor-parallel slices")


def test_a_mere_empty_tensor_is_no_placeholder() -> None:
    checkpoint = from_state_dict({"a.weight": torch.empty(0), "q.weight": torch.randn(64, 64)})
    assert set(checkpoint.tensors) == {"a.weight", "q.weight"}
