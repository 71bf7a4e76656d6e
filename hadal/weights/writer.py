"""Write a published folder: sharded safetensors, index, `config.json`, `manifest.json`; whole or not at all.

Tensors are written in pieces as they come, so that neither a model nor a shard is ever held twice; the
SHA-256 of each file is computed on the way. With `fp8`, exactly the matrices that DeepSeek stores in FP8
(V3 report §3.3; attention, FFN and expert projections) become E4M3 blocks with `weight_scale_inv`; the
rest is BF16, gate biases FP32. The folder is built beside its place, synced, and renamed into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from hadal.config import Fp8, IntGroups, ModelConfig
from hadal.model.transformer import Transformer
from hadal.ops.fp8 import quantise_blocks
from hadal.ops.packed import GROUP, Kind, quantise, to_words
from hadal.text.processor import completed
from hadal.weights.errors import WeightsError
from hadal.weights.folder import place
from hadal.weights.header import DTYPE_BYTES
from hadal.weights.layout import CONFIG, INDEX, SINGLE
from hadal.weights.manifest import FileHash, Progress, hash_file, write_manifest
from hadal.weights.mapped import PIECE_BYTES
from hadal.weights.names import GROUPS_SUFFIX, SCALE_SUFFIX, Expected, Slot, expected_tensors
from hadal.weights.quantise import packed_weights

DEFAULT_SHARD_BYTES = 5_000_000_000
TOKENIZER = "tokenizer.json"
SIDE_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
)
_FIXED = {
    "float32": "F32",
    "scale": "F32",
    "fp8": "F8_E4M3",
    "codes": "I32",
    "groups": "BF16",
    "shape": "I64",
}
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

RowReader = Callable[[Slot, int], Iterator[Tensor]]
"""(slot, height) → the rows of a tensor, top to bottom, in pieces of a multiple of `height` rows."""


@dataclass(frozen=True)
class Target:
    """What is written: a configuration (with `fp8` or without) and the dtype of what is not quantised."""

    config: ModelConfig
    dtype: torch.dtype
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def dtype_name(self, expected: Expected) -> str:
        return _FIXED.get(expected.dtype) or _DTYPE_NAMES[self.dtype]


@torch.no_grad()
def save(
    model: Transformer,
    folder: str | Path,
    *,
    fp8: bool | Fp8 = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, Any] | None = None,
    files_from: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model as a published folder, and return its path.

    fp8: quantise in blocks (True: 128×128 with FP32 scales; `Fp8(scale_fmt="ue8m0")`: power-of-two scales).
    dtype: of what is not quantised (default: BF16 with fp8, else the model's). metadata: kept in
    `config.json` under "hadal". files_from: a folder whose tokenizer and generation files are copied; a
    tokenizer that wants BOS and has no post-processor gets one (hadal/text/processor.py).
    Raises WeightsError: the folder exists (and not `overwrite`), a packed model, a NaN or infinity by name,
    no space.
    """
    for name, packed in packed_weights(model).items():
        raise WeightsError(
            f"{name} is packed in {packed.kind}, its own values are gone; save the model that it was packed "
            "from, or convert the folder"
        )
    target = make_target(model.config, fp8, dtype or (torch.bfloat16 if fp8 else model.dtype), metadata)
    state = model.state_dict()

    def rows(slot: Slot, height: int) -> Iterator[Tensor]:
        whole = place(state, slot)
        per_row = max(1, whole[0].numel() * whole.element_size())
        step = max(height, PIECE_BYTES // per_row // height * height)
        for start in range(0, whole.shape[0], step):
            yield whole[start : start + step].cpu()

    return write_folder(
        Path(folder),
        target,
        rows,
        max_shard_bytes=max_shard_bytes,
        files=side_files(files_from),
        overwrite=overwrite,
        progress=progress,
    )


def make_target(
    config: ModelConfig,
    fp8: bool | Fp8,
    dtype: torch.dtype,
    metadata: Mapping[str, Any] | None = None,
    ints: Literal["int8", "int4"] | None = None,
) -> Target:
    """The configuration of what will be written. WeightsError for dtypes that folders do not hold."""
    if ints is not None:
        if fp8:
            raise WeightsError(f"a folder is in FP8 blocks or in {ints}, not both; leave one out")
        # the names by which other loaders know what was left alone
        ignore = ("lm_head", "re:.*kv_b_proj$", "re:.*mlp\\.gate$", "re:.*eh_proj$")
        groups = IntGroups(4 if ints == "int4" else 8, GROUP[ints], ignore)
        return Target(replace(config, fp8=None, ints=groups), dtype, metadata or {})
    if dtype not in _DTYPE_NAMES:
        raise WeightsError(
            f"cannot write {dtype}; folders hold {', '.join(map(str, _DTYPE_NAMES))}, or FP8 blocks"
        )
    if fp8 is True:
        fp8 = config.fp8 or Fp8()
    return Target(replace(config, fp8=fp8 or None, ints=None), dtype, metadata or {})


def side_files(source: str | Path | None) -> list[Path]:
    """The tokenizer and generation files of a folder."""
    if source is None:
        return []
    return [Path(source) / name for name in SIDE_FILES if (Path(source) / name).is_file()]


def write_folder(
    folder: Path,
    target: Target,
    rows: RowReader,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    files: Iterable[Path] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a folder tensor by tensor from a reader of rows (a model's, or another folder's)."""
    if folder.exists() and not overwrite:
        raise WeightsError(f"{folder} exists already; remove it, or save with overwrite=True")
    expected = expected_tensors(target.config)
    shards = plan_shards(expected, target, max_shard_bytes)
    total = sum(_nbytes(e, target) for e in expected.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_space(folder.parent, total)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".saving", dir=folder.parent))
    try:
        _write_files(building, target, expected, shards, rows, list(files), progress)
        _publish(building, folder)
    except OSError as error:
        raise WeightsError(
            f"cannot write {folder}: {error.strerror or error}; free space or choose another"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def plan_shards(expected: Mapping[str, Expected], target: Target, limit: int) -> list[list[str]]:
    """Names by shard, in order, each shard at most `limit` bytes (a larger tensor has one to itself)."""
    if limit < 1:
        raise WeightsError(f"max_shard_bytes is {limit}; it must be at least 1")
    shards: list[list[str]] = []
    room = 0
    for name, e in expected.items():
        n = _nbytes(e, target)
        if not shards or n > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= n
    return shards


def _nbytes(expected: Expected, target: Target) -> int:
    n = DTYPE_BYTES[target.dtype_name(expected)]
    for size in expected.shape:
        n *= size
    return n


def _check_space(place_: Path, needed: int) -> None:
    free = shutil.disk_usage(place_).free
    if needed > free:
        raise WeightsError(f"saving needs {needed:,} bytes and {place_} has {free:,} free; free space there")


def _write_files(
    building: Path,
    target: Target,
    expected: Mapping[str, Expected],
    shards: list[list[str]],
    rows: RowReader,
    files: list[Path],
    progress: Progress | None,
) -> None:
    hashes: dict[str, FileHash] = {}
    total, done = sum(_nbytes(e, target) for e in expected.values()), 0
    scales: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        shard = SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (building / shard).open("wb") as file:
            out = _HashingFile(file)
            out.write(_header(names, expected, target))
            for name in names:
                _write_tensor(out, name, expected[name], target, rows, scales)
                weight_map[name] = shard
                done += _nbytes(expected[name], target)
                if progress is not None:
                    progress(done, total)
            hashes[shard] = out.finish()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        hashes[INDEX] = _write_json(building / INDEX, index)
    hashes[CONFIG] = _write_json(building / CONFIG, _config_json(target))
    for source in files:
        made = building / source.name
        shutil.copyfile(source, made)
        if source.name == TOKENIZER and (text := completed(source.parent)) is not None:
            made.write_text(text, encoding="utf-8")
        hashes[source.name] = FileHash(made.stat().st_size, hash_file(made))
    write_manifest(building, hashes)


def _config_json(target: Target) -> dict[str, Any]:
    """The published `config.json`; under "hadal" the writer's metadata beside our own settings."""
    config = target.config.to_hf() | {"torch_dtype": str(target.dtype).removeprefix("torch.")}
    ours = {**target.metadata, **config.get("hadal", {})}
    return config | ({"hadal": ours} if ours else {})


def _header(names: list[str], expected: Mapping[str, Expected], target: Target) -> bytes:
    """Length and JSON of a safetensors header, padded with spaces to a multiple of 8 bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in names:
        e = expected[name]
        end = begin + _nbytes(e, target)
        table[name] = {"dtype": target.dtype_name(e), "shape": list(e.shape), "data_offsets": [begin, end]}
        begin = end
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _write_tensor(
    out: _HashingFile,
    name: str,
    expected: Expected,
    target: Target,
    rows: RowReader,
    scales: dict[str, Tensor],
) -> None:
    """One tensor, piece by piece. Scales are kept from the weight, which comes just before them."""
    slot, config = expected.slot, target.config
    if expected.dtype in ("scale", "groups"):
        out.write_tensor(scales.pop(name))
        return
    if expected.dtype == "shape":
        out.write_tensor(torch.tensor(slot.shape, dtype=torch.int64))
        return
    dtype = torch.float32 if expected.dtype == "float32" else target.dtype
    block = config.fp8.weight_block_size if config.fp8 is not None else (1, 1)
    found: list[Tensor] = []
    for piece in rows(slot, block[0]):
        _check_finite(name, piece)
        if expected.dtype == "fp8":
            power_of_two = config.fp8 is not None and config.fp8.scale_fmt == "ue8m0"
            quantised, scale = quantise_blocks(piece, block, power_of_two)
            found.append(scale)
            out.write_tensor(quantised)
        elif expected.dtype == "codes":
            words, scale = _words(piece, config)
            found.append(scale)
            out.write_tensor(words)
        else:
            converted = piece.to(dtype)
            _check_finite(name, converted)
            out.write_tensor(converted)
    if found and expected.dtype == "codes":
        scales[slot.name + GROUPS_SUFFIX] = torch.cat(found)
    elif found:
        scales[name + SCALE_SUFFIX] = torch.cat(found)


def _words(piece: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Rows in integers: (words int32, scales BF16)."""
    assert config.ints is not None
    kind: Kind = "int4" if config.ints.num_bits == 4 else "int8"
    codes, scale = quantise(piece, kind, config.ints.group_size or piece.shape[1])
    return to_words(codes, kind), scale


def _check_finite(name: str, piece: Tensor) -> None:
    low, high = torch.aminmax(piece)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise WeightsError(f"{name} holds NaN or infinity in {piece.dtype}; it is not written")


class _HashingFile:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._size += len(data)
        self._file.write(data)

    def write_tensor(self, tensor: Tensor) -> None:
        """The little-endian bytes of a tensor, without a copy where it is contiguous."""
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        self.write(raw.numpy().data)

    def finish(self) -> FileHash:
        """Sync to disk; the size and hash of what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileHash(self._size, self._digest.hexdigest())


def _write_json(path: Path, value: Any) -> FileHash:
    raw = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    path.write_bytes(raw)
    return FileHash(len(raw), hashlib.sha256(raw).hexdigest())


def _publish(building: Path, folder: Path) -> None:
    """Sync a finished folder and rename it into place; an old one is moved aside first, and removed after."""
    for path in building.iterdir():
        sync_to_disk(path)
    sync_to_disk(building)
    building.chmod(0o755)
    if not folder.exists():
        building.rename(folder)
    else:
        aside = building.with_suffix(".old")
        folder.rename(aside)
        try:
            building.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        shutil.rmtree(aside)
    sync_to_disk(folder.parent)


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
