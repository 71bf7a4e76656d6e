"""Triton MLA decode by sequence, the FP8 latent cache, the gate in one kernel: against references."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hadal.config import Moe
from hadal.ops import gate as gate_op
from hadal.ops import latent_fp8, paged, rope

pytest.importorskip("triton")
from tests.ops.test_triton import GATES, pages_for, poison_unused
from tests.ops.test_triton_packed import error, poisoned, rounded  # noqa: F401  (fixtures)

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}
needs_triton = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs CUDA or TRITON_INTERPRET=1")


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests below run directly here")
def test_kernels_in_the_interpreter():
    """TRITON_INTERPRET must be set before triton is imported, so the tests below run in their own process."""
    env = dict(os.environ, TRITON_INTERPRET="1", PYTEST_ADDOPTS="")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout and "failed" not in done.stdout


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(DTYPE).to(DEVICE)


def rows_of(lengths: list[int], queries: int, page: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(block table of the sequences, the same for each of their rows, context lengths of the rows)."""
    table, _ = pages_for(lengths, page, 3)
    context = torch.tensor([n - queries + 1 + i for n in lengths for i in range(queries)], dtype=torch.int32)
    return table, table.repeat_interleave(queries, 0), context


# heads × queries: a narrow block, the same in shares, a wider one; tall blocks, one of them partial
@needs_triton
@pytest.mark.parametrize(
    "heads,queries,shares,page",
    [(4, 1, 4, 64), (4, 3, 1, 16), (10, 3, 2, 64), (40, 1, 2, 16), (33, 2, None, 64)],
)
def test_decode_of_all_rows_of_a_sequence(heads, queries, shares, page):
    from hadal.ops.triton.latent import mla_decode

    lengths, rank, width = [queries, 67, 500], 24, 32
    table, tables, context = rows_of(lengths, queries, page)
    cache = torch.randn(int(table.max()) + 2, page, width)
    poison_unused(cache, table, lengths, page)
    q, cache = draw(3 * queries, heads, width), cache.to(DTYPE).to(DEVICE)
    args = (rank, 0.2, queries, None, shares)
    out = mla_decode(q, cache, tables.to(DEVICE), context.to(DEVICE), *args)
    clean = cache.double().nan_to_num(0).cpu()
    want = paged.mla_decode_reference(q.double().cpu(), clean, tables, context, rank, 0.2)
    assert error(out, want) < TOLERANCE[DTYPE]


@needs_triton
def test_an_empty_context_gives_zeros():
    from hadal.ops.triton.latent import mla_decode

    cache = torch.full((4, 16, 32), float("nan")).to(DTYPE).to(DEVICE)
    table = torch.zeros(2, 20, dtype=torch.int32, device=DEVICE)
    context = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    assert (mla_decode(draw(2, 4, 32), cache, table, context, 24, 0.2, shares=2) == 0).all()
    with pytest.raises(ValueError, match="no multiple of 2 queries"):
        mla_decode(draw(3, 4, 32), cache, table, context, 24, 0.2, queries=2)


@needs_triton
@pytest.mark.parametrize("heads,queries,shares,page", [(4, 1, 3, 16), (10, 3, 1, 64), (40, 1, 2, 64)])
def test_decode_of_fp8_entries(heads, queries, shares, page):
    from hadal.ops.triton.latent import mla_decode

    lengths, rank, width = [queries, 67, 300], 256, 272
    table, tables, context = rows_of(lengths, queries, page)
    entry = torch.randn(int(table.max()) + 2, page, width)
    clean = latent_fp8.quantise_entries(entry, rank)
    cache = clean.clone()
    poison_unused(entry, table, lengths, page)
    cache[entry.isnan().any(-1)] = 0xFF  # NaN as E4M3, as FP32 and as BF16
    q = draw(3 * queries, heads, width)
    args = (rank, 0.06, queries, None, shares)
    out = mla_decode(q, cache.to(DEVICE), tables.to(DEVICE), context.to(DEVICE), *args)
    want = latent_fp8.decode_reference(q.double().cpu(), clean, tables, context, rank, 0.06)
    assert error(out, want) < TOLERANCE[DTYPE]


@needs_triton
def test_fp8_entries_are_written_as_the_reference_writes_them():
    from hadal.ops.triton import mla
    from hadal.ops.triton.latent_fp8 import write_latent

    rank, width, tokens = 384, 400, 5
    kv, norm = draw(tokens, width + 5)[:, :width], draw(rank)
    rotation = rope.rotation_table(rope.Rope(), width - rank, 50)[torch.randint(0, 50, (tokens,))].to(DEVICE)
    size = latent_fp8.entry_bytes(rank, width - rank)
    cache = torch.full((4, 8, size), 7, dtype=torch.uint8, device=DEVICE)
    slot = torch.randperm(32)[:tokens].to(DEVICE)
    entry = write_latent(kv, norm, 1e-6, rotation, cache, slot)
    stored = cache.view(32, size)[slot].cpu()
    want = latent_fp8.quantise_entries(entry.cpu(), rank)
    checked = size if CUDA else size - 2 * (width - rank)  # the interpreter cuts BF16 where torch rounds
    assert torch.equal(stored[:, :checked], want[:, :checked])
    back = latent_fp8.dequantise_entries(stored, rank)
    assert error(back[:, rank:], entry[:, rank:]) < 8e-3
    plain = torch.zeros(4, 8, width, dtype=DTYPE, device=DEVICE)
    assert error(entry, mla.write_latent(kv, norm, 1e-6, rotation, plain, slot)) < 1e-6
    untouched = [i for i in range(32) if i not in slot.tolist()]
    assert (cache.view(32, size)[untouched] == 7).all()


@needs_triton
@pytest.mark.parametrize("moe", GATES, ids=lambda m: f"{m.topk_method}-{m.n_routed_experts}")
def test_gate_in_one_kernel(moe: Moe):
    from hadal.ops.triton.gate_fused import gate

    x, weight = draw(3, 530), draw(moe.n_routed_experts, 530) * 0.06
    bias = torch.randn(moe.n_routed_experts) - 1.0 if moe.topk_method == "noaux_tc" else None
    want_expert, want_weights, _ = gate_op.gate_reference(x.cpu(), weight.cpu(), bias, moe)
    on_device = None if bias is None else bias.to(DEVICE)
    for splits in (1, 2, 2):  # the counter is ready for the next launch
        expert, weights = (t.cpu() for t in gate(x, weight, on_device, moe, splits=splits))
        order, want_order = expert.argsort(-1), want_expert.argsort(-1)
        assert torch.equal(expert.gather(1, order), want_expert.gather(1, want_order))
        assert error(weights.gather(1, order), want_weights.gather(1, want_order)) < 2e-5
    with pytest.raises(ValueError, match="up to 4"):
        gate(draw(5, 530), weight, on_device, moe)


@pytest.mark.skipif(not CUDA, reason="real sizes take the interpreter minutes")
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("heads,queries", [(16, 1), (16, 2), (128, 1), (128, 2), (20, 3)])
def test_decode_of_published_sizes(heads, queries, fp8):
    """Permuted pages, contexts from a page's first entry to many pages, NaN where nothing may be seen."""
    from hadal.ops.triton.latent import mla_decode

    lengths, rank, page = [queries, 63 + queries, 64, 65, 700, 1999, 4096, 5000], 512, 64
    table, tables, context = rows_of(lengths, queries, page)
    entry = torch.randn(int(table.max()) + 2, page, 576)
    clean = latent_fp8.quantise_entries(entry, rank) if fp8 else entry.to(DTYPE)
    poison_unused(entry, table, lengths, page)
    cache = clean.clone()
    cache[entry.isnan().any(-1)] = 0xFF if fp8 else float("nan")
    q = draw(len(tables), heads, 576)
    seen = latent_fp8.dequantise_entries(clean, rank).double() if fp8 else clean.double()
    want = paged.mla_decode_reference(q.double().cpu(), seen, tables, context, rank, 0.03)
    for shares in (None, 1, 32):
        args = (rank, 0.03, queries, None, shares)
        out = mla_decode(q, cache.to(DEVICE), tables.to(DEVICE), context.to(DEVICE), *args)
        assert error(out, want) < TOLERANCE[DTYPE]
