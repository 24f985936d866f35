"""What goes wrong on the way: what may pass is tried again from where it stopped, anything else is one line."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file

from esdtool.checkpoint import open_checkpoint
from esdtool.checkpoint.remote.faults import redacted, said, status_of
from esdtool.checkpoint.remote.traffic import FETCHED
from esdtool.errors import CheckpointError
from tests.checkpoint.remote_server import REPO, TOKEN, Fault, Server

NAME = "layers.0.weight"
BYTES = 1024 * 1024 * 4

LOST = 2**19
"""Bytes that aiohttp and the sockets have in hand when a connection is cut, and drop. Beginning again from the start
would cost far more."""


@pytest.fixture(params=["fake_hub", "web_server"])
def server(request) -> Server:
    return request.getfixturevalue(request.param)


@pytest.fixture
def weight(server) -> torch.Tensor:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    save_file({NAME: weight, "other": torch.ones(3)}, server.folder / "model.safetensors")
    return weight


@pytest.fixture
def checkpoint(server, weight):
    location = REPO if server.is_hub else f"{server.url}/model.safetensors"
    opened = open_checkpoint(location, **({"download": False} if server.is_hub else {}))
    server.requests.clear()
    server.sent = 0
    return opened


def why(checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(NAME)
    text = str(caught.value)
    assert "\n" not in text
    prefix = f"tensor {NAME!r}: cannot read: "
    assert "model.safetensors" in text.partition(prefix)[0]
    return text.partition(prefix)[2]


def test_cut_connections_go_on_from_where_they_stopped(server, checkpoint, weight):
    cuts = [Fault(cut_after=1_300_000), Fault(cut_after=1_200_000), Fault(cut_after=0)]
    server.faults.extend(cuts)
    before = FETCHED.bytes
    assert checkpoint.read(NAME).equal(weight)
    assert FETCHED.bytes - before == BYTES
    assert server.sent - BYTES <= (0 if server.is_hub else LOST * len(cuts))


def test_parts_of_a_large_tensor_go_on_each_by_itself(server, checkpoint, weight, monkeypatch):
    monkeypatch.setattr("esdtool.checkpoint.remote.transfer._AT_ONCE", BYTES // 2)
    monkeypatch.setattr("esdtool.checkpoint.remote.transfer._PART", BYTES // 5 - 1)
    server.faults.extend([Fault(cut_after=300_000), Fault(), Fault(status=503), Fault(cut_after=0)])
    before = FETCHED.bytes
    assert checkpoint.read(NAME).equal(weight)
    assert FETCHED.bytes - before == BYTES
    asked = {part for method, _, part in server.requests if method == "GET" and part}
    assert 6 + server.is_hub <= len(asked) <= 7  # one was taken up again: by aiohttp's dropping, from its beginning


def test_part_that_fails_ends_the_others(server, checkpoint, monkeypatch):
    monkeypatch.setattr("esdtool.checkpoint.remote.transfer._PART", BYTES // 64)
    server.always = Fault(status=403)
    assert why(checkpoint).startswith("access denied (403)")
    assert len([path for _, path, _ in server.requests if "resolve" not in path]) < 32


def test_busy_servers_are_asked_again(server, checkpoint, weight):
    server.faults.extend([Fault(status=429, headers=(("Retry-After", "0"),)), Fault(status=503), Fault(status=500)])
    assert checkpoint.read(NAME).equal(weight)
    assert server.sent == BYTES


def test_many_cuts_that_bring_something_are_no_reason_to_give_up(server, checkpoint, weight):
    server.faults.extend([Fault(cut_after=450_000)] * 8)
    assert checkpoint.read(NAME).equal(weight)


@pytest.mark.parametrize(
    ("fault", "expected", "attempts"),
    [
        (Fault(status=401), "not authorised (401); ", 1),
        (Fault(status=403), "access denied (403); ", 1),
        (Fault(status=404), "no such file", 1),
        (Fault(status=416), "the file is shorter than it was said to be (416); ", 1),
        (
            Fault(status=429),
            "the server asks for fewer requests (429); wait a while and run again: what is computed is kept",
            5,
        ),
        (Fault(status=503), "the server fails (503); run again later: what is computed is kept", 5),
        (Fault(cut_after=10), "the connection was lost (", 5),
        (Fault(shift=8), "the server sends another range of bytes than it was asked for; ", 1),
        (Fault(more=8), "the server sends another range of bytes than it was asked for; ", 1),
        (Fault(headers=(("ETag", '"other"'),)), "the file was replaced by another since it was opened; run again", 1),
        (Fault(headers=(("Content-Range", "bytes 0-3/77"),)), "the file was replaced by another since it was", 1),
        (Fault(headers=(("Content-Range", "bytes lots"),)), "the server answers a request for a range with", 1),
        (Fault(headers=(("Content-Encoding", "gzip"),)), "the server compresses what it sends, so that no range", 1),
    ],
    ids=repr,
)
def test_faults_that_stay_are_one_line(server, checkpoint, fault, expected, attempts):
    server.always = fault
    assert why(checkpoint).startswith(expected)
    asked = [path for _, path, _ in server.requests if "resolve" not in path]
    assert len(asked) == attempts


def test_ignored_range_is_noticed_before_the_body_is_read(server, weight, checkpoint):
    (server.folder / "large.safetensors").write_bytes((server.folder / "model.safetensors").read_bytes())
    server.always = Fault(ignore_range=True)
    before = FETCHED.bytes
    text = why(checkpoint)
    assert text.startswith("the server ignores the range that was asked for, and sends the whole file (")
    assert text.endswith("give --download to download the files instead" if server.is_hub else "name the copy")
    assert FETCHED.bytes == before


def test_server_that_sends_too_much(server, checkpoint, weight):
    # The headers are those of the right range, that of the file's first tensor.
    content = (server.folder / "model.safetensors").read_bytes()
    size, begin = len(content), 8 + int.from_bytes(content[:8], "little")
    headers = (("Content-Range", f"bytes {begin}-{begin + BYTES - 1}/{size}"), ("Content-Length", str(BYTES + 12)))
    server.always = Fault(more=12, headers=headers)
    assert why(checkpoint).startswith("the server sends more bytes than it was asked for")


@pytest.fixture
def s3_endpoint(web_server, monkeypatch) -> Iterator[Server]:
    """A web server that is asked by the protocol of S3, whose objects are files in folders."""
    kind = pytest.importorskip("s3fs").S3FileSystem
    kind.clear_instance_cache()
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", web_server.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    folder = web_server.folder / "bucket"
    folder.mkdir()
    save_file({NAME: torch.arange(1024.0 * 1024).reshape(1024, 1024), "other": torch.ones(3)}, folder / "m.safetensors")
    yield web_server
    kind.clear_instance_cache()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(ignore_range=True), "the server ignores the range that was asked for, and sends the whole file ("),
        (Fault(shift=8), "the server sends another range of bytes than it was asked for; "),
        (Fault(headers=(("ETag", '"other"'),)), "the file was replaced by another since it was opened; run again"),
        (Fault(headers=(("Content-Range", "bytes 0-3/77"),)), "the file was replaced by another since it was"),
        (Fault(status=403), "access denied (403); check your credentials"),
    ],
    ids=repr,
)
def test_hostile_endpoint_of_s3(s3_endpoint, fault, expected, monkeypatch):
    """The heads of its answers are looked at before a byte of the bodies is taken."""
    checkpoint = open_checkpoint("s3://bucket/m.safetensors")
    monkeypatch.setattr("esdtool.checkpoint.remote.transfer.ATTEMPTS", 1)
    s3_endpoint.always = fault
    before = FETCHED.bytes
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(NAME)
    assert str(caught.value).partition("cannot read: ")[2].startswith(expected)
    assert FETCHED.bytes - before <= BYTES


def test_objects_of_s3_go_on_from_where_they_stopped(s3_endpoint):
    checkpoint = open_checkpoint("s3://bucket/m.safetensors")
    s3_endpoint.faults.extend([Fault(cut_after=1_300_000), Fault(cut_after=1_200_000)])
    s3_endpoint.requests.clear()
    before = FETCHED.bytes
    assert checkpoint.read(NAME).equal(torch.arange(1024.0 * 1024).reshape(1024, 1024))
    assert FETCHED.bytes - before == BYTES
    # No further request asks whether the object is still the same: each answer says so.
    assert [method for method, _, _ in s3_endpoint.requests] == ["GET"] * 3


def test_slow_server(server, checkpoint, monkeypatch):
    import aiohttp

    if server.is_hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    else:
        store = checkpoint.folder.store
        store._filesystem._session._timeout = aiohttp.ClientTimeout(total=None, sock_read=0.05)
    server.always = Fault(delay=0.3)
    monkeypatch.setattr("esdtool.checkpoint.remote.transfer.ATTEMPTS", 2)
    assert why(checkpoint) == ("the server is too slow, or does not answer; run again later: what is computed is kept")


def test_server_that_is_not_there(server, checkpoint, monkeypatch):
    server.always = Fault(status=503)
    assert "server fails" in why(checkpoint)
    with pytest.raises(CheckpointError, match="the connection was lost") as caught:
        open_checkpoint("http://127.0.0.1:9/model.safetensors")
    assert "\n" not in str(caught.value)


def test_refusal_at_the_door(fake_hub):
    save_file({NAME: torch.ones(4, 4)}, fake_hub.folder / "model.safetensors")
    fake_hub.token = TOKEN
    with pytest.raises(CheckpointError, match="access to this repository is gated; accept its terms") as caught:
        open_checkpoint(REPO, download=False)
    assert TOKEN not in str(caught.value)


def test_token_goes_to_the_hub_alone_and_is_never_shown(fake_hub, monkeypatch, capfd):
    weight = torch.randn(16, 16)
    save_file({NAME: weight}, fake_hub.folder / "model.safetensors")
    fake_hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    checkpoint = open_checkpoint(REPO, download=False)
    assert checkpoint.read(NAME).equal(weight)
    assert set(fake_hub.authorization) == {None}
    fake_hub.always = Fault(status=500)
    text = why(checkpoint)
    out, err = capfd.readouterr()
    assert not any(secret in text + out + err for secret in (TOKEN, "sEcReT"))


def test_what_is_taken_out_of_messages():
    for secret in ("hf_abcDEF123", "Bearer abc.def", "AKIA" + "X" * 16):
        assert secret not in redacted(f"failed with {secret} there")
    assert redacted("https://u:p@h/x?sig=1 y") == "https://h/x?... y"


class RefusalError(Exception):
    def __init__(self, status: int) -> None:
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def test_status_is_found_below_other_errors(web_server):
    error = FileNotFoundError("x")
    error.__cause__ = RefusalError(403)
    assert status_of(error) == 403
    assert said(error, open_store(web_server)).startswith("access denied (403)")


def open_store(server: Server):
    save_file({NAME: torch.ones(2, 2)}, server.folder / "model.safetensors")
    return open_checkpoint(f"{server.url}/model.safetensors").folder.store


def test_waits_are_those_the_server_asks_for(web_server, monkeypatch):
    save_file({NAME: torch.ones(4, 4)}, web_server.folder / "model.safetensors")
    checkpoint = open_checkpoint(f"{web_server.url}/model.safetensors")
    web_server.faults.append(Fault(status=429, headers=(("Retry-After", "1"),)))
    start = time.monotonic()
    checkpoint.read(NAME)
    assert time.monotonic() - start >= 1
