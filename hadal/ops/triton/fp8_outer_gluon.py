"""The gradients of experts' weights in FP8 (dyᵀ·x, 128 tokens after 128) in Gluon, for Hopper.

    dW_e[n, k] (+)= Σ_t sa[t, n] · sb[t, k] · Σ_{i in t} qa[n, i] · qb[k, i]      t: its tiles of 128 rows

The design of fp8_gluon.py, whose parts these are: two warp groups of 64 rows, a tile of 128 × 256 in two
steps, one multiplying while the other applies scales, a warp that loads. Here both sides have a scale for
each row and tile, so many that a thread cannot hold the next ones while it sums: they come through shared
memory with the codes they belong to. The sums of a tile run over its expert's tokens, from none to many, and
gradients of experts lie one below another. The copy engine adds them to what lies there, where they are
summed over passes: no thread waits for the old values. Reference: `hadal.ops.fp8_tiles.outer`. Legend: as
there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
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
from hadal.ops.triton.fp8_gluon import BYTES, GROUP, WIDE, _next, barrier, read, write

STAGES = 3  # loads ahead, 49.5 KiB each; a step on its way out takes up to 32 KiB of each warp group
SCALE_BYTES = gl.constexpr(3 * 128 * 4)  # of a stage, beside its codes


@_core.builtin
def _add_3_6(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """`tma.async_atomic_add`, which Triton 3.6 has under no name of its own."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _add_3_6


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
def _produce(
    a, b, a_scale, b_scale, a_smem, b_smem, sa_smem, sb_smem, full, empty, end, tiles, N, K,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: fills stages in turn, each as soon as both warp groups have left it."""
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _e, n, k, first, last = _place(tile, end, N, K)
        for t in range(first, last):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES + SCALE_BYTES)
            for i in gl.static_range(2):
                row = n + i * (GROUP // 2)
                read(a, [row, t * GROUP], bar, a_smem.index(2 * stage + i))
                read(a_scale, [t, row], bar, sa_smem.index(2 * stage + i))
            for i in gl.static_range(2):
                column = k + i * GROUP
                read(b, [column, t * GROUP], bar, b_smem.index(2 * stage + i))
                read(b_scale, [t, column], bar, sb_smem.index(2 * stage + i))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _leave(acc, c, c_smem, row, n, ADD: gl.constexpr):
    """Send a step's sums out, through shared memory, which earlier ones have left first."""
    tma.store_wait(0)
    barrier()
    c_smem.store(acc.to(c.dtype))
    fence_async_shared()
    barrier()
    if ADD:
        add(c, [row, n], c_smem)
    else:
        write(c, [row, n], c_smem)


@gluon.jit
def _consume(
    a_smem, b_smem, sa_smem, sb_smem, full, empty, c, c_smem, end, tiles, N, K,
    WHICH: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """A warp group: its 64 rows of each tile. See fp8_gluon.py for the waits that name sums."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    stage = 0
    phase = 0
    part = gl.full([GROUP // 2, GROUP], 0.0, gl.float32, mma)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        e, n, k, first, last = _place(tile, end, N, K)
        acc_0 = gl.full([GROUP // 2, GROUP], 0.0, gl.float32, mma)
        acc_1 = gl.full([GROUP // 2, GROUP], 0.0, gl.float32, mma)
        for _t in range(first, last):
            mbarrier.wait(full.index(stage), phase)
            x = a_smem.index(2 * stage + WHICH)
            w = b_smem.index(2 * stage).permute((1, 0))
            part = warpgroup_mma(x, w, part, use_acc=False, is_async=True)
            sa = sa_smem.index(2 * stage + WHICH).permute((1, 0)).load(mma)
            sb = sb_smem.index(2 * stage).load(mma)
            part = warpgroup_mma_wait(0, deps=(part,))
            acc_0 = warpgroup_mma_wait(0, deps=(acc_0 + part * sb * sa,))
            w = b_smem.index(2 * stage + 1).permute((1, 0))
            part = warpgroup_mma(x, w, part, use_acc=False, is_async=True)
            sb = sb_smem.index(2 * stage + 1).load(mma)
            part = warpgroup_mma_wait(0, deps=(part,))
            barrier()  # all four warps are done with this stage, and have its scales
            mbarrier.arrive(empty.index(stage), count=1)
            acc_1 = warpgroup_mma_wait(0, deps=(acc_1 + part * sb * sa,))
            stage, phase = _next(stage, phase, STAGES)
        row = e * N + n + WHICH * (GROUP // 2)
        _leave(acc_0, c, c_smem, row, k, ADD)
        _leave(acc_1, c, c_smem, row, k + GROUP, ADD)
    tma.store_wait(0)


@gluon.jit
def _outer_kernel(
    a, b, c, a_scale, b_scale, end, N, K, n_experts, STAGES: gl.constexpr, ADD: gl.constexpr
):  # fmt: skip
    a_smem = gl.allocate_shared_memory(a.dtype, [2 * STAGES, GROUP // 2, GROUP], a.layout)
    b_smem = gl.allocate_shared_memory(b.dtype, [2 * STAGES, GROUP, GROUP], b.layout)
    sa_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, GROUP // 2], a_scale.layout)
    sb_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, GROUP], b_scale.layout)
    c_0 = gl.allocate_shared_memory(c.dtype, [GROUP // 2, GROUP], c.layout)
    c_1 = gl.allocate_shared_memory(c.dtype, [GROUP // 2, GROUP], c.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)  # both warp groups
    fence_async_shared()
    tiles = n_experts * gl.cdiv(N, GROUP) * gl.cdiv(K, WIDE)
    gl.warp_specialize(
        [
            (_consume, (a_smem, b_smem, sa_smem, sb_smem, full, empty, c, c_0, end, tiles, N, K, 0, STAGES,
                        ADD)),
            (_consume, (a_smem, b_smem, sa_smem, sb_smem, full, empty, c, c_1, end, tiles, N, K, 1, STAGES,
                        ADD)),
            (_produce, (a, b, a_scale, b_scale, a_smem, b_smem, sa_smem, sb_smem, full, empty, end, tiles, N,
                        K, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def outer(a: Codes, b: Codes, rows: Rows, into: Tensor | None = None, more: bool = False) -> Tensor:
    """[E, N, K] of two transposes [N, R] and [K, R]; N and K multiples of 128. In BF16, or written to `into`,
    BF16 or FP32, or with `more` added to what lies there."""
    (N, R), K, n_experts = a.q.shape, b.q.shape[0], rows.end_E.numel()
    if N % 128 or K % 128 or R % 128:
        raise ValueError(f"{N} outputs × {K} inputs × {R} rows: need multiples of 128")
    if into is None:
        into = torch.empty((n_experts, N, K), dtype=torch.bfloat16, device=a.q.device)
    if into.shape != (n_experts, N, K) or not into.is_contiguous() or into.data_ptr() % 16:
        raise ValueError(
            f"cannot sum in {list(into.shape)} with strides {into.stride()} at {into.data_ptr():#x}: need "
            f"{[n_experts, N, K]}, contiguous, at a multiple of 16 bytes"
        )
    codes, scales = gl.NVMMASharedLayout(128, 8, 2), gl.NVMMASharedLayout(0, 32, 2)
    sums = gl.NVMMASharedLayout(128, 8 * into.element_size(), 2)
    _outer_kernel[(_programs(a.q.device),)](
        TensorDescriptor.from_tensor(a.q, [64, 128], codes),
        TensorDescriptor.from_tensor(b.q, [128, 128], codes),
        TensorDescriptor.from_tensor(into.view(-1, K), [64, 128], sums),
        TensorDescriptor.from_tensor(a.scale, [1, 64], scales),
        TensorDescriptor.from_tensor(b.scale, [1, 128], scales),
        rows.end_E, N, K, n_experts, STAGES=STAGES, ADD=more, num_warps=4,
    )  # fmt: skip
    return into
