"""Packed weights: the formulas, and the reference products."""

from __future__ import annotations

import math

import pytest
import torch

from hadal.ops import packed
from hadal.ops.experts import experts, experts_reference, ffn
from hadal.ops.fp8 import dequantise_blocks, quantise_blocks
from hadal.ops.linear import linear
from hadal.ops.packed import KINDS, Kind, Packed, block_rows, pack

ERROR = {"fp8": 0.03, "int8": 0.008, "int4": 0.095}  # of Gaussian weights, relative, root mean square


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 256), (7, 33), (3, 40, 96), (1, 1), (2, 130, 200)])
def test_dequantised_is_near(kind: Kind, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    p = pack(w, kind)
    back = p.dequantise()
    assert back.shape == w.shape and p.shape == tuple(w.shape)
    error = (back - w).norm() / w.norm()
    assert error < ERROR[kind]
    if w.dim() == 3:
        assert torch.equal(p.dequantise(index=1), back[1])
    if w.numel() > 1000:
        assert p.nbytes < w.numel() * (1.1 if kind != "int4" else 0.65)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_survive_a_second_quantisation(kind: Kind) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    once = pack(w, kind).dequantise()
    twice = pack(once, kind).dequantise()
    assert (twice - once).norm() / once.norm() < 1e-2 * (8 if kind == "int4" else 1)


def test_int_formulas_by_hand() -> None:
    w = torch.tensor([[0.0] * 32 + [-4.0, 2.0, 1.0, 0.25] * 8])
    p = pack(w, "int4")
    assert p.scale.tolist() == [[1.0, 0.5]]  # a group of zeros has scale 1; −4 / −8
    assert p.codes.shape == (1, 32)
    low, high = p.codes & 15, p.codes >> 4
    assert low[0, :16].tolist() == [8] * 16 and high[0, :16].tolist() == [8] * 16
    assert low[0, 16:18].tolist() == [0, 10] and high[0, 16:18].tolist() == [12, 8]  # 0.25/0.5 rounds to even
    q = pack(torch.tensor([[127.0, -63.5, 1.0]]), "int8")
    assert q.scale.item() == 1.0 and q.codes.tolist() == [[127, -64, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_are_never_hidden(kind: Kind) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        w = torch.ones(4, 64)
        w[1, 3] = bad
        assert not torch.isfinite(pack(w, kind).dequantise()[1]).all()


def test_fp8_is_the_published_format() -> None:
    w = torch.randn(200, 300)
    q, s = quantise_blocks(w)
    p = pack(w, "fp8")
    assert torch.equal(p.codes.view(torch.uint8), q.view(torch.uint8)) and torch.equal(p.scale, s)
    assert torch.equal(p.dequantise(), dequantise_blocks(q, s))


@pytest.mark.parametrize("kind", KINDS)
def test_written_by_parts_equals_whole(kind: Kind) -> None:
    gate, up = torch.randn(96, 64), torch.randn(96, 64)
    rows = block_rows([96, 96])
    assert rows == 32
    p = Packed(kind, (2, 192, 64), rows=rows)
    for e in range(2):
        for start in (0, 64):
            p.write(gate[start : start + 64] * (e + 1), e, start)
            p.write(up[start : start + 64] * (e + 1), e, 96 + start)
    whole = torch.stack([torch.cat([gate, up]) * (e + 1) for e in range(2)])
    assert torch.equal(p.dequantise(), pack(whole, kind, rows=rows).dequantise())
    if kind == "fp8":
        with pytest.raises(ValueError, match="inside a block of 32"):
            p.write(gate, 0, 8)


def test_casts_leave_codes_alone() -> None:
    model = torch.nn.Module()
    model.weight = pack(torch.randn(8, 128), "fp8")
    before = model.weight.dequantise()
    model.to(torch.bfloat16).float()
    assert model.weight.codes.dtype == torch.float8_e4m3fn and model.weight.scale.dtype == torch.float32
    assert torch.equal(model.weight.dequantise(), before)
    assert set(model.state_dict()) == {"weight.codes", "weight.scale"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_equal_those_of_the_dequantised_weight(kind: Kind, dtype: torch.dtype, rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 192, generator=g).to(dtype)
    w, bias = pack(torch.randn(80, 192, generator=g), kind), torch.randn(80, generator=g).to(dtype)
    exact = x.double() @ w.dequantise(torch.float64).T + bias.double()
    assert _near(linear(x, w, bias), exact)
    up, down = pack(torch.randn(160, 192, generator=g), kind), pack(torch.randn(192, 80, generator=g), kind)
    gate_up = x.double() @ up.dequantise(torch.float64).T
    gate, rest = gate_up.chunk(2, -1)
    assert _near(ffn(x, up, down), (torch.nn.functional.silu(gate) * rest) @ down.dequantise(torch.float64).T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_experts_equal_those_of_the_dequantised_weights(kind: Kind, dtype: torch.dtype, rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    E, K, D, width = 8, 3, 128, 96
    x = torch.randn(rows, D, generator=g).to(dtype)
    gate_up = pack(torch.randn(E, 2 * width, D, generator=g) / 8, kind, rows=block_rows([width, width]))
    down = pack(torch.randn(E, D, width, generator=g) / 8, kind)
    expert = torch.rand(rows, E, generator=g).topk(K).indices
    weight = torch.rand(rows, K, generator=g)
    shared, residual = (
        torch.randn(rows, D, generator=g).to(dtype),
        torch.randn(rows, D, generator=g).to(dtype),
    )
    routed = experts_reference(
        x.double(), expert, weight.double(), gate_up.dequantise(torch.float64), down.dequantise(torch.float64)
    )
    assert _near(experts(x, expert, weight, gate_up, down), routed)
    assert _near(
        experts(x, expert, weight, gate_up, down, shared, residual),
        routed + shared.double() + residual.double(),
    )


def _near(got: torch.Tensor, exact: torch.Tensor) -> bool:
    """Within what rounding in `got`'s dtype, and activations in eight bits, may cost."""
    assert got.shape == exact.shape and bool(torch.isfinite(got).all())
    return bool((got.double() - exact).norm() / exact.norm() < 0.03)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"int3.*fp8, int8, int4"):
        Packed("int3", (4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matrix"):
        packed.Packed("int8", (4,))
