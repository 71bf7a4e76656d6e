"""The gradients of experts' weights in FP8 (dyᵀ·x, 128 tokens after 128) in Gluon, for Hopper.

    dW_e[n, k] = Σ_t sa[t, n] · sb[t, k] · Σ_{i in t} qa[n, i] · qb[k, i]      t: its tiles of 128 rows

The design of fp8_gluon.py, whose parts these are: two warp groups of 64 rows, a tile of 128 × 256 in two
steps, one multiplying while the other applies scales, a warp that loads. Here both sides have a scale for
each row and tile; the sums of a tile run over its expert's tokens, from none to many, and gradients of
experts lie one below another. Reference: `hadal.ops.fp8_tiles.outer`. Legend: as there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hadal.ops.fp8_tiles import Codes, Rows
from hadal.ops.triton.fp8 import _programs
from hadal.ops.triton.fp8_gluon import BYTES, GROUP, WIDE, _leave_both, _next, barrier, read

STAGES, LEAVES = 4, 1  # loads ahead, steps on their way out: 48 and 32 KiB each


@gluon.jit
def _place(tile, end, N, K):
    """(expert, first output, first input, first tile of tokens, the one after the last) of a tile."""
    n_tiles = gl.cdiv(N, GROUP)
    each = n_tiles * gl.cdiv(K, WIDE)
    e = tile // each
    inside = tile % each
    first = gl.load(end + gl.maximum(e - 1, 0)) // GROUP
    first = gl.where(e > 0, first, 0)
    return e, inside % n_tiles * GROUP, inside // n_tiles * WIDE, first, gl.load(end + e) // GROUP


@gluon.jit
def _produce(a, b, a_smem, b_smem, full, empty, end, tiles, N, K, STAGES: gl.constexpr):
    """The loading warp: fills stages in turn, each as soon as both warp groups have left it."""
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _e, n, k, first, last = _place(tile, end, N, K)
        for t in range(first, last):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            for i in gl.static_range(2):
                row = n + i * (GROUP // 2)
                read(a, [row, t * GROUP], bar, a_smem.index(2 * stage + i))
            for i in gl.static_range(2):
                read(b, [k + i * GROUP, t * GROUP], bar, b_smem.index(2 * stage + i))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _consume(
    a_smem, b_smem, full, empty, c, c_smem, a_scale, b_scale, end, tiles, N, K,
    WHICH: gl.constexpr, STAGES: gl.constexpr, LEAVES: gl.constexpr,
):  # fmt: skip
    """A warp group: its 64 rows of each tile. See fp8_gluon.py for the waits that name sums."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    rows = gl.arange(0, GROUP // 2, gl.SliceLayout(1, mma))
    columns = gl.arange(0, GROUP, gl.SliceLayout(0, mma))
    stage = 0
    phase = 0
    part = gl.full([GROUP // 2, GROUP], 0.0, gl.float32, mma)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        e, n, k, first, last = _place(tile, end, N, K)
        own = n + WHICH * (GROUP // 2)
        acc_0 = gl.full([GROUP // 2, GROUP], 0.0, gl.float32, mma)
        acc_1 = gl.full([GROUP // 2, GROUP], 0.0, gl.float32, mma)
        a_at = a_scale + first.to(gl.int64) * N + own
        b_at = b_scale + first.to(gl.int64) * K + k
        further = gl.minimum(k + GROUP, K - GROUP) - k  # past the edge nothing is stored
        for _t in range(first, last):
            mbarrier.wait(full.index(stage), phase)
            x = a_smem.index(2 * stage + WHICH)
            w = b_smem.index(2 * stage).permute((1, 0))
            part = warpgroup_mma(x, w, part, use_acc=False, is_async=True)
            sa = gl.load(a_at + rows)
            sb = gl.load(b_at + columns)
            part = warpgroup_mma_wait(0, deps=(part,))
            acc_0 = warpgroup_mma_wait(0, deps=(acc_0 + part * sb[None, :] * sa[:, None],))
            w = b_smem.index(2 * stage + 1).permute((1, 0))
            part = warpgroup_mma(x, w, part, use_acc=False, is_async=True)
            sb = gl.load(b_at + further + columns)
            part = warpgroup_mma_wait(0, deps=(part,))
            barrier()  # all four warps are done with this stage
            mbarrier.arrive(empty.index(stage), count=1)
            acc_1 = warpgroup_mma_wait(0, deps=(acc_1 + part * sb[None, :] * sa[:, None],))
            a_at += N
            b_at += K
            stage, phase = _next(stage, phase, STAGES)
        _leave_both(acc_0, acc_1, c, c_smem, e * N + own, k, LEAVES)
    tma.store_wait(0)


@gluon.jit
def _outer_kernel(
    a, b, c, a_scale, b_scale, end, N, K, n_experts, STAGES: gl.constexpr, LEAVES: gl.constexpr
):  # fmt: skip
    a_smem = gl.allocate_shared_memory(a.dtype, [2 * STAGES, GROUP // 2, GROUP], a.layout)
    b_smem = gl.allocate_shared_memory(b.dtype, [2 * STAGES, GROUP, GROUP], b.layout)
    c_0 = gl.allocate_shared_memory(c.dtype, [LEAVES, GROUP // 2, GROUP], c.layout)
    c_1 = gl.allocate_shared_memory(c.dtype, [LEAVES, GROUP // 2, GROUP], c.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)  # both warp groups
    fence_async_shared()
    tiles = n_experts * gl.cdiv(N, GROUP) * gl.cdiv(K, WIDE)
    gl.warp_specialize(
        [
            (_consume, (a_smem, b_smem, full, empty, c, c_0, a_scale, b_scale, end, tiles, N, K, 0, STAGES,
                        LEAVES)),
            (_consume, (a_smem, b_smem, full, empty, c, c_1, a_scale, b_scale, end, tiles, N, K, 1, STAGES,
                        LEAVES)),
            (_produce, (a, b, a_smem, b_smem, full, empty, end, tiles, N, K, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def outer(a: Codes, b: Codes, rows: Rows) -> Tensor:
    """[E, N, K] in BF16 of two transposes [N, R] and [K, R]; N and K multiples of 128."""
    (N, R), K, n_experts = a.q.shape, b.q.shape[0], rows.end_E.numel()
    if N % 128 or K % 128 or R % 128:
        raise ValueError(f"{N} outputs × {K} inputs × {R} rows: need multiples of 128")
    out = torch.empty((n_experts * N, K), dtype=torch.bfloat16, device=a.q.device)
    codes = gl.NVMMASharedLayout(128, 8, 2)
    _outer_kernel[(_programs(a.q.device),)](
        TensorDescriptor.from_tensor(a.q, [64, 128], codes),
        TensorDescriptor.from_tensor(b.q, [128, 128], codes),
        TensorDescriptor.from_tensor(out, [64, 128], gl.NVMMASharedLayout(128, 16, 2)),
        a.scale, b.scale, rows.end_E, N, K, n_experts, STAGES=STAGES, LEAVES=LEAVES, num_warps=4,
    )  # fmt: skip
    return out.view(n_experts, N, K)
