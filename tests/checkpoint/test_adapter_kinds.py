"""Each kind of PEFT adapter against PEFT's own update and merge, on linear maps, Conv1D, kernels and experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from torch import nn

import esdtool
from esdtool.checkpoint import from_model, from_state_dict, open_checkpoint
from esdtool.checkpoint.adapters import is_adapter, merged
from esdtool.checkpoint.adapters.unsupported import COMPUTED, REFUSED
from esdtool.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*embedding layer.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*KaSA.*:UserWarning"),
]

WIDTH = 32


class Net(nn.Module):
    """One of each module that adapters change."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, 48, bias=False)
        self.k_proj = nn.Linear(WIDTH, 24, bias=False)
        self.up = hf.pytorch_utils.Conv1D(48, WIDTH)
        self.conv = nn.Conv2d(12, 16, 3, bias=False)
        self.pointwise = nn.Conv2d(12, 16, 1, bias=False)
        self.line = nn.Conv1d(12, 16, 5, bias=False)
        self.embed_tokens = nn.Embedding(40, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)


class Experts(nn.Module):
    """A stack of experts, [experts, out, in] or transposed."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        gate, down = torch.randn(4, 40, WIDTH), torch.randn(4, WIDTH, 20)
        self.gate_up_proj = nn.Parameter(gate.mT.contiguous() if transposed else gate)
        self.down_proj = nn.Parameter(down.mT.contiguous() if transposed else down)
        if transposed:
            self.is_transposed = True


class Mixture(nn.Module):
    """A block with experts."""

    def __init__(self, *, transposed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module() for _ in range(2)])
        for layer in self.layers:
            layer.mlp = nn.Module()
            layer.mlp.experts = Experts(transposed=transposed)
            layer.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "lora-kernels": (Net, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["conv", "pointwise", "line"])),
    "lora-rank-of-kernel": (Net, peft.LoraConfig(r=16, lora_alpha=6, target_modules=["conv"])),
    "dora-kernels": (Net, peft.LoraConfig(r=4, use_dora=True, target_modules=["conv", "line"])),
    "dora-embedding": (Net, peft.LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"])),
    "conv1d": (Net, peft.LoraConfig(r=4, use_rslora=True, target_modules=["up"], fan_in_fan_out=True)),
    "adalora": (Net, peft.AdaLoraConfig(init_r=6, lora_alpha=5, total_step=9, target_modules=["q_proj", "k_proj"])),
    "loha": (Net, peft.LoHaConfig(r=4, alpha=3, target_modules=["q_proj", "k_proj"])),
    "loha-full-rank": (Net, peft.LoHaConfig(r=8, alpha=3, target_modules=["q_proj"])),
    "loha-patterns": (
        Net,
        peft.LoHaConfig(
            r=4, alpha=3, target_modules="q_proj|k_proj", rank_pattern={"k_.*": 2}, alpha_pattern={"q_.*": 9}
        ),
    ),
    "loha-kernels": (Net, peft.LoHaConfig(r=4, target_modules=["conv"], use_effective_conv2d=True)),
    "loha-flat-kernels": (Net, peft.LoHaConfig(r=4, target_modules=["conv", "line", "pointwise"])),
    "lokr": (Net, peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "k_proj"])),
    "lokr-both": (Net, peft.LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=["q_proj"])),
    "lokr-whole": (Net, peft.LoKrConfig(r=32, alpha=8, target_modules=["q_proj"])),
    "lokr-kernels": (Net, peft.LoKrConfig(r=1, target_modules=["conv"], use_effective_conv2d=True)),
    "lokr-whole-kernels": (Net, peft.LoKrConfig(r=16, target_modules=["conv"])),
    "lokr-flat-kernels": (Net, peft.LoKrConfig(r=1, target_modules=["conv"])),
    "vera": (Net, peft.VeraConfig(r=8, target_modules=["q_proj", "k_proj"])),
    "experts": (
        Mixture,
        peft.LoraConfig(
            r=3, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        ),
    ),
    "one-parameter": (
        Mixture,
        peft.LoraConfig(r=3, target_modules=[], target_parameters=["layers.0.mlp.experts.down_proj"]),
    ),
    "kasa": (Net, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], kasa_config=peft.KasaConfig())),
    "bdlora": (
        Net,
        peft.LoraConfig(
            r=8,
            target_modules=["q_proj", "k_proj"],
            use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["k_proj"], nblocks=4),
        ),
    ),
}


def _adapted(case: str, folder: Path) -> tuple[Any, Any]:
    """(the base before anything, the PEFT model with random factors); the adapter is saved in `folder`."""
    torch.manual_seed(0)
    make, config = CASES[case]
    base = make()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_()
                if "magnitude" in name:
                    parameter.abs_()
    model.save_pretrained(folder)
    return before, model


def _deltas(model: Any) -> dict[str, torch.Tensor]:
    """PEFT's own update of each module, in the base weight's layout."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        path = name.removeprefix("base_model.model.")
        if type(module).__name__ == "ParamWrapper":
            found[f"{path.replace('.base_layer', '')}.{module.parameter_name}"] = module.get_delta_weight("default")
        elif getattr(module, "lora_variant", None) and type(module.lora_variant["default"]).__name__.startswith("Kasa"):
            found[f"{path}.weight"] = module.lora_variant["default"]._get_delta_weight(module, "default")
        elif getattr(module, "lora_variant", None) and type(module.lora_variant["default"]).__name__.startswith("Bd"):
            found[f"{path}.weight"] = module.lora_variant["default"]._get_bdlora_delta_weight(module, "default")
        elif isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            found[f"{path}.weight"] = module.get_delta_weight("default")
    return {name: delta.detach() for name, delta in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_peft(case: str, tmp_path: Path) -> None:
    _, model = _adapted(case, tmp_path)
    adapter = open_checkpoint(tmp_path)
    assert is_adapter(adapter)
    deltas = _deltas(model)
    assert adapter.updates.keys() == deltas.keys()
    for name, delta in deltas.items():
        found = adapter.read(name)
        # A kernel that is stored flat is unfolded only with its base; so are experts turned.
        expected = delta if found.shape == delta.shape else delta.reshape(delta.shape[0], -1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.read_rows(name, 1, 3), expected[1:3], rtol=1e-4, atol=1e-5)
        factors = adapter.factors(name)
        if factors is not None:
            left, right = factors
            product = torch.einsum("or,ri...->oi...", left, right) if left.ndim == 2 else left @ right
            torch.testing.assert_close(product.float(), found, rtol=1e-4, atol=1e-5)
            assert left.shape[-1] == adapter.tensors[name].rank


@pytest.mark.parametrize("case", CASES)
def test_merging_is_that_of_peft(case: str, tmp_path: Path) -> None:
    before, model = _adapted(case, tmp_path)
    result = merged(open_checkpoint(tmp_path), from_state_dict(before, location="base"))
    expected = model.merge_and_unload().state_dict()
    assert set(result.tensors) == set(expected)
    for name in result.tensors:
        torch.testing.assert_close(result.read(name), expected[name].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["adalora", "loha", "lokr", "vera", "experts", "lora-kernels", "lokr-whole"])
def test_spectra_are_those_of_the_update(case: str, tmp_path: Path) -> None:
    _, model = _adapted(case, tmp_path)
    analysis = esdtool.analyze(tmp_path, min_eigs=2, cache=False, split_fused=False)
    deltas = _deltas(model)
    assert {module.parameter for module in analysis.modules} == deltas.keys()
    for module in analysis.modules:
        delta = deltas[module.parameter].double().numpy()
        if module.expert is not None:
            delta = delta[module.expert]
        kernel = delta.reshape(*delta.shape[:2], -1)
        scale = 0.5 if delta.ndim > 2 else 1.0
        values = np.linalg.svd(kernel.transpose(2, 0, 1), compute_uv=False) ** 2 * scale
        expected = np.sort(values[:, : module.rank].ravel())
        np.testing.assert_allclose(analysis.esds[module.name], expected, rtol=1e-4, atol=1e-4 * expected[-1])


def test_pruned_ranks_are_no_eigenvalues(tmp_path: Path) -> None:
    _, model = _adapted("adalora", tmp_path)
    layer = model.base_model.model.q_proj
    with torch.no_grad():
        layer.lora_E["default"][::3] = 0
    model.save_pretrained(tmp_path)
    adapter = open_checkpoint(tmp_path)
    left, _ = adapter.factors("q_proj.weight")
    assert left.shape[1] == adapter.tensors["q_proj.weight"].rank == 6 - 2
    torch.testing.assert_close(adapter.read("q_proj.weight"), layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)


def test_experts_that_are_stored_transposed_are_turned_by_their_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Mixture(transposed=True)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    result = merged(open_checkpoint(tmp_path), from_state_dict(before))
    for name, weight in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(result.read(name), weight, rtol=1e-4, atol=1e-4)


def test_vera_of_unlike_modules_needs_its_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"q_proj": nn.Linear(24, 48, bias=False), "down_proj": nn.Linear(48, 24, bias=False)})
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.VeraConfig(r=6, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lambda" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    adapter = open_checkpoint(tmp_path)
    assert not any("proj.weight" in name for name in adapter.tensors)
    assert any("whose shape only the base tells" in note for note in adapter.notes)
    result = merged(adapter, from_state_dict(before))
    for name, weight in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(result.read(name), weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("standalone", [False, True])
def test_trained_tokens_are_rows_of_the_embedding(standalone: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Net()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = (
        peft.TrainableTokensConfig(token_indices=[3, 1, 20], target_modules=["embed_tokens"])
        if standalone
        else peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 1, 20]})
    )
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "delta" in name or "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    adapter = open_checkpoint(tmp_path)
    if not standalone:
        analysis = esdtool.analyze(tmp_path, min_eigs=2, cache=False)
        assert [module.parameter for module in analysis.modules] == ["q_proj.weight"]
        assert any("rows of a token embedding" in tensor.reason for tensor in analysis.skipped)
    result = merged(adapter, from_state_dict(before))
    expected = model.merge_and_unload().state_dict()
    torch.testing.assert_close(result.read("embed_tokens.weight"), expected["embed_tokens.weight"])


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_other_kinds_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    torch.save({"base_model.model.q_proj.some_factor": torch.randn(64, 64)}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(CheckpointError, match=f"an adapter of the kind {REFUSED[kind].name}"):
        open_checkpoint(tmp_path)


def test_every_kind_of_peft_is_computed_or_refused() -> None:
    known = {kind.value for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING}
    assert known <= COMPUTED | REFUSED.keys()


REFUSED_CONFIGS = {
    "IA3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "OFT": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "HRA": peft.HRAConfig(target_modules=["q_proj"]),
    "VBLORA": peft.VBLoRAConfig(vector_length=4, num_vectors=8, target_modules=["q_proj"]),
    "FOURIERFT": peft.FourierFTConfig(n_frequency=9, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", REFUSED_CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_without_a_configuration_the_tensors_tell_the_kind(kind: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(Net(), REFUSED_CONFIGS[kind])
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=f"an adapter of the kind {REFUSED[kind].name} "):
        open_checkpoint(tmp_path)


UNMERGED = [name for name in CASES if name not in ("kasa",)]


@pytest.mark.parametrize("case", UNMERGED)
def test_a_live_state_dict_gives_the_weights_that_act(case: str, tmp_path: Path) -> None:
    _, model = _adapted(case, tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()  # adapter_config.json stays beside the state dict
    checkpoint, live = open_checkpoint(tmp_path), from_model(model)
    assert not is_adapter(checkpoint)
    found = {name: checkpoint.read(name) for name in checkpoint.tensors}
    of_live = {name: live.read(name) for name in live.tensors}
    expected = model.merge_and_unload().state_dict()
    assert found.keys() == expected.keys() == of_live.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of_live[name], weight.detach(), rtol=1e-4, atol=1e-4)


def test_a_module_that_is_trained_whole_replaces_the_original(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["k_proj"])
    model = peft.get_peft_model(Net(), config)
    nn.init.normal_(model.base_model.model.k_proj.modules_to_save["default"].weight)
    checkpoint = from_state_dict(model.state_dict(), config={"peft_type": "LORA", "lora_alpha": 8, "r": 4})
    torch.testing.assert_close(
        checkpoint.read("k_proj.weight"), model.base_model.model.k_proj.modules_to_save["default"].weight.detach()
    )
    assert not any("original_module" in name for name in checkpoint.tensors)
