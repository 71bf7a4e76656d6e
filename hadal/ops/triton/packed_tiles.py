"""Products with packed weights, tile by tile: codes become BF16 in registers, tensor cores add up in FP32.

A tile of the weight is the *first* factor, [outputs, inputs], and the rows are the second, so that sixteen
rows fill a tensor core's narrow side. INT8 and FP8 codes are exact in BF16: a group's scale multiplies the
group's sum, in FP32, and no weight is rounded. INT4 groups are shorter than a useful tile, so there q · s is
rounded to BF16, as in the reference; a byte's two channels go into two products, with the even and the odd
channels of the rows, and nothing is interleaved.
Legend: N outputs, K inputs, M rows, G groups of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_tile(x_row, m_ok, k, width):
    """x[k, m], zero where there is none."""
    mask = m_ok[None, :] & (k < width)[:, None]
    return tl.load(x_row[None, :] + k[:, None], mask=mask, other=0.0)


@triton.jit
def rows_split(x_row, m_ok, k, width, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """(x[k even, m], x[k odd, m]), zero where there is none."""
    mask = m_ok[:, None] & (k < width)[None, :]
    both = tl.load(x_row[:, None] + k[None, :], mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(both, [BLOCK_M, BLOCK_K // 2, 2]))
    return tl.trans(even), tl.trans(odd)


@triton.jit
def int4_tile(
    code_row, scale_row, n_ok, start, width, code_width, OUT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(even, odd) channels start … start + BLOCK_K of W[n, ·], each [N, BLOCK_K / 2], rounded to `OUT`."""
    G: tl.constexpr = BLOCK_K // GROUP
    byte = start // 2 + tl.arange(0, BLOCK_K // 2)
    code = tl.load(
        code_row[:, None] + byte[None, :], mask=n_ok[:, None] & (byte < code_width)[None, :], other=0
    )
    group = start // GROUP + tl.arange(0, G)
    mask = n_ok[:, None] & (group * GROUP < width)[None, :]
    scale = tl.load(scale_row[:, None] + group[None, :], mask=mask, other=0.0)
    wide = tl.broadcast_to(scale[:, :, None], [BLOCK_N, G, GROUP // 2])
    wide = tl.reshape(wide, [BLOCK_N, BLOCK_K // 2])
    if tl.bfloat16 == OUT:  # 0x4300 is 128 in BF16, whose last four bits count ones: 128 + code − 136, exact
        low = ((code & 15).to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
        high = ((code >> 4).to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
        return low * wide, high * wide
    else:
        low, high = (code & 15).to(tl.float32) - 8.0, (code >> 4).to(tl.float32) - 8.0
        return (low * wide.to(tl.float32)).to(OUT), (high * wide.to(tl.float32)).to(OUT)


@triton.jit
def code_tile(code_row, n_ok, start, width, OUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """INT8 or FP8 codes of W[n, start … start + BLOCK_K], as exact numbers."""
    k = start + tl.arange(0, BLOCK_K)
    mask = n_ok[:, None] & (k < width)[None, :]
    code = tl.load(code_row[:, None] + k[None, :], mask=mask, other=0.0)
    if code.dtype == tl.float8e4nv:  # by FP16 and FP32, where there are quick conversions
        return code.to(tl.float16).to(tl.float32).to(OUT)
    else:
        return code.to(OUT)


@triton.jit
def product(acc, x_row, m_ok, code_row, scale_row, n_ok, first, last, width, code_width,
            INT4: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """acc[n, m] + Σ_k W[n, k] · x[m, k] for k in first … last − 1; `first` is a multiple of BLOCK_K."""
    OUT: tl.constexpr = x_row.dtype.element_ty
    for start in range(first, last, BLOCK_K):
        if INT4:
            x_even, x_odd = rows_split(x_row, m_ok, start + tl.arange(0, BLOCK_K), width, BLOCK_M, BLOCK_K)
            even, odd = int4_tile(
                code_row, scale_row, n_ok, start, width, code_width, OUT, GROUP, BLOCK_N, BLOCK_K
            )
            acc = tl.dot(even, x_even, acc, input_precision="ieee")
            acc = tl.dot(odd, x_odd, acc, input_precision="ieee")
        else:
            scale = tl.load(scale_row + start // GROUP, mask=n_ok, other=0.0).to(tl.float32)
            x = rows_tile(x_row, m_ok, start + tl.arange(0, BLOCK_K), width)
            w = code_tile(code_row, n_ok, start, width, OUT, BLOCK_K)
            acc += tl.dot(w, x, input_precision="ieee") * scale[:, None]
    return acc


@triton.jit
def product_pair(gate, up, x_row, m_ok, code_row, up_codes, scale_row, up_scales, n_ok, width, code_width,
                 INT4: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """`product` with two weights that read the same rows, from 0 to `width`."""
    OUT: tl.constexpr = x_row.dtype.element_ty
    for start in range(0, width, BLOCK_K):
        if INT4:
            x_even, x_odd = rows_split(x_row, m_ok, start + tl.arange(0, BLOCK_K), width, BLOCK_M, BLOCK_K)
            even, odd = int4_tile(
                code_row, scale_row, n_ok, start, width, code_width, OUT, GROUP, BLOCK_N, BLOCK_K
            )
            gate = tl.dot(even, x_even, gate, input_precision="ieee")
            gate = tl.dot(odd, x_odd, gate, input_precision="ieee")
            even, odd = int4_tile(
                up_codes, up_scales, n_ok, start, width, code_width, OUT, GROUP, BLOCK_N, BLOCK_K
            )
            up = tl.dot(even, x_even, up, input_precision="ieee")
            up = tl.dot(odd, x_odd, up, input_precision="ieee")
        else:
            x = rows_tile(x_row, m_ok, start + tl.arange(0, BLOCK_K), width)
            w = code_tile(code_row, n_ok, start, width, OUT, BLOCK_K)
            scale = tl.load(scale_row + start // GROUP, mask=n_ok, other=0.0).to(tl.float32)
            gate += tl.dot(w, x, input_precision="ieee") * scale[:, None]
            w = code_tile(up_codes, n_ok, start, width, OUT, BLOCK_K)
            scale = tl.load(up_scales + start // GROUP, mask=n_ok, other=0.0).to(tl.float32)
            up += tl.dot(w, x, input_precision="ieee") * scale[:, None]
    return gate, up
