"""Convert a published folder into another, tensor by tensor: FP8 → BF16, BF16 → FP8, other dtypes.

Names and shapes stay; only how numbers are stored changes. Memory: a few pieces of 4 MiB, whatever the
model's size. FP8 to FP8 with the same blocks copies values through FP32, which is exact for power-of-two
scales only; so it is refused rather than done with loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hadal.config import Fp8
from hadal.ops.fp8 import dequantise_blocks
from hadal.ops.packed import Kind, dequantise
from hadal.weights.errors import WeightsError
from hadal.weights.folder import int_rows
from hadal.weights.layout import CONFIG, Folder, open_folder, read_config_json
from hadal.weights.manifest import Progress, verify_files
from hadal.weights.mapped import Mapping
from hadal.weights.names import CODES_SUFFIX, SCALE_SUFFIX, Slot
from hadal.weights.writer import DEFAULT_SHARD_BYTES, make_target, side_files, write_folder


@torch.no_grad()
def convert(
    source: str | Path,
    destination: str | Path,
    *,
    fp8: bool | Fp8 = False,
    ints: Literal["int8", "int4"] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Rewrite a folder in another number format, with its tokenizer files; returns `destination`.

    fp8: to FP8 blocks, the rest in `dtype`; ints: to integers in groups, as compressed-tensors packs them;
    neither: everything in `dtype` (gate biases stay FP32).
    verify: compare the source's files with their SHA-256 first. Raises WeightsError or ConfigError.
    """
    opened = open_folder(Path(source))
    if opened.config.fp8 is not None and fp8:
        raise WeightsError(f"{source} is in FP8 blocks already; convert to BF16, or copy the folder")
    if opened.config.ints is not None and ints is not None:
        bits = opened.config.ints.num_bits
        raise WeightsError(f"{source} is in {bits}-bit integers already; copy the folder")
    if verify:
        verify_files(opened.path, [*opened.files, CONFIG])
    target = make_target(opened.config, fp8, dtype, read_config_json(opened.path).get("hadal"), ints)
    with Mapping() as files:

        def rows(slot: Slot, height: int) -> Iterator[Tensor]:
            return _rows(opened, files, slot, height)

        return write_folder(
            Path(destination),
            target,
            rows,
            max_shard_bytes=max_shard_bytes,
            files=side_files(source),
            overwrite=overwrite,
            progress=progress,
        )


def _rows(folder: Folder, files: Mapping, slot: Slot, height: int) -> Iterator[Tensor]:
    """The rows of a stored tensor, dequantised to FP32 where it is in FP8 blocks."""
    if slot.name + CODES_SUFFIX in folder.stored:
        yield from _from_ints(folder, files, slot, height)
        return
    stored = folder.stored[slot.name]
    scale_at = folder.stored.get(slot.name + SCALE_SUFFIX)
    if scale_at is None or folder.config.fp8 is None:
        for _, _, rows in files.pieces(stored, height):
            yield rows
        return
    block = folder.config.fp8.weight_block_size
    scale = files.rows(scale_at, 0, scale_at.shape[0]).clone()
    files.release(scale_at, 0, scale_at.shape[0])
    for start, stop, rows in files.pieces(stored, block[0]):
        yield dequantise_blocks(rows, scale[start // block[0] : -(-stop // block[0])], block)


def _from_ints(folder: Folder, files: Mapping, slot: Slot, height: int) -> Iterator[Tensor]:
    """Dequantised rows in pieces of a multiple of `height`, but for the last."""
    ints = folder.config.ints
    assert ints is not None
    kept: list[Tensor] = []
    for _, stop, codes, scale in int_rows(folder, files, slot):
        kind: Kind = "int4" if ints.num_bits == 4 else "int8"
        width = slot.shape[1]
        kept.append(dequantise(codes, scale, kind, width, ints.group_size or width, 1, torch.float32))
        rows = torch.cat(kept)
        whole = rows.shape[0] if stop == slot.shape[0] else rows.shape[0] // height * height
        if whole:
            yield rows[:whole]
        kept = [rows[whole:]]
