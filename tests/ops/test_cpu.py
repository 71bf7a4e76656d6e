"""The C++ CPU kernels against the torch references in FP64, awkward sizes, FP32 and BF16."""

from __future__ import annotations

import pytest
import torch

from hadal.config import Moe
from hadal.ops import cpu, mla, paged, rope
from hadal.ops.experts import experts_reference
from hadal.ops.gate import gate_reference
from hadal.ops.rms_norm import rms_norm_reference
from tests.helpers.kernels import GATES, pages_for, poison_unused

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.status()[1]}")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def close(out: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    error = (out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-9)
    assert error < TOLERANCE[dtype], float(error)


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("outs,width", [(5, 19), (64, 64), (1030, 513)])
def test_linear(rows, outs, width, dtype):
    x, w, b = (
        draw(rows, width + 3, dtype=dtype)[:, :width],
        draw(outs, width, dtype=dtype),
        draw(outs, dtype=dtype),
    )
    close(cpu.linear(x, w, b), torch.nn.functional.linear(x.double(), w.double(), b.double()), dtype)
    close(cpu.linear(x, w, None), x.double() @ w.double().T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,n_experts,K", [(1, 5, 2), (9, 16, 4), (40, 3, 3)])
def test_experts(tokens, n_experts, K, dtype):
    D, width = 45, 37
    x, weight = draw(tokens, D, dtype=dtype), torch.rand(tokens, K)
    gate_up = draw(n_experts, 2 * width, D, dtype=dtype, scale=D**-0.5)
    down = draw(n_experts, D, width, dtype=dtype, scale=width**-0.5)
    expert = torch.stack([torch.randperm(n_experts)[:K] for _ in range(tokens)])
    want = experts_reference(x.double(), expert, weight.double(), gate_up.double(), down.double())
    close(cpu.experts(x, expert, weight, gate_up, down), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_swiglu_rotation(dtype):
    x, w, delta = draw(5, 77, dtype=dtype)[:, 3:73], draw(70, dtype=dtype), draw(5, 70, dtype=dtype)
    close(cpu.rms_norm(x, w, 1e-6), rms_norm_reference(x.double(), w.double(), 1e-6), dtype)
    total, normed = cpu.add_rms_norm(x, delta, w, 1e-6)
    assert torch.equal(total, x + delta)
    close(normed, rms_norm_reference((x + delta).double(), w.double(), 1e-6), dtype)
    gate, up = x.double().chunk(2, -1)
    close(cpu.swiglu(x), torch.nn.functional.silu(gate) * up, dtype)
    table = rope.rotation_table(
        rope.Rope(type="yarn", factor=4.0, original_max_position_embeddings=64), 24, 300
    )
    q, rotation = draw(6, 5, 30, dtype=dtype)[..., 6:], table[torch.randint(0, 300, (6,))]
    for interleaved, reference in [(True, rope.rotate_interleaved), (False, rope.rotate_half)]:
        with torch.enable_grad():  # a gradient forces the reference
            want = reference(q.float().requires_grad_(), rotation)
        close(cpu.rotate(q, rotation, interleaved), want.detach(), dtype)
        close(cpu.rotate(q[:, 1], rotation, interleaved), want.detach()[:, 1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", [1, 9])
def test_per_head(sequences, dtype):
    x, w = draw(sequences, 3, 20, dtype=dtype)[..., :17], draw(3, 40, 17, dtype=dtype)[:, :33]
    close(cpu.per_head(x, w), torch.einsum("shi,hoi->sho", x.double(), w.double()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_latent_entries_and_absorbed_queries(tokens, dtype):
    rank, width, heads, n = 37, 61, 3, 21
    kv, norm = draw(tokens, width + 5, dtype=dtype)[:, :width], draw(rank, dtype=dtype)
    rotation = rope.rotation_table(rope.Rope(), width - rank, 50)[torch.randint(0, 50, (tokens,))]
    cache, slot = torch.full((4, 8, width), 7.0).to(dtype), torch.randperm(32)[:tokens]
    want = mla.latent_entry(kv.double().requires_grad_(), norm.double(), 1e-6, rotation).detach()
    close(cpu.write_latent(kv, norm, 1e-6, rotation, cache, slot), want, dtype)
    close(cache.view(32, width)[slot], want, dtype)
    assert (cache.view(32, width)[[i for i in range(32) if i not in slot.tolist()]] == 7).all()
    q = draw(tokens, heads, n + width - rank, dtype=dtype)
    up = draw(heads, n + 4, rank, dtype=dtype)[:, :n]
    want = torch.cat([
        torch.einsum("shi,hio->sho", q[..., :n].double(), up.double()),
        rope.rotate_interleaved(q[..., n:].double().requires_grad_(), rotation).detach(),
    ], -1)  # fmt: skip
    close(cpu.absorbed_query(q[..., :n], q[..., n:], rotation, up), want, dtype)


@pytest.mark.parametrize("moe", GATES, ids=lambda m: f"{m.topk_method}-{m.n_routed_experts}")
def test_gate(moe: Moe):
    x, weight = draw(9, 33), draw(moe.n_routed_experts, 33, scale=0.3)
    bias = draw(moe.n_routed_experts) - 1.0 if moe.topk_method == "noaux_tc" else None
    expert, weights = cpu.gate(x, weight, bias, moe)
    want_expert, want_weights, _ = gate_reference(x, weight, bias, moe)
    order, want_order = expert.argsort(-1), want_expert.argsort(-1)
    assert torch.equal(expert.gather(1, order), want_expert.gather(1, want_order))
    close(weights.gather(1, order), want_weights.gather(1, want_order), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [4, 9])
def test_mla_decode(heads, dtype):
    lengths, page, rank, width = [1, 67, 200], 16, 24, 33
    table, context = pages_for(lengths, page, 2)
    cache = torch.randn(int(table.max()) + 2, page, width)
    poison_unused(cache, table, lengths, page)
    q, cache = draw(3, heads, width, dtype=dtype), cache.to(dtype)
    want = paged.mla_decode_reference(q.double(), cache.double().nan_to_num(0), table, context, rank, 0.2)
    close(cpu.mla_decode(q, cache, table, context, rank, 0.2), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,groups", [(6, 2), (7, 1), (3, 3)])
def test_gqa_decode(heads, groups, dtype):
    lengths, page, width = [1, 67, 200], 16, 24
    table, context = pages_for(lengths, page, 2)
    cache = torch.randn(int(table.max()) + 2, page, 2, groups, width)
    poison_unused(cache, table, lengths, page)
    q, cache = draw(3, heads, width, dtype=dtype), cache.to(dtype)
    want = paged.gqa_decode_reference(q.double(), cache.double().nan_to_num(0), table, context, 0.2)
    close(cpu.gqa_decode(q, cache, table, context, 0.2), want, dtype)


def test_no_tokens_are_no_crash():
    from hadal.ops.experts import experts

    gate_up, down = draw(3, 10, 8), draw(3, 8, 5)
    with torch.no_grad():
        none = cpu.experts(
            torch.zeros(0, 8), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), gate_up, down
        )
    assert none.shape == (0, 8)
    frozen, weight = draw(2, 8), torch.rand(2, 2, requires_grad=True)
    expert = torch.tensor([[0, 1], [2, 0]])
    experts(
        frozen, expert, weight, gate_up, down
    ).sum().backward()  # the gate alone learns: its gradient is not lost
    assert weight.grad is not None and weight.grad.abs().sum() > 0
