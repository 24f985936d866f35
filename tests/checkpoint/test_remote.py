"""Checkpoints that are read where they are: the same tensors as on disk, for few bytes, from every kind of store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from esdtool.checkpoint import open_checkpoint
from esdtool.checkpoint.opening import is_url
from esdtool.errors import CheckpointError, MissingExtraError, UsageError
from tests.checkpoint.gguf_files import writer_to
from tests.checkpoint.remote_server import COMMIT, REPO

fsspec = pytest.importorskip("fsspec")

SINGLE_PROCESS = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def memory() -> Iterator[Any]:
    """Give fsspec's store in memory, empty."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()


def upload(memory: Any, folder: Path, to: str = "/bucket/model") -> str:
    memory.put(f"{folder}/", to, recursive=True)
    return f"memory://{to}"


def message(location: str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(location, **options)
    return str(caught.value)


def test_web_server_sends_the_header_and_the_tensors_that_are_read(web_server, tensors, assert_same):
    path = web_server.folder / "model.safetensors"
    save_file(tensors, path)
    (web_server.folder / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(f"{web_server.url}/model.safetensors")
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    beside = (web_server.folder / "config.json").stat().st_size
    # The first 64 bytes tell what kind of file it is.
    assert web_server.sent == 64 + header - 8 + beside
    assert (checkpoint.location, checkpoint.model_type) == (f"{web_server.url}/model.safetensors", "llama")
    checkpoint.read("conv.weight")
    assert web_server.sent == 64 + header - 8 + beside + tensors["conv.weight"].nbytes
    before = web_server.sent
    assert checkpoint.read_rows("layers.0.float32", 2, 5).equal(tensors["layers.0.float32"][2:5])
    assert web_server.sent - before == 3 * 4 * 4
    assert_same(checkpoint, tensors)


def test_folder_of_shards_on_a_web_server_by_its_index(web_server, tensors, assert_same, write_shards):
    write_shards(web_server.folder, tensors)
    assert_same(open_checkpoint(f"{web_server.url}/model.safetensors.index.json"), tensors)
    text = message(web_server.url)
    assert text == f"{web_server.url}: no such file or folder"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_on_the_hub(fake_hub, tensors, assert_same, write_shards, suffix):
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    write_shards(fake_hub.folder, tensors, suffix=suffix, stem=stem)
    (fake_hub.folder / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(f"{REPO}@v2", download=False)
    assert_same(checkpoint, tensors)
    assert (checkpoint.location, checkpoint.revision, checkpoint.model_type) == (f"{REPO}@v2", COMMIT, "llama")
    assert checkpoint.files == tuple(f"{stem}-{n:05d}-of-00003.{suffix}" for n in (1, 2, 3))
    # Whichever branch was named, one commit is read.
    assert all(COMMIT in path for _, path, _ in fake_hub.requests if "/resolve/" in path)
    assert not (Path.cwd() / "hub-cache").exists()


def test_small_repository_is_downloaded_and_a_large_one_is_not(fake_hub, tensors, assert_same, monkeypatch):
    save_file(tensors, fake_hub.folder / "model.safetensors")
    checkpoint = open_checkpoint(REPO)
    assert [part for part in fake_hub.ranges if part] == []
    assert_same(checkpoint, tensors)
    fake_hub.requests.clear()
    # What is in the Hub's cache is read from there.
    assert_same(open_checkpoint(REPO, download=False), tensors)
    assert fake_hub.ranges == []
    monkeypatch.setattr("esdtool.checkpoint.hub._SMALL_BYTES", 10)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path.cwd() / "other"))
    assert_same(open_checkpoint(REPO), tensors)
    assert all(fake_hub.ranges)
    assert len(fake_hub.ranges) > len(tensors) - 2  # one is empty, and the header takes two
    fake_hub.requests.clear()
    open_checkpoint(REPO, download=True)
    assert fake_hub.ranges == [None]


def test_hub_urls_name_folders_and_files(fake_hub, tensors, assert_same):
    (fake_hub.folder / "sub").mkdir()
    save_file(tensors, fake_hub.folder / "sub" / "model.safetensors")
    for location in ("/sub", f"@{COMMIT}/sub/model.safetensors", "@v2/sub/"):
        for download in (False, True):
            checkpoint = open_checkpoint(f"hf://{REPO}{location}", download=download)
            assert_same(checkpoint, tensors)
            assert checkpoint.location == f"hf://{REPO}{location}"
    assert message(f"hf://{REPO}/no", download=False) == f"hf://{REPO}/no: no such file or folder"
    assert "has no such file or folder" in message(f"hf://{REPO}/no", download=True)
    assert message("hf://org/none").startswith("hf://org/none: no such file or directory, and no such repository")
    assert message(f"hf://{REPO}@nope").endswith("has no revision 'nope'")
    assert message("hf://datasets/org/x") == (
        "hf://datasets/org/x: not a model on the Hub; write hf://org/name[@revision][/path]"
    )
    with pytest.raises(UsageError, match="names revision 'v2'"):
        open_checkpoint(f"hf://{REPO}@v2", revision="v1")


@SINGLE_PROCESS
@pytest.mark.parametrize("container", ["safetensors", "bin", "legacy", "gguf", "dcp"])
def test_every_container_in_an_object_store(memory, tmp_path, tensors, assert_same, container):
    folder = tmp_path / "model"
    folder.mkdir()
    if container == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif container in ("bin", "legacy"):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=container == "bin")
    elif container == "gguf":
        pytest.importorskip("gguf")
        tensors = {name: tensors[name] for name in ("layers.0.float32", "layers.0.float16")}
        writer_to(folder)({name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if "float8" not in name and name != "empty"}
        dcp.save(tensors, checkpoint_id=folder)
    assert_same(open_checkpoint(upload(memory, folder)), tensors)


@SINGLE_PROCESS
def test_distributed_checkpoint_is_what_torch_reads_from_the_store(memory, tmp_path):
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    saved = {"w": torch.arange(12.0).reshape(3, 4), "v": torch.ones(5)}
    dcp.save(saved, checkpoint_id=tmp_path / "dcp")
    url = upload(memory, tmp_path / "dcp")
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    dcp.load(loaded, storage_reader=FsspecReader(url))
    checkpoint = open_checkpoint(url)
    assert {name: checkpoint.read(name).tolist() for name in checkpoint.tensors} == {
        name: tensor.tolist() for name, tensor in loaded.items()
    }


def test_hdf5_and_sets_of_gguf_files_in_an_object_store(memory, tmp_path):
    from tests.checkpoint.samples import keras_h5

    one = keras_h5(tmp_path)
    (tmp_path / "set").mkdir()
    write = writer_to(tmp_path / "set")
    array = torch.arange(64.0).reshape(8, 8)
    for number in (1, 2):
        write(
            {f"blk.{number}.ffn_up.weight": (number * array).numpy()},
            name=f"m-{number:05d}-of-00002.gguf",
        )
    for path in (one, tmp_path / "set"):
        local = open_checkpoint(path)
        url = f"memory://up/{path.name}"
        memory.put(str(path) + ("/" if path.is_dir() else ""), f"/up/{path.name}", recursive=path.is_dir())
        remote = open_checkpoint(url)
        assert remote.tensors == local.tensors
        for name in local.tensors:
            assert remote.read(name).equal(local.read(name))


def test_container_that_is_read_whole_is_refused(memory):
    memory.pipe("/b/model.onnx", b"x" * 100)
    assert message("memory://b/model.onnx") == (
        "memory://b/model.onnx: an ONNX file is read whole, not by ranges of bytes; copy it to this machine and name "
        "the copy"
    )


def test_object_that_changes_between_two_reads(memory, tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    memory.put(str(tmp_path / "model.safetensors"), "/b/model.safetensors")
    checkpoint = open_checkpoint("memory://b/model.safetensors")
    checkpoint.read("scale")
    memory.put(str(tmp_path / "model.safetensors"), "/b/model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("scale")
    assert str(caught.value) == (
        "memory://b/model.safetensors: tensor 'scale': cannot read: the file was replaced by another since it was "
        "opened; run again once nothing changes the checkpoint"
    )


def test_s3(tmp_path, tensors, assert_same, monkeypatch):
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        save_file(tensors, tmp_path / "model.safetensors")
        client.upload_file(str(tmp_path / "model.safetensors"), "bucket", "m/model.safetensors")
        checkpoint = open_checkpoint("s3://bucket/m")
        assert_same(checkpoint, tensors)
        assert message("s3://bucket/other") == "s3://bucket/other: no such file or folder"
        client.put_object(Bucket="bucket", Key="m/model.safetensors", Body=b"x" * 5000)
        with pytest.raises(CheckpointError, match="was replaced by another since it was opened"):
            checkpoint.read("conv.weight")
    finally:
        server.stop()


def test_what_is_a_url():
    assert [is_url(text) for text in ("gs://b", "a::b://c", "memory://x")] == [True] * 3
    assert [is_url(text) for text in ("org/name@v1", "/a/b", "C:\\x", "x.safetensors", "")] == [False] * 5


def test_file_urls_are_paths(tmp_path, tensors, assert_same):
    save_file(tensors, tmp_path / "a b.safetensors")
    assert_same(open_checkpoint((tmp_path / "a b.safetensors").as_uri()), tensors)


def test_unknown_and_missing_filesystems(monkeypatch):
    assert message("nonsense://x/y") == "nonsense://x/y: Protocol not known: nonsense"
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "pip install gcsfs" in message("gs://bucket/model")
    with pytest.raises(UsageError, match="that is for Hub ids"):
        open_checkpoint("memory://x", revision="v1")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingExtraError, match=r"esdtool\[remote\]"):
        open_checkpoint("s3://x/y")


def test_url_is_shown_without_password_query_and_token(web_server, tensors):
    save_file(tensors, web_server.folder / "model.safetensors")
    host = web_server.url.removeprefix("http://")
    checkpoint = open_checkpoint(f"http://me:pass@{host}/model.safetensors?sig=secret")
    assert "pass" not in checkpoint.location
    assert "secret" not in checkpoint.location
    text = message(f"http://me:pass@{host}/none.safetensors?sig=secret")
    assert not {"pass", "secret"} & set(text.replace("?", " ").replace("=", " ").replace(":", " ").split())


def header_file(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@given(
    length=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 200)),
    size=st.one_of(st.integers(0, 2**62), st.integers(0, 200)),
    body=st.binary(max_size=120),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numbers_of_a_hostile_store_are_not_believed(memory, length, size, body, tmp_path_factory):
    """A header of any length, tensors of any size: an error, and no memory beyond the bytes that came."""
    header = {"w": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}
    for content in (length.to_bytes(8, "little") + body, header_file(header, body)):
        memory.pipe("/hostile/model.safetensors", content)
        on_disk = tmp_path_factory.mktemp("hostile") / "model.safetensors"
        on_disk.write_bytes(content)
        try:
            local = str(sorted(open_checkpoint(on_disk).tensors))
        except CheckpointError as error:
            local = str(error).replace(str(on_disk), "")
        try:
            remote = str(sorted(open_checkpoint("memory://hostile/model.safetensors").tensors))
        except CheckpointError as error:
            remote = str(error).replace("memory://hostile/model.safetensors", "")
        assert remote == local


def test_real_library_with_its_environment(fake_hub, tensors, tmp_path):
    """HF_ENDPOINT and HF_TOKEN are honoured, and the token goes to the Hub alone."""
    fake_hub.token = "hf_" + "Secret" * 5
    save_file(tensors, fake_hub.folder / "model.safetensors")
    program = (
        "from esdtool.checkpoint import open_checkpoint\n"
        f"print(open_checkpoint({REPO!r}, download=False).read('scale').item())"
    )
    environment = os.environ | {
        "HF_ENDPOINT": fake_hub.url,
        "HF_TOKEN": fake_hub.token,
        "HF_HOME": str(tmp_path / "home"),
    }
    environment |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("2.5\n", "")
    assert set(fake_hub.authorization) == {None}
