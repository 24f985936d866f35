"""Every script in examples/trainers runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import esdtool

FOLDER = Path(__file__).parent.parent / "examples" / "trainers"

ARGUMENTS = {
    "read_with_json_only.py": (["wd.json"], "35 decays"),
    "plain_pytorch.py": (["wd.json", "--steps", "2"], "step 1"),
    "plain_pytorch_live.py": (["--steps", "3"], "step 2"),
    "hf_trainer.py": (["--steps", "2"], "different decays"),
    "lightning_trainer.py": (["--steps", "2"], "after 2 steps"),
    "nanogpt_style.py": (["wd.json"], "48 parameters"),
    "timm_vit.py": (["--steps", "20"], "groups"),
    "torchtitan_style.py": ([], "4 updates"),
}


def timm_works() -> bool:
    """timm imports torchvision, which must fit torch."""
    if importlib.util.find_spec("timm") is None:
        return False
    return subprocess.run([sys.executable, "-c", "import timm"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def assignment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("assignment") / "wd.json"
    esdtool.assign(esdtool.analyze(FOLDER.parent / "checkpoints" / "stdlib-llama")).save(path)
    return path


def test_every_script_is_listed() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == set(ARGUMENTS)
    readme = (FOLDER / "README.md").read_text()
    assert all(f"({name})" in readme for name in ARGUMENTS)


# CI leaves out the trainers that its other tests drive anyway.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("hf_trainer.py", "lightning_trainer.py") else [])
        for name in ARGUMENTS
    ],
)
def test_script(name: str, assignment: Path) -> None:
    if name == "timm_vit.py" and not timm_works():
        pytest.skip("timm cannot be imported: it needs a torchvision that fits torch")
    if name == "lightning_trainer.py":
        pytest.importorskip("lightning", reason="Lightning is not installed")
    arguments, words = ARGUMENTS[name]
    result = subprocess.run(
        [sys.executable, str(FOLDER / name), *(str(assignment) if a == "wd.json" else a for a in arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr
    assert words in result.stdout


def test_the_reader_without_esdtool_is_short() -> None:
    source = (FOLDER / "read_with_json_only.py").read_text()
    code = source.split("# What to copy.")[1].split("print(")[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    assert "esdtool" not in source.split('"""')[2]
