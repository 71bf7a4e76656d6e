"""Which path each operation takes on this machine, and why: the answer behind `hadal.ops.paths`.

The choice itself is made in `dispatch` and in the file of each operation; here it is put into words.
"""

from __future__ import annotations

import torch

from hadal.ops import attention, cpu, dispatch, exact, linear
from hadal.ops.gate import SMALL_T

Row = tuple[str, str, str]


def report(device: torch.device | None = None) -> list[Row]:
    """Rows for `device`, by default the one that a model is loaded on: CUDA where there is one."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        probe = torch.empty(1, device=device)
        rows = _cuda(dispatch.use_triton(probe)) if probe.is_cuda else _cpu(dispatch.use_cpu_kernels(probe))
    return [*rows, *_everywhere(device)]


def _cpu(fast: bool) -> list[Row]:
    library, built = cpu.status()
    if not fast:
        why = "HADAL_OPS=reference forces the references" if library else built
        names = ("linear layers", "routed experts", "gate", "norms", "rotary embedding")
        rows = [(name, "torch", why) for name in names]
        rows += [(f"{kind} decode", "torch, pages gathered", why) for kind in ("MLA", "GQA")]
        return [*rows, ("packed weights", "torch, dequantised for every product", why)]
    path = f"C++; BF16 beyond {linear.SMALL_M} rows torch" if linear.native_bf16() else "C++"
    return [
        ("linear layers", path, f"{built}; few rows stream the weights, many are panels of tokens"),
        ("routed experts", path, "reads only the chosen experts; a prompt's in one call"),
        ("gate", f"C++ to {SMALL_T} tokens, then torch", "one thread beats several torch operations"),
        ("norms", "C++", "the residual addition in the same pass"),
        ("rotary embedding", "C++", "in the layout of the checkpoint"),
        ("MLA decode", "C++, absorbed, paged", "reads the latent where it lies; a whole block in one call"),
        ("GQA decode", "C++, paged", "reads cached keys and values where they lie"),
        ("packed weights", "C++, codes in tiles", "integer dot products for INT8 and INT4; FP8 becomes FP32"),
    ]


def _cuda(fast: bool) -> list[Row]:
    grouped = "torch grouped products in BF16, expert by expert in FP32"
    if not fast:
        forced = dispatch.forced_reference()
        why = "HADAL_OPS=reference forces the references" if forced else "triton is not installed"
        rows = [("linear layers", "torch (cuBLAS)", why), ("routed experts", grouped, why)]
        rows += [(name, "torch", why) for name in ("gate", "norms", "rotary embedding")]
        rows += [(f"{kind} decode", "torch, pages gathered", why) for kind in ("MLA", "GQA")]
        return [*rows, ("packed weights", "torch, dequantised for every product", why)]
    from hadal.ops.triton.linear import MAX_ROWS

    few = f"Triton to {MAX_ROWS} rows in BF16, then torch (cuBLAS)"
    return [
        ("linear layers", few, "few rows: the weights are read once, at the memory's rate"),
        ("routed experts", f"Triton to 256 tokens, then {grouped}", "few tokens: one read of the weights"),
        ("gate", "Triton", "scores, groups and top-k in one kernel"),
        ("norms", "Triton", "the residual addition in the same kernel"),
        ("rotary embedding", "Triton", "one kernel for both pair layouts"),
        ("MLA decode", "Triton; many heads Gluon on Hopper", "context split over programs, merged after"),
        ("GQA decode", "Triton, paged", "context split over programs, merged by log-sum-exp"),
        (
            "packed weights",
            "Triton; many rows also torch, or Gluon on Hopper",
            "codes become numbers in registers; FP8 multiplies FP8",
        ),
    ]


def _everywhere(device: torch.device) -> list[Row]:
    cuda = device.type == "cuda"
    if dispatch.forced_reference():
        prefill = ("torch, scores in memory", "HADAL_OPS=reference forces the references")
    elif attention.varlen_available(torch.empty(1, dtype=torch.bfloat16, device=device)):
        prefill = ("torch varlen_attn in BF16, fused SDPA in FP32", "sequences of any lengths in one call")
    else:
        why = "this torch has no varlen_attn with a scale" if cuda else "torch's own CPU flash attention"
        prefill = ("torch fused SDPA, a sequence at a time", why)
    if cuda:
        fp8 = ("torch, in FP32", "only while loading; layers compute in the model's dtype")
        draw = ("torch, all rows at once", "nothing waits for the device")
    else:
        fp8 = ("torch, through FP16's bits", "torch converts FP16, not E4M3, with vector instructions")
        draw = ("numpy", "its argmax and sort beat torch's on a large vocabulary")
    missing = exact.unavailable(device, torch.bfloat16)
    path = "not here" if missing else "Triton, fixed tiles" if cuda else "C++, one order of sums"
    invariant = (path, missing or "a sequence has the same bits in any batch, trained or sampled")
    return [
        ("attention, prefill", *prefill),
        ("FP8 dequantisation", *fp8),
        ("sampling", *draw),
        ("with --exact", *invariant),
    ]
