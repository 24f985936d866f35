"""What is mutated: a small sound example of each format that esdtool reads, and the commands that read it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import esdtool
from esdtool.comparison.trajectory import make_trajectory
from tests.fuzz import mutate
from tests.fuzz.mutate import Mutation

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One kind of file."""

    build: Callable[[Path], Path]
    """Write a sound example into a folder and return the file that is mutated."""
    mutation: Mutation
    commands: tuple[Sequence[str], ...]
    """Commands in the folder; `FILE` stands for the file."""


_ANALYZE = (
    ("analyze", "FILE", "--min-eigs", "4", "--jobs", "1", "--no-cache", "--json", "out/a.json", "--html", "out/a.html"),
    ("analyze", "FILE", "--dry-run"),
)
_FOLDER = tuple(tuple("." if word == "FILE" else word for word in command) for command in _ANALYZE)


def _tensors(layers: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "mlp.up_proj": (24, 16)}
    found = {"model.embed_tokens.weight": torch.randn(20, 16, generator=generator)}
    for layer in range(layers):
        for name, shape in shapes.items():
            found[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape, generator=generator)
    return found


def _safetensors(folder: Path) -> Path:
    save_file(_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def _index(folder: Path) -> Path:
    names = sorted(_tensors())
    files = {}
    for number, part in enumerate((names[:2], names[2:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: _tensors()[name] for name in part}, folder / file)
        files |= dict.fromkeys(part, file)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 4096}, "weight_map": files}))
    return path


def _config(folder: Path) -> Path:
    _safetensors(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "vocab_size": 20,
        "torch_dtype": "float32",
        "text_config": {"model_type": "llama", "hidden_size": 16},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def _quantized(folder: Path) -> Path:
    name = "model.layers.0.mlp.up_proj"
    packed = {
        f"{name}.qweight": torch.randint(0, 2**31 - 1, (4, 32), dtype=torch.int32),
        f"{name}.qzeros": torch.randint(0, 2**31 - 1, (1, 4), dtype=torch.int32),
        f"{name}.scales": torch.rand(1, 32, dtype=torch.float16),
        f"{name}.g_idx": torch.zeros(32, dtype=torch.int32),
    }
    save_file(packed, folder / "model.safetensors")
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "version": 1}
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 32, "quantization_config": settings}))
    return path


def _quantized_tensors(folder: Path) -> Path:
    return _quantized(folder).with_name("model.safetensors")


def _adapter_tensors(folder: Path) -> Path:
    prefix = "base_model.model.model.layers.0"
    tensors = {
        f"{prefix}.{module}.lora_{letter}.weight": torch.randn(*shape)
        for module, rows in (("self_attn.q_proj", 16), ("mlp.up_proj", 24))
        for letter, shape in (("A", (8, 16)), ("B", (rows, 8)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "none",
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {".*up_proj": 32},
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_model.safetensors"


def _adapter_config(folder: Path) -> Path:
    return _adapter_tensors(folder).with_name("adapter_config.json")


def _pickle(folder: Path) -> Path:
    torch.save({"state_dict": _tensors(), "step": 3, "args": {"lr": 0.1}}, folder / "model.pt")
    return folder / "model.pt"


def _old_pickle(folder: Path) -> Path:
    torch.save(_tensors(), folder / "model.pt", _use_new_zipfile_serialization=False)
    return folder / "model.pt"


def _dcp(folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": _tensors(), "step": 1}, storage_writer=dcp.FileSystemWriter(folder / "dcp"), no_dist=True)
    return folder / "dcp" / ".metadata"


def _gguf(folder: Path) -> Path:
    from tests.checkpoint.gguf_files import normal, writer_to

    tensors = {"blk.0.attn_q.weight": normal(32, 32), "blk.0.ffn_up.weight": normal(64, 32)}
    sizes = {"attention.head_count": 4, "embedding_length": 32, "block_count": 1, "rope.sections": [1, 2, 3]}
    return writer_to(folder)(tensors, sizes=sizes)


def _onnx(folder: Path) -> Path:
    from onnx import helper

    from tests.checkpoint.onnx_files import normal, saved

    nodes = [
        helper.make_node("MatMul", ["x", "/layers.0/up_proj/MatMul_w"], ["h"], name="/layers.0/up_proj/MatMul"),
        helper.make_node("Gemm", ["h", "down.weight", "down.bias"], ["y"], name="/down/Gemm", transB=1),
    ]
    return saved(
        folder,
        nodes,
        {"/layers.0/up_proj/MatMul_w": normal(16, 24), "down.weight": normal(16, 24), "down.bias": normal(16)},
    )


def _h5(folder: Path) -> Path:
    import h5py

    with h5py.File(folder / "model.weights.h5", "w") as file:
        for layer in ("dense", "dense_1"):
            file.create_dataset(f"layers/{layer}/vars/0", data=np.random.default_rng(0).standard_normal((16, 24)))
            file.create_dataset(f"layers/{layer}/vars/1", data=np.zeros(24))
    return folder / "model.weights.h5"


def _keras(folder: Path) -> Path:
    import zipfile

    config = {
        "class_name": "Sequential",
        "module": "keras",
        "config": {
            "name": "s",
            "layers": [{"class_name": "Dense", "config": {"name": name}} for name in ("dense", "dense_1")],
        },
    }
    weights = _h5(folder)
    with zipfile.ZipFile(folder / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.8.0"}))
        archive.write(weights, "model.weights.h5")
    weights.unlink()
    return folder / "model.keras"


def _analysis(folder: Path) -> Path:
    analysis = esdtool.analyze(_tensors(2), min_eigs=4, fit=["hill", "ks", "powerlaw"])
    (folder / "analysis.json").write_text(analysis.to_json())
    (folder / "other.json").write_text(analysis.to_json())
    return folder / "analysis.json"


def _assignment(folder: Path) -> Path:
    _safetensors(folder)
    analysis = esdtool.analyze(folder / "model.safetensors", min_eigs=4, cache=False)
    esdtool.assign(analysis).save(folder / "wd.json")
    return folder / "wd.json"


def _trajectory(folder: Path) -> Path:
    analyses = [esdtool.analyze(_tensors(2), min_eigs=4) for _ in range(2)]
    found = make_trajectory(
        [
            analysis.model_copy(update={"source": analysis.source.model_copy(update={"checkpoint": f"step-{step}"})})
            for step, analysis in enumerate(analyses)
        ]
    )
    (folder / "trajectory.json").write_text(found.to_json())
    return folder / "trajectory.json"


def _train(folder: Path) -> Path:
    path = folder / "run.toml"
    path.write_text((ROOT / "examples" / "configs" / "quickstart.toml").read_text())
    return path


def _sweep(folder: Path) -> Path:
    (folder / "run.toml").write_text((ROOT / "examples" / "configs" / "quickstart.toml").read_text())
    path = folder / "sweep.toml"
    path.write_text(
        '[sweep]\nconfig = "run.toml"\ndir = "out/sweep"\nseeds = [0, 1]\njobs = 1\n\n[[grid]]\n'
        'name = "a"\nweight_decay.policy = ["alphadecay", "uniform"]\nweight_decay.base = 0.1\n'
    )
    return path


FORMATS: dict[str, Format] = {
    "safetensors": Format(build=_safetensors, mutation=mutate.safetensors, commands=_ANALYZE),
    "index": Format(build=_index, mutation=mutate.json_text, commands=_FOLDER),
    "config": Format(build=_config, mutation=mutate.json_text, commands=_FOLDER),
    "quantized-config": Format(build=_quantized, mutation=mutate.json_text, commands=_FOLDER),
    "quantized": Format(build=_quantized_tensors, mutation=mutate.safetensors, commands=_FOLDER),
    "adapter-config": Format(build=_adapter_config, mutation=mutate.json_text, commands=_FOLDER),
    "adapter": Format(build=_adapter_tensors, mutation=mutate.safetensors, commands=_FOLDER),
    "pickle": Format(
        build=_pickle,
        mutation=mutate.archive(mutate.pickled, r"data\.pkl$"),
        commands=_ANALYZE,
    ),
    "old-pickle": Format(build=_old_pickle, mutation=mutate.pickled, commands=_ANALYZE),
    "dcp": Format(
        build=_dcp,
        mutation=mutate.pickled,
        commands=tuple(tuple("dcp" if word == "FILE" else word for word in command) for command in _ANALYZE),
    ),
    "gguf": Format(build=_gguf, mutation=mutate.raw, commands=_ANALYZE),
    "onnx": Format(build=_onnx, mutation=mutate.raw, commands=_ANALYZE),
    "h5": Format(build=_h5, mutation=mutate.raw, commands=_ANALYZE),
    "keras": Format(
        build=_keras,
        mutation=mutate.archive(mutate.any_of(mutate.json_text, mutate.json_text, rounds=1), r"\.json$"),
        commands=_ANALYZE,
    ),
    "analysis": Format(
        build=_analysis,
        mutation=mutate.json_text,
        commands=(
            ("assign", "FILE", "--out", "out/wd.json"),
            ("compare", "FILE", "other.json", "--json", "out/c.json", "--html", "out/c.html"),
            ("plot", "FILE", "--out", "out/figures", "--dpi", "30", "--kind", "heat-map"),
        ),
    ),
    "assignment": Format(
        build=_assignment,
        mutation=mutate.json_text,
        commands=(
            ("assign", "--check", "FILE", "--model", "model.safetensors"),
            ("plot", "FILE", "--out", "out/figures", "--dpi", "30"),
        ),
    ),
    "trajectory": Format(
        build=_trajectory,
        mutation=mutate.json_text,
        commands=(("plot", "FILE", "--out", "out/figures", "--dpi", "30"),),
    ),
    "train": Format(
        build=_train,
        mutation=mutate.toml_text,
        commands=(("train", "FILE", "--print-config"),),
    ),
    "sweep": Format(
        build=_sweep,
        mutation=mutate.toml_text,
        commands=(("sweep", "FILE", "--dry-run"),),
    ),
}
