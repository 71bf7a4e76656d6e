"""Every Triton kernel compiles for an H100 (sm_90) at the sizes of real models, within its shared memory.

No card is needed: launches become compilations. The interpreter takes much that the compiler refuses.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hadal.config import preset
from hadal.ops.packed import Kind, Packed
from hadal.ops.triton import pdl

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels run there"
)
SHARED = 227 << 10  # bytes of shared memory that a program may have on an H100
BF16, INT32, FP8 = torch.bfloat16, torch.int32, torch.float8_e4m3fn


class H100:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_interface(self) -> types.SimpleNamespace:
        return types.SimpleNamespace()

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch) -> list[Any]:
    """Kernels in the order in which the test would have launched them."""
    kernels: list[Any] = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(driver, "_active", H100())
    monkeypatch.setattr(pdl, "options", lambda x: {"PDL": True, "launch_pdl": True})
    return kernels


def mla(heads: int, queries: int, fp8: bool) -> None:
    from hadal.ops.triton.latent import mla_decode

    table, context = torch.zeros(2 * queries, 8, dtype=INT32), torch.zeros(2 * queries, dtype=INT32)
    cache = torch.empty(9, 64, 656, dtype=torch.uint8) if fp8 else torch.empty(9, 64, 576, dtype=BF16)
    q = torch.empty(2 * queries, heads, 576, dtype=BF16)
    mla_decode(q, cache, table, context, 512, 0.1, queries, shares=2)


def mla_gluon(queries: int, fp8: bool) -> None:
    from hadal.ops.triton.latent_gluon import mla_decode

    table, context = torch.zeros(2 * queries, 8, dtype=INT32), torch.zeros(2 * queries, dtype=INT32)
    q = torch.empty(2 * queries, 128, 576, dtype=BF16)
    cache = torch.empty(9, 64, 656, dtype=torch.uint8) if fp8 else torch.empty(9, 64, 576, dtype=BF16)
    mla_decode(q, cache, table, context, 512, 0.1, queries, shares=2)


def gqa() -> None:
    from hadal.ops.triton.decode import gqa_decode

    table, context = torch.zeros(2, 8, dtype=INT32), torch.zeros(2, dtype=INT32)
    cache = torch.empty(9, 64, 2, 2, 128, dtype=BF16)
    gqa_decode(torch.empty(2, 12, 128, dtype=BF16), cache, table, context, 0.1, True, 4)


def heads() -> None:
    from hadal.ops.triton.heads import gqa_heads, mla_heads

    kv, rope = torch.empty(4, 16, 256, dtype=BF16), torch.empty(4, 576, dtype=BF16)[:, 512:]
    mla_heads(torch.empty(3, 16, 192, dtype=BF16), torch.empty(3, 2, 32), kv, rope)
    cache, slot = torch.empty(9, 64, 2, 2, 128, dtype=BF16), torch.zeros(3, dtype=torch.int64)
    gqa_heads(torch.empty(3, 16, 128, dtype=BF16), torch.empty(3, 2, 64), 2, cache, slot)


def flash() -> None:
    from hadal.ops.triton.flash import attention

    kv, rope = torch.empty(200, 16, 256, dtype=BF16), torch.empty(200, 576, dtype=BF16)[:, 512:]
    q, keys, values = torch.empty(100, 16, 192, dtype=BF16), kv[..., :128], kv[..., 128:]
    attention(q, keys, values, [100], [200], 0.1, rope)
    attention(q, torch.empty(200, 16, 192, dtype=BF16), values, [100], [200], 0.1)
    attention(q[..., :128], values[:, :2], values[:, 2:4], [100], [200], 0.1)


def route(n_experts: int) -> None:
    from hadal.ops.triton.route import places, spread

    place, _ = places(torch.zeros(4000, 6, dtype=torch.int64), n_experts)
    spread(torch.empty(4000, 2048, dtype=BF16), place, 6)


def linear(kind: Kind, rows: int) -> None:
    from hadal.ops.triton.packed import dequantise, streamed

    weight = Packed(kind, (2048, 2048))
    x = torch.empty(rows, 2048, dtype=BF16)
    streamed(x, weight, torch.empty(2048, dtype=BF16), x, splits=2)
    dequantise(weight, BF16)


def packed_row(kind: Kind, rows: int) -> None:
    """V2-Lite's layers at decode; the last is half as wide as its dense one (two steps), its codes in rows
    of no multiples of 64 bytes."""
    from hadal.ops.triton.packed_gemv import linear, linear_pair

    x, wide = torch.empty(rows, 2048, dtype=BF16), torch.empty(rows, 5472, dtype=BF16)
    linear_pair(x, Packed(kind, (3072, 2048)), Packed(kind, (576, 2048)))
    linear(x, Packed(kind, (2048, 2048)), residual_MN=x)
    linear(x, Packed(kind, (21888, 2048)), swiglu=True)
    linear(wide, Packed(kind, (2048, 5472)), x[0], x, dtype=torch.float32)


def experts(kind: Kind, tokens: int) -> None:
    from hadal.ops.triton import packed_gemv
    from hadal.ops.triton.packed import expert_rows

    gate_up, down = Packed(kind, (4, 2816, 2048)), Packed(kind, (4, 2048, 1408))
    shared = Packed(kind, (5632, 2048)), Packed(kind, (2048, 2816))
    x, chosen = torch.empty(tokens, 2048, dtype=BF16), torch.zeros(tokens, 2, dtype=torch.int64)
    if tokens <= 2:
        packed_gemv.experts(x, chosen, gate_up, down, shared, 2)
    else:
        many = tokens > 256
        expert_rows(x, chosen, gate_up, down, many, shared=None if many else shared)


def fp8() -> None:
    from hadal.ops.triton import fp8 as op

    x, one = torch.empty(256, 2048, dtype=BF16), torch.zeros(2, dtype=INT32)
    q, scale = op.quantise_rows(x)
    op.quantise_rows(x, torch.arange(512), 512)
    op.swiglu_quantise(x, one)
    op.rms_norm_quantise(x, x[0], 1e-6, x)
    op.grouped_matmul(q, scale, Packed("fp8", (2, 4096, 2048)), one, one)
    op.grouped_matmul(q, scale, Packed("fp8", (2, 4096, 2048), rows=64), one, one)


def grouped_gluon(outs: int, width: int) -> None:
    from hadal.ops.triton import fp8_gluon as op

    q, one = torch.empty(256, width, dtype=FP8), torch.zeros(2, dtype=INT32)
    op.grouped_matmul(q, torch.empty(8, 256), Packed("fp8", (2, outs, width)), one, one)


def fp8_training(width: int, power: bool) -> None:
    """V2-Lite's experts, and a dense network of a width that tiles do not divide."""
    from hadal.ops import fp8_tiles
    from hadal.ops.triton import fp8_train as op

    x, rows = (
        torch.empty(256, 2048, dtype=BF16),
        fp8_tiles.sort_rows(torch.zeros(256, 1, dtype=torch.int64), 4),
    )
    codes = op.quantise(x, power)
    op.quantise_both(x, power)
    op.columns(codes, rows)
    op.columns(codes, None)
    op.gather(codes, rows)
    R, weight_R = rows.token_R.numel(), torch.empty(rows.token_R.numel())
    for where, w in ((rows, weight_R), (None, None)):
        _, kept = op.swiglu(torch.empty(R, 2 * width, dtype=BF16), w, power, where)
        op.swiglu_backward(kept, torch.empty(R, width, dtype=BF16), w, power, where)
    op.transposed(op.quantise_weight(torch.empty(4, 2 * width, 2048, dtype=BF16), power))


def fp8_training_swiglu(power: bool) -> None:
    from hadal.ops import fp8_tiles
    from hadal.ops.triton import fp8_swiglu_gluon
    from hadal.ops.triton.fp8_train import _empty

    rows, width = fp8_tiles.sort_rows(torch.zeros(256, 1, dtype=torch.int64), 4), 1408
    R, device = rows.token_R.numel(), rows.used.device
    kept = fp8_tiles.Codes(torch.empty(R, 2 * width, dtype=FP8), torch.empty(22, R), True)
    for where, w in ((rows, torch.empty(R)), (None, None)):
        out = (_empty(2 * width, R, power, device), _empty(width, R, power, device), torch.empty(11, R))
        dh, d = torch.empty(R, width, dtype=BF16), _empty(R, 2 * width, power, device)
        fp8_swiglu_gluon.swiglu_backward(kept, dh, w, where, d, *out)


def fp8_training_products() -> None:
    from hadal.ops import fp8_tiles
    from hadal.ops.triton import fp8_outer_gluon
    from hadal.ops.triton import fp8_train as op
    from hadal.ops.triton import fp8_train_products as products

    rows = fp8_tiles.sort_rows(torch.zeros(256, 1, dtype=torch.int64), 4)
    R = rows.token_R.numel()
    codes, weight = op._empty(R, 2048, True, rows.used.device), op.Weight(
        torch.empty(4, 1408, 2048, dtype=FP8), torch.empty(4, 11, 16), True
    )  # fmt: skip
    for path in ("gluon", "triton"):
        products._by_tiles(codes, weight, BF16, rows, path)
    products.dequantise(codes, BF16, rows.used)
    products.dequantise_weight(weight, BF16)
    a, b = (op._empty(n, R, True, rows.used.device) for n in (2816, 2048))
    products.outer_by_tiles(a, b, BF16, rows)
    fp8_outer_gluon.outer(a, b, rows)
    for more in (False, True):
        fp8_outer_gluon.outer(a, b, rows, torch.empty(4, 2816, 2048), more)


def fp8_training_small() -> None:
    """hadal-mini's experts."""
    from hadal.ops import fp8_tiles
    from hadal.ops.triton import fp8_train_small as op

    rows = fp8_tiles.sort_rows(torch.zeros(256, 1, dtype=torch.int64), 4)
    codes = fp8_tiles.Codes(torch.empty(256, 256, dtype=FP8), torch.empty(2, 256), True)
    op.quantise_both(torch.empty(256, 192, dtype=BF16), True)
    op.columns(codes, rows)
    op.columns(codes, None)
    op.transposed(op.quantise_weight(torch.empty(4, 192, 256, dtype=BF16), True))


def gate() -> None:
    from hadal.ops.triton import gate as apart

    for name in ("deepseek-v2-lite", "deepseek-v3"):
        config = preset(name).config
        moe = config.moe
        assert moe is not None
        bias = torch.zeros(moe.n_routed_experts) if moe.topk_method == "noaux_tc" else None
        weight = torch.empty(moe.n_routed_experts, config.hidden_size, dtype=BF16)
        apart.gate(torch.empty(2, config.hidden_size, dtype=BF16), weight, bias, moe)
        if config.hidden_size <= 4096:
            norm = torch.empty(config.hidden_size, dtype=BF16), 1e-6
            apart.gate_normed(torch.empty(1, config.hidden_size, dtype=BF16), norm, weight, bias, moe)


def few_rows(rows: int) -> None:
    """Linear layers of V2-Lite and Qwen 1.5B at decode."""
    from hadal.ops.triton import gemv
    from hadal.ops.triton.linear import linear, linear_pair

    x, wide = torch.empty(rows, 2048, dtype=BF16), torch.empty(rows, 8960, dtype=BF16)
    linear_pair(x, torch.empty(3072, 2048, dtype=BF16), torch.empty(576, 2048, dtype=BF16))
    linear(x, torch.empty(2048, 2048, dtype=BF16), residual_MN=x)
    linear(x, torch.empty(21888, 2048, dtype=BF16), swiglu=True)
    linear(x, torch.empty(102400, 2048, dtype=BF16), dtype=torch.float32)
    linear(wide, torch.empty(1536, 8960, dtype=BF16), torch.empty(1536, dtype=BF16))
    if rows == 1:
        norm = gemv.Norm(torch.empty(2048, dtype=BF16), 1e-6, torch.empty(1, 2048, dtype=BF16))
        linear_pair(x, torch.empty(3072, 2048, dtype=BF16), torch.empty(576, 2048, dtype=BF16), norm=norm)
        linear(x, torch.empty(21888, 2048, dtype=BF16), swiglu=True, norm=norm)
        linear(x, torch.empty(64, 2048, dtype=BF16), dtype=torch.float32, norm=norm)


def few_experts(tokens: int) -> None:
    from hadal.ops.triton.experts import experts

    x = torch.empty(tokens, 2048, dtype=BF16)
    up, down = torch.empty(64, 2816, 2048, dtype=BF16), torch.empty(64, 2048, 1408, dtype=BF16)
    shared = torch.empty(5632, 2048, dtype=BF16), torch.empty(2048, 2816, dtype=BF16)
    chosen = torch.zeros(tokens, 6, dtype=torch.int64)
    experts(x, chosen, torch.empty(tokens, 6), up, down, shared, x)


def small() -> None:
    from hadal.ops.triton.argmax import argmax
    from hadal.ops.triton.norm import add_rms_norm

    x = torch.empty(4, 2048, dtype=BF16)
    add_rms_norm(x, x, x[0], 1e-6)
    argmax(torch.empty(4, 102400))


def write() -> None:
    from hadal.ops.triton.mla import write_latent

    kv, norm = torch.empty(4, 576, dtype=BF16), torch.empty(512, dtype=BF16)
    cache, slot = torch.empty(10, 64, 656, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    write_latent(kv, norm, 1e-6, torch.empty(4, 64), cache, slot)


def ends(heads: int, tokens: int, page_bytes: int) -> None:
    from hadal.ops.triton import latent, mla

    product, up = torch.empty(tokens, heads * 192 + 576, dtype=BF16), torch.empty(heads, 256, 512, dtype=BF16)
    q, kv = product[:, : heads * 192].unflatten(1, (heads, 192)), product[:, heads * 192 :]
    cache = torch.empty(9, 64, page_bytes, dtype=torch.uint8 if page_bytes == 656 else BF16)
    slot = torch.zeros(tokens, dtype=torch.int64)
    q = mla.queries(q, kv, kv[0, :512], 1e-6, torch.empty(tokens, 64), up[:, :128], cache, slot)
    table, context = torch.zeros(tokens, 80, dtype=INT32), torch.zeros(tokens, dtype=INT32)
    mla.values(latent.attend(q, cache, table, context, 512, 0.1, shares=32), up[:, 128:])


def backward(*outs: torch.Tensor) -> None:
    torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])


def train_experts(hidden: int, width: int, K: int) -> None:
    from hadal.ops.triton import train_experts as op

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=BF16, requires_grad=True)

    backward(op.swiglu(draw(4 * K, 2 * width)))
    place = torch.arange(4 * K)
    backward(op.spread(draw(4, hidden), place, K))
    weight = torch.empty(4, K, requires_grad=True)
    backward(op.combine(draw(4 * K, hidden), place, weight, draw(4, hidden), draw(4, hidden)))


def train_heads(heads: int, nope: int, rope: int, value: int) -> None:
    from hadal.ops.triton import train_heads as op

    kv = torch.empty(2, heads, nope + value, dtype=BF16, requires_grad=True)
    entry = torch.empty(2, 512 + rope, dtype=BF16, requires_grad=True)
    backward(op.turned(kv[..., : nope + rope], torch.empty(2, 2, rope // 2), nope))
    backward(*op.keys_and_values(kv, entry[:, 512:], nope))
    backward(*op.gqa_heads(kv, torch.empty(2, 2, (nope + value) // 2), 2))


def train_gate() -> None:
    from hadal.ops.triton import train_gate as op

    for name in ("deepseek-v2-lite", "deepseek-v3"):
        moe = preset(name).config.moe
        assert moe is not None
        E = moe.n_routed_experts
        logit = torch.empty(512, E, requires_grad=True)
        _, weight, score = op.gate(logit, torch.zeros(E) if moe.topk_method == "noaux_tc" else None, moe)
        backward(weight, score)
        counted = torch.ones(512, dtype=torch.bool)
        backward(op.sequence_loss(score.detach().requires_grad_(), moe.num_experts_per_tok, 2, counted))


def loss(vocabulary: int) -> None:
    from hadal.ops.triton.train_loss import log_prob_and_entropy, loss_and_gradient

    logits = torch.empty(2, vocabulary)
    loss_and_gradient(logits, torch.zeros(2, dtype=torch.int64), logits[:, 0].clone(), 0.0, BF16)
    log_prob_and_entropy(logits, torch.zeros(2, dtype=torch.int64))


def adamw() -> None:
    from hadal.ops.triton.train_adamw import Numbers, update

    flat, half, one = torch.empty(1 << 14), torch.empty(1 << 14, dtype=BF16), torch.ones(())
    update(flat, flat, half, half, half, one, one, 1 << 13, Numbers(0.9, 0.95, 1e-8, 0.1, 0.1, 0.1, 1.0))
    update(flat, flat, flat, flat, None, one, one, 1 << 13, Numbers(0.9, 0.95, 1e-8, 0.1, 0.1, 0.1, 0.0))


CASES: dict[str, tuple[Callable[..., None], tuple[Any, ...], int]] = {
    "MLA, 16 heads": (mla, (16, 1, False), 2),
    "MLA, 128 heads": (mla, (128, 1, False), 2),
    "MLA, FP8, 16 heads": (mla, (16, 1, True), 2),
    "MLA, FP8, 128 heads": (mla, (128, 1, True), 2),
    "MLA in Gluon": (mla_gluon, (2, False), 2),
    "MLA in Gluon, FP8": (mla_gluon, (1, True), 2),
    "GQA, pages ahead": (gqa, (), 2),
    "heads": (heads, (), 2),
    "attention of a stream": (flash, (), 3),
    "rows of 64 experts": (route, (64,), 3),
    "rows of 256 experts": (route, (256,), 3),
    "linear INT8": (linear, ("int8", 3), 2),
    "linear INT4": (linear, ("int4", 16), 2),
    "linear FP8": (linear, ("fp8", 64), 2),
    "linear INT8, 1 row": (packed_row, ("int8", 1), 4),
    "linear INT4, 1 row": (packed_row, ("int4", 1), 4),
    "linear FP8, 2 rows": (packed_row, ("fp8", 2), 4),
    "experts INT8, 1 token": (experts, ("int8", 1), 2),
    "experts INT4, 1 token": (experts, ("int4", 1), 2),
    "experts FP8, 2 tokens": (experts, ("fp8", 2), 2),
    "experts INT4, 200 tokens": (experts, ("int4", 200), 2),
    "experts INT4": (experts, ("int4", 1000), 2),
    "experts FP8": (experts, ("fp8", 100), 2),
    "products in FP8": (fp8, (), 6),
    "products in FP8, in Gluon": (grouped_gluon, (4096, 2048), 1),
    "products in FP8, in Gluon, one group": (grouped_gluon, (256, 128), 1),
    "FP8 training, experts": (fp8_training, (1408, True), 11),
    "FP8 training, V3's scales": (fp8_training, (1408, False), 11),
    "FP8 training, odd widths": (fp8_training, (10944, True), 13),
    "FP8 training, SwiGLU in Gluon": (fp8_training_swiglu, (True,), 2),
    "FP8 training, SwiGLU in Gluon, scales as they come": (fp8_training_swiglu, (False,), 2),
    "FP8 training, products": (fp8_training_products, (), 8),
    "FP8 training, small layers": (fp8_training_small, (), 4),
    "gate": (gate, (), 5),
    "linear, 1 row": (few_rows, (1,), 8),
    "linear, 32 rows": (few_rows, (32,), 5),
    "experts, 1 token": (few_experts, (1,), 2),
    "experts, 32 tokens": (few_experts, (32,), 3),
    "experts, 256 tokens": (few_experts, (256,), 3),
    "norm, argmax": (small, (), 2),
    "FP8 latent entries": (write, (), 1),
    "around MLA, 16 heads": (ends, (16, 1, 576), 3),
    "around MLA, 128 heads, FP8": (ends, (128, 16, 656), 3),
    "training: experts, V2-Lite": (train_experts, (2048, 1408, 6), 6),
    "training: experts, mini": (train_experts, (256, 96, 4), 6),
    "training: AdamW": (adamw, (), 2),
    "training: gates": (train_gate, (), 8),
    "training: heads, V2-Lite": (train_heads, (16, 128, 64, 128), 6),
    "training: heads, V3": (train_heads, (128, 128, 64, 128), 6),
    "training: heads, mini": (train_heads, (8, 32, 32, 32), 6),
    "training: loss": (loss, (102400,), 2),
    "training: loss, mini": (loss, (1088,), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_it_compiles_within_shared_memory(case: str, compiled: list[Any]) -> None:
    make, args, launches = CASES[case]
    make(*args)
    assert len(compiled) == launches
    for kernel in compiled:
        assert "cubin" in kernel.asm and kernel.metadata.shared <= SHARED, (
            kernel.name,
            kernel.metadata.shared,
        )
