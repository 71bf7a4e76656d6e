"""The likeliest token of each row of logits in one launch. Reference: greedy rows in `hadal.ops.sampling`.

A program takes a chunk of a row; the row's last program merges the chunks. A row whose largest logit is not
finite, or that holds a NaN, gives FAILED. Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hadal.ops.triton import pdl
from hadal.ops.triton.arrivals import MOST, counters
from hadal.ops.triton.sizes import ceil_div, power_of_2

CHUNK = 4096
FAILED = tl.constexpr(-1)
_NOTHING = tl.constexpr(1 << 30)


@triton.jit
def _argmax_kernel(
    logit, out, best, place, arrived, vocabulary, stride, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pdl.begin(PDL)
    pdl.wait(PDL)
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logit + row * stride + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    peak = tl.max(value, 0)
    # NaN compares with nothing: it is marked by an infinity, which fails the row just as well
    peak = tl.where(tl.max((value != value).to(tl.int32), 0) > 0, float("inf"), peak)
    first = tl.min(tl.where(value == peak, token, _NOTHING), 0)
    at = row * chunks + tl.program_id(0)
    tl.store(best + at, peak)
    tl.store(place + at, first)
    tl.debug_barrier()  # both are written before the program says so
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == chunks - 1:
        tl.store(arrived + row, 0)  # for the next launch
        c = tl.arange(0, CHUNKS)
        each = tl.load(best + row * chunks + c, mask=c < chunks, other=float("-inf"), cache_modifier=".cg")
        where = tl.load(place + row * chunks + c, mask=c < chunks, other=_NOTHING, cache_modifier=".cg")
        top = tl.max(each, 0)
        chosen = tl.min(tl.where(each == top, where, _NOTHING), 0)
        finite = (top < float("inf")) & (top > float("-inf"))
        tl.store(out + row, tl.where(finite, chosen, FAILED).to(tl.int64))


def wants(logits_BV: Tensor) -> bool:
    """Whether `argmax` takes these."""
    return 0 < logits_BV.shape[0] <= MOST and logits_BV.stride(1) == 1


def argmax(logits_BV: Tensor) -> Tensor:
    """int64 [B]: the smallest index of the largest logit, or FAILED."""
    B, V = logits_BV.shape
    chunks = ceil_div(V, CHUNK)
    out = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    best = torch.empty((B, chunks), dtype=torch.float32, device=logits_BV.device)
    place = torch.empty((B, chunks), dtype=torch.int32, device=logits_BV.device)
    _argmax_kernel[(chunks, B)](
        logits_BV, out, best, place, counters(logits_BV.device), V, logits_BV.stride(0), chunks, CHUNK=CHUNK,
        CHUNKS=power_of_2(chunks), num_warps=4, **pdl.options(logits_BV),
    )  # fmt: skip
    return out
