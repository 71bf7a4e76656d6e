"""Download a model through `huggingface_hub`: checked before, resumed after a cut, verified after.

Before: the architecture is one that we run, the files are safetensors, the disk has room. Meanwhile: a note
in the cache keeps others from using it. After: size and hash of every file (SHA-256 of large ones, Git's
SHA-1 of small ones) are compared with what the hub says; a wrong file is deleted, and the model does not
count as there.

HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning. The token goes to the endpoint's
own origin and nowhere else, whatever it redirects to; plain HTTP is for loopback addresses only.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hadal.config import PRESETS, ConfigError, ModelConfig, suggest
from hadal.weights import hub
from hadal.weights.errors import NotFoundError, PullError
from hadal.weights.layout import CONFIG, read_config
from hadal.weights.manifest import blob_of

Progress = Callable[[int, int], None]
_VERIFIED = ".hadal-verified.json"
_WANTED = re.compile(
    r"(?:config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|chat_template\.json"
    r"|model\.safetensors\.index\.json|model[A-Za-z0-9._-]*\.safetensors|chat_template\.jinja"
    r"|README\.md|LICENSE[A-Za-z0-9._-]*"
)
_SPARE_BYTES = 64 << 20
_WORKERS = 4


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the hub describes it: `sha256` of large (LFS) files, Git's `sha1` else."""

    name: str
    size: int
    sha256: str | None
    sha1: str | None


@dataclass(frozen=True)
class Remote:
    """A revision of a repository and those of its files that we take."""

    repo: str
    commit: str
    files: list[RemoteFile]

    @property
    def nbytes(self) -> int:
        return sum(f.size for f in self.files)


def pull(
    name: str,
    progress: Progress | None = None,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download a model and return its folder; at once when it is there and verified.

    progress: called with (bytes here, bytes in all), from a thread of its own. Raises NotFoundError (no
    such repository, with near names) and PullError (gated, offline, no space, wrong format or architecture,
    cut, wrong bytes); after a PullError the same command goes on with the files that are whole.
    """
    if (mine := hub.on_board(hub.safe_model_name(name))) is not None:
        return hub.resolve(mine)
    repo = hub.repo_of(name)
    storage = hub.storage_of(repo)
    if _offline():
        if hub.incompleteness(storage) is None:
            return hub.resolve(repo)
        raise PullError(f"{name} is not here and HF_HUB_OFFLINE=1 forbids the network; unset it to pull")
    endpoint = _endpoint(endpoint)
    with _explained(name, repo, endpoint):
        remote = describe(repo, revision, endpoint)
        check_space(remote, storage)
        _check_architecture(remote, endpoint)
        hub.note_pulling(storage, remote.commit)
        folder = _fetch(remote, storage, revision, endpoint, progress)
    verify(remote, storage, folder)
    hub.done_pulling(storage)
    if progress is not None:
        progress(remote.nbytes, remote.nbytes)
    return folder


def fetch_config(name: str, *, endpoint: str | None = None) -> ModelConfig:
    """The configuration alone of a model on the hub. NotFoundError, PullError, or ConfigError."""
    from huggingface_hub import hf_hub_download

    repo = hub.repo_of(name)
    if _offline():
        raise PullError(
            f"{name} is not here and HF_HUB_OFFLINE=1 forbids the network; unset it to look it up"
        )
    endpoint = _endpoint(endpoint)
    with _explained(name, repo, endpoint):
        _guard_token(endpoint)
        path = hf_hub_download(repo, CONFIG, endpoint=endpoint, cache_dir=hub.cache_dir())
    return read_config(Path(path).parent)


def describe(repo: str, revision: str | None, endpoint: str) -> Remote:
    """What a repository holds, and that it is safetensors. One request; nothing is downloaded."""
    from huggingface_hub import HfApi

    _guard_token(endpoint)
    info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True)
    siblings = info.siblings or []
    names = [s.rfilename for s in siblings]
    files = [
        RemoteFile(s.rfilename, int(s.size or 0), s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in siblings
        if _WANTED.fullmatch(s.rfilename)
    ]
    if info.sha is None or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise PullError(f"{endpoint} names no revision of {repo}; is HF_ENDPOINT a hub?")
    if not any(f.name.endswith(".safetensors") for f in files):
        other = next(
            (n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf", ".pkl", ".onnx"))), None
        )
        holds = f"it holds {other}" if other else "it holds no weights"
        raise PullError(
            f"{repo} has no *.safetensors ({holds}); pickle can run code, and is never downloaded or read"
        )
    if CONFIG not in names:
        raise PullError(f"{repo} has no {CONFIG}; it is not a model that can be run")
    return Remote(repo, info.sha, files)


def check_space(remote: Remote, storage: Path) -> None:
    """Room for what is still missing, before anything is downloaded. PullError: needed, free, and where."""
    missing = sum(f.size for f in remote.files if not _blob(storage, f).is_file())
    place = storage
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if missing and missing + _SPARE_BYTES > free:
        raise PullError(
            f"{remote.repo} needs {_gigabytes(missing)} more and {hub.cache_dir()} has {_gigabytes(free)} "
            "free; free space there, or set HF_HOME to a folder on a larger disk"
        )


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n:,} bytes"


def _blob(storage: Path, file: RemoteFile) -> Path:
    """Where the cache keeps a file's content: under its hash, as the hub's ETag gives it."""
    return storage / "blobs" / (file.sha256 or file.sha1 or file.name)


def _check_architecture(remote: Remote, endpoint: str) -> None:
    """Read `config.json` first: what cannot run is not downloaded."""
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(
        remote.repo, CONFIG, revision=remote.commit, endpoint=endpoint, cache_dir=hub.cache_dir()
    )
    try:
        read_config(Path(path).parent)
    except ConfigError as error:
        raise PullError(f"{remote.repo} cannot run here, nothing more was downloaded: {error}") from error


def _fetch(
    remote: Remote, storage: Path, revision: str | None, endpoint: str, progress: Progress | None
) -> Path:
    """Download what is missing; whole files of an earlier try are kept. The folder of the revision."""
    from huggingface_hub import snapshot_download

    with _quiet(), _reporting(remote, storage, progress):
        folder = snapshot_download(
            remote.repo,
            revision=revision,
            endpoint=endpoint,
            cache_dir=hub.cache_dir(),
            allow_patterns=[f.name for f in remote.files],
            max_workers=_WORKERS,
        )
    if Path(folder).name != remote.commit:
        raise PullError(f"{remote.repo} changed on the hub while it was downloaded; pull it again")
    return Path(folder)


# --- verification ------------------------------------------------------------------------------------------
def verify(remote: Remote, storage: Path, folder: Path) -> None:
    """Compare every file with the hub's size and hash; delete what is wrong, and say which. PullError.

    Files that were verified before and have not changed since (size, time) are not read again.
    """
    seen = _read_verified(storage)
    todo = [f for f in remote.files if seen.get(f.name) != _stamp(folder / f.name)]
    with ThreadPoolExecutor(_WORKERS, "hadal-verify") as pool:
        faults = [fault for fault in pool.map(lambda f: _fault(folder, f), todo) if fault]
    if faults:
        raise PullError(f"{remote.repo}: {faults[0]}; the file was deleted, pull again")
    stamps = {f.name: _stamp(folder / f.name) for f in remote.files}
    (storage / _VERIFIED).write_text(json.dumps(stamps), encoding="utf-8")


def _fault(folder: Path, file: RemoteFile) -> str | None:
    path = folder / file.name
    if not path.is_file():
        return f"{file.name} is missing after the download"
    actual, expected = path.stat().st_size, file.size
    if actual != expected:
        _delete(path)
        return f"{file.name} has {actual:,} bytes, the hub says {expected:,}"
    found, wanted = git_or_sha256(path, file), file.sha256 or file.sha1
    if wanted is not None and found != wanted:
        _delete(path)
        return f"{file.name} has the wrong bytes: hash {found}, the hub says {wanted}"
    return None


def git_or_sha256(path: Path, file: RemoteFile) -> str:
    """SHA-256 of the bytes for large files, Git's blob SHA-1 for those that Git itself stores."""
    if file.sha256 is not None:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _delete(path: Path) -> None:
    """A wrong file, the blob that it points to, and what that points to in a shared store."""
    for place in (path.resolve(), blob_of(path), path):
        if place is not None:
            place.unlink(missing_ok=True)


def _stamp(path: Path) -> list[int] | None:
    if not path.is_file():
        return None
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _read_verified(storage: Path) -> dict[str, list[int]]:
    """What an earlier pull verified; an unreadable record only means reading the files again."""
    try:
        found = json.loads((storage / _VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# --- progress ----------------------------------------------------------------------------------------------
@contextmanager
def _reporting(remote: Remote, storage: Path, progress: Progress | None) -> Iterator[None]:
    """Report the bytes in the cache a few times a second, however huggingface_hub fetches them."""
    if progress is None:
        yield
        return
    done = threading.Event()

    def here() -> int:
        blobs = storage / "blobs"
        whole = sum(f.size for f in remote.files if _blob(storage, f).is_file())
        parts = 0
        for part in blobs.glob("*.incomplete") if blobs.is_dir() else ():
            try:
                parts += part.stat().st_size
            except FileNotFoundError:  # just became whole
                continue
        return min(remote.nbytes, whole + parts)

    def report() -> None:
        while not done.wait(0.2):
            progress(here(), remote.nbytes)

    thread = threading.Thread(target=report, name="hadal-pull-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of huggingface_hub's own."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# --- the network -------------------------------------------------------------------------------------------
def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def default_endpoint() -> str:
    """HF_ENDPOINT, else https://huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _endpoint(endpoint: str | None) -> str:
    """The hub's address: https, or http on a loopback address."""
    url = (endpoint or default_endpoint()).rstrip("/")
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return url
    if parts.scheme == "http" and _is_loopback(parts.hostname or ""):
        return url
    raise PullError(
        f"HF_ENDPOINT is {url!r}; it must be an https:// address (http:// only for this machine itself)"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _guard_token(endpoint: str) -> None:
    """Take the Authorization header off every request to another origin than the endpoint's.

    huggingface_hub sends it to huggingface.co as well when a mirror redirects there. The hook sits in its
    shared client, and is put in again when that was made anew.
    """
    from huggingface_hub import get_session

    client: Any = get_session()
    hooks = client.event_hooks
    others = [h for h in hooks.get("request", []) if not isinstance(h, _TokenGuard)]
    hooks["request"] = [*others, _TokenGuard(_origin(endpoint))]
    client.event_hooks = hooks


class _TokenGuard:
    def __init__(self, origin: tuple[str, str, int]) -> None:
        self._origin = origin

    def __call__(self, request: Any) -> None:
        if _origin(str(request.url)) != self._origin and "authorization" in request.headers:
            del request.headers["authorization"]


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"https": 443}.get(parts.scheme, 80)


@contextmanager
def _explained(name: str, repo: str, endpoint: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into one line with a remedy."""
    try:
        yield
    except (PullError, NotFoundError, ConfigError):
        raise
    except Exception as error:
        explained = _explain(error, name, repo, endpoint)
        if explained is None:
            raise
        raise explained from error


def _explain(error: Exception, name: str, repo: str, endpoint: str) -> PullError | NotFoundError | None:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return PullError(
            f"{repo} is gated: accept its terms at {endpoint}/{repo}, then set HF_TOKEN to a token of that "
            "account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(f"{repo} has no such revision; leave it out for the newest")
    if isinstance(error, errors.RepositoryNotFoundError):
        near = suggest(repo, [p.repo_id for p in PRESETS.values() if p.repo_id])
        return NotFoundError(f"{endpoint} has no model {repo}, or it is private (then set HF_TOKEN).{near}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return PullError(
            f"{endpoint} refuses {repo} (HTTP {status}); set HF_TOKEN to a token that may read it"
        )
    if status is not None:
        return PullError(f"{endpoint} answered HTTP {status} for {repo}; try `hadal pull {name}` again later")
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, OSError) or library in (
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
        "huggingface_hub",
    ):
        text = " ".join(str(error).split())[:200]
        return PullError(
            f"downloading {repo} from {endpoint} was cut ({type(error).__name__}: {text}); "
            f"`hadal pull {name}` goes on with the files that are whole"
        )
    return None
