"""Analyses of checkpoints that stay where they are: the numbers of local ones, for the bytes of what is analysed."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import esdtool
from esdtool.checkpoint import open_checkpoint
from esdtool.checkpoint.remote.traffic import FETCHED
from esdtool.cli import app
from esdtool.errors import CheckpointError, UsageError
from esdtool.modules.sampling import evenly
from tests.checkpoint.remote_server import REPO, Fault
from tests.conftest import llama_tensors

LAYERS = 32
CHOSEN = r"layers\.(0|15|31)\."


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 32 layers in four shards."""
    folder = tmp_path_factory.mktemp("llama")
    tensors = llama_tensors(LAYERS)
    names = sorted(tensors)
    weight_map = {}
    for number in range(4):
        shard = f"model-{number + 1:05d}-of-00004.safetensors"
        part = names[number::4]
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 4, "hidden_size": 64}')
    return folder


@pytest.fixture
def on_hub(fake_hub: Any, sharded: Path) -> Any:
    """The same on a Hub that counts what it sends."""
    fake_hub.folder = sharded
    return fake_hub


def header_bytes(folder: Path) -> int:
    """Bytes of all headers, of the index and of the configuration."""
    total = sum(path.stat().st_size for path in folder.glob("*.json"))
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += 8 + int.from_bytes(file.read(8), "little")
    return total


def tensor_bytes(folder: Path, names: set[str]) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys() if name in names)  # noqa: SIM118
    return total


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(path: Path, location: object) -> str:
    """Return a JSON file's text without what it says of the source; findings name the checkpoint in their commands."""
    revision = json.loads(path.read_text())["source"]["revision"]
    return path.read_text().replace(str(location), "LOCATION").replace(json.dumps(revision), "REVISION")


def test_three_of_many_layers_for_the_bytes_of_three(on_hub, sharded, tmp_path):
    done = command("analyze", REPO, "--include", CHOSEN, "--json", tmp_path / "remote.json", "--no-cache")
    assert done.exit_code == 0, done.output
    assert "fetched" in done.stderr
    names = {module["parameter"] for module in json.loads((tmp_path / "remote.json").read_text())["modules"]}
    assert len(names) == 3 * 7
    needed = tensor_bytes(sharded, names) + header_bytes(sharded)
    assert needed <= on_hub.sent < 1.02 * needed
    command("analyze", sharded, "--include", CHOSEN, "--json", tmp_path / "local.json", "--no-cache")
    assert document(tmp_path / "remote.json", REPO).replace("REVISION", "null") == document(
        tmp_path / "local.json", sharded
    ).replace("REVISION", "null")


def test_dry_run_reads_headers_and_says_how_much_would_be_fetched(on_hub, sharded):
    done = command("analyze", REPO, "--include", CHOSEN, "--dry-run")
    assert on_hub.sent < 1.02 * header_bytes(sharded)
    names = {name for name in open_checkpoint(sharded).tensors if any(f"layers.{n}." in name for n in (0, 15, 31))} - {
        f"model.layers.{n}.input_layernorm.weight" for n in (0, 15, 31)
    }
    assert f"To fetch: {tensor_bytes(sharded, names):,} bytes" in done.stdout
    assert "To fetch" not in command("analyze", sharded, "--dry-run").stdout


def test_second_analysis_fetches_no_weights(on_hub, sharded):
    first = esdtool.analyze(REPO, include=[CHOSEN], download=False)
    on_hub.sent = 0
    again = esdtool.analyze(REPO, include=[CHOSEN], download=False)
    assert on_hub.sent < 1.02 * header_bytes(sharded)
    assert again.to_json() == first.to_json()
    for name, eigenvalues in first.esds.items():
        assert (again.esds[name] == eigenvalues).all()
    # Another estimator stands on the same spectra.
    on_hub.sent = 0
    other = esdtool.analyze(REPO, include=[CHOSEN], fit=["ks", "farms"], farms_rows=32, download=False)
    local = esdtool.analyze(sharded, include=[CHOSEN], fit=["ks", "farms"], farms_rows=32, cache=False)
    assert other.modules == local.modules
    on_hub.sent = 0
    esdtool.analyze(REPO, include=[CHOSEN], fit=["ks", "farms"], farms_rows=32, download=False)
    assert on_hub.sent < 1.02 * header_bytes(sharded)


def test_vectors_of_known_spectra_fetch_the_weights_once(on_hub, sharded):
    esdtool.analyze(REPO, include=[CHOSEN], download=False)
    on_hub.sent = 0
    first = esdtool.analyze(REPO, include=[CHOSEN], download=False, vectors=True)
    needed = tensor_bytes(sharded, {module.parameter for module in first.modules}) + header_bytes(sharded)
    assert on_hub.sent < 1.02 * needed
    assert first.modules == esdtool.analyze(sharded, include=[CHOSEN], vectors=True, cache=False).modules
    on_hub.sent = 0
    assert esdtool.analyze(REPO, include=[CHOSEN], download=False, vectors=True).modules == first.modules
    assert on_hub.sent < 1.02 * header_bytes(sharded)


def test_heads_that_are_known_are_not_fetched_again(on_hub, sharded):
    first = esdtool.analyze(REPO, include=[CHOSEN], download=False, per_head=True)
    assert first.heads == esdtool.analyze(sharded, include=[CHOSEN], per_head=True, cache=False).heads
    on_hub.sent = 0
    assert esdtool.analyze(REPO, include=[CHOSEN], download=False, per_head=True).heads == first.heads
    assert on_hub.sent < 1.02 * header_bytes(sharded)


def test_spectra_that_are_gone_are_computed_from_fetched_weights(on_hub, own_cache):
    first = esdtool.analyze(REPO, include=[CHOSEN], download=False)
    spectra = sorted(own_cache.rglob("*.esd"))
    for path in spectra[::2]:
        path.unlink()
    facts = sorted(own_cache.rglob("*.facts"))
    assert len(facts) >= len(first.modules)
    for path in facts[::3]:
        path.write_text("damaged")
    assert esdtool.analyze(REPO, include=[CHOSEN], download=False).to_json() == first.to_json()


def test_analysis_that_was_cut_off_goes_on(on_hub, sharded):
    """A server that fails after some tensors: the next analysis fetches the rest."""
    whole = on_hub.sent
    on_hub.faults.extend([Fault()] * (2 * 4 + 10) + [Fault(status=403)])
    with pytest.raises(CheckpointError, match="access denied"):
        esdtool.analyze(REPO, include=[CHOSEN], download=False, jobs=1)
    on_hub.faults.clear()
    before = on_hub.sent - whole
    on_hub.sent = 0
    found = esdtool.analyze(REPO, include=[CHOSEN], download=False)
    needed = tensor_bytes(sharded, {module.parameter for module in found.modules})
    assert on_hub.sent < header_bytes(sharded) * 1.02 + needed - (before - header_bytes(sharded)) / 3
    assert found.modules == esdtool.analyze(sharded, include=[CHOSEN], cache=False).modules


def test_sample_of_layers(on_hub, sharded, tmp_path):
    found = esdtool.analyze(REPO, sample_layers=3, download=False)
    assert {module.layer for module in found.modules} == {0, 16, 31}
    assert len(found.modules) == 3 * 7
    assert found.settings.sample_layers == 3
    left_out = [tensor for tensor in found.skipped if "--sample-layers" in tensor.reason]
    assert len(left_out) == 29 * 7
    done = command(
        "analyze", sharded, "--sample-layers", 3, "--json", tmp_path / "a.json", "--html", tmp_path / "a.html"
    )
    assert "A sample of 3 layers." in " ".join(done.stdout.split())
    assert "A sample of 3 layers." in (tmp_path / "a.html").read_text()
    assert "A sample of 3 layers." in command("analyze", sharded, "--sample-layers", 3, "--format", "markdown").stdout
    refused = command("assign", tmp_path / "a.json", "--out", tmp_path / "wd.json")
    assert isinstance(refused.exception, UsageError)
    assert "sample of its layers" in str(refused.exception)
    assert found.modules == tuple(module for module in esdtool.analyze(sharded).modules if module.layer in (0, 16, 31))


@pytest.mark.parametrize(("total", "count"), [(32, 3), (7, 2), (80, 9), (5, 4), (3, 3), (2, 9), (9, 1)])
def test_samples_are_even(total, count):
    chosen = evenly(list(range(total)), count)
    assert len(chosen) == len(set(chosen)) == min(total, count)
    if count > 1:
        assert (chosen[0], chosen[-1]) == (0, total - 1)
        gaps = [later - earlier for earlier, later in itertools.pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1


def test_memory_is_that_of_a_local_analysis(on_hub, sharded):
    def peak(source: object) -> int:
        tracemalloc.start()
        esdtool.analyze(
            source, include=[CHOSEN], jobs=1, cache=False, **({} if source is sharded else {"download": False})
        )
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(sharded), peak(REPO)  # what is imported on first use
    assert peak(REPO) < peak(sharded) + 2**20


@pytest.fixture
def store(sharded: Path, tmp_path: Path) -> Iterator[str]:
    """Give two checkpoints in a store in memory: `a` and `b`."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name, seed in (("a", 0), ("b", 1)):
        save_file(llama_tensors(2, seed=seed), tmp_path / f"{name}.safetensors")
        memory.put(str(tmp_path / f"{name}.safetensors"), f"/models/{name}/model.safetensors")
        memory.pipe(f"/models/{name}/config.json", b'{"model_type": "llama"}')
    yield "memory://models"
    memory.store.clear()


def test_other_commands_read_the_same_names(store, tmp_path):
    for arguments in (
        ("compare", f"{store}/a", f"{store}/b", "--json", tmp_path / "comparison.json"),
        ("assign", f"{store}/a", "--out", tmp_path / "wd.json"),
        ("assign", f"{store}/a", "--out", tmp_path / "live.json", "--names", "live"),
        ("plot", f"{store}/a", "--out", tmp_path / "figures", "--kind", "depth"),
        ("analyze", f"{store}/a", "--base", f"{store}/b", "--json", tmp_path / "difference.json"),
    ):
        done = command(*arguments)
        assert done.exit_code == 0, (arguments, done.output, done.exception)
    local = esdtool.analyze(tmp_path / "a.safetensors", base=tmp_path / "b.safetensors")
    found = json.loads((tmp_path / "difference.json").read_text())
    assert [module["alpha"] for module in found["modules"]] == [module.alpha for module in local.modules]
    before = FETCHED.bytes
    esdtool.analyze(f"{store}/a", base=f"{store}/b")
    headers = 2 * len(llama_tensors(2)) * 200
    assert FETCHED.bytes - before < headers


@pytest.mark.parametrize("name", ["analyze", "compare", "assign", "plot", "check"])
def test_download_goes_with_every_command(fake_hub, tmp_path, monkeypatch, name):
    """With it the files come whole, and then from the Hub's cache; without it a large repository stays where it is."""
    monkeypatch.setattr("esdtool.checkpoint.hub._SMALL_BYTES", 10)
    path = fake_hub.folder / "model.safetensors"
    save_file(llama_tensors(2), path)
    (fake_hub.folder / "config.json").write_text('{"model_type": "llama"}')
    if name == "check":
        esdtool.assign(esdtool.analyze(fake_hub.folder)).save(tmp_path / "wd.json")
    words = {
        "analyze": ("analyze", REPO, "--quiet"),
        "compare": ("compare", REPO, REPO, "--quiet"),
        "assign": ("assign", REPO, "--out", tmp_path / "new.json", "--quiet"),
        "plot": ("plot", REPO, "--out", tmp_path / "figures", "--kind", "depth", "--quiet"),
        "check": ("assign", "--check", tmp_path / "wd.json", "--model", REPO, "--quiet"),
    }[name]
    assert command(*words).exit_code == 0
    assert all(fake_hub.ranges)
    fake_hub.requests.clear()
    assert command(*words, "--download").exit_code == 0
    assert set(fake_hub.ranges) == {None}
    fake_hub.requests.clear()
    assert command(*words).exit_code == 0
    assert fake_hub.ranges == []


def test_parts_of_one_tensor_are_fetched_once(tmp_path):
    """Interleaved heads need the whole tensor for each of query, key and value."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    weight = torch.randn(3 * 128, 128, generator=torch.Generator().manual_seed(0))
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    save_file({name: weight}, tmp_path / "model.safetensors")
    memory.put(str(tmp_path / "model.safetensors"), "/neox/model.safetensors")
    config = b'{"model_type": "gpt_neox", "num_attention_heads": 4, "hidden_size": 128}'
    memory.pipe("/neox/config.json", config)
    (tmp_path / "config.json").write_bytes(config)
    before = FETCHED.bytes
    found = esdtool.analyze("memory://neox", jobs=2, cache=False)
    assert FETCHED.bytes - before < 1.02 * weight.nbytes
    assert len(found.modules) == 3
    assert found.modules == esdtool.analyze(tmp_path).modules


def test_quantised_weights_are_known_again(tmp_path):
    """Weights that are computed from codes and scales are known by all files together."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax() / 400
    tensors = {
        "model.layers.0.mlp.up_proj.weight": (weight / scale).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_inv": torch.full((1, 1), float(scale)),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    memory.put(str(tmp_path / "model.safetensors"), "/quantised/model.safetensors")
    memory.pipe("/quantised/config.json", json.dumps(config).encode())
    first = esdtool.analyze("memory://quantised")
    assert len(first.scored) == 1
    before = FETCHED.bytes
    assert esdtool.analyze("memory://quantised").to_json() == first.to_json()
    assert FETCHED.bytes - before < 128 * 64
