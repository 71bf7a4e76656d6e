"""`manifest.json`: the size and SHA-256 of every file of a folder, written last.

safetensors notices neither flipped bits nor a shard swapped for another of the same shape; a hash does.
`save` and `convert` write a manifest; folders from the hub have none, but the hub's cache names each large
file by its SHA-256 (`blobs/<sha256>`), which serves as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hadal.weights.errors import WeightsError

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class FileHash:
    size: int
    sha256: str


def hash_file(path: Path, report: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read in pieces; `report` gets the size of each piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            if report is not None:
                report(len(piece))
    return digest.hexdigest()


def folder_revision(folder: Path) -> str:
    """SHA-256 over names and contents of what decides a model's vectors: weights, configuration,
    tokenizer."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
    total = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", *names):
        total.update(f"{name}\0{hash_file(folder / name)}\n".encode())
    return total.hexdigest()


def write_manifest(folder: Path, files: Mapping[str, FileHash]) -> None:
    """Write `manifest.json` for files that are there already."""
    table = {name: {"size": f.size, "sha256": f.sha256} for name, f in sorted(files.items())}
    (folder / MANIFEST).write_text(
        json.dumps({"version": 1, "files": table}, indent=1) + "\n", encoding="utf-8"
    )


def read_manifest(folder: Path) -> dict[str, FileHash] | None:
    """File name → size and hash, or None without a manifest. WeightsError when it is malformed."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != 1:
            raise ValueError(f"version {raw['version']!r}, this code reads 1")
        files = {str(k): FileHash(int(v["size"]), str(v["sha256"])) for k, v in raw["files"].items()}
        bad = next(
            (k for k, v in files.items() if "/" in k or "\\" in k or not _SHA256.fullmatch(v.sha256)), None
        )
        if bad is not None:
            raise ValueError(f"entry {bad!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is malformed ({error}); remove it, or save the model again") from error
    return files


def known_hashes(folder: Path) -> dict[str, FileHash]:
    """The hashes that files should have: from the manifest, else from the hub cache's blob names."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest
    found: dict[str, FileHash] = {}
    for path in folder.iterdir():
        blob = blob_of(path)
        if blob is not None and _SHA256.fullmatch(blob.name):
            if not blob.is_file():
                raise WeightsError(f"{path.name} points to a missing file {blob}; pull the model again")
            found[path.name] = FileHash(blob.stat().st_size, blob.name)
    return found


def blob_of(path: Path) -> Path | None:
    """The blob that a file of the hub's cache points to (one step: it may point into a shared store)."""
    if not path.is_symlink():
        return None
    blob = path.parent / path.readlink()
    return blob if blob.parent.name == "blobs" else None


def verify_files(folder: Path, needed: list[str], progress: Progress | None = None) -> None:
    """Compare every file of the manifest with its hash; `needed` files must be covered.

    WeightsError names the file and both hashes, or the file that no hash covers.
    """
    hashes = known_hashes(folder)
    for name in needed:
        if name not in hashes:
            raise WeightsError(
                f"{folder / name} has no known SHA-256 ({MANIFEST} or hub cache); "
                'load with verify="header", or save the model again to get a manifest'
            )
    check_sizes(folder, hashes)
    total, done = sum(f.size for f in hashes.values()), 0
    for name, expected in hashes.items():

        def report(n: int) -> None:
            nonlocal done
            done += n
            if progress is not None:
                progress(done, total)

        actual = hash_file(folder / name, report)
        if actual != expected.sha256:
            raise WeightsError(
                f"{folder / name} is corrupt: SHA-256 is {actual}, expected {expected.sha256}; "
                "fetch the file again"
            )


def check_sizes(folder: Path, hashes: Mapping[str, FileHash]) -> None:
    """Every file of a manifest is there with its size (quick; `verify_files` reads the contents)."""
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{path} is listed in {MANIFEST} but missing; fetch the file again")
        if path.stat().st_size != expected.size:
            raise WeightsError(
                f"{path} has {path.stat().st_size:,} bytes, {MANIFEST} says {expected.size:,}; "
                "fetch the file again"
            )
