"""Selective recomputation: keep an operation's inputs instead of its outputs (DeepSeek-V3 report §3.2.3).

    with recompute(["norm", "up", "swiglu"]):
        loss = …                    # forward
    loss.backward()                 # RMSNorms, MLA's heads and SwiGLU products are made again when needed

Wrapping a cheap operation alone in a checkpoint would free nothing: what *follows* saves its output for the
backward pass. Here the output of a `recomputed` operation is known by its storage; where any later operation
saves it, or a view of it, a note is saved instead of the tensor. The first to need the tensor in the
backward pass makes it again, and the operation's own backward, which comes last, uses the same copy and
drops it. Notes chain: heads made from a normed latent make that again too. The second run takes the same
path as the first, so its values have the same bits.

    norm      RMSNorm, MLA's latent entries, and the FP32 copy that a gate reads
    up        MLA: queries, keys and values of all heads, from their latents
    swiglu    silu(gate) ⊙ up
    rows      the copies of tokens that are sorted by expert (not in V3, which caches them in FP8)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hadal.ops.dispatch import needs_grad

KINDS = ("norm", "up", "swiglu", "rows")


@dataclass(frozen=True)
class _Note:
    """Stands for a view of one of a run's outputs."""

    run: _Run
    output: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        made = _bare(self.run.again()[1][self.output])
        return made.as_strided(self.size, self.stride, self.offset)


class _Tape:
    """The recomputable outputs of one forward pass, by storage. The weak reference keeps a storage's address
    from being given to another one after it is freed, so that an address means one output."""

    def __init__(self, kinds: Iterable[str], kept: Callable[[Tensor], None] | None) -> None:
        self.kinds, self.kept, self.running = frozenset(kinds), kept, False
        self.outputs: dict[int, tuple[StorageWeakRef, _Run, int, torch.dtype]] = {}

    def add(self, run: _Run, outputs: tuple[Tensor, ...], given: Iterable[Any]) -> None:
        """An output that lies where an argument does is no new tensor."""
        known = {a.untyped_storage()._cdata for a in given if isinstance(a, Tensor)}
        for number, output in enumerate(outputs):
            storage = output.untyped_storage()
            if storage._cdata in known:
                continue
            self.outputs[storage._cdata] = (StorageWeakRef(storage), run, number, output.dtype)

    def pack(self, tensor: Tensor) -> Tensor | _Note:
        if self.running:  # what a first run saves lives as long as the run
            return _bare(tensor)
        found = self.outputs.get(tensor.untyped_storage()._cdata)
        if found is not None and found[3] == tensor.dtype:
            size, stride = tuple(tensor.shape), tuple(tensor.stride())
            return _Note(found[1], found[2], size, stride, int(tensor.storage_offset()))
        if self.kept is not None:
            self.kept(tensor)
        return _bare(tensor)


def _unpack(saved: Any) -> Any:
    return saved.tensor() if isinstance(saved, _Note) else saved


def _bare(tensor: Tensor) -> Tensor:
    """The values alone, without a way back to the graph: an operation that saves its own output would else
    hold itself, and all that is before it, until the garbage collector comes by."""
    return tensor.data


_TAPE: ContextVar[_Tape | None] = ContextVar("hadal_recompute", default=None)


@contextmanager
def recompute(kinds: Iterable[str], kept: Callable[[Tensor], None] | None = None) -> Iterator[None]:
    """Operations of these kinds called inside keep their inputs only. `kept` hears of every tensor that the
    graph keeps for the backward pass. Raises ValueError on an unknown kind."""
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"nothing of kind {unknown[0]!r} can be recomputed; there are {', '.join(KINDS)}")
    tape = _Tape(kinds, kept)
    if not tape.kinds and kept is None:
        yield
        return
    token = _TAPE.set(tape)
    try:
        with torch.autograd.graph.saved_tensors_hooks(tape.pack, _unpack):
            yield
    finally:
        _TAPE.reset(token)


def recomputed(kind: str, f: Callable[..., Any], *args: Any) -> Any:
    """f(*args), made again in the backward pass where `recompute` asks for this kind. `f` returns a new
    tensor, or a tuple of such and of its arguments, and depends on these alone."""
    tape = _TAPE.get()
    if tape is None or kind not in tape.kinds or not needs_grad(*(a for a in args if isinstance(a, Tensor))):
        return f(*args)
    outputs: tuple[Tensor, ...] = _Recomputed.apply(tape, run := _Run(tape, f, args), *args)
    tape.add(run, outputs, args)
    return outputs[0] if run.single else outputs


class _Run:
    """One call of a recomputable operation: its arguments, and what the second run made, while needed."""

    def __init__(self, tape: _Tape, f: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.f, self.single = f, True
        self.modes = copy_context()  # exact, FP8: the second run is as the first, whatever thread it is in
        self.modes.run(_TAPE.set, None)
        self.wants = [isinstance(a, Tensor) and a.requires_grad for a in args]
        self.args: list[Any] | None = [tape.pack(_bare(a)) if isinstance(a, Tensor) else a for a in args]
        self.made: tuple[list[Any], tuple[Tensor, ...]] | None = None

    def call(self, args: Iterable[Any]) -> tuple[list[Any], tuple[Tensor, ...]]:
        """(inputs that want gradients, outputs), with a graph between them: the differentiable path."""
        inputs = [
            _bare(a).requires_grad_(want) if isinstance(a, Tensor) else a
            for a, want in zip(args, self.wants, strict=True)
        ]
        with torch.enable_grad():
            outputs = self.modes.run(self.f, *inputs)
        self.single = isinstance(outputs, Tensor)
        wanted = [a for a, want in zip(inputs, self.wants, strict=True) if want]
        return wanted, (outputs,) if self.single else tuple(outputs)

    def again(self) -> tuple[list[Any], tuple[Tensor, ...]]:
        if self.made is None:
            if self.args is None:
                raise RuntimeError(
                    "a backward pass with recomputation can run once; retain_graph is not for it"
                )
            self.made = self.call(map(_unpack, self.args))
        return self.made

    def drop(self) -> None:
        self.args = self.made = None


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: _Tape, run: _Run, *args: Any) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        tape.running = True
        try:
            return tuple(_bare(output) for output in run.call(args)[1])
        finally:
            tape.running = False

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        run: _Run = ctx.run
        inputs, outputs = run.again()
        pairs = [(out, g) for out, g in zip(outputs, grads, strict=True) if g is not None]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        )
        result = [next(found) if want else None for want in run.wants]
        run.drop()
        return None, None, *result
