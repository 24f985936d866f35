"""Fixtures of a Hub and a web server on the loopback address, and of waits that take no time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.remote_server import Server, serve


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second attempt follow the first at once."""
    monkeypatch.setattr("esdtool.checkpoint.remote.transfer.FIRST_WAIT", 0.001)


@pytest.fixture
def web_server(tmp_path: Path, no_waits: None) -> Iterator[Server]:
    """A web server of the folder `served`."""
    pytest.importorskip("aiohttp")
    folder = tmp_path / "served"
    folder.mkdir()
    with serve(folder) as server:
        yield server


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waits: None) -> Iterator[Server]:
    """A Hub with one repository, `org/tiny`, of the files in the folder `served`; huggingface_hub asks it."""
    pytest.importorskip("huggingface_hub")
    folder = tmp_path / "served"
    folder.mkdir()
    with serve(folder, is_hub=True) as server:
        point_to(server, tmp_path, monkeypatch)
        yield server


def point_to(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what HF_ENDPOINT and HF_HOME do when huggingface_hub is imported, in a process where it has been."""
    from huggingface_hub import constants, hf_api

    monkeypatch.chdir(folder)  # where no folder is named as the repository
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub-cache"))
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
