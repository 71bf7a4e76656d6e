"""Triton products with packed weights against references in FP64: on CUDA, else in the interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hadal.ops import fp8 as numbers
from hadal.ops.packed import KINDS, Kind, Packed, experts_reference, pack
from hadal.ops.rms_norm import rms_norm_reference

pytest.importorskip("triton")
from tests.helpers import kernels
from tests.helpers.kernels import (
    CUDA,
    DEVICE,
    DTYPE,
    TOLERANCE,
    error,
    in_the_interpreter,
    needs_hopper,
    needs_triton,
)

pytestmark = pytest.mark.usefixtures("poisoned", "rounded")
draw = partial(kernels.draw, dtype=DTYPE)
test_kernels_in_the_interpreter = in_the_interpreter(__file__)


def exact(weight: Packed) -> torch.Tensor:
    """The weight that the codes stand for."""
    return weight.dequantise(torch.float64)


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows,outs,width", [(1, 19, 33), (5, 70, 130), (40, 33, 300), (3, 40, 1100)])
def test_streamed_linear(kind: Kind, rows: int, outs: int, width: int):
    from hadal.ops.triton.packed import streamed

    weight = pack(draw(outs, width, scale=width**-0.5), kind)
    x, bias, residual = draw(rows, width + 3)[:, :width], draw(outs), draw(rows, outs)
    want = x.double() @ exact(weight).T
    assert error(streamed(x, weight), want) < TOLERANCE[DTYPE]
    want += bias.double()
    for splits in (1, 2, 3, 1) if CUDA else (3, 1):  # the counters of arrivals are left as they were found
        assert error(streamed(x, weight, bias, splits=splits), want) < TOLERANCE[DTYPE]
        plus = streamed(x, weight, bias, residual, splits=splits)
        assert error(plus, want + residual.double()) < TOLERANCE[DTYPE]


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows,outs,width", [(1, 19, 64), (2, 18, 416), (1, 8, 1184 if CUDA else 544)])
def test_a_row_or_two(kind: Kind, rows: int, outs: int, width: int):
    from hadal.ops.triton.packed_gemv import Config, linear, linear_pair, wants

    weight = pack(draw(2 * outs, width, scale=width**-0.5), kind, rows=outs)
    assert wants(weight) and not wants(pack(draw(8, 36), kind))
    x, bias, residual = draw(rows, width + 8)[:, :width], draw(2 * outs), draw(rows, 2 * outs)
    want = x.double() @ exact(weight).T
    gate, up = want.chunk(2, -1)
    few_programs = Config(16, 256, 2)  # the interpreter takes its time for each
    for config in (None, few_programs) if CUDA or width == 64 else (few_programs,):
        plus = linear(x, weight, bias, residual, config=config)
        assert error(plus, want + bias.double() + residual.double()) < TOLERANCE[DTYPE]
        hidden = linear(x, weight, swiglu=True, config=config)
        assert error(hidden, torch.nn.functional.silu(gate) * up) < TOLERANCE[DTYPE]
    second = pack(draw(outs + 3, width, scale=width**-0.5), kind, rows=outs)
    a, b = linear_pair(x, weight, second)
    assert error(a, want) < TOLERANCE[DTYPE] and a.shape == want.shape
    assert error(b, x.double() @ exact(second).T) < TOLERANCE[DTYPE]
    wide = linear(x, weight, dtype=torch.float32)
    assert wide.dtype == torch.float32 and error(wide, want) < 2e-5


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_all_codes_in_all_places(kind: Kind):
    """A unit vector picks one column: every code comes out as itself, wherever it lies in its word."""
    from hadal.ops.triton.packed_gemv import CHUNK, Config, linear

    values = {"int4": torch.arange(-8, 8), "int8": torch.arange(-127, 128)}.get(kind)
    if values is None:
        bits = torch.arange(256, dtype=torch.uint8)
        values = bits[(bits & 0x7F) != 0x7F].view(torch.float8_e4m3fn).float()
    weight = Packed(kind, (values.numel(), 64), device=DEVICE)
    column = values.float().to(DEVICE)[:, None].expand(-1, 64)
    if kind == "int4":
        byte = (values + 8) | (values + 8) << 4
        weight.codes.copy_(byte.to(torch.uint8)[:, None].expand(-1, 32))
    else:
        weight.codes.copy_(column.to(weight.codes.dtype))
    weight.scale.fill_(1.0)
    config = Config(64 if CUDA else 256, 64, 1)  # the interpreter takes its time for each program
    for channel in range(33 if CUDA else CHUNK[kind] + 1):
        x = torch.zeros(1, 64, dtype=DTYPE, device=DEVICE)
        x[0, channel] = 1
        assert torch.equal(linear(x, weight, dtype=torch.float32, config=config)[0], column[:, 0])


@needs_triton
@pytest.mark.parametrize(
    "kind,group,rows", [("fp8", 128, 32), ("int8", 32, None), ("int4", 128, None), ("fp8", 64, 8)]
)
def test_linear_with_other_groups(kind: Kind, group: int, rows: int | None):
    from hadal.ops.triton.packed import linear, wants_linear

    weight = pack(draw(70, 200, scale=0.1), kind, group=group, rows=rows)
    x = draw(2, 3, 200)
    assert wants_linear(x.bfloat16(), weight) and not wants_linear(x[:0].bfloat16(), weight)
    assert error(linear(x, weight), x.double() @ exact(weight).T) < TOLERANCE[DTYPE]


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_in_one_pass(kind: Kind):
    from hadal.ops.triton.packed import dequantise, linear

    weight = pack(draw(37, 77), kind)
    assert error(dequantise(weight, DTYPE), exact(weight)) < TOLERANCE[DTYPE] / 2
    x = draw(257, 77)
    assert error(linear(x, weight), x.double() @ exact(weight).T) < TOLERANCE[DTYPE]
    stack = pack(draw(2, 24, 77), kind, rows=8)
    assert error(dequantise(stack, DTYPE), exact(stack)) < TOLERANCE[DTYPE] / 2


@needs_triton
@pytest.mark.parametrize("kind", kernels.cases(["int4"], "int8"))
def test_experts_dequantised_for_many_rows(kind: Kind, monkeypatch):
    from hadal.ops.triton import packed

    used = []
    whole = packed.dequantise
    monkeypatch.setattr(packed, "dequantise", lambda w, dtype: used.append(w) or whole(w, dtype))
    monkeypatch.setattr(packed, "FEW_TOKENS", 8)
    monkeypatch.setattr(packed, "DEQUANTISED_ROWS", 16)
    tokens, hidden, width, n_experts, K = 48, 32, 16, 3, 2
    x, residual = draw(tokens, hidden).bfloat16(), draw(tokens, hidden).bfloat16()
    gate_up = pack(draw(n_experts, 2 * width, hidden, scale=hidden**-0.5), kind)
    down = pack(draw(n_experts, hidden, width, scale=width**-0.5), kind)
    expert = torch.stack([torch.randperm(n_experts)[:K] for _ in range(tokens)]).to(DEVICE)
    weight = torch.rand(tokens, K).to(DEVICE)
    want = experts_reference(x.double(), expert, weight.double(), gate_up, down) + residual.double()
    out = packed.experts(x, expert, weight, gate_up, down, None, residual)
    assert len(used) == 2 and error(out, want) < TOLERANCE[torch.bfloat16]


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "found,tokens,hidden,width",
    kernels.cases(
        [("inside", 1, 48, 20), *((found, 18, 130, 40) for found in ("inside", "listed", "tiles"))],
        ("listed", 1, 48, 20), ("tiles", 1, 48, 20),
    ),
)  # fmt: skip
def test_experts(kind: Kind, found: str, tokens: int, hidden: int, width: int, monkeypatch):
    from hadal.ops.triton import packed
    from hadal.ops.triton.packed import _combine, expert_rows

    many = found == "tiles"
    monkeypatch.setattr(packed, "FOUND_PAIRS", 0 if found == "listed" else 512)
    n_experts, K = 6, 2
    x = draw(tokens, hidden)
    gate_up = pack(draw(n_experts, 2 * width, hidden, scale=hidden**-0.5), kind, rows=4)
    down = pack(draw(n_experts, hidden, width, scale=width**-0.5), kind)
    expert = torch.stack([torch.randperm(n_experts)[:K] for _ in range(tokens)]).to(DEVICE)
    expert[: 2 * tokens // 3] = torch.arange(K, device=DEVICE)  # a crowded expert has more rows than a tile
    weight = torch.rand(tokens, K).to(DEVICE)
    want = experts_reference(x.double(), expert, weight.double(), gate_up, down)
    out = _combine(expert_rows(x, expert, gate_up, down, many), None, weight, None, None)
    assert error(out, want) < TOLERANCE[DTYPE]


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens,hidden,width,group", [(1, 96, 64, 32), (2, 96, 32, 32), (9, 130, 64, 64)])
def test_experts_and_the_shared_one(
    kind: Kind, tokens: int, hidden: int, width: int, group: int, monkeypatch
):
    """Two parts of the routed width that every token chose, by pair (one or two tokens) and by tile."""
    from hadal.ops.triton import packed
    from hadal.ops.triton.packed import _combine, expert_rows, packed_gemv, takes_shared

    n_experts, K, parts = 5, 2, 2
    how = {"group": group, "rows": 16}
    x, residual = draw(tokens, hidden), draw(tokens, hidden)
    gate_up = pack(draw(n_experts, 2 * width, hidden, scale=hidden**-0.5), kind, **how)
    down = pack(draw(n_experts, hidden, width, scale=width**-0.5), kind, **how)
    shared = (
        pack(draw(2 * parts * width, hidden, scale=hidden**-0.5), kind, **how),
        pack(draw(hidden, parts * width, scale=width**-0.5), kind, **how),
    )
    assert takes_shared(x.bfloat16(), gate_up, down, shared)
    odd = pack(draw(hidden, parts * width + 16), kind, **how)
    assert not takes_shared(x.bfloat16(), gate_up, down, (shared[0], odd))
    expert = torch.stack([torch.randperm(n_experts)[:K] for _ in range(tokens)]).to(DEVICE)
    weight = torch.rand(tokens, K).to(DEVICE)
    gate, up = (x.double() @ exact(shared[0]).T).chunk(2, -1)
    want = experts_reference(x.double(), expert, weight.double(), gate_up, down) + residual.double()
    want += (torch.nn.functional.silu(gate) * up) @ exact(shared[1]).T
    ways = []
    if CUDA or tokens > 2:
        ways.append(expert_rows(x, expert, gate_up, down, False, shared=shared))
        monkeypatch.setattr(packed, "FOUND_PAIRS", 0)
        ways.append(expert_rows(x, expert, gate_up, down, False, shared=shared))
    if tokens <= 2:
        configs = () if CUDA else (packed_gemv.Config(32, 64, 1),) * 2
        ways.append(packed_gemv.experts(x, expert, gate_up, down, shared, parts, *configs))
        alone = packed_gemv.experts(x, expert, gate_up, down, None, 0, *configs)
        routed = experts_reference(x.double(), expert, weight.double(), gate_up, down)
        assert error(_combine(alone, None, weight, None, None), routed) < TOLERANCE[DTYPE]
    for rows in ways:
        assert error(_combine(rows, None, weight, None, residual, parts), want) < TOLERANCE[DTYPE]


# --- FP8 activations ---
def codes_agree(q: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> None:
    """Codes and scales [G, R], bit for bit, against the reference."""
    want_q, want_scale = numbers.quantise_activations(x.cpu())
    assert torch.equal(scale.t().cpu(), want_scale)
    assert torch.equal(q.cpu().view(torch.uint8), want_q.view(torch.uint8))


@needs_hopper
def test_quantised_rows_and_their_places():
    from hadal.ops.triton.fp8 import quantise_rows

    x = draw(5, 303)[:, :300]
    x[1] = 0
    x[2, 130:200] *= 1e-6
    codes_agree(*quantise_rows(x), x)
    place = torch.tensor([7, 0, 3, 12, 1, 2, 9, 8, 4, 11]).to(DEVICE)
    q, scale = quantise_rows(x, place, 13)
    codes_agree(q[place], scale[:, place], x.repeat_interleave(2, 0))
    assert (q[5].cpu().view(torch.uint8) == 0x7F).all() and scale[:, 5].isnan().all()  # nobody's row


@needs_hopper
def test_quantised_swiglu_and_norm():
    from hadal.ops.triton.fp8 import rms_norm_quantise, swiglu_quantise

    x = draw(6, 400)
    gate, up = x.double().chunk(2, -1)
    hidden = (torch.nn.functional.silu(gate).to(DTYPE).double() * up).to(DTYPE)
    q, scale = swiglu_quantise(x)
    back = numbers.dequantise_activations(q.cpu(), scale.t().cpu())
    assert error(back, hidden) < 0.03
    x, delta, weight = draw(6, 200), draw(6, 200), draw(200)
    total, normed, q, scale = rms_norm_quantise(x, weight, 1e-6, delta)
    assert torch.equal(total, x + delta)
    assert error(normed, rms_norm_reference(total.double(), weight.double(), 1e-6)) < TOLERANCE[DTYPE]
    codes_agree(q, scale, normed)


@needs_hopper
@pytest.mark.parametrize(
    "halves,half,flatten,rows,outs,width",
    [(2, 128, True, 128, 264, 272), (1, 128, False, 32, 136, 128), (2, 64, False, 128, 136, 272)],
)
def test_grouped_product(halves, half, flatten, rows, outs, width):
    from hadal.ops.triton import fp8

    weight = pack(draw(3, outs, width, scale=width**-0.5), "fp8", rows=rows)
    expert = torch.tensor([2] * 130 + [0] * 20 + [2] * 3).to(DEVICE)  # none for expert 1
    where = fp8.sort_rows(expert.unsqueeze(1), 3)
    assert int(where.used) == 3 and where.tile_expert.tolist()[:3] == [0, 2, 2]
    x = draw(expert.numel(), width)
    q, scale = fp8.quantise_rows(x, where.place, where.tile_expert.numel() * 128)
    config = fp8.Config(half, halves, 8, 3, 2, flatten)
    out = fp8.grouped_matmul(q, scale, weight, where.tile_expert, where.used, torch.float32, config)
    seen = numbers.dequantise_activations(
        q[where.place].cpu(), scale[:, where.place].t().cpu(), dtype=torch.float64
    )
    want = torch.einsum("pk,pnk->pn", seen, exact(weight).cpu()[expert.cpu()])
    assert error(out[where.place], want) < (3e-4 if CUDA else TOLERANCE[torch.float32])


@needs_hopper
def test_fp8_experts_and_linear():
    from hadal.ops.triton import fp8

    tokens, hidden, width = 20, 144, 80
    x, shared, residual = draw(tokens, hidden), draw(tokens, hidden), draw(tokens, hidden)
    gate_up = pack(draw(2, 2 * width, hidden, scale=hidden**-0.5), "fp8", rows=16)
    down = pack(draw(2, hidden, width, scale=width**-0.5), "fp8")
    expert = torch.stack([torch.randperm(2) for _ in range(tokens)]).to(DEVICE)
    expert[:15, 0], expert[:15, 1] = 1, 0
    weight = torch.rand(tokens, 2).to(DEVICE)
    routed = experts_reference(x.double(), expert, weight.double(), gate_up, down)
    out = fp8.experts(x, expert, weight, gate_up, down, shared, residual)
    added = shared.double() + residual.double()
    assert error(out - added, routed) < 0.06  # two roundings of the activations to three bits
    bias, square = draw(hidden), pack(draw(hidden, hidden, scale=hidden**-0.5), "fp8")
    want = x.double() @ exact(square).T + bias.double()
    assert error(fp8.linear(x, square, bias), want) < 0.04


def test_what_the_kernels_refuse():
    from hadal.ops.triton import fp8, packed

    x = torch.zeros(3, 48, dtype=torch.bfloat16, device=DEVICE)
    odd = pack(torch.randn(8, 48), "int8", group=48)
    assert not packed.wants_linear(x, odd)
    assert not packed.wants_experts(
        x, pack(torch.randn(2, 8, 48), "int8"), pack(torch.randn(2, 48, 4), "int4")
    )
    assert not packed.wants_linear(x.half(), pack(torch.randn(8, 48), "int8"))
    with pytest.raises(ValueError, match="multiples of 128, 16 and 8"):
        fp8.grouped_matmul(x, x, pack(torch.randn(8, 48), "fp8"), x, x)
