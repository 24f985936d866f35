"""Names in the file against names in the live model: what transformers itself loads where, shown by the values."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import esdtool
from esdtool.assignment.document import Assignment, Entry
from esdtool.assignment.reading import load_assignment
from esdtool.errors import AssignmentError, UsageError
from esdtool.optim.live_names import live_names, meta_model, with_live_names

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
}
GPT2 = {"vocab_size": 40, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 0}
MOE = LLAMA | {"moe_intermediate_size": 12, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = LLAMA | {
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
WHISPER = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 10,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
}


def _clip() -> Any:
    text = BERT | {"projection_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    return hf.CLIPConfig(text_config=text, vision_config=VISION | {"projection_dim": 8}, projection_dim=8)


def _llava() -> Any:
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**LLAMA), vision_config=hf.CLIPVisionConfig(**VISION), image_token_index=3
    )


def _qwen2_vl() -> Any:
    text = LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0], "rope_type": "default"}}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    return hf.Qwen2VLConfig(text_config=text, vision_config=vision)


MODELS: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**LLAMA)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**LLAMA)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**LLAMA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, eos_token_id=0)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**BERT)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=4)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    ),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=40, d_model=16, n_layers=2, n_heads=4, max_seq_len=12)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**BERT, ffn_dim=32, word_embed_proj_dim=16)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**BERT)),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**BERT, pad_token_id=0, bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
    "clip": lambda: hf.CLIPModel(_clip()),
    "llava": lambda: hf.LlavaForConditionalGeneration(_llava()),
    "qwen2_vl": lambda: hf.Qwen2VLForConditionalGeneration(_qwen2_vl()),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**MOE)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=12)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**MOE)),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**{k: v for k, v in MOE.items() if k != "head_dim"})),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**DEEPSEEK)),
    "granitemoe": lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**MOE)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**MOE)),
    "jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(**{k: v for k, v in MOE.items() if k != "head_dim"}, attn_layer_period=2, attn_layer_offset=1)
    ),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(**MOE, intermediate_size_mlp=24, interleave_moe_layer_step=1)
    ),
    "dbrx": lambda: hf.DbrxForCausalLM(
        hf.DbrxConfig(
            vocab_size=40,
            d_model=16,
            n_layers=2,
            n_heads=4,
            attn_config={"kv_n_heads": 2, "clip_qkv": None, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 24, "hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        )
    ),
    "mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1
        )
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1])
    ),
    "resnet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
}


def _build(family: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def _file(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _norm(tensors: list[torch.Tensor]) -> float:
    return math.fsum(float(tensor.double().square().sum()) for tensor in tensors)


@pytest.mark.parametrize("family", MODELS)
def test_every_weight_of_the_file_is_found_where_its_values_are(family: str, tmp_path: Path) -> None:
    model = _build(family)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    file = _file(tmp_path)
    buffers = dict(loaded.named_buffers())
    weights = {name: tensor for name, tensor in file.items() if name not in buffers}
    targets = live_names(
        meta_model(json.loads((tmp_path / "config.json").read_text()), location=str(tmp_path)), [*weights]
    )
    assert targets.keys() == weights.keys()
    sources: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, found in targets.items():
        sources[found].append(name)
    for found, names in sources.items():
        live = _norm([parameters[name].detach() for name in found])
        assert live == pytest.approx(_norm([weights[name] for name in names]), rel=1e-6)
    assert {name for found in sources for name in found} >= set(dict(loaded.named_parameters()))


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gpt_neox", "bert", "t5", "mixtral", "qwen3_moe", "deepseek_v3", "phi3"]
)
def test_a_file_s_assignment_fits_the_model_that_trains(family: str, tmp_path: Path) -> None:
    model = _build(family)
    model.save_pretrained(tmp_path)
    assignment = esdtool.assign(esdtool.analyze(tmp_path, min_eigs=2))
    loaded = type(model).from_pretrained(tmp_path)
    groups = esdtool.param_groups(loaded, assignment, merge=False)
    live = {id(parameter): name for name, parameter in loaded.named_parameters()}
    decays = {live[id(group["params"][0])]: group["weight_decay"] for group in groups if "weight_decay" in group}
    renamed = with_live_names(assignment, loaded)
    assert decays == pytest.approx(renamed.decays)
    # A live analysis of the same weights sees the same modules, and gives the same decays.
    direct = esdtool.assign(esdtool.analyze(loaded, min_eigs=2))
    assert direct.decays == pytest.approx(renamed.decays, rel=1e-4)


def test_experts_of_files_become_one_entry_that_names_them(tmp_path: Path) -> None:
    model = _build("mixtral")
    model.save_pretrained(tmp_path)
    assignment = esdtool.assign(esdtool.analyze(tmp_path, min_eigs=2))
    live = with_live_names(assignment, model)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    entry, members = live.parameters[name], live.members[name]
    assert (entry.shape, entry.role) == ((4, 48, 16), "gate_proj+up_proj")
    assert members.aggregate == "parameter-weighted mean"
    assert len(members.members) == 8
    experts = [assignment.parameters[f"{member}.weight"] for member in members.members]
    assert entry.weight_decay == pytest.approx(sum(expert.weight_decay for expert in experts) / 8)
    assert (
        live.parameters["model.layers.0.self_attn.q_proj.weight"]
        == assignment.parameters["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize(("saved", "trained"), [("BertForMaskedLM", "BertModel"), ("BertModel", "BertForMaskedLM")])
def test_base_models_and_models_with_heads(saved: str, trained: str, tmp_path: Path) -> None:
    config = hf.BertConfig(**BERT)
    model = getattr(hf, saved)(config)
    model.save_pretrained(tmp_path)
    assignment = esdtool.assign(esdtool.analyze(tmp_path, min_eigs=2))
    groups = esdtool.param_groups(getattr(hf, trained)(config), assignment, merge=False)
    assert sum("weight_decay" in group for group in groups) == len(assignment.parameters) == 12


def test_historical_names_of_a_multimodal_file(tmp_path: Path) -> None:
    model = _build("llava")
    model.save_pretrained(tmp_path)
    file = {}
    for name, tensor in _file(tmp_path).items():
        old = name.replace("model.language_model.", "language_model.model.").replace(
            "model.vision_tower.", "vision_tower."
        )
        file[old.replace("model.multi_modal_projector.", "multi_modal_projector.")] = tensor
    save_file(file, tmp_path / "model.safetensors", metadata={"format": "pt"})
    names = [name for name in file if name.startswith("language_model.model.layers.")]
    assert names
    targets = live_names(model, names)
    assert {name: (name.replace("language_model.model", "model.language_model"),) for name in names} == targets


def test_live_names_from_the_command_line(esdtool_cli, tmp_path: Path) -> None:
    model = _build("qwen3_moe")
    model.save_pretrained(tmp_path / "moe")
    wd = tmp_path / "wd.json"
    result = esdtool_cli("analyze", tmp_path / "moe", "--min-eigs", 2, "--json", tmp_path / "a.json", "-q")
    assert result.returncode == 0, result.stderr
    result = esdtool_cli("assign", tmp_path / "a.json", "--names", "live", "--out", wd, "-q")
    assert result.returncode == 0, result.stderr
    decays = load_assignment(wd).decays
    # Five lines and a JSON parser are enough for a trainer now.
    assert decays.keys() <= dict(model.named_parameters()).keys()
    assert "model.layers.0.mlp.experts.down_proj" in decays
    assert esdtool_cli("assign", "--check", wd, "--model", tmp_path / "moe", "-q").returncode == 0


def test_live_names_need_a_configuration(esdtool_cli, bundled: Path, tmp_path: Path) -> None:
    result = esdtool_cli(
        "assign", bundled / "model.safetensors", "--names", "live", "--out", tmp_path / "wd.json", "-q"
    )
    assert result.returncode == 0  # config.json lies beside the file
    (tmp_path / "weights.safetensors").write_bytes((bundled / "model.safetensors").read_bytes())
    result = esdtool_cli("assign", tmp_path / "weights.safetensors", "--names", "live", "--out", tmp_path / "wd.json")
    assert result.returncode == 2
    assert "no config.json with a model_type" in result.stderr


@pytest.mark.parametrize("config", [{"model_type": "no_such_model"}, {"model_type": "llama", "hidden_size": "wide"}])
def test_what_transformers_cannot_build_is_one_line(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"x: transformers .* cannot build its model_type") as caught:
        meta_model(config, location="x")
    assert "\n" not in str(caught.value)


def test_the_assignment_of_another_model_is_refused() -> None:
    model = _build("mixtral")
    prefix = "model.layers.0.block_sparse_moe.experts"
    entry = Entry(weight_decay=0.1, ratio=1.0, shape=(24, 16))
    parameters = {f"{prefix}.{expert}.{leaf}.weight": entry for expert in range(3) for leaf in ("w1", "w3")}
    with pytest.raises(AssignmentError, match=r"gate_up_proj has 3072 weights in the model, its 6 entries 2304"):
        esdtool.param_groups(model, Assignment(base_weight_decay=0.1, parameters=parameters))
    unknown = Assignment(base_weight_decay=0.1, parameters={"encoder.q.weight": entry})
    with pytest.raises(AssignmentError, match=r"encoder\.q\.weight is not a parameter of the model"):
        esdtool.param_groups(model, unknown)
    with pytest.raises(AssignmentError, match=r"encoder\.q\.weight has no counterpart in MixtralForCausalLM"):
        with_live_names(unknown, model)


def test_other_models_have_the_names_that_they_have() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert live_names(model, ["0.weight", "module.1.weight", "2.weight"]) == {
        "0.weight": ("0.weight",),
        "module.1.weight": ("1.weight",),
    }
