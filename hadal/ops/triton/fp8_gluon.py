"""The FP8 grouped product of fp8.py in Gluon (Triton's language of explicit layouts), for Hopper.

Triton's kernel (3.6) multiplies, waits, applies the scales, and only then multiplies again. Here a tile is
128 rows × 256 outputs, 64 rows to a warp group, made in two steps of 128 outputs for each group of channels:
while one warp group applies scales, the other multiplies. A thread holds 128 FP32 sums and the 64 of a step.
A warp of its own sends for the tiles, groups of channels ahead, by tensor map, through stages of 48 KiB.

On an H100 0.79 to 0.88 of DeepGEMM's speed where Triton's kernel has 0.45 to 0.58 (benchmarks/kernels_gpu.py,
part grouped). Reference: `hadal.ops.packed`. Legend: fp8.py.
"""

from __future__ import annotations

from typing import NamedTuple

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

from hadal.ops.packed import Packed
from hadal.ops.triton.fp8 import _programs
from hadal.ops.triton.pdl import on_hopper

GROUP = gl.constexpr(128)  # channels of a group, outputs of a step, rows of a tile
WIDE = gl.constexpr(256)  # outputs of a tile
BYTES = gl.constexpr(3 * 128 * 128)  # of a stage
# named otherwise in Triton 3.6 than since
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
read = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
write = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


class Config(NamedTuple):
    """`stages` and `leaves` (steps whose sums are on their way out) share 227 KiB: 48 and 32 each."""

    stages: int = 4
    leaves: int = 1
    together: int = 16  # row tiles that walk through the outputs together, for the L2 cache


# --- parts --------------------------------------------------------------------------------------------------
@gluon.jit
def _place(tile, row_tiles, N, TOGETHER: gl.constexpr):
    """(row tile, first output) of a tile: bands of row tiles, in a band outputs by outputs."""
    n_tiles = gl.cdiv(N, WIDE)
    band = tile // (TOGETHER * n_tiles)
    height = gl.maximum(gl.minimum(row_tiles - band * TOGETHER, TOGETHER), 1)
    inside = tile % (TOGETHER * n_tiles)
    return band * TOGETHER + inside % height, inside // height * WIDE


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _send(a, b, a_smem, b_smem, full, stage, m, w_row, g, pred, PARTS: gl.constexpr):
    """Send for a group of channels of a tile: activations in so many parts, weights in two."""
    bar = full.index(stage)
    mbarrier.expect(bar, BYTES, pred=pred)
    for i in gl.static_range(PARTS):
        row = m * GROUP + i * (GROUP // PARTS)
        read(a, [row, g * GROUP], bar, a_smem.index(PARTS * stage + i), pred=pred)
    for i in gl.static_range(2):
        read(b, [w_row + i * GROUP, g * GROUP], bar, b_smem.index(2 * stage + i), pred=pred)


@gluon.jit
def _expert(tile_expert, m, rows, R):
    """The expert of a row tile, a copy for each row.

    What the compiler knows to be the same in all lanes it moves to a uniform register, and the move waits for
    the load: in each group of channels, since the weight's scales are found by this. So it must not know that
    this quotient is zero.
    """
    return gl.load(tile_expert + m + rows // (R + 1))


@gluon.jit
def _scales_at(a_scale, b_scale, first, n, e, groups, scale_rows, rows):
    """Where the first group's scales lie: of rows from `first`, and of both steps' outputs from n."""
    block = gl.minimum(n // GROUP, scale_rows - 1)
    more = gl.minimum(block + 1, scale_rows - 1) - block  # past the edge nothing is stored
    at = b_scale + (e * scale_rows + block).to(gl.int64) * groups
    return a_scale + first + rows, at, at + more * groups


@gluon.jit
def _scales(a_at, b_at_0, b_at_1, g, R, groups):
    """Scales of a group of channels, past the end the last's: of the rows, of both steps' outputs."""
    g = gl.minimum(g, groups - 1)
    return gl.load(a_at + g * R), gl.load(b_at_0 + g), gl.load(b_at_1 + g)


@gluon.jit
def _leave(acc, c, c_smem, row, n):
    """Send a step's sums out, through shared memory."""
    c_smem.store(acc.to(c.dtype))
    fence_async_shared()
    barrier()
    write(c, [row, n], c_smem)


@gluon.jit
def _leave_both(acc_0, acc_1, c, c_smem, row, n, LEAVES: gl.constexpr):
    """Send a tile's sums out; earlier ones have left shared memory first."""
    tma.store_wait(0)
    barrier()
    _leave(acc_0, c, c_smem.index(0), row, n)
    if LEAVES == 1:
        tma.store_wait(0)
        barrier()
    _leave(acc_1, c, c_smem.index(LEAVES - 1), row, n + GROUP)


# --- roles --------------------------------------------------------------------------------------------------
@gluon.jit
def _produce(
    a, b, a_smem, b_smem, full, empty, tile_expert, used, N, groups,
    STAGES: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """The loading warp: fills stages in turn, each as soon as both warp groups have left it."""
    row_tiles = gl.load(used)
    stage = 0
    phase = 1  # the phase before the first counts as complete: at the start all stages are free
    for tile in range(gl.program_id(0), row_tiles * gl.cdiv(N, WIDE), gl.num_programs(0)):
        m, n = _place(tile, row_tiles, N, TOGETHER)
        w_row = gl.load(tile_expert + m) * N + n
        for g in range(groups):
            mbarrier.wait(empty.index(stage), phase)
            _send(a, b, a_smem, b_smem, full, stage, m, w_row, g, True, 2)
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _consume(
    a_smem, b_smem, full, empty, c, c_smem, a_scale, b_scale, tile_expert, used, N, R, groups, scale_rows,
    WHICH: gl.constexpr, STAGES: gl.constexpr, LEAVES: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """A warp group: its 64 rows of each tile.

    A wait that names sums just made keeps the compiler from making them later: both steps' products at once,
    beside the sums, are more than the registers hold. Therefore, too, both steps' products are one variable.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    rows = gl.arange(0, GROUP // 2, gl.SliceLayout(1, mma))
    row_tiles = gl.load(used)
    tiles = row_tiles * gl.cdiv(N, WIDE)
    stage = 0
    phase = 0
    part = gl.full([GROUP // 2, GROUP], 0.0, gl.float32, mma)
    m, n = _place(gl.minimum(gl.program_id(0), gl.maximum(tiles - 1, 0)), row_tiles, N, TOGETHER)
    first = m * GROUP + WHICH * (GROUP // 2)
    e = _expert(tile_expert, m, rows, R)
    a_at, b_at_0, b_at_1 = _scales_at(a_scale, b_scale, first, n, e, groups, scale_rows, rows)
    sa, sb_0, sb_1 = _scales(a_at, b_at_0, b_at_1, 0, R, groups)
    next_a, next_0, next_1 = _scales(a_at, b_at_0, b_at_1, 1, R, groups)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, next_n = _place(gl.minimum(tile + gl.num_programs(0), tiles - 1), row_tiles, N, TOGETHER)
        e = _expert(tile_expert, m, rows, R)  # of the next tile, on its way all through this one
        acc_0 = gl.full([GROUP // 2, GROUP], 0.0, gl.float32, mma)
        acc_1 = gl.full([GROUP // 2, GROUP], 0.0, gl.float32, mma)
        for g in range(groups):
            mbarrier.wait(full.index(stage), phase)
            x = a_smem.index(2 * stage + WHICH)
            w = b_smem.index(2 * stage).permute((1, 0))
            part = warpgroup_mma(x, w, part, use_acc=False, is_async=True)
            scale_0 = sa * sb_0
            scale_1 = sa * sb_1
            sa, sb_0, sb_1 = next_a, next_0, next_1
            next_a, next_0, next_1 = _scales(a_at, b_at_0, b_at_1, g + 2, R, groups)
            part = warpgroup_mma_wait(0, deps=(part,))
            acc_0 = warpgroup_mma_wait(0, deps=(acc_0 + part * scale_0[:, None],))
            w = b_smem.index(2 * stage + 1).permute((1, 0))
            part = warpgroup_mma(x, w, part, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            barrier()  # all four warps are done with this stage
            mbarrier.arrive(empty.index(stage), count=1)
            acc_1 = warpgroup_mma_wait(0, deps=(acc_1 + part * scale_1[:, None],))
            stage, phase = _next(stage, phase, STAGES)
        row, out = first, n
        first = m * GROUP + WHICH * (GROUP // 2)
        n = next_n
        a_at, b_at_0, b_at_1 = _scales_at(a_scale, b_scale, first, n, e, groups, scale_rows, rows)
        sa, sb_0, sb_1 = _scales(a_at, b_at_0, b_at_1, 0, R, groups)
        next_a, next_0, next_1 = _scales(a_at, b_at_0, b_at_1, 1, R, groups)
        _leave_both(acc_0, acc_1, c, c_smem, row, out, LEAVES)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["groups", "scale_rows"])
def _grouped_kernel(
    a, b, c, a_scale, b_scale, tile_expert, used, N, R, groups, scale_rows,
    STAGES: gl.constexpr, LEAVES: gl.constexpr, TOGETHER: gl.constexpr,
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
    gl.warp_specialize(
        [
            (_consume, (a_smem, b_smem, full, empty, c, c_0, a_scale, b_scale, tile_expert, used, N, R,
                        groups, scale_rows, 0, STAGES, LEAVES, TOGETHER)),
            (_consume, (a_smem, b_smem, full, empty, c, c_1, a_scale, b_scale, tile_expert, used, N, R,
                        groups, scale_rows, 1, STAGES, LEAVES, TOGETHER)),
            (_produce, (a, b, a_smem, b_smem, full, empty, tile_expert, used, N, groups, STAGES, TOGETHER)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


# --- the call -----------------------------------------------------------------------------------------------
def wants(q_RK: Tensor, weight_ENK: Packed, dtype: torch.dtype) -> bool:
    """Whether it does: BF16 out, whole tiles, a scale for each 128 × 128, on Hopper and nothing later."""
    K, N = q_RK.shape[1], weight_ENK.shape[-2]
    fits = weight_ENK.rows == 128 and K % 128 == 0 and N % 256 == 0
    return fits and dtype == torch.bfloat16 and on_hopper(q_RK.device)


def grouped_matmul(
    q_RK: Tensor, scale_GR: Tensor, weight_ENK: Packed, tile_expert: Tensor, used: Tensor,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`hadal.ops.triton.fp8.grouped_matmul` in BF16, for weights with a scale for each 128 × 128."""
    (R, K), N = q_RK.shape, weight_ENK.shape[-2]
    if R % 128 or K % 16 or N % 16 or weight_ENK.rows != 128:  # what lies past an edge is read as 0
        raise ValueError(
            f"{R} rows × {K} inputs × {N} outputs, blocks of {weight_ENK.rows} outputs: need multiples of "
            "128, 16 and 16, blocks of 128"
        )
    config = config or Config()
    out = torch.empty((R, N), dtype=torch.bfloat16, device=q_RK.device)
    codes = gl.NVMMASharedLayout(128, 8, 2)
    _grouped_kernel[(_programs(q_RK.device),)](
        TensorDescriptor.from_tensor(q_RK, [64, 128], codes),
        TensorDescriptor.from_tensor(weight_ENK.codes.view(-1, K), [128, 128], codes),
        TensorDescriptor.from_tensor(out, [64, 128], gl.NVMMASharedLayout(128, 16, 2)),
        scale_GR, weight_ENK.scale, tile_expert, used, N, R, weight_ENK.scale.shape[-1],
        weight_ENK.scale.shape[-2], STAGES=config.stages, LEAVES=config.leaves, TOGETHER=config.together,
        num_warps=4,
    )  # fmt: skip
    return out
