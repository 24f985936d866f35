"""LoRA adapters against PEFT: the updates, their spectra, and what merging gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import esdtool
from esdtool.checkpoint import from_state_dict, open_checkpoint
from esdtool.checkpoint.adapters import is_adapter, merged
from esdtool.errors import CheckpointError

# peft uses a name that transformers 5.23 deprecates, and looks for the base's configuration on the Hub.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*embedding layer.*:UserWarning"),
]

Tensors = dict[str, torch.Tensor]

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 40,
    "n_positions": 8,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def _llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))


def _gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))


def _t5() -> Any:
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0))


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "lora": (_llama, {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": (_llama, {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["v_proj"]}),
    "patterns": (
        _llama,
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 10},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 5, "up_proj": 3},
        },
    ),
    "dora": (_llama, {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": ["k_proj", "gate_proj"]}),
    "conv1d": (_gpt2, {"r": 8, "lora_alpha": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "mlp.c_proj"]}),
    "conv1d-dora": (_gpt2, {"r": 8, "use_dora": True, "fan_in_fan_out": True, "target_modules": ["c_fc"]}),
    "t5": (_t5, {"r": 8, "lora_alpha": 32, "target_modules": ["q", "v", "wo"]}),
    "embedding": (_llama, {"r": 8, "lora_alpha": 16, "target_modules": ["embed_tokens", "o_proj"]}),
    "whole-modules": (_llama, {"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


def _adapted(case: str, folder: Path) -> tuple[Any, Tensors]:
    """(the PEFT model with random factors, the base's weights before it); both are saved in `folder`."""
    make, options = CASES[case]
    torch.manual_seed(0)
    model = make()
    base = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=None, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_().mul_(0.3).abs_() if "magnitude" in name else parameter.normal_()
            elif "modules_to_save" in name:
                parameter.normal_()
    adapted.save_pretrained(folder / "adapter")
    return adapted, base


def _deltas(model: Any) -> Tensors:
    """PEFT's own s B A of each adapted module, in the layout of the base weight."""
    return {
        name.removeprefix("base_model.model.") + ".weight": module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_peft(case: str, tmp_path: Path) -> None:
    model, _ = _adapted(case, tmp_path)
    adapter = open_checkpoint(tmp_path / "adapter")
    assert is_adapter(adapter)
    deltas = _deltas(model)
    updates = {name: info for name, info in adapter.tensors.items() if info.rank is not None}
    assert updates.keys() == deltas.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(adapter.read(name), delta, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(adapter.read_rows(name, 3, 7), delta[3:7], rtol=1e-5, atol=1e-5)
        left, right = adapter.factors(name)
        assert left.shape[1] == right.shape[0] == updates[name].rank
        torch.testing.assert_close((left @ right).float(), delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["lora", "t5", "patterns"])
def test_the_spectrum_has_no_zeros_of_the_low_rank(case: str, tmp_path: Path) -> None:
    model, _ = _adapted(case, tmp_path)
    analysis = esdtool.analyze(tmp_path / "adapter")
    deltas = _deltas(model)
    assert {module.parameter for module in analysis.modules} == deltas.keys()
    for module in analysis.modules:
        singular = np.linalg.svd(deltas[module.parameter].double().numpy(), compute_uv=False)
        assert module.rank == module.num_eigs == len(analysis.esds[module.name])
        np.testing.assert_allclose(np.sqrt(analysis.esds[module.name]), singular[: module.rank][::-1], rtol=1e-5)
        assert module.ok
        assert module.mp_alpha is None
        assert module.num_spikes is None


def test_a_fused_target_is_split_by_its_factors(tmp_path: Path) -> None:
    model, _ = _adapted("conv1d", tmp_path)
    analysis = esdtool.analyze(tmp_path / "adapter")
    fused = _deltas(model)["transformer.h.1.attn.c_attn.weight"]
    for role, part in zip(("q_proj", "k_proj", "v_proj"), fused.chunk(3, dim=1), strict=True):
        singular = np.linalg.svd(part.double().numpy(), compute_uv=False)[:8]
        found = np.sqrt(analysis.esds[f"transformer.h.1.attn.{role}"])
        np.testing.assert_allclose(found, singular[::-1], rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_merging_gives_what_peft_merges(case: str, tmp_path: Path) -> None:
    model, base = _adapted(case, tmp_path)
    result = merged(open_checkpoint(tmp_path / "adapter"), open_checkpoint(tmp_path / "base"))
    expected = model.merge_and_unload().state_dict()
    changed = 0
    for name in result.tensors:
        weight = result.read(name)
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.read_rows(name, 1, 4), weight[1:4])
        changed += not torch.equal(weight, base[name])
    assert changed >= len([info for info in open_checkpoint(tmp_path / "adapter").tensors.values() if info.rank])


def test_base_merges_from_the_command_line(esdtool_cli, tmp_path: Path) -> None:
    model, _ = _adapted("lora", tmp_path)
    result = esdtool_cli("analyze", tmp_path / "adapter", "--base", tmp_path / "base", "--min-eigs", 8, "--json", "-")
    assert result.returncode == 0, result.stderr
    direct = esdtool.analyze(model.merge_and_unload(), min_eigs=8)
    merged_analysis = esdtool.Analysis.model_validate_json(result.stdout)
    assert merged_analysis.source.merged_with == str(tmp_path / "base")
    assert {m.name: m.alpha for m in merged_analysis.scored} == pytest.approx({m.name: m.alpha for m in direct.scored})


def test_the_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    _adapted("lora", tmp_path)
    other = from_state_dict({"encoder.query.weight": torch.zeros(32, 32)}, location="other")
    with pytest.raises(CheckpointError, match=r"changes 'model.layers.0.mlp.down_proj.weight', which other does not"):
        merged(open_checkpoint(tmp_path / "adapter"), other)
    narrow = from_state_dict({"model.layers.0.mlp.down_proj.weight": torch.zeros(8, 8)}, location="narrow")
    with pytest.raises(CheckpointError, match=r"is \[32, 48\], but in narrow that weight is \[8, 8\]"):
        merged(open_checkpoint(tmp_path / "adapter"), narrow)


def test_without_its_configuration_the_scale_is_one(tmp_path: Path) -> None:
    model, _ = _adapted("lora", tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    bare = open_checkpoint(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("scale is taken as 1" in note for note in bare.notes)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(2 * bare.read(name), _deltas(model)[name], rtol=1e-5, atol=1e-5)


def test_kohya_files_bring_their_own_alpha() -> None:
    up, down = torch.randn(16, 4), torch.randn(4, 12)
    tensors = {"unet.attn1.to_q.lora_up.weight": up, "unet.attn1.to_q.lora_down.weight": down}
    adapter = from_state_dict(tensors | {"unet.attn1.to_q.alpha": torch.tensor(2.0)})
    assert list(adapter.tensors) == ["unet.attn1.to_q.weight"]
    torch.testing.assert_close(adapter.read("unet.attn1.to_q.weight"), 0.5 * up @ down)


def test_convolutions_are_multiplied_position_by_position() -> None:
    conv = nn.Conv2d(3, 8, 3, bias=False)
    second = nn.Conv2d(8, 6, 1, bias=False)
    adapter = from_state_dict({"c.lora_A.weight": conv.weight.detach(), "c.lora_B.weight": second.weight.detach()})
    image = torch.randn(1, 3, 5, 5)
    joined = nn.functional.conv2d(image, adapter.read("c.weight"))
    torch.testing.assert_close(joined, second(conv(image)).detach(), rtol=1e-4, atol=1e-5)
    assert adapter.tensors["c.weight"].rank is None


def test_a_live_state_dict_keeps_several_adapters_apart(tmp_path: Path) -> None:
    model, _ = _adapted("lora", tmp_path)
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    adapter = from_state_dict(model.state_dict())
    assert adapter.tensors["model.layers.0.self_attn.q_proj.second.weight"].rank == 4
    assert adapter.tensors["model.layers.0.self_attn.q_proj.default.weight"].rank == 8
    assert adapter.tensors["model.layers.0.self_attn.q_proj.base_layer.weight"].rank is None


def test_factors_without_a_counterpart_are_named(tmp_path: Path) -> None:
    _adapted("lora", tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    tensors.pop(lost)
    save_file(tensors, file)
    analysis = esdtool.analyze(tmp_path / "adapter")
    reasons = {tensor.name: tensor.reason for tensor in analysis.skipped}
    kept = lost.removeprefix("base_model.model.").replace("lora_B", "lora_A")
    assert reasons[kept].startswith("LoRA factor without its counterpart")
    assert len(analysis.modules) == 3


def test_an_untrained_adapter_has_no_alpha() -> None:
    tensors = {"h.0.q.lora_A.weight": torch.randn(16, 64), "h.0.q.lora_B.weight": torch.zeros(64, 16)}
    (module,) = esdtool.analyze(tensors).modules
    assert module.status == "all elements are zero"
