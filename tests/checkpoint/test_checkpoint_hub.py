"""Hub ids, without a network: the library's functions are replaced, or answer from a cache laid out by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from esdtool.checkpoint import open_checkpoint
from esdtool.checkpoint.hub import HubId, parse_hub_id
from esdtool.errors import CheckpointError, MissingExtraError, UsageError

huggingface_hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")

SHA = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/tiny"


class FakeHub:
    """A repository in a folder; `hf_hub_download` copies into a cache with one folder per commit."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.downloads: list[tuple[str, str | None]] = []
        self.asked: list[str | None] = []
        self.error: Exception | None = None
        self.download_error: Exception | None = None

    def model_info(self, repo, *, revision=None):
        self.asked.append(revision)
        if self.error:
            raise self.error
        files = [str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()]
        return SimpleNamespace(sha=SHA, siblings=[SimpleNamespace(rfilename=name) for name in files])

    def hf_hub_download(self, repo, name, *, revision=None):
        assert repo == REPO
        if self.download_error:
            raise self.download_error
        self.downloads.append((name, revision))
        target = self.cache / "snapshots" / SHA / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.repository / name, target)
        return str(target)

    def try_to_load_from_cache(self, repo, name, *, revision=None):
        path = self.cache / "snapshots" / SHA / name
        return str(path) if path.exists() else None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repository").mkdir()
    fake = FakeHub(tmp_path / "repository", tmp_path / "cache")
    for name in ("model_info", "hf_hub_download", "try_to_load_from_cache"):
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    return fake


def refused(kind, text="x"):
    """An HTTP error of the library, whichever HTTP library made the response."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId(repo="org/name", revision=None)),
        ("org/name@refs/pr/1", HubId(repo="org/name", revision="refs/pr/1")),
        ("Qwen/Qwen2.5-0.5B@main", HubId(repo="Qwen/Qwen2.5-0.5B", revision="main")),
        ("name", None),
        ("a/b/c", None),
        ("./name", None),
        ("../name", None),
        ("/org/name", None),
        ("org/", None),
        ("org/name@", None),
        ("org/na me", None),
        ("runs/last.pt", None),
        ("runs/model.safetensors", None),
        ("runs/model.safetensors.index.json", None),
    ],
)
def test_what_looks_like_a_hub_id(text, expected):
    assert parse_hub_id(text) == expected


def test_revisions_that_contradict_each_other():
    assert parse_hub_id("org/name@v1", "v1") == HubId(repo="org/name", revision="v1")
    assert parse_hub_id("org/name", "v1") == HubId(repo="org/name", revision="v1")
    with pytest.raises(UsageError) as caught:
        parse_hub_id("org/name@v1", "v2")
    assert str(caught.value) == "org/name@v1: names revision 'v1', but 'v2' is asked for; give one"


def test_only_what_is_needed_is_downloaded(hub, tensors, assert_same, write_shards):
    write_shards(hub.repository, tensors)
    (hub.repository / "config.json").write_text('{"model_type": "llama"}')
    for name in ("README.md", "pytorch_model.bin", "tokenizer.json", "original/consolidated.00.pth"):
        (hub.repository / name).parent.mkdir(exist_ok=True)
        (hub.repository / name).write_text("x")
    checkpoint = open_checkpoint(REPO)
    assert_same(checkpoint, tensors)
    shards = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [name for name, _ in hub.downloads] == ["model.safetensors.index.json", "config.json", *shards]
    assert {revision for _, revision in hub.downloads[1:]} == {SHA}
    assert (checkpoint.location, checkpoint.revision, checkpoint.model_type) == (REPO, SHA, "llama")
    assert checkpoint.files == tuple(shards)
    assert checkpoint.notes == (f"{REPO}: model.safetensors.index.json is read; not read: pytorch_model.bin",)


@pytest.mark.parametrize(("location", "revision"), [(f"{REPO}@v2", None), (REPO, "v2"), (f"{REPO}@v2", "v2")])
def test_revision_is_asked_for_and_the_commit_recorded(hub, tensors, location, revision):
    save_file(tensors, hub.repository / "model.safetensors")
    checkpoint = open_checkpoint(location, revision=revision)
    assert hub.asked == ["v2"]
    assert hub.downloads == [("model.safetensors", "v2")]
    assert checkpoint.revision == SHA
    assert checkpoint.location == location


def test_pickle_where_there_is_no_safetensors(hub, tensors, assert_same):
    torch.save(tensors, hub.repository / "pytorch_model.bin")
    assert_same(open_checkpoint(REPO), tensors)


def test_existing_path_is_never_a_hub_id(hub, tmp_path, tensors, assert_same):
    (tmp_path / "org").mkdir()
    save_file(tensors, tmp_path / "org" / "tiny")
    with pytest.raises(CheckpointError, match=r"org/tiny: unknown format ''"):
        open_checkpoint(REPO)
    (tmp_path / "org" / "tiny").unlink()
    (tmp_path / "org" / "tiny").mkdir()
    save_file(tensors, tmp_path / "org" / "tiny" / "model.safetensors")
    assert_same(open_checkpoint(REPO), tensors)
    assert hub.asked == []


def test_without_the_network_the_cache_answers_and_says_so(hub, tensors, assert_same, write_shards):
    write_shards(hub.repository, tensors)
    open_checkpoint(REPO)
    hub.error = ConnectionError("no route")
    checkpoint = open_checkpoint(REPO)
    assert_same(checkpoint, tensors)
    assert checkpoint.revision == SHA
    assert checkpoint.notes == (f"{REPO}: the Hub was not asked (ConnectionError); the cached commit {SHA} is read",)


MISSING = f"{REPO}: no such file or directory"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            refused(errors.RepositoryNotFoundError),
            f"{MISSING}, and no such repository on the Hub (if it is private, set HF_TOKEN)",
        ),
        (
            refused(errors.GatedRepoError),
            f"{REPO}: access to this repository is gated; accept its terms on the Hub and set HF_TOKEN",
        ),
        (refused(errors.RevisionNotFoundError), f"{REPO}: the repository {REPO} has no revision None"),
        (errors.HFValidationError("x"), f"{MISSING}, and not a valid Hub id"),
        (
            errors.OfflineModeIsEnabled("x"),
            f"{MISSING}, and not in the Hub cache while HF_HUB_OFFLINE is set; download it first",
        ),
        (
            ConnectionError("no route to host\nat all"),
            f"{MISSING}, and the Hub cannot be reached: ConnectionError: no route to host",
        ),
    ],
)
def test_refusals_of_the_hub(hub, error, expected):
    hub.error = error
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(REPO)
    assert str(caught.value) == expected


def test_what_the_hub_denies_is_not_taken_from_the_cache(hub, tensors):
    save_file(tensors, hub.repository / "model.safetensors")
    open_checkpoint(REPO)
    hub.error = refused(errors.RevisionNotFoundError)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(f"{REPO}@v9")
    assert str(caught.value) == f"{REPO}@v9: the repository {REPO} has no revision 'v9'"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            errors.LocalEntryNotFoundError("x"),
            f"{REPO}: model.safetensors: not in the Hub cache, and the Hub cannot be reached; download it first",
        ),
        (errors.EntryNotFoundError("x"), f"{REPO}: model.safetensors: the repository {REPO} has no such file"),
        (
            refused(errors.GatedRepoError),
            f"{REPO}: model.safetensors: access to this repository is gated; "
            "accept its terms on the Hub and set HF_TOKEN",
        ),
        (OSError("disk full"), f"{REPO}: model.safetensors: the Hub cannot be reached: OSError: disk full"),
    ],
)
def test_download_that_fails(hub, tensors, error, expected):
    save_file(tensors, hub.repository / "model.safetensors")
    hub.download_error = error
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(REPO)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["README.md", "model.ggml"], f"{REPO}: no weights: looked for model.safetensors, "),
        ([".metadata", "__0_0.distcp"], f"{REPO}: holds only a torch.distributed.checkpoint, which is not read from"),
        (["a.safetensors", "b.safetensors"], f"{REPO}: 2 weight files and no index that joins them: "),
    ],
)
def test_repository_without_weights_that_can_be_read(hub, files, expected):
    for name in files:
        (hub.repository / name).write_text("x")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(REPO)
    assert str(caught.value).startswith(expected)
    assert hub.downloads == []


def test_index_of_a_repository_cannot_leave_it(hub):
    index = {"weight_map": {"w": "../../../x.safetensors"}}
    (hub.repository / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"refused: shard '\.\./\.\./\.\./x\.safetensors' lies outside"):
        open_checkpoint(REPO)
    assert [name for name, _ in hub.downloads] == ["model.safetensors.index.json"]


def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError) as caught:
        open_checkpoint(REPO)
    assert str(caught.value) == (
        "org/tiny: no such file or directory; reading it as a Hub id needs an optional extra: "
        "pip install 'esdtool[hub]'"
    )


def test_real_library_offline_with_a_real_cache(tmp_path, tensors, write_shards):
    """HF_HOME and HF_HUB_OFFLINE are honoured, and a missing shard is named."""
    repository = tmp_path / "home" / "hub" / "models--org--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / SHA
    write_shards(blobs, tensors)
    (blobs / "config.json").write_text('{"model_type": "llama"}')
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    program = """
from esdtool.checkpoint import open_checkpoint
from esdtool.errors import CheckpointError
for name in ("org/tiny", "org/tiny@main", "org/absent"):
    try:
        checkpoint = open_checkpoint(name)
        print(len(checkpoint.tensors), checkpoint.revision, checkpoint.model_type, checkpoint.read("scale").item())
    except CheckpointError as error:
        print(error)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = str(root)

    def run():
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=tmp_path,
        )
        return done.stdout.splitlines()

    absent = (
        "org/absent: no such file or directory, and not in the Hub cache while HF_HUB_OFFLINE is set; download it first"
    )
    assert run() == [f"{len(tensors)} {SHA} llama 2.5"] * 2 + [absent]
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    lost = "model-00002-of-00003.safetensors: not in the Hub cache, and the Hub cannot be reached; download it first"
    assert run() == [f"org/tiny: {lost}", f"org/tiny@main: {lost}", absent]
