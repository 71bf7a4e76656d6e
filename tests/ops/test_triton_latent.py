"""Triton MLA decode by sequence, the FP8 latent cache, the gate in one kernel: against references."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hadal.ops import latent_fp8, paged, rope

pytest.importorskip("triton")
from tests.helpers import kernels
from tests.helpers.kernels import (
    CUDA,
    DEVICE,
    DTYPE,
    TOLERANCE,
    error,
    in_the_interpreter,
    needs_triton,
    pages_for,
    poison_unused,
)

pytestmark = pytest.mark.usefixtures("poisoned", "rounded")
draw = partial(kernels.draw, dtype=DTYPE)
test_kernels_in_the_interpreter = in_the_interpreter(__file__)


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
    from hadal.ops.triton.mla import write_latent

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


# heads, nope, rank, rope, tokens: more than a block of tokens; partial parts; all sizes published
ENDS = [(3, 12, 40, 8, 18), (2, 16, 128, 16, 5)] + (
    [(16, 128, 512, 64, 1), (16, 128, 512, 64, 16)] if CUDA else []
)


@needs_triton
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("heads,nope,rank,rope_dim,tokens", ENDS)
def test_queries_and_entries_in_one_kernel(heads, nope, rank, rope_dim, tokens, fp8):
    """Against FP64; q and kv are views of one product, W_UK one of a matrix with W_UV."""
    from hadal.ops.mla import absorbed_query, latent_entry
    from hadal.ops.triton import mla

    if fp8 and rank % 128:
        pytest.skip("FP8 entries have groups of 128")
    width = nope + rope_dim
    product, norm = draw(tokens, heads * width + rank + rope_dim), draw(rank)
    q, kv = product[:, : heads * width].unflatten(1, (heads, width)), product[:, heads * width :]
    up = (draw(heads, nope + 8, rank) * nope**-0.5)[:, :nope]
    rotation = rope.rotation_table(rope.Rope(), rope_dim, 50)[torch.randint(0, 50, (tokens,))].to(DEVICE)
    size = latent_fp8.entry_bytes(rank, rope_dim) if fp8 else rank + rope_dim
    cache = torch.full((4, 8, size), 7, dtype=torch.uint8 if fp8 else DTYPE, device=DEVICE)
    slot = torch.randperm(32)[:tokens].to(DEVICE)
    other = cache.clone()
    out = mla.queries(q, kv, norm, 1e-6, rotation, up, cache, slot)
    turn, exact = rotation.cpu().double(), q.cpu().double()
    want = absorbed_query(exact[..., :nope], exact[..., nope:], turn, up.cpu().double())
    assert error(out, want) < TOLERANCE[DTYPE]
    mla.write_latent(kv, norm, 1e-6, rotation, other, slot)
    assert torch.equal(cache, other)
    if not fp8:
        entry = latent_entry(kv.cpu().double(), norm.cpu().double(), 1e-6, turn)
        assert error(cache.view(32, size)[slot], entry) < TOLERANCE[DTYPE]


@needs_triton
@pytest.mark.parametrize(
    "heads,rank,width,tokens,shares", [(3, 24, 20, 5, 4), (16, 128, 40, 3, 1), (2, 24, 40, 9, 2)]
)
def test_merge_and_values_in_one_kernel(heads, rank, width, tokens, shares, monkeypatch):
    """Against FP64, of shares in any number in use: none, one, some, all."""
    from hadal.ops.triton import latent, mla

    monkeypatch.setattr(mla, "VALUE_PROGRAMS", 16)  # so that programs take several tokens
    context = torch.tensor([0, 64, 65, 100, 400] * tokens)[:tokens].int()
    size = ((context / shares).ceil() / 64).ceil().clamp_min(1) * 64
    used = (context / size).ceil().clamp_min(1).int()
    z, partial = draw(tokens, heads, rank), torch.randn(tokens * heads, shares, rank)
    lse = torch.randn(tokens * heads, shares) * 3
    partial[torch.arange(shares) >= used.repeat_interleave(heads).unsqueeze(1)] = float("nan")
    weight = (
        (lse.double() * 0.6931471805599453).masked_fill(partial[..., 0].isnan(), float("-inf")).softmax(-1)
    )
    want = (weight.unsqueeze(-1) * partial.double().nan_to_num(0)).sum(1).view(tokens, heads, rank)
    want[used == 1] = z.double().cpu()[used == 1]
    z[used.to(DEVICE) > 1] = float("nan")
    parts = latent.Parts(z, partial.to(DEVICE), lse.to(DEVICE), context.to(DEVICE), shares, 1, 64)
    up = (draw(heads, 12 + width, rank) * rank**-0.5)[:, 12:]
    out = mla.values(parts, up)
    exact = torch.einsum("thl,hvl->thv", want.to(DTYPE).double(), up.cpu().double()).flatten(1)
    assert error(out, exact) < TOLERANCE[DTYPE]
    assert error(latent.merge(parts), want) < TOLERANCE[DTYPE]


@pytest.mark.skipif(not CUDA, reason="fused kernels are taken on CUDA")
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("heads", [16, 128])
def test_a_step_of_few_rows_is_the_step_of_many(heads, fp8, monkeypatch):
    """Fused and separate kernels, at published sizes, in graphs as they are replayed."""
    from hadal.ops import absorbed

    lengths, rank, width = [1, 64, 700, 5000], 512, 576
    table, context = pages_for(lengths, 64, 3)
    table, context = table.to(DEVICE), context.to(DEVICE)
    slot = torch.stack([table[s, (n - 1) // 64] * 64 + (n - 1) % 64 for s, n in enumerate(lengths)]).long()
    entry = torch.randn(int(table.max()) + 2, 64, width)
    cache = (latent_fp8.quantise_entries(entry, rank) if fp8 else entry.to(DTYPE)).to(DEVICE)
    product, norm = draw(4, heads * 192 + width), draw(rank)
    q, kv = product[:, : heads * 192].unflatten(1, (heads, 192)), product[:, heads * 192 :]
    up = draw(heads, 256, rank) * 0.05
    rotation = rope.rotation_table(rope.Rope(), 64, 6000).to(DEVICE)[context.long() - 1]

    def step(few: int, pages: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(absorbed, "FEW_QUERIES", few)
        monkeypatch.setattr(absorbed, "FEW_VALUES", few)
        made = absorbed.queries(q, kv, norm, 1e-6, rotation, up[:, :128], pages, slot)
        return absorbed.attend(made, pages, table, context, up[:, 128:], 0.07)

    plain, fused = cache.clone(), cache.clone()
    with torch.inference_mode():
        want = step(0, plain)
        out = step(1 << 20, fused)
        assert torch.equal(plain, fused) and error(out, want) < TOLERANCE[DTYPE]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                again = step(1 << 20, fused)
        for _ in range(3):
            graph.replay()
        assert torch.equal(again, out)


# last in the file: a fault on the card would take every test behind it along
@pytest.mark.skipif(
    not CUDA or torch.cuda.get_device_capability() < (9, 0), reason="Gluon compiles for Hopper alone"
)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("heads,queries", [(128, 1), (128, 2), (20, 3), (16, 1)])
def test_tall_decode_in_gluon(heads, queries, fp8):
    from hadal.ops.triton.latent_gluon import mla_decode

    lengths, rank, page = [queries, 63 + queries, 64, 65, 700, 1999, 4096, 5000], 512, 64
    table, tables, context = rows_of(lengths, queries, page)
    entry = torch.randn(int(table.max()) + 2, page, 576)
    clean = latent_fp8.quantise_entries(entry, rank) if fp8 else entry.to(DTYPE)
    poison_unused(entry, table, lengths, page)
    cache = clean.clone()
    cache[entry.isnan().any(-1)] = 0xFF if fp8 else float("nan")
    cache, q = cache.to(DEVICE), draw(len(tables), heads, 576)
    seen = latent_fp8.dequantise_entries(clean, rank).double() if fp8 else clean.double()
    want = paged.mla_decode_reference(q.double().cpu(), seen, tables, context, rank, 0.03)
    pages = (tables.to(DEVICE), context.to(DEVICE))
    for shares in (None, 1, 7):
        out = mla_decode(q, cache, *pages, rank, 0.03, queries, shares)
        assert error(out, want) < TOLERANCE[DTYPE]
    with pytest.raises(ValueError, match="on pages of 16"):
        mla_decode(q, cache[:, :16], *pages, rank, 0.03)
