"""FP8 training's kernels against their references in torch: on CUDA, else in the interpreter."""

from __future__ import annotations

import pytest
import torch

from hadal.ops import fp8_tiles as plain

pytest.importorskip("triton")
from tests.helpers.kernels import (
    CUDA,
    DEVICE,
    DTYPE,
    cases,
    error,
    in_the_interpreter,
    needs_hopper,
    needs_triton,
)

SHAPES = [(1, 16), (70, 136), (128, 256), (300, 200)]
POWERS = [True, False]


pytestmark = pytest.mark.usefixtures("poisoned", "rounded")
test_kernels_in_the_interpreter = in_the_interpreter(__file__)


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Rows of all sizes, with an outlier, a row of zeros and a zero tile."""
    x = torch.randn(*shape) * scale * 10.0 ** torch.randint(-9, 3, (*shape[:-1], 1))
    x[..., shape[-2] // 2, :], x[..., : min(130, shape[-2]), 3] = 0, 0
    x[..., shape[-2] // 3, 5] *= 1e4
    return x.to(DTYPE).to(DEVICE)


def same(codes, want, rows: slice | None = None, columns: slice | None = None) -> None:
    """Every code and scale; of some rows (scales' columns), or of some columns."""
    r, c = rows or slice(None), columns or slice(None)
    assert torch.equal(codes.q.view(torch.uint8)[r, c].cpu(), want.q.view(torch.uint8)[r, c].cpu())
    groups = slice(None) if columns is None else slice(c.start, c.stop // 128)
    assert torch.equal(codes.scale[groups, r].cpu(), want.scale[groups, r].cpu())
    assert codes.power == want.power


def sorted_rows(tokens: int, n_experts: int = 5, top_k: int = 2) -> plain.Rows:
    """The last expert has no rows."""
    expert = torch.rand(tokens, n_experts - 1).topk(top_k, 1).indices.to(DEVICE)
    return plain.sort_rows(expert, n_experts)


@needs_triton
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_in_both_directions(shape, power):
    from hadal.ops.triton import fp8_train

    x = draw(shape[0], shape[1] + 8)[:, : shape[1]]
    same(fp8_train.quantise(x, power), plain.quantise(x, power))
    for codes, want in zip(fp8_train.quantise_both(x, power), plain.quantise_both(x, power), strict=True):
        same(codes, want)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_cut_anew_along_rows(shape):
    from hadal.ops.triton import fp8_train

    codes = plain.quantise(draw(*shape), True)
    same(fp8_train.columns(codes, None), plain.columns(codes, None))


@needs_triton
@pytest.mark.parametrize(
    "tokens,width,n_experts", cases([(1, 24, 5), (33, 256, 5), (130, 136, 3)], (150, 300, 5), (300, 256, 5))
)
def test_rows_by_expert(tokens, width, n_experts):
    """Experts without rows, with a part of a tile, and (130 tokens choose both of two) of two tiles."""
    from hadal.ops.triton import fp8_train

    codes, rows = plain.quantise(draw(tokens, width), True), sorted_rows(tokens, n_experts)
    used = slice(0, int(rows.used) * 128)
    same(fp8_train.gather(codes, rows), plain.gather(codes, rows), used)
    same(fp8_train.columns(codes, rows), plain.columns(codes, rows), columns=used)
    row_RD = torch.randn(rows.token_R.numel(), width).to(DTYPE).to(DEVICE)
    row_RD[used.stop :] = float("nan")
    shared, residual = (torch.randn(tokens, width).to(DTYPE).to(DEVICE) for _ in range(2))
    for others in ((), (shared,), (None, residual), (shared, residual)):
        found, want = (ops.sum_rows(row_RD, rows, *others) for ops in (fp8_train, plain))
        assert error(found, want) < 1e-2


@needs_triton
def test_scales_next_to_powers_of_two():
    """Largest values on both sides of where the next power begins, all in one code of difference."""
    from hadal.ops.triton import fp8_train

    edge = torch.tensor([1.75, 1.0, 2.0, 1.5]).view(torch.int32)[:, None] + torch.arange(-2, 3)
    edge = (edge.view(torch.float32).flatten()[:, None] * 2.0 ** torch.tensor([-90, -9, 0, 60])).flatten()
    x = torch.zeros(edge.numel(), 128)
    x[:, 7] = edge
    x = x.to(DTYPE).to(DEVICE)
    same(fp8_train.quantise(x, True), plain.quantise(x, True))
    assert plain.quantise(x, True).scale.unique().numel() >= 8
    x[0, 3] = float("inf")
    x[1, 5] = float("nan")
    wide = plain.dequantise(fp8_train.quantise(x, True))
    assert not wide[0].isfinite().all() and wide[1, 5].isnan() and wide[2:].isfinite().all()


@needs_triton
@pytest.mark.parametrize("tokens,n_experts", [(1, 2), (200, 5), (300, 64)])
def test_places(tokens, n_experts):
    from hadal.ops.triton import fp8_train

    expert = torch.rand(tokens, n_experts).topk(2, 1).indices.to(DEVICE)
    found, want = fp8_train.sort_rows(expert, n_experts), plain.sort_rows(expert, n_experts)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, want, strict=True))


def close(codes, want, rows: slice | None = None, columns: slice | None = None) -> None:
    """The same values but for a few that fall to the next code: the device's sigmoid is not torch's."""
    r, c = rows or slice(None), columns or slice(None)
    groups = slice(None) if columns is None else slice(c.start, c.stop // 128)
    values = [plain.dequantise(plain.Codes(x.q[r, c], x.scale[groups, r], x.power)) for x in (codes, want)]
    assert error(*values) < (2e-2 if CUDA else 1e-3)


@needs_triton
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(
    "width,tokens",
    cases([(96, 150), (128, 150), (256, 150)], pytest.param(512, 2048, marks=needs_hopper)),
)  # the last: on Hopper in Gluon, several tiles a program
@pytest.mark.parametrize("experts", [False, True])
def test_swiglu_both_ways(width, tokens, experts, power):
    from hadal.ops.triton import fp8_train

    rows = sorted_rows(tokens) if experts else None
    R = tokens if rows is None else rows.token_R.numel()
    used = slice(0, R if rows is None else int(rows.used) * 128)
    weight_R = None if rows is None else torch.rand(R, device=DEVICE).masked_fill_(rows.token_R < 0, 0)
    x, dh = draw(R, 2 * width), draw(R, width, scale=1e-7)
    if rows is not None:
        x[rows.token_R < 0], dh[rows.token_R < 0] = 0, 0
    found, want = (ops.swiglu(x, weight_R, power, rows) for ops in (fp8_train, plain))
    close(found[0], want[0], used)
    same(found[1], want[1], used)
    kept = plain.swiglu(x, weight_R, power, rows)[1]
    found, want = (ops.swiglu_backward(kept, dh, weight_R, power, rows) for ops in (fp8_train, plain))
    close(found[0], want[0], used)
    padded = slice(0, -(-used.stop // 128) * 128)
    close(found[1], want[1], columns=padded)
    close(found[2], want[2], columns=padded)
    assert (found[3] is None) == (rows is None)
    if rows is not None:
        assert error(found[3][used], want[3][used]) < 1e-4


@needs_triton
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("shape", [(130, 200), (3, 256, 128), (2, 16, 300)])
def test_weights(shape, power):
    from hadal.ops.triton import fp8_train, fp8_train_products

    w = draw(*shape)
    w[..., :, :128] = 0
    found, want = fp8_train.quantise_weight(w, power), plain.quantise_weight(w, power)
    for a, b in ((found, want), (fp8_train.transposed(found), plain.transposed(want))):
        assert torch.equal(a.q.view(torch.uint8), b.q.view(torch.uint8)) and torch.equal(a.scale, b.scale)
        wide = fp8_train_products.dequantise_weight(a, torch.float32)
        assert torch.equal(wide, plain.dequantise_blocks(b.q, b.scale))


@needs_triton
@pytest.mark.parametrize("experts", [False, True])
def test_small_layers_multiply_the_same_values(experts):
    """Values are what the codes mean, bit for bit, and products those of the codes."""
    from hadal.ops.triton import fp8_train_small as small

    rows = sorted_rows(150) if experts else None
    lead = (5,) if experts else ()
    w, x = torch.randn(*lead, 96, 136).to(DTYPE).to(DEVICE), draw(150, 136).clamp(-4, 4)
    codes, weight = plain.quantise(x, True), plain.quantise_weight(w, True)
    R = 150 if rows is None else rows.token_R.numel()
    used = slice(0, R if rows is None else int(rows.used) * 128)
    dy = torch.randn(R, 96).to(DTYPE).to(DEVICE)
    found = small.quantise_weight(w, True)
    assert torch.equal(found.q.float(), plain.dequantise_blocks(weight.q, weight.scale))
    assert torch.equal(small.transposed(found).q, found.q.transpose(-1, -2))
    both = small.quantise_both(dy, True), plain.quantise_both(dy, True)
    anew = small.columns(codes, rows), plain.columns(codes, rows)
    for got, want in (*zip(*both, strict=True), anew):
        value, n = plain.dequantise(want), got.q.shape[1]
        last = min(n, used.stop) if got is anew[0] else n
        assert torch.equal(got.q[:, :last].float(), value[:, :last]) and not value[:, n:].any()
    inputs = codes if rows is None else plain.gather(codes, rows)
    out, want = small.matmul(inputs, found, DTYPE, rows), plain.matmul(inputs, weight, torch.float32, rows)
    assert error(out[used], want[used]) < (4e-3 if CUDA else 1e-5)
    want = plain.outer(both[1][1], anew[1], torch.float32, rows)
    for a in (both[0][1], both[1][1]):  # values, or codes, as SwiGLU's gradient is
        assert error(small.outer(a, anew[0], DTYPE, rows), want) < (4e-3 if CUDA else 1e-5)


@needs_hopper
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("N,K", [(256, 384), (320, 208)])
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("path", ["triton", "emulated"])
def test_products(experts, N, K, power, path):
    from hadal.ops.triton import fp8_train_products as products

    tokens = 150 if experts else 256
    rows = sorted_rows(tokens) if experts else None
    x = plain.quantise(draw(tokens, K).clamp(-4, 4), power)
    w = torch.randn(*((5,) if experts else ()), N, K).to(DTYPE).to(DEVICE)
    weight, used = plain.quantise_weight(w, power), slice(None)
    if rows is not None:
        x, used = plain.gather(x, rows), slice(0, int(rows.used) * 128)
    want = plain.matmul(x, weight, torch.float32, rows)
    if path == "triton":
        out = products._by_tiles(x, weight, DTYPE, rows, "triton")
    else:
        out = products._emulated(x, weight, DTYPE, rows)
    assert error(out[used], want[used]) < (4e-3 if CUDA else 1e-5)
    if N % 128 and experts:
        return
    R = x.q.shape[0]
    a, b = (plain.quantise(draw(n, R).clamp(-4, 4), power) for n in (N, K))
    want = plain.outer(a, b, torch.float32, rows)
    if path == "triton":
        out = products.outer_by_tiles(a, b, DTYPE, rows)
    else:
        out = products.outer(a, b, DTYPE, rows)
    assert error(out, want) < (4e-3 if CUDA else 1e-5)
    if experts:
        assert not out[4].any()
