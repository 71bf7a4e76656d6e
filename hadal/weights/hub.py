"""The models on this machine, by name: resolve, list, remove; `pull` fetches more.

Names: `hadal-mini` and `hadal-mini-dense` (in the package), a preset (`deepseek-r1-distill-qwen-1.5b`),
`org/repo` of the hub, or, from the command line only, a folder. Downloads live in the cache of
`huggingface_hub` (HF_HOME, HF_HUB_CACHE), so that other programs share them; nothing in this file opens a
socket. A download counts only when it is complete and verified: while one is under way a note lies in its
cache folder, and `resolve` refuses it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hadal.config import PRESETS, ConfigError, ModelConfig, Preset, preset, suggest
from hadal.weights.errors import HubError, NotFoundError, WeightsError
from hadal.weights.layout import CONFIG, INDEX, SINGLE, read_config, read_index
from hadal.weights.manifest import MANIFEST, blob_of

ON_BOARD = ("hadal-mini", "hadal-mini-dense")  # in the package; the first is what Hadal runs by default
PULLING = ".hadal-pulling"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,95}"
_NAME = re.compile(rf"{_PART}(?:/{_PART})?")
_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_WHERE = "`hadal show` lists the models that Hadal knows"


@dataclass(frozen=True)
class ModelEntry:
    """A complete model here. `modified`: seconds since 1970; `digest`: SHA-256 over its file hashes."""

    name: str
    path: Path
    size_bytes: int
    modified: float
    digest: str
    config: ModelConfig


def safe_model_name(name: str) -> str:
    """A name from a request, as it is, or without Ollama's `:latest`. HubError for anything like a path."""
    plain = name.removesuffix(":latest")
    if not _NAME.fullmatch(plain) or plain.endswith((".", ".git", ".ipynb")):
        raise HubError(
            f"{name[:100]!r} is not a model name such as {ON_BOARD[0]} or org/repo; folders are not accepted"
        )
    return plain


def find_preset(name: str) -> Preset | None:
    """The preset of that name or hub address, or None."""
    try:
        return preset(name)
    except ConfigError:
        return next((p for p in PRESETS.values() if p.repo_id and p.repo_id.lower() == name.lower()), None)


def repo_of(name: str) -> str:
    """`org/repo` of a preset, or of a name that is one already; else HubError or NotFoundError."""
    name = safe_model_name(name)
    known = find_preset(name)
    if known is not None:
        if known.repo_id is None:
            raise HubError(f"{known.name} is part of Hadal; there is nothing to download")
        return known.repo_id
    if "/" not in name:
        raise NotFoundError(
            f"unknown model {name!r}.{suggest(name.lower(), PRESETS)} {_WHERE}; others are org/repo"
        )
    return name


def resolve(name_or_path: str | Path) -> Path:
    """The folder of a model on this machine. Never touches the network.

    Raises NotFoundError with the command that fetches it, or with near names. Give it names that passed
    `safe_model_name` when they come from a request: it also takes folders.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")):
        return _folder(Path(name).expanduser())
    if (mine := on_board(name)) is not None:
        return _asset(mine)
    if find_preset(name) is None and (Path(name) / CONFIG).is_file():
        return Path(name)
    repo = repo_of(name)
    storage = storage_of(repo)
    fault = incompleteness(storage)
    if fault is None:
        return _snapshot(storage)
    if storage.is_dir():
        raise NotFoundError(f"{name} is only partly here ({fault}); `hadal pull {name}` goes on with it")
    raise NotFoundError(f"{name} is not on this machine; `hadal pull {name}` downloads it")


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise NotFoundError(f"there is no folder {path}; give a model folder or a name, {_WHERE}")
    return path


def on_board(name: str) -> str | None:
    """The model of the package that a name means, or None."""
    plain = name.removesuffix(":latest").lower()
    return plain if plain in ON_BOARD else None


def is_here(name: str) -> bool:
    """Whether the package has that model: one that is not trained yet is not on board."""
    return (_ASSETS / name / CONFIG).is_file()


def _asset(name: str) -> Path:
    if is_here(name):
        return _ASSETS / name
    remedy = "install Hadal again"
    if name != ON_BOARD[0]:
        remedy = "`hadal r1 recipes/r1/mini.toml` makes it, benchmarks/adopt_mini.py puts it there"
    raise NotFoundError(f"{name} is missing from {_ASSETS / name}; {remedy}")


# --- the cache ---------------------------------------------------------------------------------------------
def cache_dir() -> Path:
    """The cache of huggingface_hub (HF_HUB_CACHE, else $HF_HOME/hub)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def storage_of(repo: str) -> Path:
    """The cache folder of a repository."""
    return cache_dir() / ("models--" + repo.replace("/", "--"))


def _snapshot(storage: Path) -> Path:
    """The folder of the revision that `main` points to, else of the newest one."""
    ref = storage / "refs" / "main"
    if ref.is_file():
        commit = ref.read_text(encoding="utf-8").strip()
        if re.fullmatch(r"[0-9a-f]{40}", commit) and (storage / "snapshots" / commit).is_dir():
            return storage / "snapshots" / commit
    snapshots = storage / "snapshots"
    found = [p for p in snapshots.iterdir() if p.is_dir()] if snapshots.is_dir() else []
    if not found:
        raise NotFoundError(f"{storage} holds no files")
    return max(found, key=lambda p: p.stat().st_mtime)


def incompleteness(storage: Path) -> str | None:
    """Why a cached repository cannot be used, or None: a download under way, files that are missing."""
    if not storage.is_dir():
        return "not downloaded"
    if (storage / PULLING).exists():
        return "its download was cut or is under way"
    try:
        folder = _snapshot(storage)
        if not (folder / CONFIG).is_file():
            return f"no {CONFIG}"
        if not (folder / INDEX).is_file():
            return None if (folder / SINGLE).is_file() else f"no {SINGLE}"
        shards = set(read_index(folder).values())
    except WeightsError as error:
        return str(error)
    missing = sum(not (folder / shard).is_file() for shard in shards)
    return f"{missing} of {len(shards)} weight files are missing" if missing else None


# --- list and remove ---------------------------------------------------------------------------------------
def list_models() -> list[ModelEntry]:
    """Every complete model that can run here: those on board first, then the newest."""
    found = [entry for storage in _storages() if (entry := _cached_entry(storage)) is not None]
    found.sort(key=lambda e: -e.modified)
    return [*(entry_of(name, _ASSETS / name) for name in ON_BOARD if is_here(name)), *found]


def _storages() -> Iterator[Path]:
    root = cache_dir()
    return (p for p in sorted(root.glob("models--*--*")) if p.is_dir()) if root.is_dir() else iter(())


def _cached_entry(storage: Path) -> ModelEntry | None:
    """None for what this package cannot run: other architectures, other formats, half downloads."""
    if incompleteness(storage) is not None:
        return None
    repo = storage.name.removeprefix("models--").replace("--", "/", 1)
    known = find_preset(repo)
    try:
        return entry_of(known.name if known else repo, _snapshot(storage))
    except (WeightsError, ConfigError):
        return None


def entry_of(name: str, folder: Path) -> ModelEntry:
    """The entry of a complete folder. WeightsError or ConfigError when it is none."""
    config = read_config(folder)
    files = [p for p in folder.iterdir() if p.is_file()]
    return ModelEntry(
        name=name,
        path=folder,
        size_bytes=sum(p.stat().st_size for p in files),
        modified=max(p.stat().st_mtime for p in files),
        digest=digest(folder),
        config=config,
    )


def digest(folder: Path) -> str:
    """SHA-256 over names and hashes of a folder's files: the same for the same model, wherever it lies.

    Hashes come from the manifest, else from the names of the hub cache's blobs; small folders without
    either are read; of large ones (over 64 MiB) the sizes stand in.
    """
    total = hashlib.sha256()
    manifest = folder / MANIFEST
    if manifest.is_file():
        total.update(manifest.read_bytes())
        return total.hexdigest()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        blob = blob_of(path)
        if blob is not None:
            identity = blob.name
        elif path.stat().st_size <= 64 << 20:
            identity = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            identity = str(path.stat().st_size)
        total.update(f"{path.name}\0{identity}\n".encode())
    return total.hexdigest()


def remove(name: str) -> None:
    """Delete a downloaded model, all its revisions. HubError for those on board and for folders."""
    if name.startswith((".", "/", "~")) or (find_preset(name) is None and Path(name).is_dir()):
        raise HubError(f"{name} is a folder of yours, not a download; delete it yourself")
    if (mine := on_board(safe_model_name(name))) is not None:
        raise HubError(f"{mine} is part of Hadal; it goes when Hadal is uninstalled")
    repo = repo_of(name)
    storage = storage_of(repo)
    if not storage.is_dir():
        have = [entry.name for entry in list_models()]
        raise NotFoundError(
            f"{name} is not on this machine.{suggest(name.lower(), have)} `hadal list` shows what is"
        )
    _delete_revisions(storage)
    for place in (storage, cache_dir() / ".locks" / storage.name):
        if place.exists():
            shutil.rmtree(place)


def _delete_revisions(storage: Path) -> None:
    """Let huggingface_hub drop what repositories share; the caller removes what it leaves."""
    from huggingface_hub import scan_cache_dir

    cache = scan_cache_dir(cache_dir())
    commits = [r.commit_hash for repo in cache.repos if repo.repo_path == storage for r in repo.revisions]
    if commits:
        cache.delete_revisions(*commits).execute()


def pull(name: str, progress: Callable[[int, int], None] | None = None, **options: str | None) -> Path:
    """Download a model, verified; see `hadal.weights.download.pull`."""
    from hadal.weights.download import pull as download

    return download(name, progress, **options)


def note_pulling(storage: Path, commit: str) -> None:
    """Mark a repository as not to be used until `done_pulling`."""
    storage.mkdir(parents=True, exist_ok=True)
    (storage / PULLING).write_text(json.dumps({"commit": commit}), encoding="utf-8")


def done_pulling(storage: Path) -> None:
    (storage / PULLING).unlink(missing_ok=True)
