"""A moving average of the weights, in FP32 on the host (DeepSeek-V3 report §3.2.3).

    e ← e + (1 − r_t)·(w − e)      r_t = min(rate, (1 + t)/(10 + t)) at the t-th update

w are the FP32 masters; the first updates forget the random start quickly. The average costs no memory of an
accelerator: there the masters are copied to pinned memory after the update, and a thread blends them in
while the next step runs. V3 keeps one to see early how the model will do once the learning rate has decayed;
its rate is not published. Gate biases are not averaged: they are a controller's state, not weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from hadal.train.optimizer import AdamW


class Ema:
    """The average of an optimizer's masters. `every`: steps between two updates; `rate` is that of one step,
    so that its horizon does not depend on `every`."""

    def __init__(self, optimizer: AdamW, rate: float, every: int = 1) -> None:
        if not 0 < rate < 1 or every < 1:
            raise ValueError(f"an average needs a rate in (0, 1) and every ≥ 1, got {rate} and {every}")
        self.optimizer, self.rate, self.every = optimizer, rate, every
        self._on_device = optimizer.master_N.is_cuda
        self._staging_N, self._pool = torch.empty(0), None
        if self._on_device:
            self._staging_N = torch.empty_like(optimizer.master_N, device="cpu", pin_memory=True)
            self._alive = torch.ones((), pin_memory=True)
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="hadal-ema")
        self._work: Future[None] | None = None
        self.average_N = optimizer.master_N.to("cpu", copy=True)

    def share(self, step: int) -> float:
        """How much of the new weights enters at `step`."""
        update = step // self.every
        return 1.0 - min(self.rate**self.every, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self, step: int, alive: Tensor) -> None:
        """Blend in the masters as `step` left them; at `alive` 0 (a dead step) nothing changes, bit for bit.
        On an accelerator this returns at once, after waiting for the blend before."""
        if step % self.every:
            return
        if self._pool is None:
            self.average_N.lerp_(self.optimizer.master_N, self.share(step) * alive)
            return
        self.wait()  # the staging buffer is free again
        self._staging_N.copy_(self.optimizer.master_N, non_blocking=True)
        self._alive.copy_(alive, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._work = self._pool.submit(self._blend, arrived, self.share(step))

    def _blend(self, arrived: torch.cuda.Event, share: float) -> None:
        arrived.synchronize()
        self.average_N.lerp_(self._staging_N, share * self._alive)

    def wait(self) -> None:
        """Until every update made so far is in the average; raises what the thread raised."""
        if self._work is not None:
            self._work.result()
            self._work = None

    def state(self) -> dict[str, Tensor]:
        """Views of the average as `ema.NAME`."""
        self.wait()
        return {
            f"ema.{slot.name}": view for slot, view in zip(self.optimizer.slots, self._views(), strict=True)
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state()` gave. Raises ValueError on another model's."""
        own = self.state()
        if own.keys() != state.keys() or any(own[n].shape != state[n].shape for n in own):
            odd = sorted(own.keys() ^ state.keys())[:3]
            raise ValueError(
                f"the checkpoint's moving average does not fit the model: {odd or 'other shapes'}"
            )
        for name, view in own.items():
            view.copy_(state[name])

    def _views(self) -> list[Tensor]:
        return [self.average_N[s.start : s.end].view(s.shape) for s in self.optimizer.slots]

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model holds the average inside the block, and the masters again behind it."""
        self.wait()
        try:
            with torch.no_grad():
                torch._foreach_copy_(self.optimizer.parameters, self._views())
                self.optimizer.wrote()
            yield
        finally:
            self.optimizer.to_model()

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
