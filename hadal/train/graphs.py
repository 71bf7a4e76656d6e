"""Passes of training steps as CUDA graphs: the host sends one thing a pass instead of thousands.

Forward, backward and the gradient's way into the FP32 buffer of one micro-batch are recorded and replayed;
balance, norm and update follow as ever, a few dozen launches that are sent while the passes still run. What
changes from step to step lies in buffers that stay where they are: tokens, weights, λ, the step's rows, and
the lengths of documents as offsets of a fixed number of sequences, those too many being empty.

The first pass of a step writes its gradient, later ones add theirs: two graphs, in one pool of memory. A step
of another kind (size of micro-batch, context, objective) has graphs of its own, and those before are let go:
so a growing batch, each of whose sizes lasts a step or two, runs without. The first steps of a kind run
unrecorded, on the stream that is recorded later: kernels compile there, libraries allocate.

A graph's memory stays its own between the steps, for allocators to see but not to use: `make_room`.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hadal.config import Mla
from hadal.model.transformer import Transformer
from hadal.ops.attention import Spans, varlen_available
from hadal.ops.dispatch import forced_reference, has_triton
from hadal.ops.fp8_training import WeightCodes, constant_weights
from hadal.ops.kept import keeping
from hadal.train.batches import Batch, MicroBatch
from hadal.train.losses import Objective
from hadal.train.optimizer import AdamW
from hadal.train.passes import Measured, one_pass, passes

logger = logging.getLogger(__name__)

WARM = 3
"""Steps of a kind before it is recorded."""
BUCKET = 64
"""Numbers of documents are rounded up to multiples of this."""

Run = Callable[[], object]


class GraphError(RuntimeError):
    """Graphs are wanted, and cannot be."""


class Kind(NamedTuple):
    """What a graph is recorded for."""

    tokens: int  # of each micro-batch
    rows: int
    masked: bool  # documents, of lengths that change
    several: bool  # micro-batches in a step
    mtp: bool  # λ is not 0
    objective: Objective


def kind_of(batch: Batch, mtp_weight: float, objective: Objective) -> Kind | None:
    """The kind of a step; None where its micro-batches differ."""
    sizes = {(micro.tokens, micro.rows) for micro in batch.micros}
    if len(sizes) != 1:
        return None
    masked = any(micro.documents for micro in batch.micros)
    return Kind(*sizes.pop(), masked, len(batch.micros) > 1, mtp_weight != 0, objective)


def unfit(model: Transformer, *, masked: bool, compiled: bool) -> str | None:
    """Why steps of this model cannot be graphs; None where they can."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}, and graphs are CUDA's"
    if compiled:
        return "train.compile has its own way to launch kernels"
    if not has_triton() or forced_reference():
        return "the references (no Triton, or HADAL_OPS=reference) ask the host for lengths"
    if model.config.moe is not None and model.dtype != torch.bfloat16:
        return f"experts in {model.dtype} ask the host for their numbers of rows"
    a = model.config.attention
    width = a.qk_head_dim if isinstance(a, Mla) else a.head_dim
    probe = torch.empty(0, 1, width, dtype=model.dtype, device=model.device)
    if masked and not varlen_available(probe):
        return f"attention inside documents in {model.dtype} asks the host for lengths"
    return None


def _most(batch: Batch) -> int:
    """Sequences of the micro-batch that has most of them."""
    return max(len(micro.cu_seqlens) - 1 for micro in batch.micros)


def _cause(error: BaseException) -> str:
    """What went wrong first: the end of a broken recording complains as well."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


class _Inputs:
    """What a pass reads beside the model, at addresses that hold."""

    def __init__(self, micro: MicroBatch, weight_K: Tensor, documents: int) -> None:
        device, self.capacity = micro.position_T.device, documents
        start_S = torch.zeros(documents + 1, dtype=torch.int32, device=device)
        spans = Spans(start_S, micro.tokens // micro.rows) if documents else None
        token_KT, target_KT, weight_KT, counted_KT, position_T = map(torch.empty_like, self._tensors(micro))
        self.micro = MicroBatch(
            token_KT, target_KT, weight_KT, counted_KT, position_T, start_S,
            [] if documents else micro.cu_seqlens, micro.rows, spans,
        )  # fmt: skip
        self.weight_K = torch.empty_like(weight_K)
        self.step_rows, self.mtp_weight = (torch.zeros((), device=device) for _ in range(2))

    @staticmethod
    def _tensors(micro: MicroBatch) -> tuple[Tensor, ...]:
        return micro.token_KT, micro.target_KT, micro.weight_KT, micro.counted_KT, micro.position_T

    def fill(self, micro: MicroBatch, weight_K: Tensor, step_rows: int, mtp_weight: float) -> None:
        """Copy in a micro-batch of this size; nothing waits."""
        for own, given in zip(self._tensors(self.micro), self._tensors(micro), strict=True):
            own.copy_(given)
        self.weight_K.copy_(weight_K)
        self.step_rows.fill_(step_rows)
        self.mtp_weight.fill_(mtp_weight)
        if self.capacity:
            count = micro.start_S.shape[0]
            self.micro.start_S[:count].copy_(micro.start_S)
            self.micro.start_S[count:].fill_(micro.tokens)


class PassGraphs:
    """`passes`, replayed. `record` gives for a function what replays it (on CUDA: a graph)."""

    def __init__(
        self,
        model: Transformer,
        optimizer: AdamW,
        *,
        required: bool = False,
        record: Callable[[Run], Run] | None = None,
    ) -> None:
        self.model, self.optimizer, self.required = model, optimizer, required
        self.broken: str | None = None  # why graphs are off, if they failed
        self.bytes = 0  # of the graphs' memory
        self._record = record or self._capture
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._kind: Kind | None = None
        self._steps: Counter[Kind] = Counter()
        self._inputs: _Inputs | None = None
        self._graphs: dict[bool, Run] = {}  # of a step's first pass, and of later ones
        self._totals: Measured | None = None
        self._codes: WeightCodes = {}
        self._held: list[Tensor] = []
        self._where: tuple[object, ...] = ()

    @property
    def recorded(self) -> int:
        """Graphs there are."""
        return len(self._graphs)

    def run(self, batch: Batch, weight_K: Tensor, mtp_weight: float, objective: Objective) -> Measured:
        """All passes of a step. Raises GraphError where graphs are required and cannot be recorded."""
        kind = kind_of(batch, mtp_weight, objective)
        if kind is None or self.broken is not None:
            self.release()
            self._kind = kind
            return passes(self.model, self.optimizer, batch, weight_K, mtp_weight, objective)
        again = kind == self._kind
        if not (again and self._holds(batch)):
            self._begin(kind, batch, weight_K)
        warm = again and self._steps[kind] >= WARM
        self._steps[kind] += 1
        assert self._inputs is not None
        for number, micro in enumerate(batch.micros):
            self._inputs.fill(micro, weight_K, batch.rows, mtp_weight)
            if warm:
                self._replay(number == 0)
            else:
                self._unrecorded(number == 0)
        if not self._graphs:
            self._codes.clear()
        assert self._totals is not None
        return self._totals[0].clone(), self._totals[1].clone()

    # --- what graphs hold on to -----------------------------------------------------------------------------
    def _holds(self, batch: Batch) -> bool:
        """Whether inputs have room, and all is where it was."""
        masked = self._kind is not None and self._kind.masked
        if self._inputs is None or (masked and _most(batch) > self._inputs.capacity):
            return False
        now = self._addresses()
        return now[0] is self._where[0] and now[1:] == self._where[1:]

    def _addresses(self) -> tuple[object, ...]:
        """Of what a graph reads and writes by address, the table of rotations itself first."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return self.model.rotation_table(), *(tensor.data_ptr() for tensor in tensors)

    def _begin(self, kind: Kind, batch: Batch, weight_K: Tensor) -> None:
        """Inputs for another kind, or for more documents."""
        self.release()
        most = _most(batch)
        if self._kind == kind and self._inputs is not None:
            most = max(most, self._inputs.capacity)
        room = -(-(most + most // 8) // BUCKET) * BUCKET if kind.masked else 0
        self._kind, self._inputs = kind, _Inputs(batch.micros[0], weight_K, room)
        self._where = self._addresses()

    def make_room(self) -> None:
        """Before something else that takes as much memory as a pass: where that is not free, the graphs go,
        to be recorded anew."""
        if self._graphs and self._stream is not None:
            free, _ = torch.cuda.mem_get_info(self.model.device)
            if free < self.bytes:
                self.release()

    def release(self) -> None:
        """Let go of all graphs and their memory."""
        if self._graphs and self._stream is not None:
            torch.cuda.synchronize(self.model.device)
        held = bool(self._graphs)
        self._graphs.clear()
        self._codes.clear()
        self._held.clear()
        self.bytes = 0
        if held and self._stream is not None:
            torch.cuda.empty_cache()

    # --- a pass -------------------------------------------------------------------------------------------
    def _pass(self, first: bool) -> None:
        kind, inputs = self._kind, self._inputs
        assert kind is not None and inputs is not None
        if first:
            self._codes.clear()
        with constant_weights(kind.objective.fp8 and kind.several, self._codes), keeping(self._held):
            measured = one_pass(
                self.model, self.optimizer, inputs.micro, inputs.weight_K, inputs.step_rows,
                inputs.mtp_weight if kind.mtp else 0.0, kind.objective,
            )  # fmt: skip
        if self._totals is None:
            self._totals = torch.empty_like(measured[0]), torch.empty_like(measured[1])
        for total, value in zip(self._totals, measured, strict=True):
            total.copy_(value) if first else total.add_(value)

    def _unrecorded(self, first: bool) -> None:
        with self._aside():
            self._pass(first)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream that is recorded."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.model.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _replay(self, first: bool) -> None:
        if first not in self._graphs and self.broken is None:
            self._try_record(first)
        if first not in self._graphs:
            self._unrecorded(first)
            return
        self._graphs[first]()
        self.optimizer.gathered()

    def _try_record(self, first: bool) -> None:
        try:
            self._graphs[first] = self._record(partial(self._pass, first))
        except Exception as error:
            why = _cause(error)
            self.optimizer.gathered(not first)
            if self.required:
                raise GraphError(
                    f"train.graph is true, and a pass of {self._kind} cannot be recorded: {why}. Set "
                    'train.graph to "auto" or false'
                ) from error
            self.broken = why
            logger.warning("CUDA graphs of training steps are off, which is slower: %s", why)

    def _capture(self, run: Run) -> Run:
        """Record on the stream where warm-up ran. Other threads (batches, the average, a checkpoint's copy)
        may use the GPU meanwhile: that must not spoil the recording."""
        gc.collect()  # no node of an earlier pass may live on: it would remember another stream
        torch.cuda.synchronize(self.model.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.model.device)
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.model.device)
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                run()
        except BaseException:
            torch.cuda.set_stream(current)  # which the end of a broken recording does not see to
            del graph
            self._abandon()
            raise
        self.bytes += torch.cuda.memory_reserved(self.model.device) - before
        return graph.replay

    def _abandon(self) -> None:
        """What torch, before 2.12, leaves undone when the end of a recording fails: the allocator goes on
        counting it, and refuses to give memory back; the random generator too, until another one ends."""
        index = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(index, self._pool)
        except RuntimeError:  # torch has seen to it
            pass
        else:
            torch._C._cuda_releasePool(index, self._pool)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=self.model.device)
