"""The header of a safetensors file, read with every check that the format promises (no torch).

A file is: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets: [begin,
end]}}, data. Published libraries accept duplicate keys, and mapping a truncated file ends in a bus error;
so the header is checked here before anything is mapped: sizes, dtypes, shapes, no gap, no overlap, no
duplicate, a cap on the tensor count.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from hadal.weights.errors import WeightsError

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 250_000  # V3 has 91,991
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_REMEDY = "download or copy the file again"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file: `begin`/`end` are byte offsets from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path) -> dict[str, Stored]:
    """Name → place of every tensor in a file. WeightsError names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise WeightsError(
                    f"{path.name} is not a whole safetensors file: {size:,} bytes, and its header claims "
                    f"{length:,} (at most {MAX_HEADER_BYTES:,}); {_REMEDY}"
                )
            raw = file.read(length)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    table = _parse(path, raw)
    start = 8 + length
    found = {
        name: _entry(path, name, value, start) for name, value in table.items() if name != "__metadata__"
    }
    _check_layout(path, found, start, size)
    return found


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise WeightsError(f"{path.name} lists {twice!r} twice in its header; {_REMEDY}")
        return seen

    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path.name} has a header that is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(table, dict):
        raise WeightsError(
            f"{path.name} has a header that is a JSON {type(table).__name__}, not an object; {_REMEDY}"
        )
    if len(table) > MAX_TENSORS:
        raise WeightsError(f"{path.name} lists {len(table):,} tensors; at most {MAX_TENSORS:,} are read")
    return table


def _entry(path: Path, name: str, value: Any, start: int) -> Stored:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{path.name}: the header entry of {name} is malformed; {_REMEDY}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise WeightsError(f"{path.name}: {name} has dtype {dtype!r}; readable are {', '.join(DTYPE_BYTES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise WeightsError(f"{path.name}: {name} has shape {shape!r} and offsets {offsets!r}; {_REMEDY}")
    begin, end = offsets
    needed = prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != needed:
        raise WeightsError(
            f"{path.name}: {name} {dtype} {shape} needs {needed:,} bytes, its offsets give "
            f"{end - begin:,}; {_REMEDY}"
        )
    return Stored(path, dtype, tuple(shape), start + begin, start + end)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_layout(path: Path, found: dict[str, Stored], start: int, size: int) -> None:
    """Tensors follow one another without gap or overlap up to the end of the file."""
    position = start
    for name, stored in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != position:
            kind = "overlaps the tensor before it" if stored.begin < position else "leaves a gap before it"
            raise WeightsError(f"{path.name}: {name} {kind}; {_REMEDY}")
        position = stored.end
    if position != size:
        fault = "truncated" if size < position else "longer than its header says"
        raise WeightsError(f"{path.name} is {fault}: {size:,} bytes instead of {position:,}; {_REMEDY}")
