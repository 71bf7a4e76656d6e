"""FP8 training on a Hopper card, at V2-Lite's sizes: every path of every product, SwiGLU, whole layers."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from hadal.ops import fp8_tiles as plain
from hadal.ops import fp8_training
from hadal.plan.training import TrainingShape, activations, training_memory
from hadal.train.batches import build
from tests.gpu.test_training import DENSE, ROWS, V3, WIDE, _trainer, kept_bytes
from tests.train import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper card",
    ),
]
HIDDEN, WIDTH, EXPERTS, TOP, TOKENS = 2048, 1408, 64, 6, 4096
DENSE_SHAPES = {  # outputs, inputs: who multiplies forward, backward
    "q_proj": (3072, 2048, "torch", "torch"),
    "kv_a_proj": (576, 2048, "torch", "gluon"),
    "kv_b_proj": (4096, 512, "torch", "torch"),
    "o_proj": (2048, 2048, "torch", "torch"),
    "gate_up, dense": (21888, 2048, "torch", "torch"),
    "down, dense": (2048, 10944, "gluon", "torch"),
    "gate_up, shared": (5632, 2048, "torch", "torch"),
    "hadal-mini": (384, 96, "emulated", "emulated"),
}
EXPERT_SHAPES = {
    "gate_up": (2 * WIDTH, HIDDEN, "gluon"),
    "down": (HIDDEN, WIDTH, "gluon"),
    "hadal-mini": (192, 256, "emulated"),
}


@pytest.fixture(autouse=True)
def nothing_unwritten(poisoned: None) -> None:
    """What is not written is NaN."""


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


def some_rows(n_experts: int = EXPERTS, tokens: int = TOKENS) -> plain.Rows:
    """Uneven, and the last expert without any."""
    from hadal.ops.triton import fp8_train

    score = torch.rand(tokens, n_experts - 1, device="cuda") + torch.linspace(0, 0.3, n_experts - 1).cuda()
    return fp8_train.sort_rows(score.topk(TOP, 1).indices, n_experts)


def wide(codes: plain.Codes) -> torch.Tensor:
    return plain.dequantise(codes)


@pytest.mark.parametrize("power", [True, False], ids=["power_of_two", "float32"])
@pytest.mark.parametrize("name", DENSE_SHAPES)
def test_dense_products_of_a_linear_layer(name, power):
    from hadal.ops.triton import fp8_train as ops
    from hadal.ops.triton import fp8_train_products as products

    N, K, forward, backward = DENSE_SHAPES[name]
    x, dy = draw(TOKENS, K), draw(TOKENS, N, scale=1e-7)
    weight = ops.quantise_weight(draw(N, K, scale=K**-0.5), power)
    turned, codes = ops.transposed(weight), ops.quantise(x, True)
    w = plain.dequantise_blocks(weight.q, weight.scale)
    grad, grad_columns = ops.quantise_both(dy, power)
    x_columns = ops.columns(codes, None)
    assert products.matmul_path(codes, weight, torch.bfloat16, None) == forward
    assert products.matmul_path(grad, turned, torch.bfloat16, None) == backward
    assert error(products.matmul(codes, weight, torch.bfloat16, None), wide(codes) @ w.t()) < 4e-3
    assert error(products.matmul(grad, turned, torch.bfloat16, None), wide(grad) @ w) < 4e-3
    want = wide(grad_columns) @ wide(x_columns).t()
    assert error(products.outer(grad_columns, x_columns, torch.bfloat16, None), want) < 4e-3
    assert products.outer_path(grad_columns, x_columns, None) == (
        "emulated" if forward == "emulated" else "torch"
    )
    own = products.outer_by_tiles(grad_columns, x_columns, torch.bfloat16, None)
    assert error(own, want) < 4e-3


@pytest.mark.parametrize("name", EXPERT_SHAPES)
def test_grouped_products_of_experts(name):
    from hadal.ops.triton import fp8_train as ops
    from hadal.ops.triton import fp8_train_products as products

    N, K, path = EXPERT_SHAPES[name]
    rows = some_rows()
    used = slice(0, int(rows.used) * 128)
    weight = ops.quantise_weight(draw(EXPERTS, N, K, scale=K**-0.5), True)
    for stack, width in ((weight, K), (ops.transposed(weight), N)):
        token = ops.quantise(draw(TOKENS, width), True)
        codes = ops.gather(token, rows)
        assert products.matmul_path(codes, stack, torch.bfloat16, rows) == path
        want = plain.matmul(codes, stack, torch.float32, rows)[used]
        for way in ("gluon", "triton", "emulated"):
            if way == "emulated":
                out = products._emulated(codes, stack, torch.bfloat16, rows)
            elif path == "emulated":
                continue
            else:
                out = products._by_tiles(codes, stack, torch.bfloat16, rows, way)
            assert error(out[used], want) < 4e-3, way
    a, b = (ops.columns(ops.quantise(draw(TOKENS, n, scale=1e-6), True), rows) for n in (N, K))
    want = plain.outer(a, b, torch.float32, rows)
    out = products.outer(a, b, torch.bfloat16, rows)
    assert error(out, want) < 4e-3 and not out[-1].any()
    assert products.outer_path(a, b, rows) == ("gluon" if path == "gluon" else "emulated")
    sums = torch.full(want.shape, float("nan"), device="cuda")
    for times, more in ((1, False), (2, True), (3, True)):
        products.outer_into(a, b, rows, sums, more)
        assert error(sums, times * want) < (1e-3 if path == "gluon" else 4e-3) and not sums[-1].any()
    if N % 128 == 0:
        out = products.outer_by_tiles(a, b, torch.bfloat16, rows)
        assert error(out, want) < 4e-3 and not out[-1].any()
    a_wide, b_wide = (products.dequantise(c, torch.bfloat16) for c in (a, b))
    assert error(products._grouped(a_wide, b_wide.t(), rows), want) < 4e-3


@pytest.mark.parametrize("width", [WIDTH, 96])
@pytest.mark.parametrize("power", [True, False], ids=["power_of_two", "float32"])
def test_swiglu_with_quantising(width, power):
    from hadal.ops.triton import fp8_train as ops

    rows = some_rows(tokens=1000)
    R, used = rows.token_R.numel(), slice(0, int(rows.used) * 128)
    gap = (rows.token_R < 0)[:, None]
    x, dh = draw(R, 2 * width).masked_fill_(gap, 0), draw(R, width, scale=1e-7).masked_fill_(gap, 0)
    weight_R = torch.rand(R, device="cuda").masked_fill_(gap[:, 0], 0)
    found, want = (o.swiglu(x, weight_R, power, rows) for o in (ops, plain))
    assert torch.equal(found[1].q.view(torch.uint8)[used], want[1].q.view(torch.uint8)[used])
    assert error(wide(found[0])[used], wide(want[0])[used]) < 1e-2
    found, want = (o.swiglu_backward(want[1], dh, weight_R, power, rows) for o in (ops, plain))
    assert error(wide(found[0])[used], wide(want[0])[used]) < 1e-2
    for i in (1, 2):
        assert error(wide(found[i])[:, used], wide(want[i])[:, used]) < 1e-2
    assert error(found[3][used], want[3][used]) < 1e-3


@pytest.mark.parametrize("shape", [(HIDDEN, WIDTH, EXPERTS), (256, 96, 16)], ids=["V2-Lite", "hadal-mini"])
def test_experts_are_the_reference(shape, monkeypatch):
    """Values and all gradients, with the reference on the same card in FP32 products."""
    hidden, width, n_experts = shape
    x, gate_up = draw(1024, hidden), draw(n_experts, 2 * width, hidden, scale=hidden**-0.5)
    down, dy = draw(n_experts, hidden, width, scale=width**-0.5), draw(1024, hidden, scale=1e-6)
    expert = torch.rand(1024, n_experts - 1, device="cuda").topk(4, 1).indices
    weight, ends = torch.rand(1024, 4, device="cuda"), []
    for reference in (False, True):
        if reference:
            monkeypatch.setattr(fp8_training, "_kernels", lambda *x: plain)
        inputs = [t.clone().requires_grad_() for t in (x, weight, gate_up, down)]
        y = fp8_training.experts(inputs[0], expert, *inputs[1:])
        ends.append([y, *torch.autograd.grad(y, inputs, dy)])
    for out, want in zip(*ends, strict=True):
        assert error(out.detach(), want.detach()) < 2e-2


def test_a_step_waits_for_nothing():
    """Experts and a dense network, forward and backward, without a synchronisation of host and device."""
    x = draw(1024, HIDDEN).requires_grad_()
    gate_up = draw(EXPERTS, 2 * WIDTH, HIDDEN, scale=0.02).requires_grad_()
    down = draw(EXPERTS, HIDDEN, WIDTH, scale=0.02).requires_grad_()
    expert = torch.rand(1024, EXPERTS, device="cuda").topk(TOP, 1).indices
    weight = torch.rand(1024, TOP, device="cuda", requires_grad=True)
    for mode in (0, 2):  # the second time all is compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            y = fp8_training.experts(x, expert, weight, gate_up, down)
            (y + fp8_training.ffn(x, gate_up[0], down[0])).backward(torch.ones_like(y))
        finally:
            torch.cuda.set_sync_debug_mode(0)
    assert all(t.grad.isfinite().all() for t in (x, gate_up, down, weight))


@pytest.mark.parametrize("changes", [WIDE, DENSE], ids=["v3", "qwen"])
@pytest.mark.parametrize("kinds", [(), V3], ids=["nothing", "v3"])
def test_kept_codes_and_the_peak_are_predicted(changes, kinds):
    network = tiny.model(dtype=torch.bfloat16, **changes).cuda()
    rows = tiny.RandomRows(plain=True).rows(0, ROWS)
    micro = build(rows, depths=len(network.mtp), mask_documents=True).to(network.device)
    shape = TrainingShape(micro.tokens, recompute=kinds, fp8=True)
    with fp8_training.fp8_training():
        kept = kept_bytes(network, micro, kinds)
    assert activations(network.config, shape) == pytest.approx(kept, rel=0.1)
    del network, micro, rows
    gc.collect()
    others = torch.cuda.memory_allocated()
    trainer = _trainer(kinds, **changes)
    trainer.objective = replace(trainer.objective, fp8=True)
    trainer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    trainer.step()
    peak = torch.cuda.max_memory_allocated() - others
    predicted = training_memory(trainer.model.config, shape).peak
    assert predicted == pytest.approx(peak, rel=0.1)
