"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest_plugins = ["tests.train.run_fixtures", "tests.checkpoint.remote_fixtures"]

# No network in tests. Read when the libraries are first imported.
for _name in (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
):
    os.environ[_name] = "1"

# A shell that starts the tests in the background ignores Ctrl-C, and all processes of the tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One library for all tests: which one is faster is decided again with each empty cache, and the last digits follow it.
os.environ["ESDTOOL_LAPACK"] = "torch"

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "examples" / "checkpoints" / "stdlib-llama"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's cache and latest analysis out of the tests, and each test's out of the others'."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ESDTOOL_CACHE_DIR", str(path))
    return path


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device on which a test must give the same numbers."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The checkpoint that esdtool ships: a LLaMA trained on the standard library's source."""
    return BUNDLED


LLAMA_SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 64),
    "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (172, 64),
    "mlp.up_proj": (172, 64),
    "mlp.down_proj": (64, 172),
}


def llama_tensors(layers: int = 2, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a random LLaMA, hidden size 64, under their Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(100, 64, generator=generator)}
    for layer in range(layers):
        for name, shape in LLAMA_SHAPES.items():
            # Column scales spread the spectrum, so that alphas differ.
            spread = torch.logspace(0, -0.3 * (layer + 1), shape[1])
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape, generator=generator) * spread
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(64)
    tensors["model.norm.weight"] = torch.ones(64)
    tensors["lm_head.weight"] = torch.randn(100, 64, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    """A Hugging Face directory with one safetensors file."""
    folder = tmp_path / "llama"
    folder.mkdir()
    save_file(llama_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture
def make_llama() -> Callable[..., dict[str, torch.Tensor]]:
    """`llama_tensors` for tests that need other sizes or dtypes."""
    return llama_tensors


@pytest.fixture
def esdtool_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own, as a user does."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "esdtool", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)  # type: ignore[call-overload]

    return run
