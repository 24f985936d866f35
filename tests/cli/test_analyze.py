"""`esdtool analyze` as a user types it: streams, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file


def one_line_error(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The error of a failed command: exactly one line on stderr, nothing on stdout, no traceback."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.stderr.splitlines()[-1] == line
    assert "Traceback" not in result.stderr
    assert line.startswith("esdtool: error: ")
    return line


def test_table_summary_and_conclusion(esdtool_cli, llama_dir: Path) -> None:
    result = esdtool_cli("analyze", llama_dir)
    assert (result.returncode, result.stderr) == (0, "")
    for words in (
        "model.layers.1.mlp.down_proj",
        "172x64",
        "alpha by role",
        "alpha by depth",
        "skipped: 5 tensors",
        "model.embed_tokens.weight",
        "token embedding",
        "1-D (norm or bias)",
        "Mean alpha",
        "Heaviest tails:",
    ):
        assert words in result.stdout


def test_several_fits_sorting_and_top(esdtool_cli, llama_dir: Path) -> None:
    result = esdtool_cli("analyze", llama_dir, "--fit", "hill", "--fit", "ks", "--sort", "alpha", "--top", 3)
    assert result.returncode == 0
    table = result.stdout.split("alpha by role")[0]
    assert "3 of 14 modules" in table
    rows = [line for line in table.splitlines() if "model.layers" in line]
    alphas = [float(line.split()[4]) for line in rows]
    assert len(alphas) == 3
    assert alphas == sorted(alphas)


def test_json_to_stdout_is_nothing_but_json(esdtool_cli, llama_dir: Path) -> None:
    result = esdtool_cli("analyze", llama_dir, "--json", "-")
    document = json.loads(result.stdout)
    assert len(document["modules"]) == 14
    again = esdtool_cli("analyze", llama_dir, "--json", "-", "--jobs", 1)
    assert again.stdout == result.stdout


def test_outputs(esdtool_cli, llama_dir: Path, tmp_path: Path) -> None:
    targets = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "esd")}
    options = [part for name, path in targets.items() for part in (f"--{name}", path)]
    result = esdtool_cli("analyze", llama_dir, "--quiet", *options)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    weights = load_file(llama_dir / "model.safetensors")
    for name, eigenvalues in load_file(targets["esd"]).items():
        singular = np.linalg.svd(weights[f"{name}.weight"].double().numpy(), compute_uv=False)
        np.testing.assert_allclose(eigenvalues.numpy(), np.sort(singular**2), rtol=1e-9, atol=1e-13 * singular[0] ** 2)
    assert targets["csv"].read_text().count("\n") == 15
    assert json.loads(targets["json"].read_text())["summary"]["num_scored"] == 14


def test_the_latest_analysis_is_remembered(esdtool_cli, llama_dir: Path, own_cache: Path) -> None:
    esdtool_cli("analyze", llama_dir, "--json", "-")
    remembered = json.loads((own_cache / "latest-analysis.json").read_text())
    assert remembered["source"]["checkpoint"] == str(llama_dir)


def test_an_unwritable_cache_is_only_a_remark(esdtool_cli, llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment = {**os.environ, "ESDTOOL_CACHE_DIR": str(tmp_path / "file" / "cache")}
    result = esdtool_cli("analyze", llama_dir, env=environment)
    assert result.returncode == 0
    assert "not remembered" in result.stderr


def test_dry_run_reads_headers_only(esdtool_cli, llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    whole = esdtool_cli("analyze", llama_dir, "--dry-run")
    assert whole.returncode == 0
    assert "14 weight modules" in whole.stdout
    assert "Estimated:" in whole.stdout
    assert "MiB" in whole.stdout
    # Ruin the data but not the header: a dry run does not notice.
    raw = bytearray(path.read_bytes())
    raw[-64 * 64 :] = b"\xff" * (64 * 64)
    path.write_bytes(raw)
    assert (
        esdtool_cli("analyze", llama_dir, "--dry-run").stdout.split("Estimated")[0]
        == whole.stdout.split("Estimated")[0]
    )


def test_include_and_exclude(esdtool_cli, llama_dir: Path) -> None:
    result = esdtool_cli("analyze", llama_dir, "--include", "layers.0", "--exclude", "mlp", "--json", "-")
    roles = [module["role"] for module in json.loads(result.stdout)["modules"]]
    assert roles == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_nan_in_one_tensor_leaves_the_rest(esdtool_cli, llama_dir: Path) -> None:
    weights = load_file(llama_dir / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, llama_dir / "model.safetensors")
    result = esdtool_cli("analyze", llama_dir, "--json", "-")
    assert result.returncode == 0
    status = {module["name"]: module["status"] for module in json.loads(result.stdout)["modules"]}
    assert "NaN" in status.pop("model.layers.0.mlp.up_proj")
    assert set(status.values()) == {"ok"}
    assert "13 modules" in esdtool_cli("analyze", llama_dir).stdout


def test_bad_input_is_one_line(esdtool_cli, tmp_path: Path, llama_dir: Path) -> None:
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    norms = tmp_path / "norms.safetensors"
    save_file({"norm.weight": torch.ones(9)}, norms)
    tiny = tmp_path / "tiny.safetensors"
    save_file({"linear.weight": torch.ones(3, 4)}, tiny)
    cases = [
        (["analyze", tmp_path / "missing"], 1, "missing"),
        (["analyze", empty], 1, "empty.safetensors"),
        (["analyze", norms], 3, "no weight matrix"),
        (["analyze", tiny], 3, "too few eigenvalues"),
        (["analyze", llama_dir, "--fit", "hil"], 2, "unknown fit 'hil'"),
        (["analyze", llama_dir, "--spectrum", "qr"], 2, "--spectrum"),
        (["analyze", llama_dir, "--top", "0"], 2, "--top"),
        (["analyze", llama_dir, "--nonsense"], 2, "--nonsense"),
        (["analyze"], 2, "CHECKPOINT"),
        (["analyze", llama_dir, "--include", "no_such"], 2, "no_such"),
        (["analyze", llama_dir, "--include", "("], 2, "("),
        (["analyze", llama_dir, "--json", "-", "--csv", "-"], 2, "stdout"),
        (["analyze", llama_dir, "--device", "quantum"], 2, "quantum"),
        (["schema", "nonsense"], 2, "nonsense"),
    ]
    if not torch.cuda.is_available():
        cases.append((["analyze", llama_dir, "--device", "cuda"], 1, "--device cpu"))
    for arguments, code, words in cases:
        result = esdtool_cli(*arguments, "--quiet") if code == 3 else esdtool_cli(*arguments)
        assert words in one_line_error(result, code)


def test_an_unwritable_target_is_refused_before_the_work(esdtool_cli, llama_dir: Path, tmp_path: Path) -> None:
    assert "does not exist" in one_line_error(
        esdtool_cli("analyze", llama_dir, "--json", tmp_path / "no" / "out.json"), 1
    )
    assert "is a directory" in one_line_error(esdtool_cli("analyze", llama_dir, "--json", tmp_path), 1)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert "cannot make the folder" in one_line_error(esdtool_cli("analyze", llama_dir, "--plots", in_the_way), 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_is_one_line(llama_dir: Path) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "esdtool", "analyze", str(llama_dir), "--json", "-"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "No space left" in result.stderr


def test_a_closed_pipe_is_no_error_message(llama_dir: Path) -> None:
    command = f"{sys.executable} -m esdtool analyze {llama_dir} --json - | head -c 10"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("{")
    assert result.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_is_one_line_and_130(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    save_file({f"layers.{i}.linear.weight": torch.randn(1500, 1500) for i in range(24)}, path)
    process = subprocess.Popen(
        [sys.executable, "-m", "esdtool", "analyze", str(path), "--jobs", "1", "--json", str(tmp_path / "out.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(3.0)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "esdtool: interrupted"
    assert stdout == ""
    assert not (tmp_path / "out.json").exists()


def test_version_help_and_schema(esdtool_cli) -> None:
    assert esdtool_cli("--version").stdout.startswith("esdtool 0.")
    assert "analyze" in esdtool_cli("--help").stdout
    assert json.loads(esdtool_cli("schema", "analysis").stdout)["title"] == "Analysis"


def test_help_imports_nothing_heavy() -> None:
    """The promise of a fast --help, as the imports that would break it rather than as a time."""
    code = (
        "import sys, contextlib, io\n"
        "from esdtool.cli import app\n"
        "for command in ([], ['analyze']):\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        app([*command, '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'scipy', 'matplotlib', 'transformers', 'safetensors', 'powerlaw'}\n"
        "heavy.add('esdtool.modules')\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_plain_analysis_loads_no_more_than_it_needs(bundled: Path) -> None:
    """Statistics, figures, and the models of what other commands read and write take a good part of a second."""
    code = (
        "import sys, contextlib, io\n"
        "from esdtool.cli import app\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    app(['analyze', {str(bundled)!r}, '--include', 'layers.0', '--quiet'], standalone_mode=False)\n"
        "heavy = {'scipy.integrate', 'scipy.optimize', 'scipy.stats', 'powerlaw', 'matplotlib', 'pandas'}\n"
        "heavy |= {'esdtool.train.config.train_config', 'esdtool.assignment.document', 'esdtool.optim', 'fsspec'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_python_m_and_import_are_clean() -> None:
    code = "import esdtool; esdtool.analyze; esdtool.hill; assert 'analyze' in dir(esdtool)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)


def test_names_are_not_read_as_markup(esdtool_cli, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    save_file({"[red]x[/red].weight": torch.randn(60, 60), "[/bold].weight": torch.randn(60, 60)}, path)
    for options in ([], ["--dry-run"]):
        result = esdtool_cli("analyze", path, *options)
        assert (result.returncode, result.stderr) == (0, "")
        # As a module and as a role: the leaf of an unknown name is its role.
        assert result.stdout.count("[red]x[/red]") >= 2
        assert "[/bold]" in result.stdout


@pytest.fixture
def unknown_layout(tmp_path: Path) -> Path:
    """A file with a fused tensor of no known family, and one that may be fused."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"trunk.0.core.qkv.weight": (96, 32), "trunk.0.core.joint.weight": (96, 32)}
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, tmp_path / "m.safetensors"
    )
    return tmp_path / "m.safetensors"


def test_what_is_in_doubt_is_shown(esdtool_cli, unknown_layout: Path) -> None:
    result = esdtool_cli("analyze", unknown_layout, "--min-eigs", 20, "--json", unknown_layout.with_name("a.json"))
    assert result.returncode == 0, result.stderr
    assert "identified by" in result.stdout
    document = json.loads(unknown_layout.with_name("a.json").read_text())
    (module,) = document["modules"]
    assert (module["identified_by"], module["note"]) == ("shape", "perhaps several projections in one; not split")
    (skipped,) = document["skipped"]
    assert skipped["kind"] == "several-matrices"
    assert "say how it is split (--split)" in skipped["reason"]


def test_split_says_how(esdtool_cli, unknown_layout: Path) -> None:
    out = unknown_layout.with_name("a.json")
    result = esdtool_cli("analyze", unknown_layout, "--min-eigs", 10, "--split", "qkv=per-head:4", "--json", out)
    assert result.returncode == 0, result.stderr
    document = json.loads(out.read_text())
    assert document["settings"]["split"] == ["qkv=per-head:4"]
    whole = load_file(unknown_layout)["trunk.0.core.qkv.weight"].double()
    keys = whole.reshape(4, 3, 8, 32)[:, 1].reshape(32, 32)
    (module,) = (module for module in document["modules"] if module["role"] == "k_proj")
    np.testing.assert_allclose(module["lambda_max"], float(torch.linalg.svdvals(keys)[0]) ** 2, rtol=1e-9)
    one_line_error(esdtool_cli("analyze", unknown_layout, "--split", "qkv=fifths"), 2)


def test_explain_says_what_becomes_of_a_tensor(esdtool_cli, unknown_layout: Path) -> None:
    result = esdtool_cli("analyze", unknown_layout, "--explain", "core", "--split", "qkv=interleaved")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("trunk.0.core.qkv.weight") and "96x32" in line for line in lines)
    assert any("--split qkv=interleaved" in line for line in lines)
    assert any("position 1 of each of 32 equal groups of rows" in line for line in lines)
    assert any("no rule names it" in line for line in lines)
    skipped = esdtool_cli("analyze", unknown_layout, "--explain", "qkv")
    assert "skipped:" in skipped.stdout
    assert "several in one: " in skipped.stdout
    one_line_error(esdtool_cli("analyze", unknown_layout, "--explain", "nothing"), 2)
