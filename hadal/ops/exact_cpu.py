"""The exact kernels of `csrc/exact.cpp` through ctypes; see hadal/ops/invariant.py for what each computes.

Built and cached as those of hadal/ops/cpu.py, but with flags that leave sums in their written order.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hadal.config import Moe
from hadal.ops import cpu

if TYPE_CHECKING:
    from hadal.ops.invariant import Stream

SOURCE = cpu.SOURCE.with_name("exact.cpp")
# No reassociation, no reciprocals, no contraction: FMAs are written where they are wanted.
FLAGS = [
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-std=c++17",
]


@functools.cache
def status() -> tuple[Any, str]:
    """(library or None, why). Builds it if it is not in the cache."""
    return cpu.load_library(SOURCE, FLAGS)


def set_threads(threads: int) -> None:
    """How many threads share the work; the results are the same for any number."""
    status()[0].set_threads(threads)


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    function = getattr(status()[0], f"{name}_{'f32' if dtype == torch.float32 else 'bf16'}")
    p, n, i, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    function.restype = None
    function.argtypes = {
        "linear": [p] * 4 + [n] * 4 + [i],
        "rms_norm": [p] * 3 + [n] * 3 + [f],
        "rotate": [p] * 3 + [n] * 5 + [i],
        "latent": [p] * 4 + [n] * 4 + [f],
        "swiglu": [p] * 2 + [n] * 2,
        "gate": [p] * 6 + [n] * 6 + [i] * 3 + [f],
        "experts": [p] * 6 + [n] * 5,
        "mla": [p] * 8 + [n] * 9 + [f],
        "gqa": [p] * 6 + [n] * 8 + [f],
        "logsumexp": [p] * 2 + [n] * 3,
    }[name]
    return function


def _rows(x: Tensor) -> Tensor:
    """x as a matrix whose rows are contiguous (they may be strided)."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, wide: bool) -> Tensor:
    """x·Wᵀ + b; FP32 whatever x is where `wide`."""
    rows, weight_OI = _rows(x), weight_OI.contiguous()
    outs, width = weight_OI.shape
    out = torch.empty((*x.shape[:-1], outs), dtype=torch.float32 if wide else x.dtype)
    bias = None if bias_O is None else bias_O.data_ptr()
    _function("linear", x.dtype)(
        rows.data_ptr(), weight_OI.data_ptr(), bias, out.data_ptr(),
        rows.shape[0], outs, width, rows.stride(0), int(wide),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension."""
    rows, out = _rows(x), x.new_empty(x.shape)
    _function("rms_norm", x.dtype)(
        rows.data_ptr(), weight.data_ptr(), out.data_ptr(), rows.shape[0], rows.shape[1], rows.stride(0), eps
    )
    return out


def rotate(x: Tensor, rotation_T2r: Tensor, interleaved: bool) -> Tensor:
    """Rotated copy of x [T, H, R] or [T, R]."""
    x_THR = x if x.dim() == 3 else x.unsqueeze(1)
    x_THR = x_THR if x_THR.stride(2) == 1 else x_THR.contiguous()
    (T, H, R), rotation, out = x_THR.shape, rotation_T2r.contiguous(), x.new_empty(x.shape)
    _function("rotate", x.dtype)(
        x_THR.data_ptr(), rotation.data_ptr(), out.data_ptr(), T, H, R // 2, x_THR.stride(0), x_THR.stride(1),
        int(interleaved),
    )  # fmt: skip
    return out


def latent_entry(kv_TC: Tensor, norm_L: Tensor, rotation_T2r: Tensor, eps: float) -> Tensor:
    """[RMSNorm(latent); rotated key] of each row."""
    kv_TC, rotation = _rows(kv_TC), rotation_T2r.contiguous()
    (T, C), rank = kv_TC.shape, norm_L.shape[0]
    out = kv_TC.new_empty((T, C))
    _function("latent", kv_TC.dtype)(
        kv_TC.data_ptr(), norm_L.data_ptr(), rotation.data_ptr(), out.data_ptr(), T, rank, (C - rank) // 2,
        kv_TC.stride(0), eps,
    )  # fmt: skip
    return out


def swiglu(x_T2I: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    x_T2I = x_T2I.contiguous()
    out = x_T2I.new_empty((x_T2I.shape[0], x_T2I.shape[1] // 2))
    _function("swiglu", x_T2I.dtype)(x_T2I.data_ptr(), out.data_ptr(), out.shape[0], out.shape[1])
    return out


def gate(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, moe: Moe) -> tuple[Tensor, Tensor, Tensor]:
    """(experts int64 [T, K], weights FP32 [T, K], scores FP32 [T, E])."""
    x_TD, (T, D) = x_TD.contiguous(), x_TD.shape
    E, K = moe.n_routed_experts, moe.num_experts_per_tok
    expert = torch.empty((T, K), dtype=torch.int64)
    weight, score = torch.empty((T, K)), torch.empty((T, E))
    _function("gate", x_TD.dtype)(
        x_TD.data_ptr(), weight_ED.data_ptr(), None if bias_E is None else bias_E.data_ptr(),
        expert.data_ptr(), weight.data_ptr(), score.data_ptr(), T, D, E, K, *cpu._gate_settings(moe),
    )  # fmt: skip
    return expert, weight, score


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor
) -> Tensor:
    """Σ_k weight_k · expert_k(x), k ascending."""
    x_TD, expert_TK, weight_TK = x_TD.contiguous(), expert_TK.contiguous(), weight_TK.contiguous()
    (T, K), (E, D, width), out = expert_TK.shape, down_EDI.shape, torch.empty_like(x_TD)
    _function("experts", x_TD.dtype)(
        x_TD.data_ptr(), expert_TK.data_ptr(), weight_TK.data_ptr(), gate_up_E2ID.data_ptr(),
        down_EDI.data_ptr(), out.data_ptr(), T, K, E, D, width,
    )  # fmt: skip
    return out


def _stream(stream: Stream) -> tuple[list[int | None], list[int]]:
    table = stream.table
    pointers = [stream.start.data_ptr(), stream.begin.data_ptr(), None if table is None else table.data_ptr()]
    return pointers, [stream.begin.shape[0], 0 if table is None else table.stride(0), stream.page_size]


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
    q_THw, rotation, (T, H, width) = q_THw.contiguous(), rotation_T2r.contiguous(), q_THw.shape
    rope = 2 * rotation.shape[2]
    nope = width - rope
    values = kv_b.shape[0] // H - nope
    out = q_THw.new_empty((T, H * values))
    pointers, sizes = _stream(stream)
    _function("mla", q_THw.dtype)(
        q_THw.data_ptr(), rotation.data_ptr(), entries.data_ptr(), kv_b.data_ptr(), out.data_ptr(),
        *pointers, *sizes, H, nope, rope, rank, values, H * width, scale,
    )  # fmt: skip
    return out


def gqa(q_THC: Tensor, entries: Tensor, stream: Stream, groups: int, scale: float) -> Tensor:
    """Attention of rotated queries over entries [.., 2, G, C]; [T, H, C]."""
    q_THC = q_THC if q_THC.stride(2) == 1 else q_THC.contiguous()
    (T, H, C), (pointers, sizes) = q_THC.shape, _stream(stream)
    out = q_THC.new_empty((T, H, C))
    _function("gqa", q_THC.dtype)(
        q_THC.data_ptr(), entries.data_ptr(), out.data_ptr(), *pointers, *sizes, H, groups, C,
        q_THC.stride(0), q_THC.stride(1), scale,
    )  # fmt: skip
    return out


def logsumexp(logits_BV: Tensor) -> Tensor:
    """log Σ exp of each row of FP32 logits."""
    rows = _rows(logits_BV)
    out = torch.empty(rows.shape[0])
    _function("logsumexp", torch.float32)(
        rows.data_ptr(), out.data_ptr(), rows.shape[0], rows.shape[1], rows.stride(0)
    )
    return out
