"""Triton kernels against their torch references: on CUDA in BF16 and FP32, else in the interpreter (FP32)."""

from __future__ import annotations

import pytest
import torch

from hadal.ops import gate as gate_op
from hadal.ops import paged, rope
from hadal.ops.experts import experts_reference, ffn
from hadal.ops.rms_norm import rms_norm_reference

pytest.importorskip("triton")
from hadal.ops.triton import arrivals, gemv
from tests.helpers.kernels import (
    CUDA,
    DEVICE,
    DTYPES,
    GATES,
    cases,
    close,
    draw,
    in_the_interpreter,
    needs_triton,
    pages_for,
    poison_unused,
)

test_kernels_in_the_interpreter = in_the_interpreter(__file__)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,width", [(1, 24), (5, 100), (3, 2048)])
def test_rms_norm(rows, width, dtype):
    from hadal.ops.triton.norm import add_rms_norm, rms_norm

    wide, weight = draw(rows, width + 8, dtype=dtype), draw(width, dtype=dtype)
    x = wide[:, :width]  # strided rows
    close(rms_norm(x, weight, 1e-6), rms_norm_reference(x.double(), weight.double(), 1e-6), dtype)
    delta = draw(rows, width, dtype=dtype)
    total, normed = add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    close(normed, rms_norm_reference((x + delta).double(), weight.double(), 1e-6), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation(interleaved, dtype):
    from hadal.ops.triton.rope import rotate

    x = draw(7, 5, 3 + 24, dtype=dtype)[..., 3:]
    table = rope.rotation_table(
        rope.Rope(type="yarn", factor=4.0, original_max_position_embeddings=64), 24, 300
    )
    rotation = table[torch.randint(0, 300, (7,))].to(DEVICE)
    reference = (rope.rotate_interleaved if interleaved else rope.rotate_half)(
        x.cpu().float(), rotation.cpu()
    )
    close(rotate(x, rotation, interleaved), reference, dtype)
    close(rotate(x[:, 0], rotation, interleaved), reference[:, 0], dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_entries_and_rotation_into_a_slice(dtype):
    from hadal.ops.mla import latent_entry
    from hadal.ops.triton.mla import write_latent
    from hadal.ops.triton.rope import rotate_into

    rank, width, tokens = 37, 61, 5
    kv, norm = draw(tokens, width + 5, dtype=dtype)[:, :width], draw(rank, dtype=dtype)
    rotation = rope.rotation_table(rope.Rope(), width - rank, 50)[torch.randint(0, 50, (tokens,))].to(DEVICE)
    cache, slot = torch.full((4, 8, width), 7.0).to(dtype).to(DEVICE), torch.randperm(32)[:tokens].to(DEVICE)
    entry = write_latent(kv, norm, 1e-6, rotation, cache, slot)
    want = latent_entry(
        kv.cpu().double().requires_grad_(), norm.cpu().double(), 1e-6, rotation.cpu()
    ).detach()
    close(entry, want, dtype)
    close(cache.view(32, width)[slot], want, dtype)
    untouched = [i for i in range(32) if i not in slot.tolist()]
    assert (cache.view(32, width)[untouched] == 7).all()
    q, out = draw(tokens, 3, 30, dtype=dtype)[..., 6:], torch.zeros(tokens, 3, 40, dtype=dtype, device=DEVICE)
    rotate_into(q, rotation, out[..., 16:], interleaved=True)
    close(
        out[..., 16:],
        rope.rotate_interleaved(q.cpu().float().requires_grad_(), rotation.cpu()).detach(),
        dtype,
    )
    assert (out[..., :16] == 0).all()


@needs_triton
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("moe", GATES, ids=lambda m: f"{m.topk_method}-{m.n_routed_experts}")
def test_gate(moe, tokens):
    from hadal.ops.triton.gate import gate

    x, weight = (
        draw(tokens, 32, dtype=torch.float32),
        draw(moe.n_routed_experts, 32, dtype=torch.float32, scale=0.3),
    )
    biased = moe.topk_method == "noaux_tc"
    # negative biases: −inf masks
    bias = draw(moe.n_routed_experts, dtype=torch.float32) - 1.0 if biased else None
    expert, weights = gate(x, weight, bias, moe)
    want_expert, want_weights, _ = gate_op.gate_reference(x, weight, bias, moe)
    order, want_order = expert.argsort(-1), want_expert.argsort(-1)
    assert torch.equal(expert.gather(1, order), want_expert.gather(1, want_order))
    close(weights.gather(1, order), want_weights.gather(1, want_order), torch.float32)


@needs_triton
@pytest.mark.parametrize("moe", GATES, ids=lambda m: f"{m.topk_method}-{m.n_routed_experts}")
def test_the_gate_of_one_token_with_its_norm(moe):
    from hadal.ops.triton.gate import gate_normed

    x, norm = draw(1, 90, dtype=torch.float32, scale=3.0), draw(90, dtype=torch.float32)
    weight = draw(moe.n_routed_experts, 90, dtype=torch.float32, scale=0.3)
    bias = draw(moe.n_routed_experts, dtype=torch.float32) - 1.0 if moe.topk_method == "noaux_tc" else None
    for _ in range(2):  # the second finds the counters as the first left them
        normed, expert, weights = gate_normed(x, (norm, 1e-6), weight, bias, moe)
        want = rms_norm_reference(x, norm, 1e-6)
        close(normed, want, torch.float32)
        want_expert, want_weights, _ = gate_op.gate_reference(want, weight, bias, moe)
        order, want_order = expert.argsort(-1), want_expert.argsort(-1)
        assert torch.equal(expert.gather(1, order), want_expert.gather(1, want_order))
        close(weights.gather(1, order), want_weights.gather(1, want_order), torch.float32)
    assert not arrivals.counters(x.device).any()


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens,hidden,width,n_experts,K",
    cases(
        [(1, 48, 20, 6, 2), (3, 96, 48, 16, 4), (40, 48, 20, 6, 2)],
        *[(3, 48, 20, 6, 2), (1, 96, 48, 16, 4), (40, 96, 48, 16, 4)],
    ),
)
def test_experts(tokens, hidden, width, n_experts, K, dtype):
    from hadal.ops.triton.experts import experts

    x = draw(tokens, hidden, dtype=dtype)
    gate_up = draw(n_experts, 2 * width, hidden, dtype=dtype, scale=hidden**-0.5)
    down = draw(n_experts, hidden, width, dtype=dtype, scale=width**-0.5)
    expert = torch.stack([torch.randperm(n_experts)[:K] for _ in range(tokens)]).to(DEVICE)
    expert[: tokens // 2] = torch.arange(K, device=DEVICE)  # a crowded expert has more rows than a tile
    weight = draw(tokens, K, dtype=torch.float32).abs()
    wide = experts_reference(x.double(), expert, weight.double(), gate_up.double(), down.double())
    close(experts(x, expert, weight, gate_up, down), wide, dtype)
    residual = draw(tokens, hidden, dtype=dtype)
    for parts in (1, 2):  # a shared expert of so many routed widths
        up = draw(2 * parts * width, hidden, dtype=dtype, scale=hidden**-0.5)
        back = draw(hidden, parts * width, dtype=dtype, scale=(parts * width) ** -0.5)
        want = wide + ffn(x.double(), up.double(), back.double()) + residual.double()
        close(experts(x, expert, weight, gate_up, down, (up, back), residual), want, dtype)
    with pytest.raises(ValueError, match="no multiple"):
        experts(x, expert, weight, gate_up, down, (up, back[:, :-1]))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(dtype):
    from hadal.ops.experts import combine as reference
    from hadal.ops.triton.experts import combine

    row, order, weight = (
        draw(15, 40, dtype=dtype),
        torch.randperm(15, device=DEVICE),
        torch.rand(5, 3).to(DEVICE),
    )
    with torch.enable_grad():  # a gradient forces the reference
        want = reference(row.double().requires_grad_(), order, weight.double()).detach()
    close(combine(row, order, weight), want, dtype)
    shared, residual = draw(5, 40, dtype=dtype), draw(5, 40, dtype=dtype)
    close(combine(row, order, weight, shared, residual), want + shared.double() + residual.double(), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,rank,rope_dim", [(4, 24, 8), (20, 64, 16)])
def test_mla_decode(heads, rank, rope_dim, dtype):
    from hadal.ops.triton.latent import mla_decode

    lengths, page = [1, 67, 200], 16
    table, context = pages_for(lengths, page, 3)
    cache = torch.randn(int(table.max()) + 2, page, rank + rope_dim)
    poison_unused(cache, table, lengths, page)
    q = draw(3, heads, rank + rope_dim, dtype=dtype)
    cache = cache.to(dtype).to(DEVICE)
    out = mla_decode(q, cache, table.to(DEVICE), context.to(DEVICE), rank, 0.2)
    clean = cache.double().nan_to_num(0).cpu()
    close(out, paged.mla_decode_reference(q.double().cpu(), clean, table, context, rank, 0.2), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,groups,width", [(6, 2, 24), (7, 1, 64)])
def test_gqa_decode(heads, groups, width, dtype):
    from hadal.ops.triton.decode import gqa_decode

    lengths, page = [1, 67, 200], 16
    table, context = pages_for(lengths, page, 3)
    cache = torch.randn(int(table.max()) + 2, page, 2, groups, width)
    poison_unused(cache, table, lengths, page)
    q = draw(3, heads, width, dtype=dtype)
    cache = cache.to(dtype).to(DEVICE)
    clean = cache.double().nan_to_num(0).cpu()
    want = paged.gqa_decode_reference(q.double().cpu(), clean, table, context, 0.2)
    for ahead in (False, True):
        close(gqa_decode(q, cache, table.to(DEVICE), context.to(DEVICE), 0.2, ahead, 2 + ahead), want, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,outs,width",
    cases(
        [(1, 19, 33), (3, 25, 70), (32, 19, 33)],
        *[(3, 19, 33), (1, 70, 130), (3, 70, 130), (32, 70, 130)],
    ),
)
def test_linear_of_few_rows(rows, outs, width, dtype):
    from hadal.ops.triton import linear as few

    if dtype == torch.float32 and CUDA:
        pytest.skip("the dispatcher gives these kernels BF16 only; FP32 tiles exceed shared memory")
    x = draw(rows, width + 3, dtype=dtype)[:, :width]
    w = draw(2 * outs, width, dtype=dtype, scale=width**-0.5)
    bias, residual = draw(2 * outs, dtype=dtype), draw(rows, 2 * outs, dtype=dtype)
    want = torch.nn.functional.linear(x.double(), w.double(), bias.double())
    configs: list[few.Config | gemv.Config] = [few.Config(16, 32, 2, 2, splits) for splits in (1, 2, 3)]
    for config in [*configs, gemv.Config(8, 64, 2)] if rows <= 4 else configs:
        close(few.linear(x, w, bias, config=config), want, dtype)
        close(few.linear(x, w, bias, residual, config=config), want + residual.double(), dtype)
        for out, part in zip(
            few.linear_pair(x, w[:outs], w[outs:], config), (w[:outs], w[outs:]), strict=True
        ):
            close(out, x.double() @ part.double().T, dtype)
    assert not arrivals.counters(x.device).any()  # zero again, for the next launch
    gate, up = (x.double() @ w.double().T).chunk(2, -1)
    close(few.linear(x, w, swiglu=True), torch.nn.functional.silu(gate) * up, dtype)
    with pytest.raises(ValueError, match="not shared out"):
        few.linear(x, w, swiglu=True, config=few.Config(16, 32, 2, 2, 2))
    wide = few.linear(x, w, dtype=torch.float32)
    assert wide.dtype == torch.float32
    close(wide, x.double() @ w.double().T, torch.float32)
    assert few.wants(x, w) == (dtype == torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outs,width", [(19, 33), (70, 130)])
def test_a_norm_inside_the_product_of_one_row(outs, width, dtype):
    """The same bits of the normed row as from its own kernel, and the products of those."""
    from hadal.ops.triton import linear as few
    from hadal.ops.triton.norm import rms_norm

    x, residual = draw(1, width, dtype=dtype, scale=5.0), draw(1, 2 * outs, dtype=dtype)
    weight, bias = draw(width, dtype=dtype), draw(2 * outs, dtype=dtype)
    w = draw(2 * outs, width, dtype=dtype, scale=width**-0.5)
    normed = torch.full_like(x, float("nan"))
    norm, want = gemv.Norm(weight, 1e-6, normed), rms_norm(x, weight, 1e-6)
    product = want.double() @ w.double().T
    close(few.linear(x, w, bias, residual, norm=norm), product + bias.double() + residual.double(), dtype)
    assert CUDA or torch.equal(normed, want)  # on a GPU another order of its sum
    close(normed, want.double(), dtype)
    for out, part in zip(
        few.linear_pair(x, w[:outs], w[outs:], norm=norm), product.chunk(2, -1), strict=True
    ):
        close(out, part, dtype)
    gate, up = product.chunk(2, -1)
    close(few.linear(x, w, swiglu=True, norm=norm), torch.nn.functional.silu(gate) * up, dtype)
    close(few.linear(x, w, dtype=torch.float32, norm=norm), product, torch.float32)
    with pytest.raises(AssertionError, match="one row"):
        few.linear(torch.cat([x, x]), w, config=gemv.Config(8, 256, 2), norm=norm)


@needs_triton
def test_argmax_of_logits():
    from hadal.ops.triton.argmax import argmax

    logits = torch.randn(7, 9000).to(DEVICE)[:, :8990]
    logits[0, [17, 5000, 8000]] = 9.0  # the first of equals
    logits[1, 8989] = 9.0
    logits[2, 4100] = float("nan")
    logits[3, 0] = float("inf")
    logits[4] = float("-inf")
    logits[5, :4096] = float("-inf")
    want = logits.argmax(-1)
    want[2:5] = -1
    want[0] = 17
    assert argmax(logits).tolist() == want.tolist()
    assert argmax(logits[:, :100].bfloat16().contiguous()[5:]).tolist()[0] == -1
    assert not arrivals.counters(logits.device).any()
