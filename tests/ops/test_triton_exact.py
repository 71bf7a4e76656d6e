"""Exact Triton kernels: right, and the same bits for a row in every batch, chunk and cache; on CUDA in BF16
and FP32, else in the interpreter (FP32). Whole models on CUDA: tests/gpu/test_exact.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hadal.model import Context
from hadal.ops import invariant, rope
from hadal.ops.attention import attention_reference
from hadal.ops.exact import exact
from hadal.ops.experts import experts_reference
from hadal.ops.gate import gate_reference
from hadal.ops.invariant import Stream
from tests.weights import tiny
from tests.weights.helpers import random_model

pytest.importorskip("triton")
from tests.helpers.kernels import (
    CUDA,
    DEVICE,
    DTYPES,
    INTERPRETED,
    close,
    draw,
    in_the_interpreter,
    needs_triton,
)

test_kernels_in_the_interpreter = in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def small_shares(monkeypatch):
    """Contexts of a few hundred keys are cut, too, and rows are taken in turns."""
    torch.manual_seed(0)
    if CUDA or INTERPRETED:
        from hadal.ops.triton import exact as kernels

        monkeypatch.setattr(kernels, "SHARE", 64 if CUDA else kernels.KEYS)
        monkeypatch.setattr(kernels, "SHARE_BYTES", 1 << 18)
        if not CUDA:
            monkeypatch.setattr(invariant, "_kernels", lambda x: kernels)


def stream_of(lengths: list[int], table: Tensor | None = None, page: int = 0, first: int = 0) -> Stream:
    position = torch.cat([torch.arange(first, first + n) for n in lengths]).to(DEVICE)
    return Stream.build(position, [0, *torch.tensor(lengths).cumsum(0).tolist()], table, page)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,outs,width", [(1, 24, 20), (70, 130, 100)])
def test_linear(rows, outs, width, dtype):
    x, w, b = draw(rows, width, dtype=dtype), draw(outs, width, dtype=dtype), draw(outs, dtype=dtype)
    want = x.double() @ w.double().T
    close(invariant.linear(x, w, b), want + b.double(), dtype)
    wide = invariant.linear(x, w, wide=True)
    assert wide.dtype == torch.float32
    close(wide, want, torch.float32)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_and_gate(dtype):
    moe = tiny.V3.moe
    assert moe is not None
    x, router, bias = draw(45 if CUDA else 20, 40, dtype=dtype), draw(8, 40, dtype=dtype), draw(8)
    expert, weight, score = invariant.gate(x, router, bias, moe)
    want_expert, want_weight, want_score = gate_reference(x, router, bias, moe)
    order, want_order = expert.argsort(-1), want_expert.argsort(-1)
    assert torch.equal(expert.gather(1, order), want_expert.gather(1, want_order))
    close(weight.gather(1, order), want_weight.gather(1, want_order), torch.float32)
    close(score, want_score, torch.float32)
    gate_up, down = draw(8, 2 * 21, 40, dtype=dtype, scale=0.2), draw(8, 40, 21, dtype=dtype, scale=0.2)
    expert[expert == 5] = 6  # an expert without rows
    args = (x, expert, weight, gate_up, down)
    want = experts_reference(*(t.double() if t.is_floating_point() else t for t in args))
    close(invariant.experts(*args), want, dtype)
    whole = invariant.experts(*args)
    for n in (1, 2, 33) if CUDA else (2,):
        part = invariant.experts(x[-n:], expert[-n:], weight[-n:], gate_up, down)
        assert CUDA is False or torch.equal(part, whole[-n:])
        close(part, want[-n:], dtype)


@needs_triton
def test_logsumexp():
    x = draw(3, 2500, scale=5.0)
    close(invariant.logsumexp(x), x.double().logsumexp(-1), torch.float32)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_attention_has_one_form(kind, dtype):
    """Against the reference; packed, paged, in chunks and alone: equal bits, shares and turns included."""
    lengths, page = ([5, 90, 1, 270] if CUDA else [3, 1, 35]), 16
    T, H, nope, rope_width, rank, values = sum(lengths), 2, 10, 12, 37, 9
    stream = stream_of(lengths)
    table = rope.rotation_table(rope.Rope(), rope_width, 300, DEVICE)
    if kind == "mla":
        q, entries = draw(T, H, nope + rope_width, dtype=dtype), draw(T, rank + rope_width, dtype=dtype)
        kv_b = draw(H * (nope + values), rank, dtype=dtype, scale=0.3)
    else:
        q, entries = draw(T, 4, 20, dtype=dtype), draw(T, 2, 2, 20, dtype=dtype)

    def run(where: Stream, rows: slice, keys: Tensor) -> Tensor:
        if kind == "mla":
            turn = table[where.position]
            return invariant.mla_attention(q[rows], turn, keys, kv_b, where, rank, 0.2)
        return invariant.gqa_attention(q[rows], keys, where, 0.2)

    got = run(stream, slice(None), entries)
    if kind == "mla":
        wide = (q.double().cpu(), entries.double().cpu(), kv_b.double().cpu())
        turn = table[stream.position].cpu()
        want = invariant._mla_expanded(wide[0], turn, wide[1], wide[2], lengths, rank, 0.2)
    else:
        k, v = entries.double().cpu().unbind(1)
        want = attention_reference(q.double().cpu(), k, v, lengths, lengths, 0.2)
    close(got, want, dtype)

    per = -(-max(lengths) // page)
    count = len(lengths) * per
    cache = torch.full((count + 1, page, *entries.shape[1:]), float("nan"), dtype=dtype, device=DEVICE)
    pages = (torch.randperm(count) + 1).view(-1, per).int().to(DEVICE)
    for s, part in enumerate(entries.split(lengths)):
        for t, entry in enumerate(part):
            cache[pages[s, t // page], t % page] = entry
    assert torch.equal(run(stream_of(lengths, pages, page), slice(None), cache), got)
    begin = 0
    for s, n in enumerate(lengths):
        for a, b in {(n - 2, n) if n > 2 else (0, n), (n - 1, n)}:
            chunk = stream_of([b - a], pages[s : s + 1], page, a)
            assert torch.equal(run(chunk, slice(begin + a, begin + b), cache), got[begin + a : begin + b])
        begin += n


@needs_triton
@pytest.mark.parametrize("name", ["v3", "qwen2"])
def test_whole_models(name):
    """Logits of a packed pass equal the CPU kernels' within rounding; with gradients they keep their bits."""
    config = replace(tiny.ALL[name], num_hidden_layers=2)
    model = random_model(config, seed=1).to(DEVICE)
    many = [torch.randint(0, 120, (n,)).to(DEVICE) for n in ((1, 6) if CUDA else (1, 3))]
    lengths = [len(t) for t in many]
    with exact():
        with torch.no_grad():
            got = model.logits(model(torch.cat(many), Context.packed(lengths, DEVICE)))
        trained = model.logits(model(torch.cat(many), Context.packed(lengths, DEVICE)))
        assert trained.requires_grad and torch.equal(trained.detach(), got)
    with torch.no_grad():
        wide = random_model(config, seed=1).double()
        want = wide.logits(wide(torch.cat(many).cpu(), Context.packed(lengths)))
    close(got, want, torch.float32)


@pytest.mark.skipif(
    CUDA or INTERPRETED, reason="on CUDA the kernels are run; the interpreter does not compile"
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_attention_of_published_sizes_compiles_for_hopper(dtype):
    """DeepSeek's latent (512 + 64) and a head of 128, without a GPU: within an H100's shared memory."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hadal.ops.triton import exact as kernels

    tensor = f"*{dtype}"
    kind = {name: "i32" for name in kernels._attend_kernel.arg_names if name.islower()}
    kind |= {"q": tensor, "entries": tensor, "table": "*i32", "start": "*i64", "row": "*i32", "scale": "fp32"}
    kind |= {"position": "*i64", "partial": "*fp32", "peaks": "*fp32", "totals": "*fp32"}
    for values, rest in ((512, 64),) if dtype == "fp32" else ((512, 64), (128, 0)):
        sizes = {"PAGED": True, "PAGE": 64, "V_WIDTH": values, "REST": rest, "BLOCK_V": values}
        sizes |= {"BLOCK_R": max(16, rest), "BLOCK_H": 16, "SHARE": kernels.SHARE, "KEYS": kernels.KEYS}
        names = kernels._attend_kernel.arg_names
        source = ASTSource(
            fn=kernels._attend_kernel,
            signature={name: kind.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in sizes.items()},
        )
        options = {"num_warps": 4, "num_stages": 2}
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert built.metadata.shared <= 227 * 1024, built.metadata.shared
