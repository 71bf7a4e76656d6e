"""From packed rows to what a training step computes on: shifted targets, MTP inputs, positions, weights.

In a stretch of the stream that attention covers (a document, or a whole row where attention crosses
documents) token i predicts token i+1, and the MTP module of depth k ≥ 1 embeds token i+k at position i and
predicts token i+k+1 (V3 §2.2). A target beyond the stretch's end does not exist: its weight is 0.

Everything here is NumPy on the host, so that a thread prepares the next batches while the device works.
Shapes: R rows, C context (tokens in a row), T = R·C tokens of the stream, D MTP depths.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hadal.data.stream import Rows
from hadal.model.context import Context
from hadal.ops.attention import Spans

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Source(Protocol):
    """Where rows come from. `rows(start, count)` gives the same rows for the same numbers, always."""

    def rows(self, start: int, count: int) -> Rows: ...


@dataclass
class MicroBatch:
    """One forward pass, on the host or on the device. First index 0 is the main model, k the MTP module of
    depth k."""

    token_KT: Tensor  # int64 [D+1, T]: what is embedded
    target_KT: Tensor  # int64 [D+1, T]: what is predicted
    weight_KT: Tensor  # float32 [D+1, T]: how much the prediction counts
    counted_KT: (
        Tensor  # bool [D+1, T]: the embedded token exists and is no padding; others leave no statistics
    )
    position_T: Tensor  # int64
    start_S: Tensor  # int32: cu_seqlens, as a tensor like the others
    cu_seqlens: list[int]
    rows: int
    spans: Spans | None = None  # where only the device knows lengths (hadal/train/graphs.py)

    @property
    def tokens(self) -> int:
        return self.position_T.shape[0]

    def context(self, *, record_routing: bool = False) -> Context:
        """A fresh context for one forward pass."""
        return Context(self.position_T, self.cu_seqlens, record_routing=record_routing, spans=self.spans)

    @property
    def documents(self) -> int:
        """Stretches that attention covers, where they are not whole rows; 0 where they are."""
        count = len(self.cu_seqlens) - 1
        return 0 if self.cu_seqlens == list(range(0, self.tokens + 1, self.tokens // self.rows)) else count

    def to(self, device: torch.device) -> MicroBatch:
        """On the device; from pinned memory this does not wait."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin(self) -> MicroBatch:
        """In page-locked memory, from which copies to a GPU run beside everything else."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, f: Callable[[Tensor], Tensor]) -> MicroBatch:
        return MicroBatch(
            f(self.token_KT), f(self.target_KT), f(self.weight_KT), f(self.counted_KT), f(self.position_T),
            f(self.start_S), self.cu_seqlens, self.rows,
        )  # fmt: skip


@dataclass
class Batch:
    """One optimizer step: micro-batches and the sums of their weights, [D+1] in FP32."""

    micros: list[MicroBatch]
    weight_K: Tensor
    position: int  # rows consumed once this batch is done: where a resumed run goes on

    @property
    def tokens(self) -> int:
        return sum(micro.tokens for micro in self.micros)

    @property
    def rows(self) -> int:
        return sum(micro.rows for micro in self.micros)

    @property
    def attended_pairs(self) -> int:
        """Σ over attended stretches of length²: what attention costs."""
        return sum(
            (b - a) ** 2 for m in self.micros for a, b in zip(m.cu_seqlens, m.cu_seqlens[1:], strict=False)
        )

    def to(self, device: torch.device) -> Batch:
        weight_K = self.weight_K.to(device, non_blocking=True)
        return Batch([micro.to(device) for micro in self.micros], weight_K, self.position)

    def pin(self) -> Batch:
        return Batch([micro.pin() for micro in self.micros], self.weight_K.pin_memory(), self.position)


def build(rows: Rows, *, depths: int, mask_documents: bool) -> MicroBatch:
    """Shift tokens into targets. `mask_documents` False: attention, and prediction, cross documents in a
    row."""
    count, context = rows.token_RC.shape
    lengths = np.asarray(rows.lengths, dtype=np.int64)
    if lengths.sum() != count * context:
        raise ValueError(f"document lengths sum to {lengths.sum()}; the rows hold {count * context} tokens")
    counted_T = ~np.repeat(np.asarray(rows.padding, dtype=bool), lengths)
    stretches = lengths if mask_documents else np.full(count, context, dtype=np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(stretches)])
    at_T = np.arange(count * context)
    end_T = np.repeat(starts[1:], stretches)
    token_T, weight_T = rows.token_RC.reshape(-1), rows.weight_RC.reshape(-1) * counted_T
    token, weight, counted = [token_T], [weight_T], [counted_T]
    for shift in range(1, depths + 2):
        exists_T = at_T + shift < end_T
        from_T = np.where(exists_T, at_T + shift, 0)
        token.append(np.where(exists_T, token_T[from_T], 0))
        weight.append(np.where(exists_T, weight_T[from_T], 0))
        counted.append(exists_T & counted_T[from_T])
    return MicroBatch(  # depth k embeds what depth k−1 predicts
        token_KT=torch.from_numpy(np.stack(token[:-1]).astype(np.int64)),
        target_KT=torch.from_numpy(np.stack(token[1:]).astype(np.int64)),
        weight_KT=torch.from_numpy(np.stack(weight[1:]).astype(np.float32)),
        counted_KT=torch.from_numpy(np.stack(counted[:-1])),
        position_T=torch.from_numpy(at_T - np.repeat(starts[:-1], stretches)),
        start_S=torch.from_numpy(starts.astype(np.int32)),
        cu_seqlens=starts.tolist(),
        rows=count,
    )


def batches(
    source: Source,
    *,
    position: int,
    rows: int | Callable[[int], int],
    micro_rows: int,
    depths: int,
    mask_documents: bool,
) -> Iterator[Batch]:
    """Batches from row number `position` on, for ever, of `rows` rows (a number, or a function of the
    position that a batch begins at), cut into micro-batches of `micro_rows` (0: each batch is one)."""
    while True:
        count = rows if isinstance(rows, int) else rows(position)
        size = micro_rows or count
        micros = [
            build(source.rows(start, size), depths=depths, mask_documents=mask_documents)
            for start in range(position, position + count, size)
        ]
        position += count
        weight_K = (
            torch.stack([micro.weight_KT.sum(1, dtype=torch.float64) for micro in micros]).sum(0).float()
        )
        yield Batch(micros, weight_K, position)


class Prefetcher:
    """Runs an iterator of batches in a thread, `depth` batches ahead; on CUDA into pinned memory.

    Iterating gives batches on `device`. An error in the thread is raised at the next batch. Close it when
    done.
    """

    def __init__(self, source: Iterator[Batch], device: torch.device, depth: int = 4) -> None:
        self._source, self._device = source, device
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hadal-batches", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for batch in self._source:
                self._put(batch.pin() if self._device.type == "cuda" else batch)
                if self._closed.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: object) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # and at every later call
            raise item
        batch: Batch = item
        return batch.to(self._device)

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        self._thread.join(timeout=10)
