"""Make every picture of the README from real runs: `python examples/gallery.py --pretrained FOLDER`.

This trains the quickstart under two policies with two seeds each (about a quarter of an hour on two cores) unless
runs/gallery holds the runs already. It analyses the bundled checkpoint, and photographs the report of a pretrained
model in Chromium (package `playwright`). The README shows `rxnfp` 0.1.0, a 12-layer BERT inside its PyPI package:

    pip download --no-deps rxnfp==0.1.0 && unzip rxnfp-0.1.0-*.whl -d rxnfp
    python examples/gallery.py --pretrained rxnfp/rxnfp/models/transformers/bert_ft
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

import esdtool
from esdtool.report import terminal

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
BUNDLED = "examples/checkpoints/stdlib-llama"
RUNS = "runs/gallery"
MODULE = "model.layers.2.mlp.down_proj"


def command(*words: str, folder: Path = ROOT) -> None:
    """Run esdtool as a user would."""
    print("esdtool", *words)
    subprocess.run([sys.executable, "-m", "esdtool", *words, "--quiet"], cwd=folder, check=True)


def train() -> list[str]:
    """Train the quickstart under two policies with two seeds each; finished runs are kept."""
    runs = []
    for policy in ("alphadecay", "uniform"):
        for seed in (0, 1):
            run = f"{RUNS}/{policy}-{seed}"
            runs.append(run)
            if (ROOT / run / "final").is_dir():
                continue
            configs = ("examples/configs/quickstart.toml", f"examples/configs/policies/{policy}.toml")
            changes = (f"run.seed={seed}", f"run.dir={run}", "checkpoint.keep=10")
            command("train", *configs, *(word for change in changes for word in ("--set", change)))
    return runs


def figures(runs: list[str], folder: Path) -> None:
    """Draw each figure with one command, under the name that the README uses."""
    wd = str(folder / "wd.json")
    esdtool_plot = ("plot", "--out", str(folder), "--dpi", "110")
    command("assign", BUNDLED, "--out", wd)
    alone = ("--kind", "esd", "--kind", "ks", "--module", re.escape(MODULE))
    command(*esdtool_plot, BUNDLED, *alone, "--kind", "heat-map", "--kind", "depth")
    command(*esdtool_plot, wd, "--kind", "decay")
    steps = [f"{runs[0]}/checkpoints/step_{step:06d}" for step in (100, 200, 300)]
    command(*esdtool_plot, *steps, "--kind", "roles")
    training = ("alpha-steps", "decay-steps", "loss", "perplexity")
    command(*esdtool_plot, runs[0], "--kind", training[0])
    command(*esdtool_plot, *runs, *(word for kind in training[1:] for word in ("--kind", kind)))
    for name in ("heat-map", "depth", "decay", "roles", *training):
        shutil.copy(folder / f"{name}.png", IMAGES / f"{name}.png")
    for kind in ("esd", "ks"):
        shutil.copy(folder / kind / f"{MODULE}.png", IMAGES / f"{kind}.png")


def terminal_picture() -> None:
    """Save the table of `esdtool analyze` as SVG."""
    console = Console(record=True, width=130, force_terminal=True, file=io.StringIO())
    analysis = esdtool.analyze(ROOT / BUNDLED)
    analysis = analysis.model_copy(update={"source": analysis.source.model_copy(update={"checkpoint": BUNDLED})})
    terminal.print_analysis(analysis, top=14, console=console)
    svg = console.export_svg(title=f"esdtool analyze {BUNDLED} --top 14", unique_id="esdtool")
    # The default theme loads its font from a CDN; a picture in a repository should not.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (IMAGES / "analyze.svg").write_text(svg, encoding="utf-8")


def photograph(checkpoint: Path, folder: Path) -> None:
    """Photograph the top of the HTML report of a checkpoint in a browser."""
    from playwright.sync_api import sync_playwright

    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        sys.exit("gallery: the report's picture needs Chromium")
    report = folder / "report.html"
    command("analyze", checkpoint.name, "--html", str(report), folder=checkpoint.parent)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(report.as_uri())
        page.screenshot(path=str(IMAGES / "report.png"))
        browser.close()


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", type=Path, help="checkpoint for the picture of the HTML report")
    pretrained = parser.parse_args().pretrained
    IMAGES.mkdir(parents=True, exist_ok=True)
    terminal_picture()
    with tempfile.TemporaryDirectory() as folder:
        figures(train(), Path(folder))
        if pretrained is not None:
            photograph(pretrained.resolve(), Path(folder))


if __name__ == "__main__":
    main()
