"""The CPU kernels for prompts against the torch references in FP64: awkward sizes, poisoned memory."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from hadal.ops import cpu, cpu_prompt
from hadal.ops import experts as ops
from hadal.ops.linear import SMALL_M, linear
from tests.helpers.processes import run_tests
from tests.ops.test_cpu import close, draw

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.status()[1]}")
DTYPES = [torch.float32, torch.bfloat16]


def poisoned(values: Tensor) -> Tensor:
    """The same rows at an odd address, further apart, between values that must not be read."""
    around = torch.full((values.shape[0] + 2, values.shape[1] + 5), math.nan, dtype=values.dtype)
    around[1:-1, 1:-4] = values
    return around[1:-1, 1:-4]


@pytest.fixture(autouse=True)
def _no_gradients(monkeypatch):
    """And whatever the kernels do not write is NaN."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        plain = getattr(owner, name)

        def poison(*args, plain=plain, **settings):
            out = plain(*args, **settings)
            return out.fill_(math.nan) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, poison)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 49, 256, 257, 1030])
@pytest.mark.parametrize("outs,width", [(1, 1), (5, 19), (49, 257), (97, 512)])
def test_linear(rows, outs, width, dtype):
    x, w, b = draw(rows, width, dtype=dtype), draw(outs, width, dtype=dtype), draw(outs, dtype=dtype)
    want = x.double() @ w.double().T
    close(cpu_prompt.linear(poisoned(x), w, None), want, dtype)
    close(cpu_prompt.linear(x, w, b), want + b.double(), dtype)
    close(cpu_prompt.linear(x.T.contiguous().T, poisoned(w), b), want + b.double(), dtype)


def test_a_row_of_nan_stays_alone():
    x, w = draw(40, 300), draw(70, 300)
    x[7, 250] = math.nan
    out = cpu_prompt.linear(x, w)
    assert out[7].isnan().all() and not out[:7].isnan().any() and not out[8:].isnan().any()


def network(tokens: int, n_experts: int, K: int, D: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    expert = torch.rand(tokens, n_experts).topk(K).indices
    gate_up = draw(n_experts, 2 * width, D, dtype=dtype, scale=D**-0.5)
    down = draw(n_experts, D, width, dtype=dtype, scale=width**-0.5)
    return [draw(tokens, D, dtype=dtype), expert, torch.rand(tokens, K), gate_up, down]


def reference(x, expert, weight, gate_up, down) -> Tensor:
    return ops.experts_reference(x.double(), expert, weight.double(), gate_up.double(), down.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens,n_experts,K,D,width",
    [(1, 5, 2, 45, 37), (33, 40, 3, 64, 7), (70, 3, 3, 45, 130), (300, 2, 1, 19, 70), (1100, 4, 2, 50, 33)],
)
def test_experts(tokens, n_experts, K, D, width, dtype):
    args = network(tokens, n_experts, K, D, width, dtype)
    want = reference(*args)
    close(cpu_prompt.experts(*args), want, dtype)
    residual = draw(tokens, D, dtype=dtype)
    close(cpu_prompt.experts(*args, None, residual), want + residual, dtype)
    for own in (1, width, 2 * width + 1):
        shared = draw(2 * own, D, dtype=dtype, scale=D**-0.5), draw(D, own, dtype=dtype)
        gate, up = (args[0].double() @ shared[0].double().T).chunk(2, -1)
        more = want + (torch.nn.functional.silu(gate) * up) @ shared[1].double().T
        close(cpu_prompt.experts(*args, shared), more, dtype)
        close(cpu_prompt.experts(*args, shared, residual), more + residual, dtype)


def test_one_expert_takes_all_and_the_others_are_not_read():
    x, _, weight, gate_up, down = network(50, 6, 1, 40, 24, torch.float32)
    for e in (0, 1, 2, 4, 5):
        gate_up[e], down[e] = math.nan, math.nan
    expert = torch.full((50, 1), 3)
    close(cpu_prompt.experts(x, expert, weight, gate_up, down), reference(
        x, torch.zeros_like(expert), weight, gate_up[3:4], down[3:4]), torch.float32)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,D,width", [(1, 3, 5), (47, 100, 261), (261, 48, 64)])
def test_ffn(tokens, D, width, dtype):
    x, gate_up, down = (
        draw(tokens, D, dtype=dtype),
        draw(2 * width, D, dtype=dtype),
        draw(D, width, dtype=dtype),
    )
    gate, up = (x.double() @ gate_up.double().T).chunk(2, -1)
    want = (torch.nn.functional.silu(gate) * up) @ down.double().T
    close(cpu_prompt.ffn(poisoned(x), gate_up, down), want, dtype)
    residual = draw(tokens, D, dtype=dtype)
    close(cpu_prompt.ffn(x, gate_up, down, residual), want + residual, dtype)


def test_nothing_in_nothing_out():
    x, expert, weight, gate_up, down = network(1, 3, 2, 8, 5, torch.float32)
    assert cpu_prompt.linear(x[:0], down[0].T.contiguous()).shape == (0, 5)
    assert cpu_prompt.experts(x[:0], expert[:0], weight[:0], gate_up, down).shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operations_use_them(dtype, monkeypatch):
    """Long inputs go through these kernels, and those that need a gradient do not."""
    monkeypatch.setattr(ops, "native_bf16", lambda: False)
    monkeypatch.setattr("hadal.ops.linear.native_bf16", lambda: False)
    calls = []
    for name in ("linear", "ffn", "experts"):
        own = getattr(cpu_prompt, name)
        monkeypatch.setattr(cpu_prompt, name, lambda *a, own=own, name=name: (calls.append(name), own(*a))[1])
    tokens, width = SMALL_M + 1, 300
    args = network(tokens, 2, 1, 256, width, dtype)
    want = reference(*args)
    close(ops.experts(*args), want, dtype)
    x, gate_up, down = args[0], args[3][0], args[4][0]
    close(linear(x, gate_up), x.double() @ gate_up.double().T, dtype)
    ffn = ops.ffn(x, gate_up, down)
    assert calls == ["experts", "linear", "ffn"]
    with torch.enable_grad():
        close(ops.ffn(x, gate_up.requires_grad_(), down).detach(), ffn.double(), dtype)
        args[3].requires_grad_()
        close(ops.experts(*args).detach(), want, dtype)
    assert calls == ["experts", "linear", "ffn"]


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_lesser_processors(isa: str) -> None:
    """The same tests through the kernels of another instruction set, in a process of their own."""
    if os.environ.get("HADAL_CPU_ISA"):
        pytest.skip("this is that process")
    if isa == "avx2" and not torch.backends.cpu.get_cpu_capability().lower().startswith("avx"):
        pytest.skip("this processor has no AVX2")
    done = run_tests(__file__, HADAL_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 skipped" in done.stdout, done.stdout[-500:]
