"""A checkpoint on the Hugging Face Hub: read where it is by ranges of bytes, or downloaded as a whole if it is small.

`huggingface_hub` does the work and honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn
from urllib.parse import unquote

from esdtool.checkpoint.base import Checkpoint
from esdtool.checkpoint.formats import weight_suffixes
from esdtool.checkpoint.jsonfiles import read_index
from esdtool.checkpoint.layout import (
    INDEX_SUFFIX,
    KNOWN_NAMES,
    WeightChoice,
    choose_weights,
    config_name,
    is_weight_file,
)
from esdtool.checkpoint.local import open_choice
from esdtool.checkpoint.opening import open_place
from esdtool.checkpoint.remote.path import RemotePath
from esdtool.errors import CheckpointError, MissingExtraError, UsageError
from esdtool.support.words import one_line

_SMALL_BYTES = 10**9
"""Below so many bytes of weights a repository is downloaded: the next command then needs no network."""

_HUB_URL = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(pr|convert)/[^/@]+|[^/@]+))?(/(?P<path>[^@]*))?", re.ASCII
)
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})(@(?P<revision>[^\s@]+))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class HubId:
    """A repository on the Hub and which of its revisions."""

    repo: str
    revision: str | None
    path: str = ""
    """A folder or a file of the repository; empty for all of it."""

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_hub_id(text: str, revision: str | None = None) -> HubId | None:
    """`org/name` or `org/name@revision`; None for what can only be a path.

    >>> parse_hub_id("meta/llama@v2")
    HubId(repo='meta/llama', revision='v2', path='')
    >>> parse_hub_id("runs/best.pt") is None
    True

    Raises:
        UsageError: if `revision` contradicts the one in the text.
    """
    match = _HUB_ID.fullmatch(text)
    if match is None or match["repo"].lower().endswith((*weight_suffixes(), ".json")):
        return None
    if revision and match["revision"] and revision != match["revision"]:
        raise UsageError(f"{text}: names revision {match['revision']!r}, but {revision!r} is asked for; give one")
    return HubId(repo=match["repo"], revision=match["revision"] or revision)


def parse_hub_url(text: str, revision: str | None = None) -> HubId | None:
    """`hf://org/name[@revision][/path]`; None for what does not begin so.

    >>> parse_hub_url("hf://meta/llama@v2/original")
    HubId(repo='meta/llama', revision='v2', path='original')

    Raises:
        UsageError: if `revision` contradicts the one in the text.
        CheckpointError: if it is a URL of something else on the Hub.
    """
    if not text.startswith("hf://"):
        return None
    match = _HUB_URL.fullmatch(text)
    if match is None or match["repo"].partition("/")[0] in ("datasets", "spaces", "buckets"):
        raise CheckpointError(f"{text}: not a model on the Hub; write hf://org/name[@revision][/path]")
    named = unquote(match["revision"]) if match["revision"] else None
    if revision and named and revision != named:
        raise UsageError(f"{text}: names revision {named!r}, but {revision!r} is asked for; give one")
    return HubId(repo=match["repo"], revision=named or revision, path=(match["path"] or "").strip("/"))


def without_revision(location: str) -> str:
    """Return a location on the Hub without its revision, to be opened at another one.

    >>> without_revision("org/name@v2"), without_revision("hf://org/name@v2/sub")
    ('hf://org/name', 'hf://org/name/sub')
    """
    found = parse_hub_url(location) or parse_hub_id(location)
    if found is None:
        return location
    return f"hf://{found.repo}/{found.path}" if found.path else f"hf://{found.repo}"


def open_hub(hub_id: HubId, *, location: str, download: bool | None = None) -> Checkpoint:
    """Open what is needed of a repository.

    Args:
        hub_id: the repository.
        location: what the user named, for messages.
        download: True downloads the files (unless cached), False reads headers now and tensors later, by ranges. None:
            a repository of less than 1 GB of weights is downloaded.

    Raises:
        MissingExtraError: if `huggingface_hub` is not installed.
        CheckpointError: if the repository or revision does not exist, is gated, or cannot be reached.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError(f"{location}: no such file or directory; reading it as a Hub id", "hub") from error

    try:
        details = huggingface_hub.model_info(hub_id.repo, revision=hub_id.revision)
    # Whichever HTTP library is underneath, its errors come in several families.
    except Exception as error:
        snapshot = None if _is_verdict(error) else _cached_snapshot(hub_id)
        if snapshot is None:
            _fail(error, hub_id, location)
        checkpoint = _open_snapshot(hub_id, snapshot.name, [entry.name for entry in snapshot.iterdir()], location)
        note = f"{location}: the Hub was not asked ({type(error).__name__}); the cached commit {snapshot.name} is read"
        return replace(checkpoint, notes=(note, *checkpoint.notes))
    commit = details.sha or hub_id.revision or "main"
    names = [file.rfilename for file in details.siblings or ()]
    if not download:
        place = _place(hub_id, commit)
        if place is not None and (download is False or not _is_small(place)):
            return replace(open_place(place, location=location), location=location, revision=commit)
    return _open_snapshot(hub_id, commit, names, location)


def _place(hub_id: HubId, commit: str) -> RemotePath | None:
    """Find a folder or a file of a commit to read it where it is; None if the Hub does not list its files."""
    from esdtool.checkpoint.remote.hub import HubStore

    place = RemotePath(key=hub_id.path, store=HubStore(hub_id.repo, commit))
    try:
        place.store.entries("")
    except Exception:
        return None  # downloading fails, too, and says why
    return place


def _is_small(place: RemotePath) -> bool:
    """Return whether all weights of a folder together are few enough to download them."""
    folder = place if place.is_dir() else place.parent
    entries = place.store.entries(folder.key)
    return sum(entry.size for name, entry in entries.items() if is_weight_file(name)) < _SMALL_BYTES


def _open_snapshot(hub_id: HubId, commit: str, names: list[str], location: str) -> Checkpoint:
    """Fetch the chosen files of one commit into the cache and open them there."""
    folder, choice = _choose(hub_id, names, location)
    if choice.kind == "dcp":
        raise CheckpointError(
            f"{location}: holds only a torch.distributed.checkpoint, which is not read from the Hub; "
            "download it and name its folder"
        )
    # The first file goes by the user's own revision, so that the cache learns which commit it means and
    # answers offline; the rest by commit, so that all are of one.
    weights = _fetch(hub_id.repo, folder + choice.file, hub_id.revision, hub_id, location)
    if f"/{commit}/" not in weights.as_posix():
        weights = _fetch(hub_id.repo, folder + choice.file, commit, hub_id, location)
    if folder + choice.config in names:
        _fetch(hub_id.repo, folder + choice.config, commit, hub_id, location)
    if choice.kind == "index":
        for shard in read_index(weights).shards:
            _fetch(hub_id.repo, folder + shard, commit, hub_id, location)
    for name in choice.beside:
        _fetch(hub_id.repo, folder + name, commit, hub_id, location)
    return open_choice(weights.parent, choice, location=location, revision=commit)


def _choose(hub_id: HubId, names: list[str], location: str) -> tuple[str, WeightChoice]:
    """Choose the weights: (the folder with a slash at its end, what to open there)."""
    if hub_id.path in names:
        folder, slash, name = hub_id.path.rpartition("/")
        kind: Literal["single", "index"] = "index" if name.endswith(INDEX_SUFFIX) else "single"
        return folder + slash, WeightChoice(kind=kind, file=name, config=config_name(name))
    folder = f"{hub_id.path}/" if hub_id.path else ""
    inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    if folder and not inside:
        raise CheckpointError(f"{location}: the repository {hub_id.repo} has no such file or folder")
    return folder, choose_weights([name for name in inside if "/" not in name], location=location)


def _fetch(repo: str, name: str, revision: str | None, hub_id: HubId, location: str) -> Path:
    """Path in the cache of one file of the repository."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
    except Exception as error:
        _fail(error, hub_id, location, name)


def _cached_snapshot(hub_id: HubId) -> Path | None:
    """Folder in the cache of the revision, if any of its files was fetched before."""
    import huggingface_hub

    for name in ("config.json", "adapter_config.json", *KNOWN_NAMES):
        found = huggingface_hub.try_to_load_from_cache(hub_id.repo, name, revision=hub_id.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _is_verdict(error: Exception) -> bool:
    """Return whether the Hub itself has said no, so that the cache must not answer in its stead."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, HFValidationError | RepositoryNotFoundError | RevisionNotFoundError)


def _fail(error: Exception, hub_id: HubId, location: str, name: str = "") -> NoReturn:
    """Raise the library's error as one line that says what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{location}: {name}" if name else location
    if isinstance(error, GatedRepoError):
        message = f"{what}: access to this repository is gated; accept its terms on the Hub and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        message = (
            f"{what}: no such file or directory, and no such repository on the Hub (if it is private, set HF_TOKEN)"
        )
    elif isinstance(error, RevisionNotFoundError):
        message = f"{what}: the repository {hub_id.repo} has no revision {hub_id.revision!r}"
    elif isinstance(error, HFValidationError):
        message = f"{what}: no such file or directory, and not a valid Hub id"
    elif isinstance(error, OfflineModeIsEnabled):
        message = (
            f"{what}: no such file or directory, and not in the Hub cache while HF_HUB_OFFLINE is set; "
            "download it first"
        )
    elif isinstance(error, LocalEntryNotFoundError):
        message = f"{what}: not in the Hub cache, and the Hub cannot be reached; download it first"
    elif isinstance(error, EntryNotFoundError):
        message = f"{what}: the repository {hub_id.repo} has no such file"
    else:
        wanted = "" if name else "no such file or directory, and "
        message = f"{what}: {wanted}the Hub cannot be reached: {type(error).__name__}: {one_line(error)}"
    raise CheckpointError(message) from error
