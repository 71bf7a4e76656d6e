"""Triton kernels of training, both directions, against torch in FP64: on CUDA in BF16 and FP32, else in the
interpreter (FP32)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from hadal.config import Moe
from hadal.ops import experts as expert_op
from hadal.ops import gate as gate_op
from hadal.ops import rope as rope_op
from hadal.train import balance

pytest.importorskip("triton")
from tests.helpers.kernels import (
    CUDA,
    DEVICE,
    DTYPES,
    TOLERANCE,
    draw,
    error,
    in_the_interpreter,
    needs_triton,
)

test_training_kernels_in_the_interpreter = in_the_interpreter(__file__)


def agree(
    kernel: Callable[..., Tensor | Sequence[Tensor]], reference: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor], dtype: torch.dtype,
) -> None:  # fmt: skip
    """Outputs and all gradients, for random gradients of the outputs, as the reference has them in FP64."""
    ours = [x.detach().requires_grad_() for x in inputs]
    theirs = [x.detach().double().cpu().requires_grad_() for x in inputs]
    got, want = kernel(*ours), reference(*theirs)
    got, want = ([x] if isinstance(x, Tensor) else list(x) for x in (got, want))
    grads = [draw(*x.shape, dtype=x.dtype) for x in got]
    torch.autograd.backward(got, grads)
    torch.autograd.backward(want, [g.double().cpu() for g in grads])
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert error(a, b) < TOLERANCE[dtype]
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.grad is not None and b.grad is not None
        assert a.grad.dtype == a.dtype
        assert error(a.grad, b.grad) < TOLERANCE[dtype], number


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,width", [(1, 8), (37, 24), (5, 1408)])
def test_swiglu(rows, width, dtype):
    from hadal.ops.triton.train_experts import swiglu

    agree(swiglu, expert_op.swiglu_reference, [draw(rows, 2 * width, dtype=dtype)], dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,width,experts,K", [(1, 24, 3, 2), (53, 40, 8, 3), (9, 2304, 16, 6)])
@pytest.mark.parametrize("others", [True, False])
def test_rows_to_experts_and_back(tokens, width, experts, K, others, dtype):
    from hadal.ops.triton import route, train_experts

    chosen = torch.rand(tokens, experts).topk(K, -1).indices
    place, end = route.places(chosen.to(DEVICE), experts)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    assert torch.equal(place.cpu(), order.argsort())
    assert end.tolist() == flat.bincount(minlength=experts).cumsum(0).tolist()
    host = place.cpu()
    x = draw(tokens, width, dtype=dtype)
    agree(
        lambda x: train_experts.spread(x, place, K),
        lambda x: x.index_select(0, order // K),
        [x],
        dtype,
    )

    def combined(row: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
        out = (row[host].unflatten(0, (-1, K)) * weight.unsqueeze(-1)).sum(1)
        return sum(more, start=out)

    inputs = [draw(tokens * K, width, dtype=dtype), draw(tokens, K)]
    if others:
        inputs += [draw(tokens, width, dtype=dtype), draw(tokens, width, dtype=dtype)]
        kernel = lambda row, weight, a, b: train_experts.combine(row, place, weight, a, b)  # noqa: E731
    else:
        kernel = lambda row, weight: train_experts.combine(row, place, weight, None, None)  # noqa: E731
    agree(kernel, combined, inputs, dtype)


def rotation_of(tokens: int, width: int) -> Tensor:
    table = rope_op.rotation_table(rope_op.Rope(), width, 60)
    return table[torch.randint(0, 60, (tokens,))].to(DEVICE)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,heads,nope,rope,value", [(5, 3, 20, 12, 28), (2, 20, 128, 64, 128)])
def test_heads_of_mla(tokens, heads, nope, rope, value, dtype):
    from hadal.ops.triton.train_heads import keys_and_values, turned

    rotation = rotation_of(tokens, rope)
    on_host = rotation.cpu().double()

    def rotated(q: Tensor) -> Tensor:
        return torch.cat([q[..., :nope], interleaved(q[..., nope:], on_host)], -1)

    agree(
        lambda q: turned(q, rotation, nope), rotated, [draw(tokens, heads, nope + rope, dtype=dtype)], dtype
    )

    def put_together(kv: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.cat([kv[..., :nope], entry[:, None, 3:].expand(-1, heads, -1)], -1)
        return k, kv[..., nope:]

    inputs = [draw(tokens, heads, nope + value, dtype=dtype), draw(tokens, 3 + rope, dtype=dtype)]
    agree(lambda kv, entry: keys_and_values(kv, entry[:, 3:], nope), put_together, inputs, dtype)

    def padded(kv: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
        k, v = put_together(kv, entry)
        return k, torch.nn.functional.pad(v, (0, 7))

    agree(lambda kv, entry: keys_and_values(kv, entry[:, 3:], nope, value + 7), padded, inputs, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,heads,wide,width", [(5, 3, 20, 12), (40, 8, 64, 32), (0, 2, 8, 4)])
def test_the_first_columns_of_heads(tokens, heads, wide, width, dtype):
    from hadal.ops.triton.train_heads import narrow

    x = draw(tokens, heads, wide, dtype=dtype)
    agree(lambda x: narrow(x, width), lambda x: x[..., :width], [x], dtype)


def interleaved(x: Tensor, rotation: Tensor) -> Tensor:
    cos, sin = rotation[:, None, 0], rotation[:, None, 1]
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,heads,groups,width", [(5, 4, 2, 12), (3, 14, 2, 64), (2, 32, 8, 128)])
def test_heads_of_gqa(tokens, heads, groups, width, dtype):
    from hadal.ops.triton.train_heads import gqa_heads

    rotation = rotation_of(tokens, width)
    on_host = rotation.cpu().double()

    def reference(qkv: Tensor) -> list[Tensor]:
        cos, sin = on_host[:, None, 0], on_host[:, None, 1]
        a, b = qkv[:, : heads + groups].chunk(2, -1)
        qk = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return [qk[:, :heads], qk[:, heads:], qkv[:, heads + groups :]]

    inputs = [draw(tokens, heads + 2 * groups, width, dtype=dtype)]
    agree(lambda qkv: gqa_heads(qkv, rotation, groups), reference, inputs, dtype)


MOES = {
    "v3": Moe(16, 1, 4, 8, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5),
    "mini": Moe(16, 1, 4, 8, routed_scaling_factor=2.0),
    "v2-lite": Moe(12, 1, 3, 8, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False),
    "v2": Moe(
        12, 1, 3, 8, scoring_func="softmax", topk_method="group_limited_greedy", n_group=3, topk_group=2
    ),
}


@needs_triton
@pytest.mark.parametrize("moe", MOES.values(), ids=MOES)
def test_gate(moe):
    from hadal.ops.triton.train_gate import gate

    E = moe.n_routed_experts
    logit, bias = draw(37 if CUDA else 9, E), draw(E, scale=0.1) if moe.topk_method == "noaux_tc" else None

    def score_of(z: Tensor) -> Tensor:
        return z.sigmoid() if moe.scoring_func == "sigmoid" else z.softmax(-1)

    expert = gate(logit, bias, moe)[0]
    host_bias = None if bias is None else bias.cpu()
    want = gate_op.choose(score_of(logit.cpu()), host_bias, moe)
    assert torch.equal(expert.cpu().sort(-1).values, want.sort(-1).values)
    chosen = expert.cpu()

    def reference(z: Tensor) -> tuple[Tensor, Tensor]:
        score = score_of(z)
        return gate_op.weigh(score, chosen, moe), score

    agree(lambda z: gate(z, bias, moe)[1:], reference, [logit], torch.float32)
    agree(lambda z: gate(z, bias, moe)[1], lambda z: reference(z)[0], [logit], torch.float32)


@needs_triton
@pytest.mark.parametrize("rows,length,experts,K", [(1, 5, 6, 2), (3, 300, 16, 4), (2, 40, 60, 6)])
def test_sequence_loss(rows, length, experts, K):
    from hadal.ops.triton.train_gate import sequence_loss

    score, counted = torch.rand(rows * length, experts).to(DEVICE), torch.rand(rows * length) < 0.8
    counted[-length:] = rows == 1  # the last of several sequences is all padding
    kernel = lambda s: sequence_loss(s, K, rows, counted.to(DEVICE))  # noqa: E731
    agree(kernel, lambda s: balance.sequence_loss(s, K, rows, counted), [score], torch.float32)


@needs_triton
@pytest.mark.parametrize("tokens,vocabulary", [(3, 50), (5, 9001), (2, 4096)])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_loss_and_gradient(tokens, vocabulary, z_loss):
    from hadal.ops.triton.train_loss import loss_and_gradient

    logits, share = draw(tokens, vocabulary, scale=5.0), draw(tokens)
    target = torch.randint(vocabulary, (tokens,)).to(DEVICE)
    wide = logits.double().requires_grad_()
    lse = wide.logsumexp(-1)
    want = share.double() * (lse - wide.gather(1, target[:, None])[:, 0] + z_loss * lse.square())
    want.sum().backward()
    for dtype in (torch.float32, torch.bfloat16):
        loss, grad = loss_and_gradient(logits, target, share, z_loss, dtype)
        assert error(loss, want) < 1e-6
        assert error(grad, wide.grad) < (1e-5 if dtype == torch.float32 else 6e-3)
    assert torch.equal(loss_and_gradient(logits, target, share, z_loss, None)[0], loss)


@needs_triton
@pytest.mark.parametrize("tokens,vocabulary", [(3, 50), (5, 9001), (2, 4096)])
def test_log_prob_and_entropy(tokens, vocabulary):
    from hadal.ops.triton.train_loss import log_prob_and_entropy

    logits = draw(tokens, vocabulary, scale=5.0)
    logits[0, 7] += 90.0  # nearly certain
    logits[1, :20] -= 100.0  # banned
    token = torch.randint(vocabulary, (tokens,)).to(DEVICE)
    log_p = logits.double().log_softmax(-1)
    found, entropy = log_prob_and_entropy(logits, token)
    assert error(found, log_p.gather(1, token[:, None])[:, 0]) < 1e-6
    assert error(entropy, -(log_p.exp() * log_p).sum(-1)) < 1e-5


@needs_triton
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size,decayed", [(5000, 4100), (2048, 2048), (7, 0)])
def test_adamw(size, decayed, moments, clip):
    """Against the formula in FP64, and a dead step that holds NaN changes no bit."""
    from hadal.ops.triton.train_adamw import Numbers, update

    grad, master, parameter = draw(size), draw(size), torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    m, v = draw(size, dtype=moments, scale=0.1), draw(size, dtype=moments, scale=0.1).square()
    numbers = Numbers(0.9, 0.95, 1e-8, 0.01 / (1 - 0.9**3), math.sqrt(1 - 0.95**3), 0.01 * 0.1, clip)
    norm, alive = grad.norm(), torch.ones((), device=DEVICE)
    g = grad.double() * (min(1.0, clip / (norm.item() + 1e-6)) if clip else 1.0)
    want_m, want_v = 0.9 * m.double() + 0.1 * g, 0.95 * v.double() + 0.05 * g * g
    shrink = torch.where(torch.arange(size, device=DEVICE) < decayed, 1 - numbers.shrink, 1.0)
    want = master.double() * shrink - numbers.rate * want_m / (want_v.sqrt() / numbers.root + 1e-8)
    update(grad, master, m, v, parameter, norm, alive, decayed, numbers)
    assert error(master, want) < 1e-6
    assert error(m, want_m) < (1e-6 if moments == torch.float32 else 6e-3)
    assert error(v, want_v) < (1e-6 if moments == torch.float32 else 6e-3)
    assert error(parameter, master) < (3e-3 if CUDA else 6e-3)  # the interpreter truncates
    before = [x.clone() for x in (master, m, v, parameter)]
    grad[0] = float("nan")
    update(grad, master, m, v, parameter, grad.norm(), 0 * alive, decayed, numbers)
    assert all(torch.equal(a, b) for a, b in zip(before, (master, m, v, parameter), strict=True))
    update(grad, master, m, v, None, norm, alive, decayed, numbers)
    assert torch.equal(parameter, before[3])
