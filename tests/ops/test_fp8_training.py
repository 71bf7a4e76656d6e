"""FP8 products of training against FP64, and where they are taken."""

from __future__ import annotations

import pytest
import torch

from hadal.ops import fp8, fp8_training
from hadal.ops.linear import linear, linear_wide


def gradients(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, function) -> list[torch.Tensor]:
    """[y, dx, dW]."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = function(x, w)
    return [y.detach(), *torch.autograd.grad(y, [x, w], dy)]


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


def transcription(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """V3's three products, element by element of the tiles, in FP64."""

    def tile(values: torch.Tensor, power: bool) -> torch.Tensor:
        out = torch.empty_like(values, dtype=torch.float64)
        for row in range(values.shape[0]):
            for at in range(0, values.shape[1], 128):
                part = values[row, at : at + 128].float()
                scale = part.abs().max().clamp(min=1e-4) / 448
                if power:
                    scale = torch.tensor(2.0) ** torch.ceil(torch.log2(scale.double())).float()
                code = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                out[row, at : at + 128] = code.double() * scale.double()
        return out

    def block(values: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(values, dtype=torch.float64)
        for i in range(0, values.shape[0], 128):
            for j in range(0, values.shape[1], 128):
                part = values[i : i + 128, j : j + 128].float()
                scale = part.abs().max() / 448
                code = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                out[i : i + 128, j : j + 128] = code.double() * scale.double()
        return out

    kept = tile(x, True)
    return [
        kept @ block(w).T,
        tile(dy, False) @ block(w),
        tile(dy.T, False) @ tile(kept.T, True).T,
    ]


@pytest.mark.parametrize("tokens,inputs,outputs", [(3, 16, 24), (130, 200, 300), (256, 384, 128)])
def test_it_is_the_recipe(tokens, inputs, outputs):
    """Partial tiles and blocks on every side."""
    x, w = torch.randn(tokens, inputs), torch.randn(outputs, inputs) * inputs**-0.5
    dy = torch.randn(tokens, outputs)
    found = gradients(x, w, dy, fp8_training.linear)
    for out, want in zip(found, transcription(x, w, dy), strict=True):
        assert error(out, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_near_the_product_in_high_precision(dtype):
    """E4M3 has three bits of mantissa: about 2.6% an element, and no more in a sum of many."""
    x, w, dy = (torch.randn(*shape).to(dtype) for shape in ((256, 512), (384, 512), (256, 384)))
    found = gradients(x, w, dy, fp8_training.linear)
    exact = gradients(x.double(), w.double(), dy.double(), torch.nn.functional.linear)
    assert [g.dtype for g in found] == [dtype] * 3
    for out, want in zip(found, exact, strict=True):
        assert error(out, want) < 0.04


def test_an_outlier_costs_its_own_tile_only():
    """The reason for small tiles: one value a million times the others, and no row beside it notices."""
    x, w = torch.randn(8, 512), torch.randn(64, 512) * 512**-0.5
    x[3, 200] = 1e6
    y = fp8_training.linear(x, w)
    want = x.double() @ w.double().T
    others = [0, 1, 2, 4, 5, 6, 7]
    assert error(y[others], want[others]) < 0.04
    whole = x.abs().max() / 448  # one scale for the whole matrix
    flat = (x / whole).to(torch.float8_e4m3fn).float() * whole
    assert error(flat[others] @ w.T, want[others]) > 0.3


def test_the_input_is_kept_in_one_byte_an_element():
    kept: list[torch.Tensor] = []
    x, w = torch.randn(256, 256, requires_grad=True), torch.randn(128, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_training.linear(x, w).sum()
    large = [t for t in kept if t.numel() >= 128 * 256]
    assert [t.dtype for t in large] == [torch.float8_e4m3fn] * 2


def test_cutting_anew_along_tokens_keeps_what_powers_of_two_can():
    """Where all tokens are of one size, the second rounding changes nothing."""
    x = torch.randn(128, 128).clamp(0.51, 0.99) * torch.randn(128, 128).sign()
    kept = fp8.dequantise_activations(*fp8.quantise_activations(x, power_of_two=True))
    assert torch.equal(fp8_training._rounded(kept.T, power_of_two=True).T, kept)


def test_where_it_is_taken():
    x, w = torch.randn(4, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    plain, wide = linear(x, w), linear_wide(x, w)
    with fp8_training.fp8_training():
        assert not torch.equal(linear(x, w), plain)
        assert torch.equal(linear_wide(x, w), wide)  # the head
        with torch.no_grad():  # inference, inside a training step: as ever
            assert torch.allclose(linear(x, w), plain, atol=1e-5)
        with fp8_training.fp8_training(False):
            assert torch.equal(linear(x, w), plain)
    assert not fp8_training.is_fp8_training()


def test_bias_leading_dimensions_and_what_is_not_finite():
    x, w, b = torch.randn(2, 3, 40), torch.randn(8, 40), torch.randn(8)
    assert fp8_training.linear(x, w, b).shape == (2, 3, 8)
    x[0, 1, 5] = float("nan")
    assert fp8_training.linear(x, w)[0, 1].isnan().all() and fp8_training.linear(x, w)[1].isfinite().all()
