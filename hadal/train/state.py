"""Checkpoints: safetensors + JSON, hashed, atomic; complete or absent.

    ROOT/step-00001200/tensors-00001.safetensors …   masters, moments, gate biases, random states, by name
                       state.json                    step, tokens, data position, the resolved recipe
                       manifest.json                 bytes and SHA-256 of every other file; written last

A checkpoint is written into a hidden folder, flushed to the disk, and renamed: a process killed at any
moment leaves the old checkpoints, or the old and the new. Tensors are named after parameters, never after
ranks or buffers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hadal.weights.writer import sync_to_disk

FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(tmp|old)-step-\d{8,}")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be trusted or does not fit the run; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on the disk."""

    path: Path
    step: int


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    shard_mib: int = 1024,
    keep: int = 2,
) -> Checkpoint:
    """Write a checkpoint of `step` below `root` and drop all but the newest `keep`. Returns once it is on
    the disk.

    Tensors may live on any device. A complete checkpoint of the same step is the same state: it stands.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    final, temporary = root / f"step-{step:08d}", root / f".tmp-step-{step:08d}"
    if (final / "manifest.json").is_file():
        return Checkpoint(final, step)
    temporary.mkdir()
    for number, shard in enumerate(_shards(tensors, shard_mib * 2**20), start=1):
        save_file(shard, temporary / f"tensors-{number:05d}.safetensors")
    _write_json(temporary / "state.json", {"format": FORMAT, **state, "step": step})
    files = sorted(temporary.iterdir())
    for file in files:
        sync_to_disk(file)
    _write_json(
        temporary / "manifest.json", {"format": FORMAT, "files": {f.name: _fingerprint(f) for f in files}}
    )
    sync_to_disk(temporary / "manifest.json")
    sync_to_disk(temporary)
    if final.exists():  # it has lost its manifest: no checkpoint
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync_to_disk(root)
    for old in checkpoints(root)[:-keep]:
        os.rename(old.path, root / f".old-{old.path.name}")
    _remove_leftovers(root)
    return Checkpoint(final, step)


def checkpoints(root: Path) -> list[Checkpoint]:
    """The complete checkpoints below `root`, oldest first (their hashes are checked when one is loaded)."""
    if not root.is_dir():
        return []
    found = [
        (m, p) for p in root.iterdir() if (m := _STEP.fullmatch(p.name)) and (p / "manifest.json").is_file()
    ]
    return sorted((Checkpoint(p, int(m[1])) for m, p in found), key=lambda c: c.step)


def latest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    found = checkpoints(root)
    return found[-1] if found else None


def load(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, state). Every file's hash is checked first; raises CheckpointError."""
    path = checkpoint.path
    manifest = _read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest.get('format')!r}; this version reads {FORMAT}"
        )
    for name, want in manifest["files"].items():
        _check(path / name, want)
    tensors: dict[str, Tensor] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            try:
                with safe_open(path / name, framework="pt") as file:
                    tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            except SafetensorError as error:
                raise CheckpointError(f"{path / name} cannot be read: {error}") from None
    return tensors, _read_json(path / "state.json")


# --- files ---
def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Groups of at most `limit` bytes each (a tensor above it stands alone), contiguous and on the CPU."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        copy = tensor.detach().cpu().contiguous()
        shard[name] = (
            copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy
        )  # flat buffers share storage
        size += tensor.nbytes
    if shard:
        yield shard


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _check(path: Path, want: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; delete {path.parent} to resume from the checkpoint before it"
        )
    if _fingerprint(path) != dict(want):
        raise CheckpointError(
            f"{path} is damaged (its bytes do not have the recorded SHA-256); delete {path.parent} to resume "
            "from the checkpoint before it"
        )


def _remove_leftovers(root: Path) -> None:
    for path in root.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value
