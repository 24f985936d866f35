"""Analyses and a browser that the report tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import esdtool
from esdtool.analysis.document import Analysis
from tests.conftest import BUNDLED

HOSTILE = (
    "model.layers.0.</script><script>window.__pwned=1</script>.weight",
    'model.layers.0." onmouseover="window.__pwned=1" x=".weight',
    "model.layers.0.' autofocus onfocus='window.__pwned=1.weight",
    "model.layers.0.<img src=x onerror=window.__pwned=1>.weight",
    "model.layers.1.&lt;b&gt;.weight",
    "model.layers.1.\u202egnp.weight",
    "model.layers.1.<!--<script>.weight",
    f"model.layers.1.{'x' * 3000}.weight",
)


@pytest.fixture(scope="session")
def analysis() -> Analysis:
    """The bundled checkpoint, by two estimators."""
    return esdtool.analyze(BUNDLED, fit=["hill", "ks"], jobs=1)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """A checkpoint whose tensor names are markup."""
    path = tmp_path_factory.mktemp("hostile") / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(64, 64, generator=generator) for name in HOSTILE}, path)
    return esdtool.analyze(path)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, as found on this machine."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome on the PATH")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
        )
        yield browser
        browser.close()


class Opened:
    """A report in the browser, and all that went wrong there."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.address = path.as_uri()
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", lambda dialog: self.troubles.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.address)

    def check(self) -> None:
        """Nothing was complained of, and nothing asked for but the file."""
        assert self.troubles == []
        assert set(self.requests) == {self.address}


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A function that opens a report; at the end each must have been quiet."""
    pages: list[Opened] = []

    def opened(text: str, **options: Any) -> Any:
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        pages.append(Opened(browser, path, **options))
        return pages[-1].page

    yield opened
    for page in pages:
        page.check()
        page.page.close()
