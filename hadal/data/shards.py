"""Token shards: flat files of integers that are memory-mapped, with a manifest that names and hashes them.

    NAME.bin        token ids, little-endian uint16, or uint32 for a large vocabulary; documents end to end
    NAME.len        the documents' lengths in tokens, little-endian uint32
    manifest.json   what is in the folder: tokens, documents, SHA-256 of each file, and how they were made

The manifest is written last and atomically, so a folder without one was never finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "hadal-shards-1"
Tokens = NDArray[np.uint16 | np.uint32]
DTYPES = {"uint16": "<u2", "uint32": "<u4"}


class ShardError(ValueError):
    """A folder of shards that cannot be read, or is not what its manifest says."""


@dataclass(frozen=True)
class ShardFile:
    """One shard: its name without ending, its size, the SHA-256 of its two files, and the type of its ids."""

    name: str
    tokens: int
    documents: int
    bin_sha256: str
    len_sha256: str
    dtype: str = "uint16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ShardError(f"shard {self.name} has ids of type {self.dtype!r}; known: {', '.join(DTYPES)}")

    @property
    def bytes(self) -> int:
        """Size of the .bin file."""
        return self.tokens * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """All shards of a folder, in order. `made_by` is free: seed, split, tokenizer, ..."""

    shards: tuple[ShardFile, ...]
    made_by: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


def write_shard(
    folder: Path, name: str, documents: Sequence[Sequence[int]] | tuple[Tokens, NDArray[np.uint32]]
) -> ShardFile:
    """Write one shard from token lists (16 bits an id), or from (all tokens, lengths)."""
    if isinstance(documents, tuple):
        tokens, lengths = documents
    else:
        lengths = np.array([len(document) for document in documents], dtype=np.uint32)
        flat = np.array([token for document in documents for token in document], dtype=np.int64)
        if flat.size and (flat.min() < 0 or flat.max() > 0xFFFF):
            raise ShardError(f"token id {int(flat.max())} does not fit 16 bits; shards hold ids up to 65535")
        tokens = flat.astype(np.uint16)
    if int(lengths.sum()) != len(tokens):
        raise ShardError(
            f"shard {name}: document lengths sum to {int(lengths.sum())}, but there are {len(tokens)} tokens"
        )
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "uint32" if tokens.dtype == np.uint32 else "uint16"
    hashes = [
        _write(folder / f"{name}.bin", tokens.astype(DTYPES[dtype]).tobytes()),
        _write(folder / f"{name}.len", lengths.astype("<u4").tobytes()),
    ]
    return ShardFile(name, len(tokens), len(lengths), hashes[0], hashes[1], dtype)


def _write(path: Path, data: bytes) -> str:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
    return hashlib.sha256(data).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish a folder."""
    data = {
        "format": FORMAT,
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "made_by": dict(manifest.made_by),
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    _write(folder / "manifest.json", (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, its fields checked. Raises ShardError."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ShardError(
            f"{path} does not exist: the folder holds no finished shards; `hadal data prepare` makes them"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ShardError(f"{path} has format {data['format']!r}; this version reads {FORMAT!r}")
        shards = tuple(ShardFile(**entry) for entry in data["shards"])
        manifest = Manifest(shards, data["made_by"])
        counts = (data["tokens"], data["documents"])
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not a manifest of shards: {error!r}; write the shards again") from None
    if any(Path(shard.name).name != shard.name for shard in shards):
        raise ShardError(f"{path} names a shard outside its folder")
    if counts != (manifest.tokens, manifest.documents):
        raise ShardError(
            f"{path} says {counts[0]} tokens in all, its shards {manifest.tokens}; write the shards again"
        )
    return manifest


def verify_shards(folder: Path) -> Manifest:
    """Read everything and compare with the hashes. Raises ShardError naming the file."""
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        for ending, wanted in ((".bin", shard.bin_sha256), (".len", shard.len_sha256)):
            path = folder / (shard.name + ending)
            if not path.is_file():
                raise ShardError(f"{path} is missing; write the shards again")
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != wanted:
                raise ShardError(
                    f"{path} has SHA-256 {found[:12]}…, its manifest says {wanted[:12]}…; write it again"
                )
    return manifest


def open_shard(folder: Path, shard: ShardFile) -> tuple[Tokens, NDArray[np.uint32]]:
    """(tokens, lengths) of a shard, the tokens memory-mapped read-only; their sizes are checked."""
    path = folder / f"{shard.name}.bin"
    if not path.is_file() or path.stat().st_size != shard.bytes:
        size = path.stat().st_size if path.is_file() else "no"
        raise ShardError(f"{path} has {size} bytes, its manifest says {shard.bytes}; write the shards again")
    dtype = DTYPES[shard.dtype]
    tokens: Tokens = np.memmap(path, dtype=dtype, mode="r") if shard.tokens else np.empty(0, dtype=dtype)
    lengths = np.fromfile(folder / f"{shard.name}.len", dtype="<u4")
    if len(lengths) != shard.documents or int(lengths.sum()) != shard.tokens:
        raise ShardError(f"{folder / shard.name}.len does not fit {path.name}; write the shards again")
    return tokens, lengths
