"""What tests of Triton kernels share: where they run (CUDA, else Triton's interpreter), inputs, errors."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hadal.config import Moe
from tests.helpers.processes import PATIENT, run_tests

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32  # the interpreter's BF16 arithmetic is not faithful
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}
needs_triton = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs CUDA or TRITON_INTERPRET=1")
# Tensor maps and FP8 products need a Hopper card, or the interpreter.
needs_hopper = pytest.mark.skipif(
    not (INTERPRETED or (CUDA and torch.cuda.get_device_capability() >= (9, 0))), reason="needs Hopper"
)


GATES = [
    Moe(16, 1, 4, 8, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    Moe(256, 1, 8, 8, n_group=8, topk_group=4, routed_scaling_factor=2.5),
    Moe(24, 1, 3, 8, n_group=3, topk_group=2, norm_topk_prob=False),
    Moe(160, 2, 6, 8, scoring_func="softmax", topk_method="group_limited_greedy", n_group=8, topk_group=3,
        norm_topk_prob=False, routed_scaling_factor=16.0),
    Moe(64, 2, 6, 8, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False),
    Moe(12, 2, 5, 8, scoring_func="softmax", topk_method="greedy", norm_topk_prob=True,
        routed_scaling_factor=3.0),
]  # fmt: skip


def in_the_interpreter(file: str) -> Callable[[], None]:
    """A test that runs those of `file` in Triton's interpreter: in a process of its own, since
    TRITON_INTERPRET counts when triton is imported."""

    @pytest.mark.skipif(CUDA or INTERPRETED, reason="the file's tests run directly here")
    @pytest.mark.timeout(PATIENT)
    def test() -> None:
        done = run_tests(file, TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        assert "passed" in done.stdout and "failed" not in done.stdout

    return test


def cases(few: list[object], *more: object) -> list[object]:
    """Parameters of a test: `few` for the interpreter, which takes its time; all of them on a card."""
    return [*few, *more] if CUDA else few


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def error(got: Tensor, want: Tensor) -> float:
    """Relative error in norm; NaN stays NaN and passes no comparison."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def close(out: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    """Within the dtype's rounding of a reference that was computed from upcast inputs."""
    assert error(out, reference) < TOLERANCE[dtype]


def pages_for(lengths: list[int], page: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block table of shuffled pages, wider than needed, padded with page 0; the rest is poison."""
    columns = max(-(-n // page) for n in lengths) + width
    table = torch.zeros(len(lengths), columns, dtype=torch.int32)
    free = torch.randperm(sum(-(-n // page) for n in lengths)) + 1
    at = 0
    for s, n in enumerate(lengths):
        used = -(-n // page)
        table[s, :used] = free[at : at + used].int()
        at += used
    return table, torch.tensor(lengths, dtype=torch.int32)


def poison_unused(cache: torch.Tensor, table: torch.Tensor, lengths: list[int], page: int) -> None:
    """NaN in every cached row that no sequence may see."""
    visible = torch.zeros(cache.shape[:2], dtype=torch.bool)
    for s, n in enumerate(lengths):
        for t in range(n):
            visible[table[s, t // page], t % page] = True
    cache[~visible] = float("nan")


def patch_once_a_launch() -> None:
    """The interpreter puts its own functions into triton.language at each launch, and again at each call
    within a kernel, which takes a third of its time: once a launch for each function called says the same."""
    from triton.runtime import interpreter

    patched: set[object] = set()
    launch, call = interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__

    def launched(self, *args, **options):
        patched.clear()
        return launch(self, *args, **options)

    def called(self, *args, **options):
        if self.fn not in patched:
            patched.add(self.fn)
            return call(self, *args, **options)
        try:
            return self.rewrite()(*args, **options)
        except Exception as raised:
            raise interpreter.InterpreterError(repr(raised)) from raised

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called


if INTERPRETED:
    patch_once_a_launch()
