"""What the README shows works: its commands on the bundled checkpoint, its Python, its links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BUNDLED = "examples/checkpoints/stdlib-llama"

# What a reader replaces by their own paths. Longest first.
PLACEHOLDERS = {
    "examples/configs": "examples/configs",
    "path/to/hf-model": BUNDLED,
    "model.safetensors": f"{BUNDLED}/model.safetensors",
    "config.toml": "examples/configs/quickstart.toml",
    "CKPT": BUNDLED,
    "ckpt": BUNDLED,
}
# Installing is .ci/run's part; these need the network, a file that the README only names, or a tool that may be absent.
ELSEWHERE = (
    *("pip ", "org/name", "pytorch_model.bin", "checkpoint-dcp", "jq "),
    *("model.gguf", "adapter/", "tuned/", "step_*"),
)

# A training run takes minutes; its first steps show that the commands work.
SHORTENED = [
    f"--set={setting}"
    for setting in (
        "schedule.steps=8",
        "schedule.warmup_steps=2",
        "weight_decay.interval=4",
        "eval.every=8",
        "eval.tokens=4096",
    )
]


def commands(language: str = "console") -> list[str]:
    found = []
    for block in re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL):
        for line in block.splitlines():
            command = line.split("  #")[0].strip()
            if command and not any(word in line for word in ELSEWHERE):
                found.append(command)
    return found


def run(command: str, folder: Path) -> None:
    for placeholder, path in PLACEHOLDERS.items():
        command = re.sub(rf"(?<![\w/-]){re.escape(placeholder)}(?![\w])", str(ROOT / path), command)
    words = shlex.split(command)
    assert words[0] == "esdtool"
    if words[1] == "train":
        words += SHORTENED
    result = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    # Commands whose outcome is a file have nothing to say on stdout.
    assert result.stdout or words[1] in ("train", "plot") or "--json" in words


def test_commands_in_the_order_of_the_page(tmp_path: Path) -> None:
    found = commands()
    assert len(found) > 5
    for command in found:
        run(command, tmp_path)


@pytest.mark.slow
def test_the_commands_at_the_top(tmp_path: Path) -> None:
    found = commands("sh")
    assert [command.split()[:2] for command in found] == [["esdtool", name] for name in ("analyze", "assign", "train")]
    for command in found:
        run(command, tmp_path)


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks in order, as one session, in a folder that holds the wd.json of the commands above them."""
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    run("esdtool assign path/to/hf-model --out wd.json", tmp_path)
    names = {"model": AutoModelForCausalLM.from_pretrained(ROOT / BUNDLED, dtype=torch.float32)}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        source = block.replace("path/to/hf-model", str(ROOT / BUNDLED))
        exec(compile(source, "README.md", "exec"), names)
    assert len(names["optimizer"].param_groups) > 1
    assert names["fit"].alpha > 1


def test_links() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_family_names_a_test_that_exists() -> None:
    table = README.split("### Model families")[1].split("###")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    present = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(?:tests/[\w/]+/)?(test_\w+\.py)`", row.rpartition(" | ")[2])
        assert named, row
        assert set(named) <= present, row
