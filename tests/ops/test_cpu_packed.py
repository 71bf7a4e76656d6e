"""The kernels for packed weights on CPU against FP64, quantised activations modelled exactly."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from hadal.ops import cpu, cpu_packed
from hadal.ops.packed import KINDS, Kind, Packed, block_rows, dequantise, pack
from tests.helpers.processes import run_tests

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.status()[1]}")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
SHAPES = [(1, 1), (7, 33), (32, 128), (33, 130), (80, 192), (130, 517), (96, 1024)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seen(x_TI: Tensor, kind: Kind) -> Tensor:
    """The activations that the kernel multiplies with, FP64."""
    if kind == "fp8":
        return x_TI.double()
    q, scale = cpu_packed.quantise_activations(x_TI)
    return q.double() * scale.double().repeat_interleave(128, 1)[:, : q.shape[1]]


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-9)
    assert error < tolerance, float(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 40, 96), (2, 65, 131)])
def test_layout_is_undone_exactly(kind: Kind, shape: tuple[int, ...]) -> None:
    plain = pack(draw(*shape), kind)
    codes, scale = plain.codes.clone(), plain.scale.clone()
    tiles = pack(draw(*shape), kind)
    cpu_packed.pack(tiles)
    assert tiles.layout == cpu_packed.LAYOUT
    got_codes, got_scale = tiles.plain()
    assert torch.equal(got_codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(got_scale, scale)
    with pytest.raises(ValueError, match="tile32"):
        tiles.write(draw(shape[-2], shape[-1]), 0 if len(shape) == 3 else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(kind: Kind, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, bias = pack(draw(*shape), kind), draw(shape[0], seed=1, dtype=dtype)
    wide = weight.dequantise(torch.float64)
    assert cpu_packed.wants_linear(draw(1, shape[1]), weight) and weight.layout == cpu_packed.LAYOUT
    for rows in (1, 2, 3, 5, 12, 13, 25, 70):
        # strided, at an odd address, and next to values that must not be read
        x = torch.full((rows, shape[1] + 5), math.nan, dtype=dtype)[:, 1 : shape[1] + 1]
        x.copy_(draw(rows, shape[1], seed=rows))
        want = seen(x, kind) @ wide.T
        close(cpu_packed.linear(x, weight), want, TOLERANCE[dtype])
        close(cpu_packed.linear(x, weight, bias), want + bias.double(), TOLERANCE[dtype])
    close(cpu_packed.linear(x.T.contiguous().T, weight), want, TOLERANCE[dtype])
    close(cpu_packed.linear(x.unsqueeze(0), weight), want.unsqueeze(0), TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 32, 96])
def test_fp8_blocks_of_any_height(rows: int) -> None:
    weight = pack(draw(192, 200), "fp8", rows=rows)
    x, wide = draw(9, 200), weight.dequantise(torch.float64)
    assert cpu_packed.wants_linear(x, weight)
    close(cpu_packed.linear(x, weight), x.double() @ wide.T, 1e-6)
    assert torch.equal(weight.dequantise(torch.float64), wide)


def test_every_fp8_code() -> None:
    codes = torch.arange(256).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    weight = Packed("fp8", (32, 256))
    weight.write_codes(codes.view(torch.float8_e4m3fn).repeat(32, 1), torch.ones(1, 2))
    assert cpu_packed.wants_linear(torch.eye(256), weight)
    assert torch.equal(cpu_packed.linear(torch.eye(256), weight).T, weight.dequantise())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_extreme_codes_do_not_saturate(kind: Kind) -> None:
    weight = Packed(kind, (40, 256))
    extreme = torch.full_like(weight.codes, 127 if kind == "int8" else 0x0F)
    extreme[::2] = -127 if kind == "int8" else 0
    weight.write_codes(extreme, torch.ones_like(weight.scale))
    x = torch.full((3, 256), 127.0)
    x[1] = -127
    want = x.double() @ weight.dequantise(torch.float64).T
    assert cpu_packed.wants_linear(x, weight)
    assert torch.equal(cpu_packed.linear(x, weight).double(), want)


def routed(
    x: Tensor, expert: Tensor, weight: Tensor, gate_up: Packed, down: Packed, kinds: tuple[Kind, Kind]
) -> Tensor:
    """The experts in FP64 on the activations that the kernels see."""
    out = torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64)
    for t in range(x.shape[0]):
        for k in range(expert.shape[1]):
            e = int(expert[t, k])
            gate, up = (seen(x[t : t + 1], kinds[0]) @ gate_up.dequantise(torch.float64, e).T).chunk(2, -1)
            hidden = (torch.nn.functional.silu(gate) * up).float()
            row = seen(hidden, kinds[1]) @ down.dequantise(torch.float64, e).T
            out[t] += weight[t, k].double() * row[0]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 5, 2, 45, 37), (9, 16, 4, 128, 96), (70, 3, 3, 130, 64), (40, 8, 1, 64, 144)]
)
def test_experts(kind: Kind, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    tokens, count, K, D, width = sizes
    x, weight = draw(tokens, D, dtype=dtype), draw(tokens, K, seed=1).abs()
    gate_up = pack(draw(count, 2 * width, D, seed=2) / D**0.5, kind, rows=block_rows([width, width]))
    down = pack(draw(count, D, width, seed=3) / width**0.5, kind)
    expert = draw(tokens, count, seed=4).topk(K).indices
    want = routed(x, expert, weight, gate_up, down, (kind, kind))
    assert cpu_packed.wants_experts(x, gate_up, down)
    # a hidden value that sits between two codes may fall to either
    close(cpu_packed.experts(x, expert, weight, gate_up, down), want, max(TOLERANCE[dtype], 2e-4))


def test_experts_of_several_threads_and_few_tokens_agree() -> None:
    try:
        for kind in KINDS:
            x, weight, expert = draw(20, 256), draw(20, 4, seed=1), draw(20, 16, seed=2).topk(4).indices
            gate_up, down = pack(draw(16, 1024, 256), kind), pack(draw(16, 256, 512), kind)
            matrix = pack(draw(2048, 512, seed=3), kind)
            assert cpu_packed.ready(gate_up, down, matrix)
            out, wide = [], []
            for threads in (1, 2, 3, 4):
                cpu.status()[0].set_threads(threads)
                out.append(cpu_packed.experts(x, expert, weight, gate_up, down))
                wide.append(cpu_packed.linear(draw(30, 512), matrix))
            assert all(torch.equal(o, out[0]) for o in out) and all(torch.equal(w, wide[0]) for w in wide)
            alone = cpu_packed.experts(x[3:4], expert[3:4], weight[3:4], gate_up, down)
            close(alone, out[0][3:4].double(), 1e-5)
    finally:
        cpu.status()[0].set_threads(torch.get_num_threads())


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_in_activations_are_never_hidden(kind: Kind) -> None:
    matrix, gate_up, down = (
        pack(draw(64, 300), kind),
        pack(draw(4, 128, 300), kind, rows=64),
        pack(draw(4, 300, 64), kind),
    )
    expert, weight = torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.rand(3, 2)
    assert cpu_packed.ready(matrix, gate_up, down)
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in DTYPES:
            x = draw(3, 300, dtype=dtype)
            clean = cpu_packed.linear(x, matrix)
            x[1, 290] = bad
            out = cpu_packed.linear(x, matrix)
            assert not out[1].isfinite().any() and torch.equal(out[[0, 2]], clean[[0, 2]])
            out = cpu_packed.experts(x, expert, weight, gate_up, down)
            assert not out[1].isfinite().any() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_scale_is_never_hidden(kind: Kind) -> None:
    w = draw(64, 256)
    w[40, 7] = math.nan
    weight = pack(w, kind, rows=32)
    x = draw(3, 256)
    if kind == "fp8":  # NaN codes: the reference must take it
        assert not cpu_packed.wants_linear(x, weight) and weight.layout == "plain"
        assert not cpu_packed.wants_linear(x, weight)
        return
    assert cpu_packed.wants_linear(x, weight)
    out = cpu_packed.linear(x, weight)
    assert out[:, 40].isnan().all() and out[:, :40].isfinite().all() and out[:, 41:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_tiny_and_large_activations(dtype: torch.dtype) -> None:
    weight = pack(draw(32, 128), "int8")
    assert cpu_packed.ready(weight)
    for factor in (0.0, 1e-39, 1e-30, 1e30):
        x = (draw(2, 128) * factor).to(dtype)
        close(cpu_packed.linear(x, weight), seen(x, "int8") @ weight.dequantise(torch.float64).T, 1e-2)


def test_unusual_groups_stay_plain() -> None:
    weight = pack(draw(8, 96), "int8", group=32)
    assert not cpu_packed.wants_linear(draw(1, 96), weight) and weight.layout == "plain"
    codes, scale = weight.plain()
    assert torch.equal(dequantise(codes, scale, "int8", 96, 32, 1, torch.float32), weight.dequantise())


def test_no_tokens() -> None:
    gate_up, down = pack(draw(3, 10, 8), "int8"), pack(draw(3, 8, 5), "int8")
    assert cpu_packed.ready(gate_up, down)
    none = cpu_packed.experts(
        torch.zeros(0, 8), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), gate_up, down
    )
    assert none.shape == (0, 8)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_lesser_processors(isa: str) -> None:
    """The same tests through the kernels of another instruction set, in a process of their own."""
    if os.environ.get("HADAL_CPU_ISA"):
        pytest.skip("this is that process")
    if isa == "avx2" and "avx2" not in torch.backends.cpu.get_cpu_capability().lower():
        capability = torch.backends.cpu.get_cpu_capability().lower()
        if "avx512" not in capability:
            pytest.skip("this processor has no AVX2")
    done = run_tests(__file__, HADAL_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 skipped" in done.stdout, done.stdout[-500:]
