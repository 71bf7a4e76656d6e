"""Exact operations on CUDA: tiles and orders of sums that no row count changes. See `hadal.ops.invariant`.

  * a product has one tile shape for every number of rows, and walks its inputs in ascending order, unsplit;
  * an expert's rows are gathered into such tiles; a token's K results are added in the gate's order;
  * attention cuts the context at multiples of SHARE keys from position 0, whatever the batch; a row's shares
    are merged one after the other, as many as its own context has;
  * inputs are brought to one memory layout first: Triton compiles a kernel anew for other alignments, and
    might lay out a reduction in another way.
The context's shares are FP32 in memory, so rows are taken in turns of bounded size.
Legend: M rows, N outputs, K inputs (or experts a token), T tokens, H heads, G key/value heads, C entry or
head width, L latent, E experts, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.config import Moe
from hadal.ops.triton import experts as ordinary_experts
from hadal.ops.triton import norm, rope
from hadal.ops.triton.gate import route

if TYPE_CHECKING:
    from hadal.ops.invariant import Stream

BLOCK_M, BLOCK_N, BLOCK_K = 32, 64, 64  # of every product
KEYS = 32  # of an attention tile
SHARE = 1024  # keys after which a context is cut; a multiple of KEYS
SHARE_BYTES = 128 << 20  # of unmerged shares at once


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and at an address that is a multiple of 16."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


# --- products -----------------------------------------------------------------------------------------------
@triton.jit
def _tile(
    x_row, x_ok, w, n, n_ok, K, w_n, w_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] products of rows (their pointers) with weight rows n, inputs ascending."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_row[:, None] + k[None, :], mask=x_ok[:, None] & (k < K)[None, :], other=0.0)
        at = n[None, :] * w_n + k[:, None] * w_k
        weight = tl.load(w + at, mask=n_ok[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    x, w, bias, out, M, N, K, x_m, x_h, w_h, w_n, w_k, out_m, out_h, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(2).to(tl.int64)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = _tile(x + m * x_m + h * x_h, m < M, w + h * w_h, n, n < N, K, w_n, w_k, BLOCK_M, BLOCK_N, BLOCK_K)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    to = out + m[:, None] * out_m + h * out_h + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def _product(x_MHK: Tensor, w_HNK: Tensor, bias_N: Tensor | None, out_MHN: Tensor) -> None:
    """Each head's rows times its own matrix (any strides), into `out`; the inputs of x are contiguous."""
    (M, H, K), N = x_MHK.shape, w_HNK.shape[1]
    if M == 0:
        return
    _product_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(M, BLOCK_M), H)](
        x_MHK, w_HNK, x_MHK if bias_N is None else bias_N, out_MHN, M, N, K, x_MHK.stride(0), x_MHK.stride(1),
        w_HNK.stride(0), w_HNK.stride(1), w_HNK.stride(2), out_MHN.stride(0), out_MHN.stride(1),
        BIAS=bias_N is not None, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, num_stages=3,
    )  # fmt: skip


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, wide: bool) -> Tensor:
    """x·Wᵀ + b; FP32 whatever x is where `wide`."""
    rows = _aligned(x.reshape(-1, x.shape[-1]))
    out = torch.empty(
        (*x.shape[:-1], weight_NK.shape[0]), dtype=torch.float32 if wide else x.dtype, device=x.device
    )
    _product(rows.unsqueeze(1), weight_NK.unsqueeze(0), bias_N, out.view(rows.shape[0], 1, -1))
    return out


# --- rows: one program each, in the kernels of ordinary mode ------------------------------------------------
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension."""
    return norm.rms_norm(_aligned(x), weight, eps)


def rotate(x: Tensor, rotation_T2r: Tensor, interleaved: bool) -> Tensor:
    """Rotated copy of x [T, H, R] or [T, R]."""
    return rope.rotate(_aligned(x), rotation_T2r, interleaved)


def latent_entry(kv_TC: Tensor, norm_L: Tensor, rotation_T2r: Tensor, eps: float) -> Tensor:
    """[RMSNorm(latent); rotated key] of each row."""
    rank = norm_L.shape[0]
    latent_TL = rms_norm(kv_TC[:, :rank], norm_L, eps)
    return torch.cat([latent_TL, rotate(kv_TC[:, rank:], rotation_T2r, True)], -1)


def swiglu(x_T2I: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    return ordinary_experts.swiglu(_aligned(x_T2I))


@triton.jit
def _logsumexp_kernel(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        value = tl.load(x + row * width + start + col, mask=start + col < width, other=float("-inf"))
        peak = tl.maximum(peak, value)
    top = tl.max(peak, 0)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        value = tl.load(x + row * width + start + col, mask=start + col < width, other=float("-inf"))
        total += tl.exp(value - top).to(tl.float64)
    tl.store(out + row, (top.to(tl.float64) + tl.log(tl.sum(total, 0))).to(tl.float32))


def logsumexp(logits_BV: Tensor) -> Tensor:
    """log Σ exp of each row of FP32 logits."""
    rows, width = logits_BV.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits_BV.device)
    if rows:
        _logsumexp_kernel[(rows,)](_aligned(logits_BV), out, width, BLOCK=1024, num_warps=4)
    return out


# --- routing and experts ------------------------------------------------------------------------------------
def gate(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, moe: Moe) -> tuple[Tensor, Tensor, Tensor]:
    """(experts int64 [T, K], weights FP32 [T, K], scores FP32 [T, E])."""
    logit_TE = linear(x_TD, weight_ED, None, wide=True)
    expert_TK, weight_TK = route(logit_TE, bias_E, moe)
    score_TE = logit_TE.sigmoid() if moe.scoring_func == "sigmoid" else logit_TE.softmax(-1)
    return expert_TK, weight_TK, score_TE


@triton.jit
def _expert_kernel(
    x, w, out, order, offset, block_end, N, K, n_experts,
    PER_ROW: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one expert. Its pairs (token, k) are order[offset_e …], input rows pair // PER_ROW."""
    block = tl.program_id(1)
    each = tl.arange(0, BLOCK_E)
    end = tl.load(block_end + each, mask=each < n_experts, other=1 << 30)
    e = tl.sum((end <= block).to(tl.int32), 0)
    if e < n_experts:
        before = tl.where(e > 0, tl.load(block_end + tl.maximum(e - 1, 0)), 0)
        place = tl.load(offset + e) + (block - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = place < tl.load(offset + e + 1)
        pair = tl.load(order + place, mask=row_ok, other=0)
        n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        acc = _tile(
            x + pair // PER_ROW * K, row_ok, w + e.to(tl.int64) * N * K, n, n < N, K, K, 1,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        to = out + pair[:, None] * N + n[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & (n < N)[None, :])


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor
) -> Tensor:
    """Σ_k weight_k · expert_k(x), k ascending."""
    x_TD, (T, K), E = _aligned(x_TD), expert_TK.shape, down_EDI.shape[0]
    if T == 0:
        return torch.empty_like(x_TD)
    flat = expert_TK.flatten()
    order = flat.argsort(stable=True)
    count_E = torch.zeros(E, dtype=torch.int64, device=flat.device)
    count_E.scatter_add_(0, flat, torch.ones_like(flat))
    offset = torch.nn.functional.pad(count_E.cumsum(0), (1, 0))
    block_end = ((count_E + BLOCK_M - 1) // BLOCK_M).cumsum(0)
    most = triton.cdiv(T * K, BLOCK_M) + E  # tiles, known without asking the device

    def multiply(x: Tensor, w_ENK: Tensor, per_row: int) -> Tensor:
        width, inputs = w_ENK.shape[1:]
        out = torch.empty((T * K, width), dtype=x.dtype, device=x.device)
        _expert_kernel[(triton.cdiv(width, BLOCK_N), most)](
            x, w_ENK, out, order, offset, block_end, width, inputs, E, PER_ROW=per_row,
            BLOCK_E=triton.next_power_of_2(E), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        return out

    row_ND = multiply(swiglu(multiply(x_TD, gate_up_E2ID, K)), down_EDI, 1)
    return ordinary_experts._combine(row_ND, None, weight_TK.contiguous(), None, None)


# --- attention ----------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["first", "table_stride", "splits"])
def _attend_kernel(
    q, entries, table, start, row, position, partial, peaks, totals, first, heads, per_group, table_stride,
    entry, group_stride, v_offset, splits, scale,
    PAGED: tl.constexpr, PAGE: tl.constexpr, V_WIDTH: tl.constexpr, REST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    SHARE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A token's heads that share keys, over one share of its context; unmerged results in FP32.

    With a REST, keys are V_WIDTH + REST values and the first V_WIDTH are the values (MLA); else both are
    V_WIDTH values, `v_offset` apart (GQA).
    """
    local = tl.program_id(0).to(tl.int64)
    t = local + first
    share = tl.program_id(2)
    blocks = tl.cdiv(per_group, BLOCK_H)
    g = tl.program_id(1) // blocks
    i = tl.program_id(1) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    mine = i < per_group
    h = g * per_group + i
    col = tl.arange(0, BLOCK_V)
    rest = tl.arange(0, BLOCK_R)
    seen = (tl.load(position + t) + 1).to(tl.int32)
    begin = share * SHARE
    if begin < seen:
        end = tl.minimum(begin + SHARE, seen)
        s = tl.load(row + t)
        q_row = q + (t * heads + h[:, None]) * (V_WIDTH + REST)
        query = tl.load(q_row + col[None, :], mask=mine[:, None] & (col < V_WIDTH)[None, :], other=0.0)
        if REST:
            q_rest = tl.load(
                q_row + V_WIDTH + rest[None, :], mask=mine[:, None] & (rest < REST)[None, :], other=0.0
            )
        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
        for at in range(begin, end, KEYS):
            key = at + tl.arange(0, KEYS)
            visible = key < end
            if PAGED:
                page = tl.load(table + s * table_stride + key // PAGE, mask=visible, other=0).to(tl.int64)
                place = page * PAGE + key % PAGE
            else:
                place = tl.load(start + s) + key
            base = (entries + place * entry + g * group_stride)[:, None]
            inside = visible[:, None] & (col < V_WIDTH)[None, :]
            k = tl.load(base + col[None, :], mask=inside, other=0.0)
            score = tl.dot(query, tl.trans(k), input_precision="ieee")
            if REST:
                v = k
                k_rest = tl.load(
                    base + V_WIDTH + rest[None, :], mask=visible[:, None] & (rest < REST)[None, :], other=0.0
                )
                score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision="ieee")
            else:
                v = tl.load(base + v_offset + col[None, :], mask=inside, other=0.0)
            score = tl.where(visible[None, :], score * scale, float("-inf"))
            peak = tl.maximum(top, tl.max(score, 1))
            p = tl.exp(score - peak[:, None])
            decay = tl.exp(top - peak)
            total = total * decay + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
            top = peak
        out = (local * heads + h) * splits + share
        tl.store(partial + out[:, None] * BLOCK_V + col[None, :], acc, mask=mine[:, None])
        tl.store(peaks + out, top, mask=mine)
        tl.store(totals + out, total, mask=mine)


@triton.jit(do_not_specialize=["first", "splits"])
def _merge_kernel(
    partial, peaks, totals, position, out, first, heads, width, splits,
    BLOCK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """A head's shares, one after the other, as many as the token's context has."""
    local = tl.program_id(0).to(tl.int64)
    seen = (tl.load(position + first + local // heads) + 1).to(tl.int32)
    col = tl.arange(0, BLOCK)
    at = local * splits
    top = tl.load(peaks + at)
    total = tl.load(totals + at)
    acc = tl.load(partial + at * BLOCK + col)
    for share in range(1, tl.cdiv(seen, SHARE)):
        next_top = tl.load(peaks + at + share)
        peak = tl.maximum(top, next_top)
        old, new = tl.exp(top - peak), tl.exp(next_top - peak)
        total = total * old + tl.load(totals + at + share) * new
        acc = acc * old + tl.load(partial + (at + share) * BLOCK + col) * new
        top = peak
    value = (acc / total).to(out.dtype.element_ty)
    tl.store(out + (first * heads + local) * width + col, value, mask=col < width)


def _attend(
    q_THC: Tensor, entries: Tensor, stream: Stream, groups: int, v_width: int, v_offset: int, scale: float
) -> Tensor:
    """softmax(q·k)·v of each head over its group's keys; [T, H, v_width]."""
    q_THC, (T, H, C) = _aligned(q_THC), q_THC.shape
    entry = entries.shape[-1] if groups == 1 and entries.dim() < 4 else 2 * groups * C
    paged = stream.table is not None
    longest = stream.table.shape[1] * stream.page_size if stream.table is not None else max(stream.lengths)
    splits = triton.cdiv(longest, SHARE)
    block_v = max(16, triton.next_power_of_2(v_width))
    turn = max(1, min(T, SHARE_BYTES // (4 * H * splits * block_v)))
    out = torch.empty((T, H, v_width), dtype=q_THC.dtype, device=q_THC.device)
    partial = torch.empty((turn * H, splits, block_v), dtype=torch.float32, device=q_THC.device)
    peaks, totals = torch.empty((2, turn * H, splits), dtype=torch.float32, device=q_THC.device)
    for first in range(0, T, turn):
        rows = min(turn, T - first)
        _attend_kernel[(rows, groups * triton.cdiv(H // groups, 16), splits)](
            q_THC, entries, stream.start if stream.table is None else stream.table, stream.start, stream.row,
            stream.position, partial, peaks, totals, first, H, H // groups,
            0 if stream.table is None else stream.table.stride(0), entry, C, v_offset, splits, scale,
            PAGED=paged, PAGE=stream.page_size or 1, V_WIDTH=v_width, REST=C - v_width, BLOCK_V=block_v,
            BLOCK_R=max(16, triton.next_power_of_2(C - v_width)), BLOCK_H=16,
            SHARE=SHARE, KEYS=KEYS, num_warps=4, num_stages=2,
        )  # fmt: skip
        _merge_kernel[(rows * H,)](
            partial, peaks, totals, stream.position, out, first, H, v_width, splits,
            BLOCK=block_v, SHARE=SHARE, num_warps=4,
        )  # fmt: skip
    return out


def mla(
    q_THw: Tensor,
    rotation_T2r: Tensor,
    entries: Tensor,
    kv_b: Tensor,
    stream: Stream,
    rank: int,
    scale: float,
) -> Tensor:
    """Attention of unrotated queries [T, H, n + R] over latent entries; [T, H·v]."""
    q_THw, (T, H, width), R = _aligned(q_THw), q_THw.shape, 2 * rotation_T2r.shape[2]
    nope = width - R
    w_HwL = kv_b.view(H, -1, rank)
    q_THC = torch.empty((T, H, rank + R), dtype=q_THw.dtype, device=q_THw.device)
    _product(q_THw[..., :nope], w_HwL[:, :nope].transpose(1, 2), None, q_THC[..., :rank])
    rope.rotate_into(_aligned(q_THw[..., nope:]), rotation_T2r, q_THC[..., rank:], True)
    z_THL = _attend(q_THC, entries, stream, 1, rank, 0, scale)
    out = torch.empty((T, H, w_HwL.shape[1] - nope), dtype=q_THw.dtype, device=q_THw.device)
    _product(z_THL, w_HwL[:, nope:], None, out)
    return out.flatten(1)


def gqa(q_THC: Tensor, entries: Tensor, stream: Stream, groups: int, scale: float) -> Tensor:
    """Attention of rotated queries over entries [.., 2, G, C]; [T, H, C]."""
    width = q_THC.shape[2]
    return _attend(q_THC, entries, stream, groups, width, groups * width, scale)
