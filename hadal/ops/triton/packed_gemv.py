"""Linear layers and experts of one or two rows on packed weights. References: `hadal.ops.packed`.

As in gemv.py a program owns BLOCK_N outputs and asks for all their codes and scales at once, into registers,
before its input is there. Codes lie as [C, N, units]: a thread holds the sixteen bytes (FP8: eight) of a
chunk, which lies in one group, so a chunk's sum takes one product with its scale and no thread needs
another's numbers before the end.

Integers become floats without a conversion: the code's bits go into the mantissa of 2²³ where they lie, and
a subtraction leaves (code) · 2^place, exactly; the input is divided by 2^place once for all outputs.
Legend: M rows, N outputs, K inputs, C chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.packed import Packed
from hadal.ops.triton import pdl
from hadal.ops.triton.gemv import silu_mul
from hadal.ops.triton.sizes import ceil_div, power_of_2

MAX_ROWS = 2
CHUNK = {"fp8": 8, "int8": 16, "int4": 32}  # channels that a thread holds together


class Config(NamedTuple):
    """Block sizes of a launch; `inputs` in channels."""

    outputs: int
    inputs: int
    warps: int


def config_for(kind: str, K: int, swiglu: bool) -> Config:
    """A chunk or two for every thread: with fewer chunks than threads the compiler loads the input in another
    order than the codes, and sends it through shared memory."""
    inputs = min(4096 if K > 4096 else 2048, power_of_2(K))
    return Config(4 if swiglu else 8, inputs, max(1, min(inputs // 512, inputs // CHUNK[kind] // 32)))


def wants(weight: Packed) -> bool:
    """Whether these kernels take the weight: whole chunks, each in one group."""
    chunk = CHUNK[weight.kind]
    return weight.layout == "plain" and weight.shape[-1] % chunk == 0 and weight.group % chunk == 0


# --- a chunk ------------------------------------------------------------------------------------------------
@triton.jit
def _units_of(KIND: tl.constexpr):
    """Units of a chunk: eight FP8 codes, or four words of integers. Rows are counted in whole chunks, so that
    the compiler knows how they are aligned."""
    return 8 if KIND == "fp8" else 4


@triton.jit
def _codes(row, c, K, FP8: tl.constexpr, CHUNK: tl.constexpr):
    """Codes [C, N, units] of the weight rows at `row` [1, N, 1], zero where there are none."""
    UNITS: tl.constexpr = 8 if FP8 else 4
    at = c[:, None, None] * UNITS + tl.arange(0, UNITS)[None, None, :]
    inside = (c * CHUNK < K)[:, None, None]
    if FP8:
        return tl.load(row + at, mask=inside, other=0.0)
    else:
        return tl.load(row + at, mask=inside, other=0)


@triton.jit
def _scales(row, c, K, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """The scale of every chunk [C, N or 1], of the rows of scales at `row`."""
    channel = c * CHUNK
    return tl.load(row + (channel // GROUP)[:, None], mask=(channel < K)[:, None], other=0.0)


@triton.jit
def _eight(x, channel, K, C: tl.constexpr):
    """x[channel], …, x[channel + 7] as eight tensors [C, 1]."""
    at = channel[:, None] + tl.arange(0, 8)[None, :]
    value = tl.load(x + at, mask=(channel < K)[:, None], other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [C, 2, 2, 2]))
    even_low, even_high = tl.split(even)
    odd_low, odd_high = tl.split(odd)
    x0, x4 = tl.split(even_low)
    x2, x6 = tl.split(even_high)
    x1, x5 = tl.split(odd_low)
    x3, x7 = tl.split(odd_high)
    return (x0[:, None], x1[:, None], x2[:, None], x3[:, None],
            x4[:, None], x5[:, None], x6[:, None], x7[:, None])  # fmt: skip


@triton.jit
def _float(word, magic, MASK: tl.constexpr, ZERO: tl.constexpr):
    """The bits of `word` under MASK as a number, less ZERO; exact."""
    return ((word & MASK) | magic).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)


@triton.jit
def _bytes(total, word, magic, x0, x1, x2, x3):
    """total + Σ of a word's four INT8 codes with four inputs; the second and fourth come divided by 2^8."""
    low = word ^ tl.full([], -0x7F7F7F80, tl.int32)  # code + 128, byte by byte
    high = low >> 16
    total += _float(low, magic, 0xFF, 0x80) * x0
    total += _float(low, magic, 0xFF00, 0x8000) * x1
    total += _float(high, magic, 0xFF, 0x80) * x2
    total += _float(high, magic, 0xFF00, 0x8000) * x3
    return total


@triton.jit
def _nibbles(total, word, magic, x, channel, K, C: tl.constexpr):
    """total + Σ of a word's eight INT4 codes with the inputs from `channel` on, [C, N]."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x, channel, K, C)
    high = word >> 12
    total += _float(word, magic, 0xF, 0x8) * x0
    total += _float(word, magic, 0xF0, 0x80) * (x1 * 0.0625)
    total += _float(word, magic, 0xF00, 0x800) * (x2 * 0.00390625)
    total += _float(word, magic, 0xF000, 0x8000) * (x3 * 0.000244140625)
    total += _float(word, magic, 0xF0000, 0x80000) * (x4 * 0.0000152587890625)
    total += _float(high, magic, 0xF00, 0x800) * (x5 * 0.00390625)
    total += _float(high, magic, 0xF000, 0x8000) * (x6 * 0.000244140625)
    total += _float(high, magic, 0xF0000, 0x80000) * (x7 * 0.0000152587890625)
    return total


@triton.jit
def _products(
    tile, scale, x, c, K, KIND: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Σ of every chunk's codes with the input row `x`, times its scale: [C, N]."""
    channel = c * CHUNK
    if KIND == "fp8":
        at = channel[:, None] + tl.arange(0, 8)[None, :]
        value = tl.load(x + at, mask=(channel < K)[:, None], other=0.0).to(tl.float32)
        total = tl.sum(tile.to(tl.float16).to(tl.float32) * value[:, None, :], 2)
    else:
        magic = tl.num_programs(2) * 0x4B000000  # 2²³ in FP32, unknown to the compiler: and + or in one step
        even, odd = tl.split(tl.reshape(tile, [C, BLOCK_N, 2, 2]))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        total = tl.zeros([C, BLOCK_N], tl.float32)
        if KIND == "int8":
            S: tl.constexpr = 0.00390625
            x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x, channel, K, C)
            total = _bytes(total, w0, magic, x0, x1 * S, x2, x3 * S)
            total = _bytes(total, w1, magic, x4, x5 * S, x6, x7 * S)
            x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x, channel + 8, K, C)
            total = _bytes(total, w2, magic, x0, x1 * S, x2, x3 * S)
            total = _bytes(total, w3, magic, x4, x5 * S, x6, x7 * S)
        else:
            total = _nibbles(total, w0, magic, x, channel, K, C)
            total = _nibbles(total, w1, magic, x, channel + 8, K, C)
            total = _nibbles(total, w2, magic, x, channel + 16, K, C)
            total = _nibbles(total, w3, magic, x, channel + 24, K, C)
    return total * scale.to(tl.float32)


@triton.jit
def _add(acc, tile, scale, x, M, x_stride, c, K, ROWS: tl.constexpr, KIND: tl.constexpr,
         CHUNK: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """acc + the products of one step: [C, N] for one row, else [N, ROWS]."""
    if ROWS == 1:
        acc += _products(tile, scale, x, c, K, KIND, CHUNK, C, BLOCK_N)
    else:
        i = tl.arange(0, ROWS)
        for m in tl.static_range(ROWS):
            own = x + tl.minimum(m, M - 1) * x_stride  # rows that are not there repeat the last, not stored
            total = tl.sum(_products(tile, scale, own, c, K, KIND, CHUNK, C, BLOCK_N), 0)
            acc += tl.where((i == m)[None, :], total[:, None], 0.0)
    return acc


@triton.jit
def _stream(
    x, M, x_stride, row, up_row, scale, up_scale, K, ROWS: tl.constexpr, SWIGLU: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STEPS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Sums [N, ROWS] over the rows of codes at `row` [1, N, 1] with scales at `scale` [1, N or 1], and over
    the second pair; the first codes are asked for before the input is waited for, always one step ahead."""
    FP8: tl.constexpr = KIND == "fp8"
    C: tl.constexpr = BLOCK_K // CHUNK
    c = tl.arange(0, C)
    tile, each = _codes(row, c, K, FP8, CHUNK), _scales(scale, c, K, GROUP, CHUNK)
    up_tile, up_each = tile, each
    if SWIGLU:
        up_tile, up_each = _codes(up_row, c, K, FP8, CHUNK), _scales(up_scale, c, K, GROUP, CHUNK)
    pdl.wait(WAIT)
    acc = tl.zeros([C, BLOCK_N] if ROWS == 1 else [BLOCK_N, ROWS], tl.float32)
    up = tl.zeros([C, BLOCK_N] if ROWS == 1 else [BLOCK_N, ROWS], tl.float32)
    for step in tl.static_range(STEPS):  # unrolled: codes of a byte, carried, would take a register each
        here, after = c + step * C, c + (step + 1) * C
        following, following_each, following_up, following_up_each = tile, each, up_tile, up_each
        if step < STEPS - 1:
            following = _codes(row, after, K, FP8, CHUNK)
            following_each = _scales(scale, after, K, GROUP, CHUNK)
            if SWIGLU:
                following_up = _codes(up_row, after, K, FP8, CHUNK)
                following_up_each = _scales(up_scale, after, K, GROUP, CHUNK)
        acc = _add(acc, tile, each, x, M, x_stride, here, K, ROWS, KIND, CHUNK, C, BLOCK_N)
        if SWIGLU:
            up = _add(up, up_tile, up_each, x, M, x_stride, here, K, ROWS, KIND, CHUNK, C, BLOCK_N)
        tile, each, up_tile, up_each = following, following_each, following_up, following_up_each
    if ROWS == 1:
        return tl.sum(acc, 0)[:, None], tl.sum(up, 0)[:, None]
    else:
        return acc, up


# --- linear layers ------------------------------------------------------------------------------------------
@triton.jit
def _linear_kernel(
    x, codes, scale, second, second_scale, bias, residual, out, second_out, M, N, second_N, K, x_stride,
    groups, blocks, ROWS: tl.constexpr, PAIR: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, HIGH: tl.constexpr, BLOCK_N: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_K: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    block = tl.program_id(0)
    if PAIR:
        late = block >= blocks
        block = tl.where(late, block - blocks, block)
        codes, scale = tl.where(late, second, codes), tl.where(late, second_scale, scale)
        out, N = tl.where(late, second_out, out), tl.where(late, second_N, N)
    units = K // CHUNK * _units_of(KIND)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    of_scales = block * BLOCK_N + tl.arange(0, SCALES)
    weight_n = tl.minimum(n, N - 1).to(tl.int64)[None, :, None]
    scale_n = tl.minimum(of_scales, N - 1).to(tl.int64)[None, :]
    acc, up = _stream(
        x, M, x_stride, codes + weight_n * units, codes + (weight_n + N) * units,
        scale + scale_n // HIGH * groups, scale + (scale_n + N) // HIGH * groups, K, ROWS, SWIGLU, KIND,
        GROUP, CHUNK, BLOCK_N, BLOCK_K, STEPS, PDL,
    )  # fmt: skip
    m = tl.arange(0, ROWS)
    to = m[None, :] * N + n[:, None]
    inside = (m < M)[None, :] & (n < N)[:, None]
    if SWIGLU:
        acc = silu_mul(acc, up, out.dtype.element_ty)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:  # the product is rounded before the addition, as in the unfused pair
        acc = acc.to(out.dtype.element_ty).to(tl.float32)
        acc += tl.load(residual + to, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=inside)


def linear(
    x_MK: Tensor, weight: Packed, bias_N: Tensor | None = None, residual_MN: Tensor | None = None,
    swiglu: bool = False, dtype: torch.dtype | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """x·Wᵀ + b + residual, in `dtype` or x's; with `swiglu` the weight stacks gate rows above up rows and
    silu(gate) ⊙ up comes out. At most MAX_ROWS rows."""
    N = weight.shape[0] // (2 if swiglu else 1)
    out = torch.empty((x_MK.shape[0], N), dtype=dtype or x_MK.dtype, device=x_MK.device)
    _launch(x_MK, weight, None, bias_N, residual_MN, out, None, swiglu, config)
    return out


def linear_pair(
    x_MK: Tensor, first: Packed, second: Packed, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """(x·W₁ᵀ, x·W₂ᵀ) in one launch; the weights are of one kind, with equal groups and blocks."""
    out, second_out = (
        torch.empty((x_MK.shape[0], w.shape[0]), dtype=x_MK.dtype, device=x_MK.device)
        for w in (first, second)
    )
    _launch(x_MK, first, second, None, None, out, second_out, False, config)
    return out, second_out


def _launch(
    x_MK: Tensor, weight: Packed, second: Packed | None, bias_N: Tensor | None, residual_MN: Tensor | None,
    out: Tensor, second_out: Tensor | None, swiglu: bool, config: Config | None,
) -> None:  # fmt: skip
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    (M, K), N = x_MK.shape, out.shape[1]
    second_N = 0 if second_out is None else second_out.shape[1]
    c = config or config_for(weight.kind, K, swiglu)
    blocks, other = ceil_div(N, c.outputs), weight if second is None else second
    codes = _units(weight)
    _linear_kernel[(blocks + ceil_div(second_N, c.outputs),)](
        x_MK, codes, weight.scale, codes if second is None else _units(second), other.scale,
        x_MK if bias_N is None else bias_N, x_MK if residual_MN is None else residual_MN.contiguous(), out,
        out if second_out is None else second_out, M, N, second_N, K, x_MK.stride(0),
        weight.scale.shape[-1], blocks, ROWS=power_of_2(M), PAIR=second is not None, BIAS=bias_N is not None,
        RESIDUAL=residual_MN is not None, SWIGLU=swiglu, SCALES=_scale_rows(weight, c, N if swiglu else 0),
        **_constants(weight, c), **pdl.options(x_MK),
    )  # fmt: skip


def _units(weight: Packed) -> Tensor:
    """Codes as the kernels load them: FP8, or words of four bytes."""
    return weight.codes if weight.kind == "fp8" else weight.codes.view(torch.int32)


def _scale_rows(weight: Packed, config: Config, *offsets: int) -> int:
    """Rows of scales of a program's outputs: 1 where all of them lie in one block of rows."""
    return 1 if all(n % config.outputs == 0 for n in (weight.rows, *offsets)) else config.outputs


def _constants(weight: Packed, c: Config) -> dict[str, int | str]:
    """Of a launch over a weight's whole rows."""
    return {
        "KIND": weight.kind, "GROUP": weight.group, "CHUNK": CHUNK[weight.kind], "HIGH": weight.rows,
        "BLOCK_N": c.outputs, "BLOCK_K": c.inputs, "STEPS": ceil_div(weight.shape[-1], c.inputs),
        "num_warps": c.warps,
    }  # fmt: skip


# --- experts: a program for every (token, k) pair -----------------------------------------------------------
@triton.jit
def _store(acc, out, M, width, n, ROWS: tl.constexpr):
    m = tl.arange(0, ROWS)
    to = out + m[None, :] * width + n[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < width)[:, None])


@triton.jit
def _gate_up_kernel(
    x, expert, codes, scale, shared, shared_scale, out, tokens, pairs, hidden, width, groups, scale_rows,
    PARTS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, HIGH: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALES: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    units = hidden // CHUNK * _units_of(KIND)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_n = tl.minimum(n, width - 1).to(tl.int64)[None, :, None]
    of_scales = tl.program_id(0) * BLOCK_N + tl.arange(0, SCALES)
    scale_n = tl.minimum(of_scales, width - 1).to(tl.int64)[None, :]
    if part < PARTS:  # of the shared expert, for every token
        pdl.begin(PDL)
        first = part * width
        up_first = first + PARTS * width
        every, every_up = _stream(
            x, tokens, hidden, shared + (weight_n + first) * units, shared + (weight_n + up_first) * units,
            shared_scale + (scale_n + first) // HIGH * groups,
            shared_scale + (scale_n + up_first) // HIGH * groups, hidden, ROWS, True, KIND, GROUP, CHUNK,
            BLOCK_N, BLOCK_K, STEPS, PDL,
        )  # fmt: skip
        every = silu_mul(every, every_up, out.dtype.element_ty)
        _store(every, out + (pairs + part * tokens).to(tl.int64) * width, tokens, width, n, ROWS)
    else:
        pdl.wait(PDL)
        pdl.begin(PDL)  # only now: so the next kernel's programs find the experts chosen when they begin
        pair = part - PARTS
        e = tl.load(expert + pair)
        code_row = codes + (e * 2 * width + weight_n) * units
        scale_row = scale + e * scale_rows * groups
        acc, up = _stream(
            x + pair // K * hidden, 1, hidden, code_row, code_row + tl.cast(width, tl.int64) * units,
            scale_row + scale_n // HIGH * groups, scale_row + (scale_n + width) // HIGH * groups, hidden, 1,
            True, KIND, GROUP, CHUNK, BLOCK_N, BLOCK_K, STEPS, False,
        )  # fmt: skip
        _store(silu_mul(acc, up, out.dtype.element_ty), out + pair * width, 1, width, n, 1)


@triton.jit
def _down_kernel(
    h, expert, codes, scale, shared, shared_scale, out, tokens, pairs, hidden, width, groups, scale_rows,
    PARTS: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, HIGH: tl.constexpr, BLOCK_N: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_K: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    part = tl.program_id(1)
    units = width // CHUNK * _units_of(KIND)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_n = tl.minimum(n, hidden - 1).to(tl.int64)[None, :, None]
    of_scales = tl.program_id(0) * BLOCK_N + tl.arange(0, SCALES)
    scale_n = tl.minimum(of_scales, hidden - 1).to(tl.int64)[None, :]
    if part < PARTS:
        first = pairs + part * tokens
        row = shared + weight_n * (PARTS * units) + part * units
        scale_row = shared_scale + scale_n // HIGH * (PARTS * groups) + part * groups
        every, _every_up = _stream(
            h + first * width, tokens, width, row, row, scale_row, scale_row, width, ROWS, False, KIND,
            GROUP, CHUNK, BLOCK_N, BLOCK_K, STEPS, PDL,
        )  # fmt: skip
        _store(every, out + first * hidden, tokens, hidden, n, ROWS)
    else:
        pair = part - PARTS
        e = tl.load(expert + pair, cache_modifier=".cg")  # chosen before the launch before let this one begin
        row = codes + (e * hidden + weight_n) * units
        scale_row = scale + (e * scale_rows + scale_n // HIGH) * groups
        acc, _ = _stream(
            h + pair * width, 1, width, row, row, scale_row, scale_row, width, 1, False, KIND, GROUP, CHUNK,
            BLOCK_N, BLOCK_K, STEPS, PDL,
        )  # fmt: skip
        _store(acc, out + pair * hidden, 1, hidden, n, 1)


def wants_experts(gate_up: Packed, down: Packed) -> bool:
    return wants(gate_up) and wants(down)


def experts(
    x_TD: Tensor, expert_TK: Tensor, gate_up: Packed, down: Packed, shared: tuple[Packed, Packed] | None,
    parts: int, up_config: Config | None = None, down_config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Rows [P + T·parts, D]: every pair's expert, then each part of the shared one for every token.

    The shared weights are like the routed ones (kind, group, rows of a block), and a part's inputs and blocks
    begin with its own groups and blocks: packed.py's `takes_shared` sees to it.
    """
    (tokens, hidden), K, width = x_TD.shape, expert_TK.shape[1], down.shape[2]
    pairs = tokens * K
    shared_up, shared_down = shared or (gate_up, down)
    h_RI = torch.empty((pairs + parts * tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    y_RD = torch.empty((pairs + parts * tokens, hidden), dtype=x_TD.dtype, device=x_TD.device)
    up = up_config or config_for(gate_up.kind, hidden, True)
    dn = down_config or config_for(down.kind, width, False)
    constants = {"PARTS": parts, "ROWS": power_of_2(tokens), **pdl.options(x_TD)}
    _gate_up_kernel[(ceil_div(width, up.outputs), parts + pairs)](
        x_TD, expert_TK, *_stack(gate_up), *_stack(shared_up), h_RI, tokens, pairs, hidden, width,
        *_sizes(gate_up), K=K, SCALES=_scale_rows(gate_up, up, width), **constants, **_constants(gate_up, up),
    )  # fmt: skip
    _down_kernel[(ceil_div(hidden, dn.outputs), parts + pairs)](
        h_RI, expert_TK, *_stack(down), *_stack(shared_down), y_RD, tokens, pairs, hidden, width,
        *_sizes(down), SCALES=_scale_rows(down, dn), **constants, **_constants(down, dn),
    )  # fmt: skip
    return y_RD


def _stack(weight: Packed) -> tuple[Tensor, Tensor]:
    return _units(weight), weight.scale


def _sizes(weight: Packed) -> tuple[int, int]:
    """Groups of a row, rows of scales of a matrix."""
    return weight.scale.shape[-1], weight.scale.shape[-2]
