"""Files of one commit of a repository on the Hub: `huggingface_hub` lists them (HfFileSystem) and asks for ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from esdtool.checkpoint.remote.ranges import Etags, check_answer, range_header
from esdtool.checkpoint.remote.store import Entry, RemoteStore


class HubStore(RemoteStore):
    """The files of a commit. What the Hub's cache on this machine has of it is read from there."""

    credentials = (
        "accept the repository's terms on the Hub if it has any, and set HF_TOKEN or log in with 'hf auth login'"
    )
    copy = "give --download to download the files instead"

    def __init__(self, repo: str, commit: str) -> None:
        """Stand before a repository of a model, `org/name`."""
        super().__init__()
        from huggingface_hub import HfFileSystem

        self._repo, self._commit = repo, commit
        self._filesystem: Any = HfFileSystem(skip_instance_cache=True)
        self._folders: dict[str, dict[str, Entry]] = {}
        self._etags = Etags()

    def shown(self, key: str) -> str:
        """Return the file's name on the Hub."""
        return f"hf://{self._repo}/{key}" if key else f"hf://{self._repo}"

    def entry(self, key: str) -> Entry | None:
        """Look a file up in the listing of its folder."""
        if not key:
            return Entry(key="", is_folder=True)
        folder, _, name = key.rpartition("/")
        try:
            return self.entries(folder).get(name)
        except FileNotFoundError:
            return None

    def entries(self, folder: str) -> Mapping[str, Entry]:
        """List a folder, once."""
        if folder not in self._folders:
            found = self._filesystem.ls(self._path(folder), detail=True)
            self._folders[folder] = {entry.key.rpartition("/")[2]: entry for entry in map(self._entry, found)}
        return self._folders[folder]

    @contextmanager
    def stream(self, entry: Entry, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        """Ask for a range, and look at the answer's head before its body."""
        from huggingface_hub import constants, utils

        library: Any = utils  # which declares its names lazily

        # The library's HfFileSystem would take whatever body comes into memory, and tell nothing of its etag. What is
        # tried again, and from where, is decided in `transfer`: the library would begin again at the first byte.
        with library.http_stream_backoff(
            "GET",
            self._filesystem.url(self._path(entry.key)),
            headers={**library.build_hf_headers(), **range_header(start, stop)},
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),
            retry_on_status_codes=(),
        ) as response:
            library.hf_raise_for_status(response)
            check_answer(response.status_code, response.headers, entry, start, stop)
            for answer in (*response.history, response):  # the Hub's own, which leads to a store of objects, and its
                etag = answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag")
                self._etags.check(f"{answer.url.host} {entry.key}", etag)
            yield response.iter_bytes()

    def local(self, key: str) -> Path | None:
        """Return the file in the Hub's cache."""
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(self._repo, key, revision=self._commit)
        return Path(found) if isinstance(found, str) else None

    def _path(self, key: str) -> str:
        root = f"{self._repo}@{quote(self._commit, safe='')}"
        return f"{root}/{key}" if key else root

    def _entry(self, info: Mapping[str, Any]) -> Entry:
        key = str(info["name"]).removeprefix(self._path("")).lstrip("/")
        lfs = info.get("lfs") or {}
        identity = lfs.get("sha256") or info.get("blob_id")
        is_folder = info.get("type") == "directory"
        return Entry(key=key, is_folder=is_folder, size=int(info.get("size") or 0), identity=identity)
