"""Spectra on disk: what is found again, what is not, and what happens to damaged entries."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import esdtool
from esdtool.errors import UsageError
from esdtool.spectra import scoring
from esdtool.spectra.cache import SpectrumCache, content_hash, entry_key
from esdtool.spectra.spectrum import Spectrum
from esdtool.support.sizes import parse_size


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many spectra were computed since it was last asked."""
    calls: list[str] = []
    original = scoring.compute_spectrum

    def counting(matrices, path, **keywords):
        calls.append(path)
        return original(matrices, path, **keywords)

    def count() -> int:
        number = len(calls)
        calls.clear()
        return number

    monkeypatch.setattr(scoring, "compute_spectrum", counting)
    return count


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "spectra").rglob("*.esd"))


def test_nothing_is_computed_twice(llama_dir: Path, computed: Callable[[], int]) -> None:
    first = esdtool.analyze(llama_dir)
    assert computed() == 14
    second = esdtool.analyze(llama_dir)
    assert computed() == 0
    assert first.to_json() == second.to_json()
    assert all(np.array_equal(first.esds[name], second.esds[name]) for name in first.esds)
    # Another fit, other settings of a fit, and other names: the same weights.
    esdtool.analyze(llama_dir, fit=["ks", "fix-finger"])
    esdtool.analyze(llama_dir, k_fraction=0.3, min_eigs=60)
    save_file({f"x.{name}": value for name, value in load_file(llama_dir / "model.safetensors").items()},
              llama_dir / "model.safetensors")  # fmt: skip
    esdtool.analyze(llama_dir)
    assert computed() == 0
    assert esdtool.analyze(llama_dir, cache=False).summary == esdtool.analyze(llama_dir).summary
    assert computed() == 14


def test_what_changed_is_computed(llama_dir: Path, computed: Callable[[], int]) -> None:
    esdtool.analyze(llama_dir)
    weights = load_file(llama_dir / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(weights, llama_dir / "model.safetensors")
    computed()
    changed = esdtool.analyze(llama_dir)
    assert computed() == 1
    assert changed.summary == esdtool.analyze(llama_dir, cache=False).summary
    computed()
    esdtool.analyze(llama_dir, spectrum="svd")
    assert computed() == 14
    esdtool.analyze(llama_dir, fast=True)
    fast = computed()
    assert 0 < fast <= 14
    # The same numbers in another dtype have another rounding floor.
    save_file({name: value.to(torch.float64) for name, value in weights.items()}, llama_dir / "model.safetensors")
    esdtool.analyze(llama_dir)
    assert computed() == 14


def test_farms_windows_have_entries_of_their_own(llama_dir: Path, computed: Callable[[], int]) -> None:
    options = {"fit": "farms", "farms_rows": 32, "farms_windows": 2}
    first = esdtool.analyze(llama_dir, **options)
    assert computed() > 0
    assert esdtool.analyze(llama_dir, **options).to_json() == first.to_json()
    assert computed() == 0
    other = esdtool.analyze(llama_dir, **(options | {"farms_windows": 3}))
    assert computed() == 14
    assert other.modules[0].alpha != first.modules[0].alpha


def test_what_is_in_memory_is_not_kept(own_cache: Path, computed: Callable[[], int]) -> None:
    weights = {"layers.0.mlp.up_proj.weight": torch.randn(80, 70)}
    for _ in range(2):
        esdtool.analyze(weights)
        assert computed() == 1
    assert entries(own_cache) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "header", "length", "long", "folder", "text"])
def test_a_damaged_entry_is_computed_again(
    llama_dir: Path, own_cache: Path, computed: Callable[[], int], damage: str
) -> None:
    whole = esdtool.analyze(llama_dir).to_json()
    computed()
    victim = entries(own_cache)[0]
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
    elif damage == "header":
        content[0] ^= 1
    elif damage == "length":
        content[7] = 0xFF
    elif damage == "long":
        content += b"more"
    elif damage == "text":
        content = b"esdtool spectrum 1\n" + content
    victim.write_bytes({"cut": content[:-8], "empty": b""}.get(damage, content))
    if damage == "folder":
        victim.unlink()
        victim.mkdir()
    assert esdtool.analyze(llama_dir).to_json() == whole
    assert computed() == 1
    esdtool.analyze(llama_dir)
    assert computed() == (damage == "folder")  # which is not ours to remove


def test_every_bit_of_an_entry_is_guarded(tmp_path: Path) -> None:
    """Whatever bit flips, an entry is either as it was or not there."""
    cache = SpectrumCache(folder=tmp_path, limit=2**30)
    spectrum = Spectrum(
        eigenvalues=np.linspace(1, 2, 9), path="svd-float64", resolution=1e-20, storage_floor=1e-9, exponent=-1200
    )
    key = entry_key("content", "svd-float64", "cpu")
    cache.save(key, spectrum)
    (path,) = tmp_path.rglob("*.esd")
    whole = path.read_bytes()
    rest = range(0, 8 * len(whole), 5)
    for bit in rest:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found = cache.load(key)
        if found is None:
            assert not path.exists()
        else:  # the header's blanks, which say nothing
            assert np.array_equal(found.eigenvalues, spectrum.eigenvalues)
            assert replace(found, eigenvalues=spectrum.eigenvalues) == spectrum
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert cache.load(key) is None


@pytest.mark.parametrize(
    "facts",
    [
        {"key": "0" * 64},
        {"num_eigs": 5},
        {"path": "qr"},
        {"resolution": "small"},
        {"resolution": float("nan")},
        {"storage_floor": None},
        {"exponent": 1.5},
        {"exponent": "2"},
        {"another": 1},
        "no object",
        [1, 2],
        None,
    ],
)
def test_an_entry_with_a_right_checksum_and_wrong_facts_is_not_used(tmp_path: Path, facts: object) -> None:
    cache = SpectrumCache(folder=tmp_path, limit=2**30)
    spectrum = Spectrum(eigenvalues=np.linspace(1, 2, 9), path="gram-float64", resolution=0.0, storage_floor=0.0)
    key = entry_key("content", "gram-float64", "cpu")
    cache.save(key, spectrum)
    (path,) = tmp_path.rglob("*.esd")
    with safe_open(path, "numpy") as file:
        right = json.loads(file.metadata()["facts"])
    assert cache.load(key) is not None
    text = json.dumps(right | facts if isinstance(facts, dict) else facts)
    checksum = hashlib.sha256(text.encode() + b"\0" + spectrum.eigenvalues.tobytes()).hexdigest()
    save_arrays({"eigenvalues": spectrum.eigenvalues}, path, metadata={"facts": text, "sha256": checksum})
    assert cache.load(key) is None
    assert not path.exists()


def test_swapped_entries_are_noticed(llama_dir: Path, own_cache: Path, computed: Callable[[], int]) -> None:
    whole = esdtool.analyze(llama_dir).to_json()
    computed()
    first, second = entries(own_cache)[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert esdtool.analyze(llama_dir).to_json() == whole
    assert computed() == 2


def test_two_processes_use_one_cache(llama_dir: Path, own_cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "esdtool", "analyze", str(llama_dir), "-q", "--json"]
    processes = [subprocess.Popen([*command, str(tmp_path / f"{number}.json")]) for number in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    expected = esdtool.analyze(llama_dir, cache=False).to_json()
    assert [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)] == [json.loads(expected)] * 2
    assert len(entries(own_cache)) == 14


def test_a_cache_that_cannot_be_written_is_no_error(
    llama_dir: Path, own_cache: Path, computed: Callable[[], int]
) -> None:
    (own_cache / "spectra").write_text("a file in the way")
    for _ in range(2):
        assert len(esdtool.analyze(llama_dir).scored) == 14
        assert computed() == 14


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    spectrum = Spectrum(eigenvalues=np.linspace(1, 2, 100), path="gram-float64", resolution=0.0, storage_floor=0.0)
    cache = SpectrumCache(folder=tmp_path, limit=2500)
    keys = [entry_key(str(number), "gram-float64", "cpu") for number in range(4)]
    for age, key in enumerate(keys):
        cache.save(key, spectrum)
        (path,) = tmp_path.glob(f"{key[:2]}/{key[2:]}*")
        os.utime(path, (1000 + age, 1000 + age))
    found = cache.load(keys[0])
    assert found is not None
    assert np.array_equal(found.eigenvalues, spectrum.eigenvalues)
    cache.trim()
    assert [cache.load(key) is not None for key in keys] == [True, False, False, True]
    assert cache.info().bytes <= 2500
    assert cache.clear().entries == 2
    assert cache.info().entries == 0


def test_every_bit_counts() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    different = [
        matrix,
        matrix.reshape(4, 3),
        matrix.T,
        matrix.to(torch.bfloat16),
        -matrix,
        torch.cat([matrix, matrix]),
    ]
    hashes = {content_hash([found]) for found in different} | {content_hash([matrix, matrix])}
    assert len(hashes) == 7
    assert content_hash([matrix.T.contiguous().T]) == content_hash([matrix])


def test_sizes() -> None:
    assert parse_size("1.5 GB") == parse_size("1.5gib") == parse_size("1.5g") == 3 * 2**29
    assert parse_size("1e3") == parse_size("1_000 B") == 1000
    for wrong in ("", "much", "-1MB", "1e999GB", "nan", "inf", "GB", "1iB", "2GBB", "1 2MB"):
        with pytest.raises(UsageError, match="not a size"):
            parse_size(wrong)


def test_an_interrupted_analysis_goes_on(tmp_path: Path, own_cache: Path, computed: Callable[[], int]) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"layers.{index}.mlp.up_proj.weight": torch.randn(700, 700) for index in range(30)}, path)
    process = subprocess.Popen([sys.executable, "-m", "esdtool", "analyze", str(path), "--jobs", "1", "-q"])
    deadline = time.monotonic() + 60
    while len(entries(own_cache)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(entries(own_cache))
    assert 3 <= done < 30
    assert len(esdtool.analyze(path).scored) == 30
    assert computed() == 30 - done


def test_the_command(esdtool_cli, llama_dir: Path, own_cache: Path) -> None:
    esdtool_cli("analyze", llama_dir, "-q")
    assert f"{own_cache / 'spectra'}: 14 spectra, 0.0 MiB of at most 2.00 GiB" in esdtool_cli("cache", "info").stdout
    esdtool_cli("analyze", llama_dir, "-q", "--no-cache")
    assert "removed 14 spectra" in esdtool_cli("cache", "clear").stdout
    assert ": 0 spectra" in esdtool_cli("cache", "info").stdout
