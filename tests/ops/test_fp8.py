"""FP8 block quantisation against a plain Python loop, exact identities and published shapes."""

import math

import pytest
import torch

from hadal.ops.fp8 import (
    dequantise_activations,
    dequantise_blocks,
    quantise_activations,
    quantise_blocks,
    reference_dequantise_blocks,
    round_up_to_power_of_two,
    scale_shape,
)

E4M3 = sorted(
    {
        s * (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
        for s in (1, -1)
        for e in range(16)
        for m in range(8)
        if not (e == 15 and m == 7)
    }
)


def nearest_e4m3(x: float) -> float:
    return min(E4M3, key=lambda v: abs(v - x))


def loop_quantise(w: torch.Tensor, rows: int, cols: int) -> tuple[list[list[float]], list[list[float]]]:
    """Block by block in double precision, straight from the formula."""
    n, k = w.shape
    scales = [[0.0] * math.ceil(k / cols) for _ in range(math.ceil(n / rows))]
    values = [[0.0] * k for _ in range(n)]
    for r in range(len(scales)):
        for c in range(len(scales[0])):
            block = w[r * rows : (r + 1) * rows, c * cols : (c + 1) * cols]
            s = float(block.abs().max()) / 448 or 1.0
            scales[r][c] = s
            for i in range(block.shape[0]):
                for j in range(block.shape[1]):
                    values[r * rows + i][c * cols + j] = nearest_e4m3(float(block[i, j]) / s) * s
    return values, scales


@pytest.mark.parametrize(
    ("shape", "block"), [((5, 7), (2, 3)), ((4, 6), (2, 3)), ((1, 1), (4, 4)), ((9, 3), (4, 8))]
)
def test_matches_the_formula_block_by_block(shape: tuple[int, int], block: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    q, scale = quantise_blocks(w, block)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    values, scales = loop_quantise(w.double(), *block)
    expected, back = torch.tensor(values).double(), dequantise_blocks(q, scale, block).double()
    torch.testing.assert_close(scale.double(), torch.tensor(scales).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((576, 7168), (5, 56)),
        ((24576, 1536), (192, 12)),
        ((32768, 512), (256, 4)),
        ((18432, 7168), (144, 56)),
    ],
)
def test_published_scale_shapes(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert scale_shape(shape) == expected


def test_partial_blocks_scale_by_their_own_maximum() -> None:
    w = torch.zeros(576, 130)
    w[512:, 128:] = 7.0  # the corner block alone
    w[:128, :128] = -2.0
    q, scale = quantise_blocks(w)
    assert scale.shape == (5, 2)
    assert scale[4, 1].item() == pytest.approx(7 / 448) and scale[0, 0].item() == pytest.approx(2 / 448)
    assert scale[2, 0] == 1.0, "an all-zero block has scale 1"
    torch.testing.assert_close(dequantise_blocks(q, scale), w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_path_equals_the_reference_for_every_code(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    no_nan = codes[(codes & 0x7F) != 0x7F]
    q = no_nan[torch.randint(len(no_nan), (3, 70, 90))]
    q[0].view(-1)[: len(no_nan)] = no_nan
    scale = torch.rand(3, 3, 4) + 0.5
    scale[1, 0, 0], scale[1, 0, 1] = 2.0**125, 2.0**-140
    fp8 = q.view(torch.float8_e4m3fn)
    got = dequantise_blocks(fp8, scale, (32, 24), dtype)
    assert torch.equal(got, reference_dequantise_blocks(fp8, scale, (32, 24), dtype))
    q[2, 69, 89] = 0xFF  # a NaN code stays NaN
    got = dequantise_blocks(q.view(torch.float8_e4m3fn), scale, (32, 24), dtype)
    assert torch.isnan(got[2, 69, 89]) and not torch.isnan(got[2, 69, :89]).any()


def test_error_is_bounded_by_half_a_step() -> None:
    w = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    for power_of_two in (False, True):
        q, scale = quantise_blocks(w, power_of_two=power_of_two)
        error = (dequantise_blocks(q, scale) - w).abs()
        step = scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
        # E4M3: relative spacing 2^-3 above 2^-6, absolute spacing 2^-9 below.
        assert (error <= torch.maximum(w.abs() * 2.0**-4, step * 2.0**-10) * (1 + 1e-5)).all()


def test_stacks_equal_their_members() -> None:
    w = torch.randn(3, 130, 140)
    q, scale = quantise_blocks(w)
    for i in range(3):
        qi, si = quantise_blocks(w[i])
        assert torch.equal(q[i].view(torch.uint8), qi.view(torch.uint8)) and torch.equal(scale[i], si)
        assert torch.equal(dequantise_blocks(q, scale)[i], dequantise_blocks(qi, si))


def test_power_of_two_rounds_up_exactly() -> None:
    s = torch.tensor([0.25, 0.2500001, 1.0, 1.5, 2.0**-20, 3e-5, 0.9999999, float("nan")])
    got = round_up_to_power_of_two(s)
    assert got[:-1].tolist() == [2.0 ** math.ceil(math.log2(v)) for v in s[:-1].tolist()]
    assert math.isnan(got[-1].item())
    _, scale = quantise_blocks(torch.randn(256, 256), power_of_two=True)
    assert (torch.frexp(scale).mantissa == 0.5).all()


def test_power_of_two_quantisation_repeats_itself() -> None:
    """With power-of-two scales, quantising a dequantised matrix again changes nothing."""
    w = torch.randn(200, 300)
    q, scale = quantise_blocks(w, power_of_two=True)
    once = dequantise_blocks(q, scale)
    again = dequantise_blocks(*quantise_blocks(once, power_of_two=True))
    assert torch.equal(once, again)
    assert torch.equal(once, dequantise_blocks(q, scale, dtype=torch.bfloat16).float()), "exact in BF16 too"


def test_extremes_stay_finite_and_faults_stay_visible() -> None:
    tiny, huge = torch.full((4, 4), 1e-44), torch.full((4, 4), 3.4e38)
    for w in (tiny, huge):
        q, scale = quantise_blocks(w, (4, 4))
        assert torch.isfinite(q.float()).all() and torch.isfinite(scale).all()
    for bad in (float("nan"), float("inf")):
        w = torch.ones(4, 8)
        w[0, 0] = bad
        back = dequantise_blocks(*quantise_blocks(w, (4, 4)), (4, 4))
        assert not torch.isfinite(back[:, :4]).all(), "a fault must not turn into an ordinary number"
        assert torch.equal(back[:, 4:], torch.ones(4, 4))


@pytest.mark.parametrize("k", [128, 256, 200, 7])
def test_activations(k: int) -> None:
    x = torch.randn(3, 5, k)
    x[0, 0] = 1e-7  # below the clamp of 1e-4
    q, scale = quantise_activations(x)
    assert q.shape == x.shape and scale.shape == (3, 5, math.ceil(k / 128))
    amax = torch.stack([c.abs().amax(-1) for c in x.split(128, -1)], -1)
    torch.testing.assert_close(scale, amax.clamp(min=1e-4) / 448, rtol=1e-6, atol=0)
    back, atol = dequantise_activations(q, scale), float(scale.max()) * 2.0**-9
    torch.testing.assert_close(back, x, rtol=2.0**-4, atol=atol)
    _, rounded = quantise_activations(x, power_of_two=True)
    assert (rounded >= scale).all() and (rounded < 2 * scale).all()


def test_wrong_scale_shape_is_refused_with_both_shapes() -> None:
    q, scale = quantise_blocks(torch.randn(130, 130))
    with pytest.raises(ValueError, match=r"\[1, 2\].*needs \[2, 2\]"):
        dequantise_blocks(q, scale[:1])
    with pytest.raises(ValueError, match="needs a matrix"):
        quantise_blocks(torch.ones(4))
