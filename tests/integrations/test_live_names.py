"""Live names where a trainer has wrapped the model, or the file is of another age or has another head.

The oracle is `from_pretrained`: what it has loaded where, value by value, and what it says that it did not find.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

import esdtool
from esdtool.assignment.document import Assignment, Entry
from esdtool.errors import AssignmentError, UsageError
from esdtool.optim.live_names import live_names, meta_model, with_live_names

Tensors = dict[str, torch.Tensor]

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
BERT = SIZES | {"intermediate_size": 32, "max_position_embeddings": 12}
VISION = {key: SIZES[key] for key in SIZES if key != "vocab_size"} | {
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}
MIXTRAL = LLAMA | TOKENS | {"num_local_experts": 4}

CONFIGS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: hf.LlamaConfig(**LLAMA, **TOKENS),
    "Mixtral": lambda: hf.MixtralConfig(**MIXTRAL),
    "GPT2": lambda: hf.GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=4, **TOKENS),
    "GPTNeoX": lambda: hf.GPTNeoXConfig(**BERT, **TOKENS),
    "OPT": lambda: hf.OPTConfig(**BERT, ffn_dim=32, word_embed_proj_dim=16),
    "Bert": lambda: hf.BertConfig(**BERT),
    "NomicBert": lambda: hf.NomicBertConfig(**BERT),
    "ViT": lambda: hf.ViTConfig(**VISION),
    "Dinov2": lambda: hf.Dinov2Config(**VISION, use_swiglu_ffn=True),
    "T5": lambda: hf.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "Llava": lambda: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**LLAMA, **TOKENS), vision_config=hf.CLIPVisionConfig(**VISION), image_token_index=3
    ),
    "Gemma3": lambda: hf.Gemma3Config(
        text_config=LLAMA | TOKENS, vision_config=VISION, mm_tokens_per_image=4, image_token_index=3
    ),
    "Qwen2VL": lambda: hf.Qwen2VLConfig(
        text_config=LLAMA
        | TOKENS
        | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0], "rope_type": "default"}},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
    ),
}
EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


def build(name: str) -> Any:
    """A model by the name of its class, with weights that are all different."""
    family = max((family for family in CONFIGS if name.startswith(family)), key=len)
    torch.manual_seed(0)
    model = getattr(hf, name)(CONFIGS[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def saved(model: Any, folder: Path) -> Tensors:
    """The tensors of the file that transformers writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rewritten(tensors: Tensors, folder: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def square(tensors: list[torch.Tensor]) -> float:
    return math.fsum(float(tensor.double().square().sum()) for tensor in tensors)


def assert_as_loaded(kind: Any, folder: Path) -> dict[str, tuple[str, ...]]:
    """`live_names` says of each tensor of the file what `from_pretrained` does with it."""
    file = load_file(folder / "model.safetensors")
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    targets = live_names(loaded, list(file))
    sources: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, found in targets.items():
        sources[found].append(name)
    for found, names in sources.items():
        values = [parameters[name].detach() for name in found]
        if len(names) == len(values) == 1:
            assert torch.equal(values[0], file[names[0]])
        else:
            assert square(values) == pytest.approx(square([file[name] for name in names]), rel=1e-12)
    # Some classes have transformers pass over names that they know not to need (T5's encoder: the decoder).
    unneeded = kind._keys_to_ignore_on_load_unexpected or ()
    lost = [name for name in file if name not in targets and not any(re.search(each, name) for each in unneeded)]
    assert len(lost) == len(info["unexpected_keys"])
    reached = {id(parameters[name]) for found in sources for name in found}
    untouched = {name for name, parameter in parameters.items() if id(parameter) not in reached}
    assert untouched == set(info["missing_keys"]) & parameters.keys()
    return targets


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("LlamaForCausalLM", "LlamaModel"),
        ("LlamaModel", "LlamaForCausalLM"),
        ("MixtralForCausalLM", "MixtralModel"),
        ("MixtralModel", "MixtralForCausalLM"),
        ("GPT2LMHeadModel", "GPT2Model"),
        ("GPT2Model", "GPT2LMHeadModel"),
        ("OPTForCausalLM", "OPTModel"),
        ("OPTModel", "OPTForCausalLM"),
        ("BertModel", "BertForSequenceClassification"),
        ("BertForMaskedLM", "BertModel"),
        ("NomicBertModel", "NomicBertForMaskedLM"),
        ("NomicBertForMaskedLM", "NomicBertModel"),
        ("ViTForImageClassification", "ViTModel"),
        ("T5ForConditionalGeneration", "T5EncoderModel"),
        ("LlavaForConditionalGeneration", "LlavaModel"),
        ("LlavaModel", "LlavaForConditionalGeneration"),
        ("Gemma3ForConditionalGeneration", "Gemma3ForConditionalGeneration"),
        ("Gemma3Model", "Gemma3ForConditionalGeneration"),
        ("Dinov2Model", "Dinov2Model"),
        ("Qwen2VLForConditionalGeneration", "Qwen2VLModel"),
    ],
)
def test_heads_and_bases(written: str, read: str, tmp_path: Path) -> None:
    saved(build(written), tmp_path)
    assert assert_as_loaded(getattr(hf, read), tmp_path)


@pytest.mark.parametrize(
    "replacements",
    [
        {"model.visual.": "visual.", "model.language_model.": "model."},
        {},  # the live names themselves
    ],
)
def test_qwen2_vl_of_any_age(replacements: dict[str, str], tmp_path: Path) -> None:
    model = build("Qwen2VLForConditionalGeneration")
    saved(model, tmp_path)
    file = {}
    for name, parameter in model.named_parameters():
        for new, old in replacements.items():
            name = name.replace(new, old)
        file[name] = parameter.detach()
    rewritten(file, tmp_path)
    assert assert_as_loaded(type(model), tmp_path).keys() == file.keys()


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
def test_head_of_gpt_neox_by_both_names(head: str, tmp_path: Path) -> None:
    model = build("GPTNeoXForCausalLM")
    file = saved(model, tmp_path)
    written = next(name for name in file if name in ("embed_out.weight", "lm_head.weight"))
    rewritten({head if name == written else name: tensor for name, tensor in file.items()}, tmp_path)
    assert assert_as_loaded(type(model), tmp_path)[head] == ("lm_head.weight",)


def test_a_tensor_that_the_loader_splits_gives_each_part_its_value(tmp_path: Path) -> None:
    model = build("NomicBertModel")
    saved(model, tmp_path)
    assignment = esdtool.assign(esdtool.analyze(tmp_path, min_eigs=2))
    live = with_live_names(assignment, model)
    fused = assignment.parameters["encoder.layers.0.attn.Wqkv.weight"]
    parts = [live.parameters[f"layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert [part.weight_decay for part in parts] == [fused.weight_decay] * 3
    assert [part.shape for part in parts] == [(16, 16)] * 3
    assert list(live.parameters) == [name for name, _ in model.named_parameters() if name in live.parameters]


class Wrapper(nn.Module):
    """As DataParallel and its kin hold a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def inner_compiled(model: Any) -> Any:
    model.model = compiled(model.model)
    return model


def checkpointed(model: Any) -> Any:
    for position, layer in enumerate(model.model.layers):
        model.model.layers[position] = checkpoint_wrapper(layer)
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        compiled,
        lambda model: Wrapper(compiled(model)),
        lambda model: compiled(Wrapper(model)),
        inner_compiled,
        checkpointed,
    ],
    ids=["module", "compiled", "module(compiled)", "compiled(module)", "compiled inside", "checkpointed inside"],
)
def test_wrappers_do_not_hide_the_model(wrap: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    model = build("MixtralForCausalLM")
    file = list(saved(model, tmp_path))
    bases = [name.removeprefix("model.") for name in file]
    expected, expected_of_bases = live_names(model, file), live_names(model, bases)
    assert len(expected) == len(expected_of_bases) == len(file)
    assignment = esdtool.assign(esdtool.analyze(tmp_path, min_eigs=2))
    wrapped = wrap(model)
    assert live_names(wrapped, file) == expected
    assert live_names(wrapped, bases) == expected_of_bases
    groups = esdtool.param_groups(wrapped, assignment, merge=False)
    assert sum("weight_decay" in group for group in groups) == len(with_live_names(assignment, wrapped).parameters)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "name", ["MixtralForCausalLM", "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "Dinov2Model"]
)
def test_fsdp2_does_not_hide_the_model(name: str, tmp_path: Path) -> None:
    """It gives classes new names, and by those of classes transformers finds its maps."""
    model = build(name)
    file = list(saved(model, tmp_path))
    expected = live_names(model, file)
    assert len(expected) == len(file)
    for child in model.children():
        fully_shard(child)
    fully_shard(model)
    assert live_names(model, file) == expected


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [("w3", ["w1"]), (r"experts\.0", ["w1", "w3"]), (r"w3|experts\.[1-3]", ["w1"])],
    ids=["a part", "an expert", "all but one"],
)
def test_what_is_left_out_of_a_fused_parameter_is_not_in_its_mean(
    pattern: str, kept: list[str], tmp_path: Path
) -> None:
    model = build("MixtralForCausalLM")
    saved(model, tmp_path)
    assignment = esdtool.assign(esdtool.analyze(tmp_path, min_eigs=2), exclude=[pattern])
    parts = [
        entry.weight_decay
        for name, entry in assignment.parameters.items()
        if name.startswith("model.layers.0.block_sparse_moe.experts") and name.split(".")[-2] in kept
    ]
    live = with_live_names(assignment, model)
    assert live.parameters[FUSED].weight_decay == pytest.approx(math.fsum(parts) / len(parts))
    assert live.parameters[FUSED].shape == (4, 48, 16)
    assert FUSED not in live.left_out
    assert esdtool.param_groups(model, assignment)


def test_experts_that_the_assignment_has_never_seen_are_missed(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM")
    entry = Entry(weight_decay=0.1, ratio=1.0, shape=(24, 16))
    names = [EXPERT.replace("experts.0", f"experts.{expert}") for expert in range(4)]
    assignment = Assignment(base_weight_decay=0.1, parameters=dict.fromkeys(names, entry))
    with pytest.raises(AssignmentError, match="3072 weights in the model, its 4 entries 1536"):
        with_live_names(assignment, model)
    one_left_out = assignment.model_copy(update={"left_out": {EXPERT.replace("w1", "w3"): "excluded"}})
    assert with_live_names(one_left_out, model).parameters[FUSED].weight_decay == 0.1


def test_entries_keep_their_values_and_find_the_order_of_the_model(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    names = [name for name, parameter in model.named_parameters() if ".layers." in name and parameter.ndim == 2]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    entries = {
        name.removeprefix("model."): Entry(weight_decay=0.01 * position, ratio=0.1, layer=0, shape=shapes[name])
        for position, name in reversed(list(enumerate(names)))
    }
    live = with_live_names(Assignment(base_weight_decay=0.1, parameters=entries), model)
    assert list(live.parameters) == names
    for name in names:
        assert live.parameters[name] == entries[name.removeprefix("model.")]
        assert live.members[name].aggregate == "renamed"
        assert live.members[name].members == (name.removeprefix("model."),)


@pytest.mark.parametrize("name", ["pipeline", "LlamaConfig", "LlamaTokenizer", "logging", "NoSuchForCausalLM", 7])
def test_a_configuration_may_name_nothing_but_a_model(name: object, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(hf, "pipeline", lambda *given: called.append(given))
    with pytest.raises(UsageError, match=rf"x: transformers .* has no model {name!r}, which config.json names"):
        meta_model({"model_type": "llama", "architectures": [name], **LLAMA}, location="x")
    assert not called


def test_the_checkpoint_s_own_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text("raise SystemExit('the code was run')\n")
    config = {
        "model_type": "llama",
        "architectures": ["CustomForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling.CustomForCausalLM"},
    }
    with pytest.raises(UsageError, match="it needs the checkpoint's own code"):
        meta_model(config | LLAMA, location=str(tmp_path))


@pytest.mark.parametrize("named", [["LlamaForCausalLM"], "LlamaForCausalLM"])
def test_the_class_that_the_configuration_names(named: object) -> None:
    model = meta_model(json.loads(json.dumps({"model_type": "llama", "architectures": named, **LLAMA})), location="x")
    assert type(model) is hf.LlamaForCausalLM
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("named", [None, []])
def test_without_a_class_it_is_the_base_model(named: object) -> None:
    model = meta_model({"model_type": "llama", "architectures": named, **LLAMA}, location="x")
    assert type(model) is hf.LlamaModel
