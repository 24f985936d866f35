"""A web server on the loopback address, plain or as a Hub, that counts the bytes it sends and can misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/tiny"
TOKEN = "hf_" + "Secret" * 5


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How one answer with a file's bytes goes wrong."""

    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    """More headers; they replace the right ones."""
    cut_after: int | None = None
    """Bytes of the body after which the connection is closed."""
    ignore_range: bool = False
    shift: int = 0
    """Bytes by which the range that is sent is another."""
    more: int = 0
    """Bytes that are sent beyond the range, with headers that fit."""
    delay: float = 0.0
    """Seconds of silence before the body."""


@dataclass
class Server:
    """What is served, and what came of it."""

    folder: Path
    is_hub: bool = False
    rate: float | None = None
    """Bytes a second of all answers together."""
    faults: deque[Fault] = field(default_factory=deque)
    """Used up by the next answers with bytes of weight files (GET)."""
    always: Fault | None = None
    sent: int = 0
    """Bytes of bodies with files' contents."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, range)."""
    authorization: list[str | None] = field(default_factory=list)
    """What came with requests for the store of objects, to which the Hub redirects."""
    token: str | None = None
    """Without which the Hub refuses."""
    etags: dict[str, str] = field(default_factory=dict)
    """Other etags than the content's, by file."""
    url: str = ""

    def etag(self, name: str) -> str:
        if name not in self.etags:
            status = (self.folder / name).stat()
            self.etags[name] = hashlib.sha256(f"{name} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
        return self.etags[name]

    @property
    def ranges(self) -> list[str | None]:
        """The ranges of weight files that were asked for."""
        return [part for method, path, part in self.requests if method == "GET" and "/cdn/" in path]


@contextmanager
def serve(folder: Path, *, is_hub: bool = False, rate: float | None = None) -> Iterator[Server]:
    """Serve a folder on the loopback address."""
    server = Server(folder=folder, is_hub=is_hub, rate=rate)
    lock = threading.Lock()
    free_at = [0.0]
    buffered = 0.05  # seconds of data in the buffers on the way: a sender that comes late does not leave the link idle

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = 2**16

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            with lock:
                server.requests.append((self.command, path, self.headers.get("Range")))
            if not server.is_hub:
                self._file(path.strip("/"))
            elif path.startswith("/cdn/"):
                with lock:
                    server.authorization.append(self.headers.get("Authorization"))
                self._file(path.removeprefix("/cdn/"))
            else:
                self._hub(path)

        def _hub(self, path: str) -> None:
            if server.token is not None and self.headers.get("Authorization") != f"Bearer {server.token}":
                return self._json({"error": "no"}, status=401, headers={"X-Error-Code": "GatedRepo"})
            api = re.fullmatch(rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+)|/tree/[^/]+(/(?P<sub>.*))?)?", path)
            if api and "/tree/" not in path:
                if api["revision"] not in (None, "main", "v2", COMMIT):
                    return self._json({"error": "no"}, status=404, headers={"X-Error-Code": "RevisionNotFound"})
                names = [{"rfilename": name} for name in self._names()]
                return self._json({"id": REPO, "sha": COMMIT, "siblings": names, "private": False, "tags": []})
            if api:
                return self._json(self._tree(api["sub"] or ""))
            if path.startswith("/api/models/"):
                return self._json({"error": "no"}, status=404, headers={"X-Error-Code": "RepoNotFound"})
            found = re.fullmatch(rf"/{REPO}/resolve/[^/]+/(?P<name>.+)", path)
            if found is None or not (server.folder / found["name"]).is_file():
                return self._json({"error": "no"}, status=404, headers={"X-Error-Code": "EntryNotFound"})
            etag = server.etag(found["name"])
            size = (server.folder / found["name"]).stat().st_size
            self.send_response(302)
            # To another host, as the Hub does, with a signature.
            host = server.url.replace("127.0.0.1", "localhost")
            self.send_header("Location", f"{host}/cdn/{found['name']}?X-Amz-Signature=sEcReT")
            for name, value in (
                ("X-Repo-Commit", COMMIT),
                ("X-Linked-Etag", f'"{etag}"'),
                ("X-Linked-Size", str(size)),
                ("ETag", f'"{etag}"'),
                ("Content-Length", "0"),
            ):
                self.send_header(name, value)
            self.end_headers()
            return None

        def _names(self) -> list[str]:
            return sorted(
                path.relative_to(server.folder).as_posix() for path in server.folder.rglob("*") if path.is_file()
            )

        def _tree(self, sub: str) -> list[dict[str, object]]:
            entries = []
            for path in sorted((server.folder / sub).iterdir()):
                name, size = path.relative_to(server.folder).as_posix(), path.stat().st_size
                if path.is_dir():
                    entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
                    continue
                entry = {"type": "file", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": size, "path": name}
                if not name.endswith(".json"):
                    entry["lfs"] = {"oid": server.etag(name), "size": size, "pointerSize": 134}
                entries.append(entry)
            return entries

        def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _file(self, name: str) -> None:
            path = server.folder / name
            if not path.is_file():
                return self._json({"error": "no such file"}, status=404)
            fault = Fault()
            if self.command == "GET" and not name.endswith(".json"):
                with lock:
                    fault = server.faults.popleft() if server.faults else server.always or fault
            if fault.status is not None:
                return self._json({"error": "fault"}, status=fault.status, headers=dict(fault.headers))
            size = path.stat().st_size
            start, stop, status = 0, size, 200
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted and not fault.ignore_range:
                start, status = int(wanted[1]), 206
                stop = min(size, int(wanted[2]) + 1 if wanted[2] else size)
            start, stop = max(0, start - fault.shift), min(size, max(stop - fault.shift, 1) + fault.more)
            headers = {"ETag": f'"{server.etag(name)}"', "Accept-Ranges": "bytes", "Content-Length": str(stop - start)}
            if status == 206:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self.send_response(status)
            for header, value in (headers | dict(fault.headers)).items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "HEAD":
                return None
            self.wfile.flush()
            if fault.delay:
                time.sleep(fault.delay)
            return self._body(
                path, start, stop if fault.cut_after is None else min(stop, start + fault.cut_after), stop
            )

        def _body(self, path: Path, start: int, until: int, stop: int) -> None:
            with path.open("rb") as file:
                file.seek(start)
                while start < until:
                    piece = file.read(min(2**18, until - start))
                    if server.rate is not None:
                        with lock:
                            free_at[0] = max(free_at[0], time.monotonic() - buffered) + len(piece) / server.rate
                            wait = free_at[0] - time.monotonic()
                        time.sleep(max(0.0, wait))
                    try:
                        self.wfile.write(piece)
                    except OSError:  # whoever asked has left
                        self.close_connection = True
                        return
                    with lock:
                        server.sent += len(piece)
                    start += len(piece)
            if until < stop:
                self.wfile.flush()
                self.close_connection = True

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: object) -> None:
            pass

    httpd = Quiet(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def first_then(fault: Fault, count: int = 1) -> deque[Fault]:
    """The same fault some times, and then no more."""
    return deque([replace(fault)] * count)
