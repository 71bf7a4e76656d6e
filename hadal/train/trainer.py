"""The training step: load → forward → backward → reduce → balance → update.

On an accelerator the host never waits for the device inside a step: statistics travel back on their own and
are read when they have arrived. A loss or a gradient that is not finite lowers `alive`, a scalar on the
device, for good: from that step on no update changes anything, so that whenever the host learns of it,
weights, moments and biases are those from before the bad step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hadal.model.transformer import Transformer
from hadal.train.balance import max_violation, update_biases
from hadal.train.batches import Batch
from hadal.train.ema import Ema
from hadal.train.graphs import PassGraphs
from hadal.train.losses import Objective, correction_biases
from hadal.train.nonfinite import NonFiniteError, describe
from hadal.train.optimizer import AdamW
from hadal.train.passes import Measured, passes
from hadal.train.schedules import Knobs, Schedule

AHEAD = 2
"""Steps that the host may be ahead of the device: so late it learns of a number that is not finite."""

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, in place, and returns it: the one place where a step hears of others."""


def alone(value: Tensor) -> Tensor:
    """The reduction of a single device."""
    return value


@dataclass
class Progress:
    """Where a run stands. `position`: rows consumed."""

    step: int = 0
    tokens: int = 0
    position: int = 0


@dataclass(frozen=True)
class StepStats:
    """What one step measured, on the host."""

    step: int
    tokens: int  # seen once the step was done
    knobs: Knobs
    loss: float  # main
    mtp_loss: float
    balance_loss: float  # Σ f P over gates, without α; one gate in perfect balance gives 1
    grad_norm: float  # before clipping
    max_violation: float  # mean over gates
    max_violation_worst: float
    rows: tuple[int, int] = (0, 0)  # the batch: rows [first, end) of the data's order


@dataclass
class _Pending:
    """A step whose statistics are on their way."""

    progress: Progress
    knobs: Knobs
    batch: Batch
    values: Tensor
    arrived: torch.cuda.Event | None

    def ready(self) -> bool:
        return self.arrived is None or self.arrived.query()


@dataclass
class Trainer:
    """A model, its optimizer and a stream of batches. `step()` makes one update."""

    model: Transformer
    optimizer: AdamW
    batches: Iterator[Batch]
    schedule: Schedule
    objective: Objective = field(default_factory=Objective)
    reduce: Reduce = alone
    ema: Ema | None = None
    progress: Progress = field(default_factory=Progress)
    graphs: PassGraphs | None = None  # of the same model and optimizer

    def __post_init__(self) -> None:
        self.alive = torch.ones((), device=self.model.device)
        self.biases = correction_biases(self.model)
        self.load_GE: Tensor | None = None  # tokens per gate and expert since `take_load`
        self._pending: deque[_Pending] = deque()

    def step(self) -> list[StepStats]:
        """One optimizer step. Returns the statistics of the steps that have arrived by now (of earlier ones,
        on an accelerator). Raises NonFiniteError, naming the step and the place, with the update not
        applied."""
        batch = next(self.batches)  # load
        knobs = self.schedule.at(self.progress.tokens + batch.tokens)
        parts, count_GE = self._passes(batch, self.reduce(batch.weight_K), knobs)  # forward, backward
        parts, count_GE = self.reduce(parts), self.reduce(count_GE)  # reduce
        self.reduce(self.optimizer.grad_N)
        norm = self.optimizer.grad_norm()
        self.alive = self.alive * (parts.isfinite().all() & norm.isfinite())
        if self.biases:  # balance
            update_biases(self.biases, count_GE, knobs.bias_speed * self.alive)
        self.optimizer.step(knobs.learning_rate, norm, self.alive)  # update
        if self.ema is not None:
            self.ema.update(self.progress.step + 1, self.alive)
        self._advance(batch, knobs, parts, norm, count_GE)
        return self.arrived()

    def _passes(self, batch: Batch, weight_K: Tensor, knobs: Knobs) -> Measured:
        if self.graphs is not None:
            return self.graphs.run(batch, weight_K, knobs.mtp_weight, self.objective)
        return passes(self.model, self.optimizer, batch, weight_K, knobs.mtp_weight, self.objective)

    def make_room(self) -> None:
        """Before something beside the steps that takes as much memory as they do."""
        if self.graphs is not None:
            self.graphs.make_room()

    # --- statistics
    # ----------------------------------------------------------------------------------------------
    def _advance(self, batch: Batch, knobs: Knobs, parts: Tensor, norm: Tensor, count_GE: Tensor) -> None:
        last = self.progress
        self.progress = Progress(last.step + 1, last.tokens + batch.tokens, batch.position)
        violation_G = max_violation(count_GE) if count_GE.numel() else torch.zeros(1, device=parts.device)
        values = torch.cat([parts, torch.stack([norm, violation_G.mean(), violation_G.max(), self.alive])])
        self.load_GE = count_GE if self.load_GE is None else self.load_GE + count_GE
        arrived = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            values = host
        self._pending.append(_Pending(self.progress, knobs, batch, values, arrived))

    def arrived(self, *, wait: bool = False) -> list[StepStats]:
        """Statistics that have come back from the device; with `wait`, those of every step made so far. More
        than AHEAD steps on their way are waited for."""
        found = []
        while self._pending and (wait or len(self._pending) > AHEAD or self._pending[0].ready()):
            pending = self._pending.popleft()
            if pending.arrived is not None:
                pending.arrived.synchronize()
            found.append(self._read(pending))
        return found

    def _read(self, pending: _Pending) -> StepStats:
        main, mtp, balance, norm, violation, worst, alive = pending.values.tolist()
        batch = pending.batch
        stats = StepStats(
            pending.progress.step, pending.progress.tokens, pending.knobs,
            main, mtp, balance, norm, violation, worst, (batch.position - batch.rows, batch.position),
        )  # fmt: skip
        if not alive:
            if self.graphs is not None:
                self.graphs.release()
            where = describe(self.model, batch, pending.knobs, self.objective)
            raise NonFiniteError(stats.step, stats.tokens, main, mtp, norm, where)
        return stats

    def take_load(self) -> list[list[int]]:
        """Tokens per gate and expert since the last call (waits for the device)."""
        load = [] if self.load_GE is None else self.load_GE.tolist()
        self.load_GE = None
        return load

    # --- state
    # ---------------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Everything that a continuation needs, by name: masters, moments, their moving average, gate biases,
        random states."""
        biases = {
            name: b for name, b in self.model.named_buffers() if name.endswith("e_score_correction_bias")
        }
        random = {"random.cpu": torch.get_rng_state()}
        if self.model.device.type == "cuda":
            random["random.cuda"] = torch.cuda.get_rng_state(self.model.device)
        average = {} if self.ema is None else self.ema.state()
        return self.optimizer.state() | average | {f"buffer.{name}": b for name, b in biases.items()} | random

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Put back what `tensors()` gave. The batches must go on at `progress.position`. Raises ValueError on
        tensors of another model."""
        rest = dict(tensors)
        random = {name: rest.pop(name) for name in list(rest) if name.startswith("random.")}
        saved = {name: rest.pop(name) for name in list(rest) if name.startswith("buffer.")}
        average = {name: rest.pop(name) for name in list(rest) if name.startswith("ema.")}
        own = {
            f"buffer.{n}": b for n, b in self.model.named_buffers() if n.endswith("e_score_correction_bias")
        }
        if own.keys() != saved.keys():
            raise ValueError(f"the checkpoint's gate biases are those of another model: {sorted(saved)[:3]}")
        self.optimizer.load_state(rest, steps=progress.step)
        if self.ema is not None:
            self.ema.load_state(average)
        for name, bias_E in own.items():
            bias_E.copy_(saved[name])
        torch.set_rng_state(random["random.cpu"])
        if self.model.device.type == "cuda" and "random.cuda" in random:
            torch.cuda.set_rng_state(random["random.cuda"], self.model.device)
        self.progress = progress
