"""Causal attention on a flat stream: every sequence attends to its own keys, aligned at the end.

Query i of a sequence with Q queries and N keys sees keys 0 … N − Q + i (a cached prefix comes first).
    out = softmax(q·kᵀ · scale)·v        softmax in FP32
Legend: T query tokens, N key tokens, H heads, G key/value heads, C key width, V value width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from hadal.ops.dispatch import forced_reference, needs_grad, use_triton
from hadal.ops.heads import mla_heads, rotate_queries
from hadal.ops.kept import kept
from hadal.ops.recompute import recomputed

BATCHED = 64  # tokens: on a CPU, sequences up to this length share a call with others about as long


class Spans(NamedTuple):
    """Sequences whose lengths the host does not know, as a CUDA graph wants them: offsets in a tensor of
    fixed size. Sequences of length 0 at the end fill it up."""

    start_S: Tensor  # int32 [S + 1]; the last is T
    longest: int  # at most so many tokens in each

    def lengths(self) -> list[int]:
        """Those of the sequences that are not empty, on the host (which waits for the device)."""
        return [n for n in self.start_S.diff().tolist() if n]


def attention_reference(
    q_THC: Tensor, k_NGC: Tensor, v_NGV: Tensor, q_len: Sequence[int], k_len: Sequence[int], scale: float
) -> Tensor:
    """One sequence at a time, scores materialised in FP32 (FP64 for FP64 inputs)."""
    out, t, n = [], 0, 0
    repeat = q_THC.shape[1] // k_NGC.shape[1]
    for Q, N in zip(q_len, k_len, strict=True):
        map_HQN = _map(q_THC[t : t + Q], k_NGC[n : n + N], scale)
        v = v_NGV[n : n + N].transpose(0, 1).repeat_interleave(repeat, 0)
        out.append((map_HQN @ v.to(map_HQN.dtype)).to(q_THC.dtype).transpose(0, 1))
        t, n = t + Q, n + N
    return torch.cat(out)


def attention_maps(q_THC: Tensor, k_TGC: Tensor, lengths: Sequence[int], scale: float) -> list[Tensor]:
    """softmax(q·kᵀ · scale) of each sequence, [H, n, n] in FP32: what the fused forms never hold."""
    pieces = zip(q_THC.split(list(lengths)), k_TGC.split(list(lengths)), strict=True)
    return [_map(q, k, scale) for q, k in pieces]


def _map(q_QHC: Tensor, k_NGC: Tensor, scale: float) -> Tensor:
    """[H, Q, N]; a row sums to one."""
    wide = torch.promote_types(q_QHC.dtype, torch.float32)
    q = q_QHC.transpose(0, 1).to(wide)
    k = k_NGC.transpose(0, 1).repeat_interleave(q_QHC.shape[1] // k_NGC.shape[1], 0).to(wide)
    score = (q @ k.transpose(1, 2)) * scale
    hidden = ~_visible(q.shape[1], k.shape[1], q.device)
    return score.masked_fill(hidden, float("-inf")).softmax(-1)


def _visible(queries: int, keys: int, device: torch.device) -> Tensor:
    """Mask [Q, N], True where query i sees key j: j ≤ N − Q + i."""
    row = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    return torch.arange(keys, device=device).unsqueeze(0) <= row


def attention(
    q_THC: Tensor, k_NGC: Tensor, v_NGV: Tensor, q_len: Sequence[int], k_len: Sequence[int], scale: float
) -> Tensor:
    """Causal attention of every sequence, [T, H, V]. Lengths are host integers; Σ q_len = T, Σ k_len = N."""
    if forced_reference() or q_THC.dtype == torch.float64:
        return attention_reference(q_THC, k_NGC, v_NGV, q_len, k_len, scale)
    if use_triton(q_THC, k_NGC, v_NGV):
        from hadal.ops.triton import flash

        if flash.wants(q_THC, v_NGV):
            return flash.attention(q_THC, k_NGC, v_NGV, q_len, k_len, scale)
    alike = len(set(q_len)) == 1 and len(set(k_len)) == 1
    masked = alike and q_len[0] not in (1, k_len[0])  # behind a prefix: a mask in memory, and all of its work
    if alike and not (masked and varlen_available(q_THC)):
        return _uniform(q_THC, k_NGC, v_NGV, len(q_len), scale)
    if varlen_available(q_THC):
        starts = _starts(tuple(q_len), q_THC.device), _starts(tuple(k_len), q_THC.device)
        return _varlen(q_THC, k_NGC, v_NGV, starts, (max(q_len), max(k_len)), scale)
    q_len, k_len = list(q_len), list(k_len)
    if q_len == k_len and q_THC.device.type == "cpu" and 4 * len(_batches(tuple(q_len))[1]) <= len(q_len):
        return _batched(q_THC, k_NGC, v_NGV, tuple(q_len), scale)
    pieces = zip(q_THC.split(q_len), k_NGC.split(k_len), v_NGV.split(k_len), strict=True)
    # split, since the gradient of every slice is as large as the stream
    return torch.cat([_uniform(q, k, v, 1, scale) for q, k, v in pieces])


def self_attention(
    q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor, spans: Sequence[int] | Spans, scale: float
) -> Tensor:
    """`attention` of sequences that see themselves alone, [T, H, V]; their lengths may lie on the device."""
    if not isinstance(spans, Spans):
        return attention(q_THC, k_TGC, v_TGV, spans, spans, scale)
    if not varlen_available(q_THC):
        lengths = spans.lengths()
        return attention(q_THC, k_TGC, v_TGV, lengths, lengths, scale)
    starts = (spans.start_S, spans.start_S)
    return _varlen(q_THC, k_TGC, v_TGV, starts, (spans.longest, spans.longest), scale)


def value_width(q_THC: Tensor, spans: Sequence[int] | Spans, width: int) -> int:
    """In what width `self_attention` takes values of `width` without copying them: the kernel for sequences
    of several lengths wants that of the keys, the columns behind the values zero."""
    several = isinstance(spans, Spans) or len(set(spans)) > 1
    return q_THC.shape[2] if several and varlen_available(q_THC) else width


def mla_attention(
    q_THC: Tensor, rotation_T2r: Tensor, kv_NHw: Tensor, rope_NR: Tensor, q_len: Sequence[int],
    k_len: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """`attention` in MLA's expanded form, from what `hadal.ops.heads.mla_heads` takes; [T, H, V]. The queries
    may be overwritten."""
    nope = q_THC.shape[2] - rope_NR.shape[1]
    if use_triton(q_THC, kv_NHw, rope_NR):
        from hadal.ops.triton import flash

        k_NHn, v_NHv = kv_NHw[..., :nope], kv_NHw[..., nope:]
        if flash.wants(q_THC, v_NHv):  # keys need not be put together
            q_THC = rotate_queries(q_THC, rotation_T2r, nope)
            return flash.attention(q_THC, k_NHn, v_NHv, q_len, k_len, scale, rope_NR)
    return attention(*mla_heads(q_THC, rotation_T2r, kv_NHw, rope_NR), q_len, k_len, scale)


def _uniform(q_THC: Tensor, k_NGC: Tensor, v_NGV: Tensor, sequences: int, scale: float) -> Tensor:
    """Sequences of equal lengths as one batch through torch's fused attention."""
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q_THC, k_NGC, v_NGV))
    queries, keys, width_V = q.shape[2], k.shape[2], v.shape[3]
    if queries == keys > 1 and needs_grad(q, k, v) and q.is_cuda and _cudnn_trains(*_kind(q, k, v)):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out.transpose(1, 2).flatten(0, 1)
    if width_V < q.shape[3]:  # flash kernels want equal widths; zero columns add nothing
        v = recomputed("up", pad, v, (0, q.shape[3] - width_V))
    mask = None if queries in (1, keys) else _visible(queries, keys, q.device)
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        is_causal=queries == keys and queries > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1)[..., :width_V]


def _batched(q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """Sequences that see themselves alone, similar lengths as one batch with zeros at their ends: no query
    sees a key behind it, so that they change nothing. Many short ones are bound by the calls, not by the
    work; from about four a batch on, that outweighs the copies."""
    slot_T, batches = _batches(lengths)
    sizes = [sequences * longest for sequences, longest in batches]
    padded = [x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, slot_T, x).split(sizes)
              for x in (q_THC, k_TGC, v_TGV)]  # fmt: skip
    out = [_uniform(q, k, v, n, scale) for (n, _), q, k, v in zip(batches, *padded, strict=True)]
    return torch.cat(out).index_select(0, slot_T)


@functools.lru_cache(maxsize=64)
def _batches(lengths: tuple[int, ...]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Batches (sequences, longest): lengths up to BATCHED within a factor of two, longer ones alone; and the
    place of each token in them, one after another [T]."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, length in enumerate(lengths):
        if not length:
            continue
        key = (length.bit_length(), -1 if length <= BATCHED else number)
        groups.setdefault(key, []).append(number)
    first, base, batches = [0] * len(lengths), 0, []
    for members in groups.values():
        longest = max(lengths[number] for number in members)
        batches.append((len(members), longest))
        for place, number in enumerate(members):
            first[number] = base + place * longest
        base += len(members) * longest
    with torch.inference_mode(False):  # kept, and wanted by gradients as well
        slots = [torch.arange(at, at + length) for at, length in zip(first, lengths, strict=True)]
        return torch.cat(slots), batches


def _kind(q: Tensor, k: Tensor, v: Tensor) -> tuple[torch.device, torch.dtype, int, int, int, int, int]:
    return q.device, q.dtype, q.shape[2], q.shape[1], k.shape[1], q.shape[3], v.shape[3]


@functools.cache
def _cudnn_trains(
    device: torch.device, dtype: torch.dtype, length: int, heads: int, groups: int, width: int, width_V: int
) -> bool:
    """Whether cuDNN takes these heads forward and backward, by trying. On Hopper its attention is up to twice
    as fast as torch's own (FlashAttention 2), and takes values narrower than keys as they are. It is planned
    for each shape: rows of one length plan once."""
    if torch.cuda.get_device_capability(device)[0] != 9 or dtype not in (torch.bfloat16, torch.float16):
        return False
    shapes = ((heads, width), (groups, width), (groups, width_V))
    q, k, v = (
        torch.zeros(1, n, length, w, device=device, dtype=dtype, requires_grad=True) for n, w in shapes
    )
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    except RuntimeError:  # "No available kernel", or no plan: torch's own then
        return False
    return True


@functools.cache
def _varlen_function() -> tuple[Any, frozenset[str]] | None:
    """torch's variable-length flash attention and its parameter names (they differ between 2.10 and 2.13)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def varlen_available(q: Tensor) -> bool:
    found = _varlen_function()
    half = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0
    return q.is_cuda and half and found is not None and "scale" in found[1]


def _varlen(
    q_THC: Tensor, k_NGC: Tensor, v_NGV: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int],
    scale: float,
) -> Tensor:  # fmt: skip
    found = _varlen_function()
    assert found is not None  # `varlen_available` looked
    function, names = found
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    if "enable_gqa" in names:
        options["enable_gqa"] = q_THC.shape[1] != k_NGC.shape[1]
    elif q_THC.shape[1] != k_NGC.shape[1]:
        repeat = q_THC.shape[1] // k_NGC.shape[1]
        k_NGC, v_NGV = k_NGC.repeat_interleave(repeat, 1), v_NGV.repeat_interleave(repeat, 1)
    width_V = v_NGV.shape[2]
    if width_V < q_THC.shape[2]:  # flash kernels want equal widths; zero columns add nothing
        v_NGV = recomputed("up", pad, v_NGV, (0, q_THC.shape[2] - width_V))
    q_start, k_start = (kept(start) for start in starts)
    q, k, v = q_THC.contiguous(), k_NGC.contiguous(), v_NGV.contiguous()
    out: Tensor = function(q, k, v, q_start, k_start, *longest, scale=scale, **options)
    return out[..., :width_V]


@functools.lru_cache(maxsize=64)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Offsets 0, l₀, l₀ + l₁, … as int32; the same for every layer of a step, so kept."""
    start = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if device.type == "cuda":  # from pinned memory: the host does not wait for the device
        start = start.pin_memory()
    return start.to(device, non_blocking=True)
