"""FP8 products of training against FP64, and where they are taken."""

from __future__ import annotations

import pytest
import torch

from hadal.ops import fp8, fp8_tiles, fp8_training
from hadal.ops.experts import experts_reference, swiglu
from hadal.ops.linear import linear, linear_wide


def gradients(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, function) -> list[torch.Tensor]:
    """[y, dx, dW]."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = function(x, w)
    return [y.detach(), *torch.autograd.grad(y, [x, w], dy)]


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.detach().double() - want.double()).norm() / want.double().norm())


def tile(values: torch.Tensor, power: bool) -> torch.Tensor:
    """Through E4M3 in tiles of one row and 128 columns, element by element of the tiles, in FP64."""
    out = torch.empty_like(values, dtype=torch.float64)
    for row in range(values.shape[0]):
        for at in range(0, values.shape[1], 128):
            part = values[row, at : at + 128].float()
            out[row, at : at + 128] = rounded(part, power)
    return out


def block(values: torch.Tensor, power: bool) -> torch.Tensor:
    """The same in blocks of 128 × 128."""
    out = torch.empty_like(values, dtype=torch.float64)
    for i in range(0, values.shape[0], 128):
        for j in range(0, values.shape[1], 128):
            out[i : i + 128, j : j + 128] = rounded(values[i : i + 128, j : j + 128].float(), power)
    return out


def rounded(part: torch.Tensor, power: bool) -> torch.Tensor:
    scale = (part.abs().max() / 448).clamp(min=2.0**-100)
    if power:
        scale = torch.tensor(2.0) ** torch.ceil(torch.log2(scale.double())).float()
    return (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()


def transcription(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, power: bool) -> list[torch.Tensor]:
    """V3's three products."""
    kept, weight = tile(x, True), block(w, power)
    return [kept @ weight.T, tile(dy, power) @ weight, tile(dy.T, power) @ tile(kept.T, True).T]


@pytest.mark.parametrize("scales", fp8_training.SCALES)
@pytest.mark.parametrize("tokens,inputs,outputs", [(3, 16, 24), (130, 200, 300), (256, 384, 128)])
def test_it_is_the_recipe(tokens, inputs, outputs, scales):
    """Partial tiles and blocks on every side; a zero tile, an outlier, gradients as small as they are."""
    x, w = torch.randn(tokens, inputs), torch.randn(outputs, inputs) * inputs**-0.5
    dy = torch.randn(tokens, outputs) * 1e-9
    x[0], x[1, 3], dy[:, :8] = 0, 1e4, 0
    with fp8_training.fp8_training(scales=scales):
        found = gradients(x, w, dy, fp8_training.linear)
    for out, want in zip(found, transcription(x, w, dy, scales == "power_of_two"), strict=True):
        assert error(out, want) < 1e-6


def network(
    x: torch.Tensor, w: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, dy: torch.Tensor, power: bool
) -> list[torch.Tensor]:
    """[y, dx, dw, dgate_up, ddown] of Σ over rows of one expert w · ffn(x), by the recipe, in FP64."""
    kept, up_blocks, down_blocks = tile(x, True), block(gate_up, power), block(down, power)
    gate, up = (kept @ up_blocks.T).float().chunk(2, 1)
    hidden = (torch.nn.functional.silu(gate) * up * w[:, None]).float()
    y = tile(hidden, power) @ down_blocks.T
    gate, up = (tile(part, True).requires_grad_() for part in (gate, up))
    again, w = torch.nn.functional.silu(gate) * up, w.double().requires_grad_()
    token = tile(dy, True)
    weighted = again * w[:, None]
    grads = torch.autograd.grad(weighted, [gate, up, w], (token @ down_blocks))
    d = torch.cat(grads[:2], 1)
    ddown = tile(token.T, True) @ tile(weighted.detach().T, power).T
    return [
        y, tile(d, power) @ up_blocks, grads[2], tile(d.T, power) @ tile(kept.T, True).T, ddown
    ]  # fmt: skip


def routed(tokens: int, hidden: int, width: int, n_experts: int, top_k: int, dtype=torch.float32):
    """x, expert, weight, gate_up, down, dy: the last expert is chosen by nobody."""
    x, dy = torch.randn(tokens, hidden, dtype=dtype), torch.randn(tokens, hidden, dtype=dtype) * 1e-6
    expert = torch.rand(tokens, n_experts - 1).topk(top_k, 1).indices
    gate_up = torch.randn(n_experts, 2 * width, hidden, dtype=dtype) * hidden**-0.5
    down = torch.randn(n_experts, hidden, width, dtype=dtype) * width**-0.5
    return x, expert, torch.rand(tokens, top_k), gate_up, down, dy


@pytest.mark.parametrize("scales", fp8_training.SCALES)
@pytest.mark.parametrize("width", [40, 128, 192])
def test_experts_are_the_recipe(width, scales):
    """More rows than a tile for one expert, few for others, none for one. FP32 sums here, FP64 there: a value
    that lies between two codes can fall to either side, hence the tolerance."""
    torch.manual_seed(0)
    x, expert, weight, gate_up, down, dy = routed(200, 136, width, 5, 2)
    inputs = [t.clone().requires_grad_() for t in (x, weight, gate_up, down)]
    with fp8_training.fp8_training(scales=scales):
        y = fp8_training.experts(inputs[0], expert, *inputs[1:])
    found = torch.autograd.grad(y, inputs, dy)
    want = [torch.zeros_like(t, dtype=torch.float64) for t in (y, *inputs)]
    for e in range(5):
        token, slot = (expert == e).nonzero(as_tuple=True)
        args = x[token], weight[token, slot], gate_up[e], down[e], dy[token], scales == "power_of_two"
        parts = network(*args)
        want[0].index_add_(0, token, parts[0])
        want[1].index_add_(0, token, parts[1])
        want[2][token, slot] = parts[2]
        want[3][e], want[4][e] = parts[3:]
    for out, expected in zip((y.detach(), *found), want, strict=True):
        assert error(out, expected) < 2e-3
    assert not found[2][4].any() and not found[3][4].any()


def test_a_dense_network_is_two_linear_layers():
    """But for values between two codes, and in the gradients for SwiGLU's inputs, kept in FP8."""
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(70, 136), torch.randn(400, 136) * 0.1, torch.randn(136, 200) * 0.1
    inputs = [t.requires_grad_() for t in (x, gate_up, down)]
    y = fp8_training.ffn(*inputs)
    plain = fp8_training.linear(swiglu(fp8_training.linear(x, gate_up)), down)
    assert error(y, plain.detach()) < 2e-3
    dy = torch.randn_like(y)
    for out, want in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(plain, inputs, dy), strict=True
    ):
        assert error(out, want) < 0.08


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_near_those_in_high_precision(dtype):
    torch.manual_seed(0)
    x, expert, weight, gate_up, down, dy = routed(300, 256, 128, 6, 3, dtype)
    ends = []
    for function, wide in ((fp8_training.experts, dtype), (experts_reference, torch.float64)):
        inputs = [t.to(wide).requires_grad_() for t in (x, weight, gate_up, down)]
        y = function(inputs[0], expert, *inputs[1:])
        ends.append([y, *torch.autograd.grad(y, inputs, dy.to(wide))])
    for out, want in zip(*ends, strict=True):
        assert error(out, want) < 0.09
    assert ends[0][0].dtype == dtype


def test_what_is_added_to_experts_passes_its_gradient_on():
    torch.manual_seed(0)
    x, expert, weight, gate_up, down, dy = routed(40, 64, 48, 5, 2)
    shared, residual = (torch.randn_like(x).requires_grad_() for _ in range(2))
    x.requires_grad_()
    plain = fp8_training.experts(x, expert, weight, gate_up, down)
    for others in ((shared, residual), (None, residual), (shared, None), (shared.detach(), residual)):
        y = fp8_training.experts(x, expert, weight, gate_up, down, *others)
        torch.testing.assert_close(y, plain + sum(t for t in others if t is not None))
        learned = [t for t in others if t is not None and t.requires_grad]
        dx, *rest = torch.autograd.grad(y, [x, *learned], dy)
        assert all(torch.equal(d, dy) for d in rest)
        assert torch.equal(dx, torch.autograd.grad(plain, x, dy, retain_graph=True)[0])


def test_sorted_rows_begin_at_tiles():
    expert = torch.tensor([[3, 0], [3, 1], [3, 0]])
    rows = fp8_tiles.sort_rows(expert, 5)
    assert rows.place_TK.tolist() == [[256, 0], [257, 128], [258, 1]]
    assert rows.end_E.tolist() == [128, 256, 256, 384, 384] and rows.used.tolist() == [3]
    assert rows.tile_expert[:3].tolist() == [0, 1, 3]
    assert [rows.token_R[at].item() for at in (0, 1, 2, 128, 256, 258)] == [0, 2, -1, 1, 0, 2]


def test_weights_are_quantised_once_where_they_are_constant(monkeypatch):
    """In both directions, for several micro-batches, through views and bare data; and anew after updates."""
    seen = []
    quantise = fp8_tiles.quantise_weight
    monkeypatch.setattr(fp8_tiles, "quantise_weight", lambda w, p: seen.append(1) or quantise(w, p))
    w = torch.nn.Parameter(torch.randn(32, 64))
    x = torch.randn(8, 64, requires_grad=True)
    ends = []
    for _ in range(2):
        with fp8_training.constant_weights():
            for weight in (w, w.detach().requires_grad_(), w.data, w.view(32, 64)):
                y = fp8_training.linear(x, weight)
                y.sum().backward()
        ends.append(y.detach())
        with torch.no_grad():
            w.mul_(2.0)
    assert len(seen) == 2 and torch.allclose(ends[1], 2 * ends[0])
    fp8_training.linear(x, w)
    fp8_training.linear(x, w)
    assert len(seen) == 4
    with fp8_training.constant_weights(), pytest.raises(RuntimeError, match="changed inside"):
        fp8_training.linear(x, w)
        with torch.no_grad():
            w.add_(1.0)
        fp8_training.linear(x, w)


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
    assert [t.dtype for t in large] == [torch.float8_e4m3fn]  # the weight's codes are not the graph's


def test_cutting_anew_along_tokens_keeps_what_powers_of_two_can():
    """Where all tokens are of one size, the second rounding changes nothing."""
    x = torch.randn(128, 128).clamp(0.51, 0.99) * torch.randn(128, 128).sign()
    codes = fp8_tiles.quantise(x, True)
    assert torch.equal(fp8_tiles.dequantise(fp8_tiles.columns(codes, None)).T, fp8_tiles.dequantise(codes))


def test_dequantised_values_are_exact_in_bf16_with_powers_of_two():
    x = torch.randn(64, 300) * 10.0 ** torch.randint(-28, 8, (64, 1))
    codes = fp8_tiles.quantise(x, True)
    assert torch.equal(fp8_tiles.dequantise(codes, torch.bfloat16).float(), fp8_tiles.dequantise(codes))
    weight = fp8_tiles.quantise_weight(x, True)
    wide = fp8.dequantise_blocks(weight.q, weight.scale)
    assert torch.equal(wide.bfloat16().float(), wide)
    turned = fp8_tiles.transposed(weight)
    assert torch.equal(fp8.dequantise_blocks(turned.q, turned.scale).T, wide)


def test_unknown_scales_are_refused():
    with (
        pytest.raises(ValueError, match="use one of power_of_two, float32"),
        fp8_training.fp8_training(scales="e8"),
    ):
        pass


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
