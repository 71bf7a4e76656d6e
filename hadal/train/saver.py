"""Checkpoints beside the training: what is to be saved is copied at once, and written by a thread.

A step changes masters and moments in place, so the copy must be whole before the next one. On an accelerator
it is taken in the device's own order, into pinned memory that is kept from one save to the next, and the host
does not wait for it. One save is on its way at a time: the next waits for it, and so do a resumption's
reader, the end of the run and `close`. A process that dies meanwhile leaves the older checkpoints, as
`state.save` promises. An error of the thread is raised by the next call here.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hadal.train import state


class Saver:
    """Writes checkpoints below `root` with `state.save`, one at a time."""

    def __init__(self, root: Path, *, shard_mib: int = 1024, keep: int = 2) -> None:
        self.root, self.shard_mib, self.keep = root, shard_mib, keep
        self._host: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hadal-saver")
        self._work: Future[state.Checkpoint] | None = None

    def start(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
    ) -> state.Checkpoint | None:
        """Save `step` while others work; returns the save before, if nobody has been told of it. Afterwards
        `tensors` may change."""
        before = self.wait()
        arrived = self._copy(tensors)
        self._work = self._pool.submit(self._write, step, dict(self._host), dict(meta), arrived)
        return before

    def _copy(self, tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
        """Copies of all tensors in host memory; the event, when they will be complete."""
        if self._host.keys() != tensors.keys():
            self._host = {
                name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for name, t in tensors.items()
            }
        for name, tensor in tensors.items():
            self._host[name].copy_(tensor.detach(), non_blocking=True)
        if not any(t.is_cuda for t in tensors.values()):
            return None
        arrived = torch.cuda.Event()
        arrived.record()
        return arrived

    def _write(
        self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], arrived: torch.cuda.Event | None
    ) -> state.Checkpoint:
        if arrived is not None:
            arrived.synchronize()
        return state.save(self.root, step, tensors, meta, shard_mib=self.shard_mib, keep=self.keep)

    def poll(self) -> state.Checkpoint | None:
        """The save that has just reached the disk, told once; raises what stopped it."""
        return self.wait() if self._work is not None and self._work.done() else None

    def wait(self) -> state.Checkpoint | None:
        """Wait for the save on its way, if there is one; told once. Raises what stopped it."""
        work, self._work = self._work, None
        return None if work is None else work.result()

    def close(self) -> None:
        """Wait for what is on its way and end the thread; raises nothing."""
        self._pool.shutdown(wait=True)
