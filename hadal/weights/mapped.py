"""Tensors of safetensors files as memory-mapped views, released page by page once they were read.

A mapped page counts as this process's memory until it is unmapped. Readers therefore take a tensor
in pieces of at most 4 MiB and give each piece back (`MADV_DONTNEED`) before the next: the peak is
the weights themselves plus a few pieces, however large the files are.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch
from torch import Tensor

from hadal.weights.errors import WeightsError
from hadal.weights.header import Stored

PIECE_BYTES = 4 << 20
# Touching a page maps its neighbours too, up to a whole 2 MiB folio of the page cache: released ones come
# back, and would stay. Measured (Linux 6.18, ext4, 1 GB in FP8): 109 MB left with 64 KiB here, 15 with 2 MiB.
_FAULT_WINDOW = max(2 << 20, mmap.PAGESIZE)
FP8_GROWTH = 4  # dequantising takes about 5 bytes beside each FP8 byte, in every thread: smaller pieces
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I64": torch.int64,
}
# Private and writable, because torch wants writable buffers; nothing is written, so nothing is copied, and
# NORESERVE (0x4000 on Linux, not yet a name in Python 3.11) keeps a large file from counting as memory.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0


class Mapping:
    """The mapped files of one folder; opened on first use, closed together. Safe to share between threads."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = Lock()

    def __enter__(self) -> Mapping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all files. A view that an error's traceback still holds keeps its file until it goes."""
        with self._lock:
            for mapped in self._maps.values():
                try:
                    mapped.close()
                except BufferError:
                    continue
            self._maps.clear()

    def rows(self, stored: Stored, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a stored tensor as a view of the file (a copy where it is misaligned)."""
        row_bytes = stored.nbytes // stored.shape[0] if stored.shape[0] else 0
        begin, n = stored.begin + start * row_bytes, (stop - start) * row_bytes
        dtype = DTYPES[stored.dtype]
        if not n:
            return torch.empty((stop - start, *stored.shape[1:]), dtype=dtype)
        raw = torch.frombuffer(self._open(stored.file), dtype=torch.uint8, count=n, offset=begin)
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(stop - start, *stored.shape[1:])

    def release(self, stored: Stored, start: int, stop: int) -> None:
        """Give the pages of rows [start, stop) back, with the neighbours that faulting them brought in.

        A neighbour that another thread reads is only brought in again: nothing mapped is ever changed.
        """
        if not hasattr(mmap, "MADV_DONTNEED") or not stored.shape[0]:
            return
        row_bytes = stored.nbytes // stored.shape[0]
        mapped = self._open(stored.file)
        begin = (stored.begin + start * row_bytes) // _FAULT_WINDOW * _FAULT_WINDOW
        end = -(-(stored.begin + stop * row_bytes) // _FAULT_WINDOW) * _FAULT_WINDOW
        end = min(end, len(mapped))
        if end > begin:
            mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def pieces(self, stored: Stored, multiple: int = 1) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows) in pieces of about 4 MiB, at least `multiple` rows, released after use."""
        for start, stop in piece_ranges(stored, multiple):
            yield start, stop, self.rows(stored, start, stop)
            self.release(stored, start, stop)

    def _open(self, path: Path) -> mmap.mmap:
        with self._lock:
            if path not in self._maps:
                try:
                    with path.open("rb") as file:
                        self._maps[path] = _map(file.fileno())
                except OSError as error:
                    raise WeightsError(f"cannot map {path}: {error.strerror or error}") from error
            return self._maps[path]


def piece_ranges(stored: Stored, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of at most 4 MiB each (at least `multiple` rows, the height of an FP8 block)."""
    rows = stored.shape[0]
    per_row = max(1, stored.nbytes // max(1, rows))
    limit = PIECE_BYTES // (FP8_GROWTH if stored.dtype == "F8_E4M3" else 1)
    step = max(multiple, limit // per_row // multiple * multiple)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _map(descriptor: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    size = os.fstat(descriptor).st_size
    flags = mmap.MAP_PRIVATE | _NORESERVE
    return mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
