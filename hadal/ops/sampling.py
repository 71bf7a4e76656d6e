"""From logits to tokens: penalties, bans, temperature, top-k, top-p, min-p, and one draw by inverse CDF.

For one row of logits l, in this order:
    repetition r   l_t ← l_t / r if l_t > 0 else l_t · r, for t in prompt or output   (CTRL, arXiv:1909.05858)
    frequency f,   l_t ← l_t − f · count_t − p · [count_t > 0], counted in the output (OpenAI API reference)
    presence p
    bias, bans     l_t ← l_t + b_t;  l_t ← −∞ where not allowed
    temperature T  l ← l / T;  at T = 0 the most likely token, and nothing below applies
    top-k          keep l_t ≥ the k-th largest
    top-p          keep π_t ≥ c, π = softmax(l), c the largest cut that keeps mass ≥ p (arXiv:1904.09751)
    min-p          keep π_t ≥ m · max π                                                (arXiv:2407.01082)

All three filters are cuts through the same order, and ties at a cut are kept: which tokens survive does not
depend on how a sort breaks ties. Then u ∈ [0, 1) picks the first token whose cumulative probability exceeds
u · mass. u comes from (seed, position in the sequence) through an integer hash, not from a generator with a
state: a seeded output is the same on every device, in every batch, and after preemption.

Log-probabilities are those of the *raw* logits (before all of the above), as OpenAI's API reports them. A row
whose largest logit is not finite (NaN, or everything banned) yields token −1: the caller fails that request.
Nothing here waits for the GPU. Legend: B rows, V vocabulary, N blocks of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from hadal.ops import invariant
from hadal.ops.dispatch import use_triton
from hadal.ops.exact import is_exact

Rows = npt.NDArray[np.float32]

FAILED = -1  # token of a row without a finite logit
_BLOCK = 128  # the CDF is built of block sums first; see `choose`
_BELOW_ONE = 1.0 - 2.0**-52
_MASK64 = 2**64 - 1
_WEYL = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, as in SplitMix64
_MUL1, _MUL2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


# --- random numbers ------------------------------------------------------------------------------------


def uniform_reference(seed: int, position: int, stream: int = 0) -> float:
    """u ∈ [0, 1) with 53 bits, of (seed, position): two rounds of SplitMix64 (Steele et al., OOPSLA 2014).
    `stream` > 0 gives further independent numbers for the same place (speculation needs an accept and a
    draw)."""
    x = _mix_reference((seed + (stream + 1) * _WEYL) & _MASK64)
    return (_mix_reference((x + position * _WEYL) & _MASK64) >> 11) * 2.0**-53


def _mix_reference(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MUL1) & _MASK64
    x = ((x ^ (x >> 27)) * _MUL2) & _MASK64
    return x ^ (x >> 31)


def uniform(seed_B: Tensor, position_B: Tensor, stream: int = 0) -> Tensor:
    """`uniform_reference` of int64 tensors, float64 [B], with the same bits on every device."""
    if seed_B.device.type == "cpu":
        return torch.from_numpy(_uniform_cpu(seed_B.numpy(), position_B.numpy(), stream))
    x = _mix(seed_B + _signed((stream + 1) * _WEYL))
    return _shift(_mix(x + position_B * _signed(_WEYL)), 11).double() * 2.0**-53


def _signed(constant: int) -> int:
    """The int64 with the bits of an unsigned constant; int64 products and sums wrap as unsigned ones do."""
    constant &= _MASK64
    return constant - 2**64 if constant >= 2**63 else constant


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _uniform_cpu(
    seed_B: npt.NDArray[np.int64], position_B: npt.NDArray[np.int64], stream: int
) -> npt.NDArray[np.float64]:
    """`uniform` in numpy, a third of torch's time for hundreds of numbers. Unsigned arrays wrap silently."""
    x = _mix_cpu(seed_B.view(np.uint64) + np.uint64((stream + 1) * _WEYL & _MASK64))
    x = _mix_cpu(x + position_B.view(np.uint64) * np.uint64(_WEYL)) >> np.uint64(11)
    return x.astype(np.float64) * np.float64(2.0**-53)


def _mix_cpu(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MUL1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MUL2)
    return x ^ (x >> np.uint64(31))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MUL1)
    x = (x ^ _shift(x, 27)) * _signed(_MUL2)
    return x ^ _shift(x, 31)


# --- changes to the logits ------------------------------------------------------------------------------


def penalize(
    logits_BV: Tensor,
    count_BV: Tensor,
    in_prompt_BV: Tensor,
    repetition_B: Tensor,
    frequency_B: Tensor,
    presence_B: Tensor,
) -> Tensor:
    """Logits after the three penalties. count: occurrences in the output; in_prompt: bool."""
    seen_BV = count_BV > 0
    r_B1 = repetition_B.unsqueeze(1)
    factor_BV = torch.where(logits_BV > 0, 1.0 / r_B1, r_B1)
    out_BV = torch.where(seen_BV | in_prompt_BV, logits_BV * factor_BV, logits_BV)
    return out_BV - frequency_B.unsqueeze(1) * count_BV - presence_B.unsqueeze(1) * seen_BV


def expand_bitmask(mask_NW: Tensor, vocab_size: int) -> Tensor:
    """bool [N, V] of int32 words [N, W]: bit i % 32 of word i // 32 allows token i; beyond the words,
    nothing."""
    bit = torch.arange(32, dtype=torch.int32, device=mask_NW.device)
    allowed_NV = ((mask_NW.unsqueeze(-1) >> bit) & 1).bool().flatten(1)[:, :vocab_size]
    return pad(allowed_NV, (0, vocab_size - allowed_NV.shape[1]))


# --- choosing -------------------------------------------------------------------------------------------


@dataclass
class Filters:
    """Settings of a batch, one value a row: on the host (the CPU path reads these), and as tensors on the
    device of the logits, where None says that no row uses the filter. Temperature 0 is greedy, top_k 0 and
    top_p 1 are off."""

    temperature: Sequence[float]
    top_k: Sequence[int]
    top_p: Sequence[float]
    min_p: Sequence[float]
    all_greedy: bool
    temperature_B: Tensor  # float32; 1 for greedy rows
    greedy_B: Tensor | None  # bool
    top_k_B: Tensor | None  # int64
    top_p_B: Tensor | None  # float32
    min_p_B: Tensor | None  # float32

    @classmethod
    def build(
        cls,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        device: torch.device | str,
    ) -> Filters:
        def tensor(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            host = torch.tensor(values, dtype=dtype)
            if torch.device(device).type == "cpu":
                return host
            return host.pin_memory().to(device, non_blocking=True)

        greedy = [t == 0 for t in temperature]
        drawn = [not g for g in greedy]
        use_k = any(k and d for k, d in zip(top_k, drawn, strict=True))
        use_p = any(p < 1 and d for p, d in zip(top_p, drawn, strict=True))
        use_m = any(m > 0 and d for m, d in zip(min_p, drawn, strict=True))
        return cls(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            all_greedy=all(greedy),
            temperature_B=tensor([t or 1.0 for t in temperature], torch.float32),
            greedy_B=tensor(greedy, torch.bool) if any(greedy) else None,
            top_k_B=tensor(top_k, torch.int64) if use_k else None,
            top_p_B=tensor(top_p, torch.float32) if use_p else None,
            min_p_B=tensor(min_p, torch.float32) if use_m else None,
        )


def sample(logits_BV: Tensor, filters: Filters, u_B: Tensor | None) -> Tensor:
    """One token a row, int64 [B]; FAILED where no logit is finite. u: float64 [B], unused when all are
    greedy."""
    if logits_BV.device.type == "cpu":
        return _sample_cpu(logits_BV, filters, u_B)
    return sample_tensors(logits_BV, filters, u_B)


def sample_tensors(logits_BV: Tensor, filters: Filters, u_B: Tensor | None) -> Tensor:
    """`sample` for all rows at once in tensor operations that never wait for the device."""
    if filters.all_greedy:
        if use_triton(logits_BV):
            from hadal.ops.triton import argmax as fast

            if fast.wants(logits_BV):
                return fast.argmax(logits_BV)
        token_B = logits_BV.argmax(-1)
        best_B = logits_BV.gather(1, token_B.unsqueeze(1)).squeeze(
            1
        )  # NaN if any logit is: argmax prefers NaN
        return token_B.where(best_B.isfinite(), FAILED)
    assert u_B is not None
    token_B = choose(filtered_probabilities(logits_BV, filters), u_B)
    if filters.greedy_B is not None:
        token_B = torch.where(filters.greedy_B, logits_BV.argmax(-1), token_B)
    return token_B.where(logits_BV.amax(-1).isfinite(), FAILED)


def _sample_cpu(logits_BV: Tensor, filters: Filters, u_B: Tensor | None) -> Tensor:
    """`sample` in numpy: for V = 129k, its argmax takes 15 µs where torch takes 350, its sort 1 ms where
    torch takes 15; for small V, a call costs a fraction of torch's."""
    l_BV = logits_BV.detach().numpy()
    best_B = l_BV.argmax(-1)
    top_B = l_BV[np.arange(len(best_B)), best_B]  # NaN if any logit is: argmax prefers NaN
    if not filters.all_greedy:
        assert u_B is not None
        with np.errstate(invalid="ignore"):  # in rows that failed
            weight_BV = _weights_cpu(l_BV - top_B[:, None], filters)
            token_B = _choose_cpu(weight_BV, u_B.numpy())
        best_B = np.where([t == 0 for t in filters.temperature], best_B, token_B)
    best_B[~np.isfinite(top_B)] = FAILED
    return torch.from_numpy(best_B)


def _weights_cpu(x_BV: Rows, filters: Filters) -> Rows:
    """exp(x / T) of rows whose largest entry is 0, in place; 0 where a filter cuts. Not normalised."""
    V = x_BV.shape[1]
    x_BV *= np.array([[1.0 / (t or 1.0)] for t in filters.temperature], np.float32)
    if filters.top_k_B is not None:
        for x_V, k in zip(x_BV, filters.top_k, strict=True):
            if 0 < k < V:
                x_V[x_V < np.partition(x_V, V - k)[V - k]] = -np.inf
    np.exp(x_BV, out=x_BV)
    if filters.top_p_B is not None or filters.min_p_B is not None:
        cut_B = [
            max(m, _top_p_cut_row(p_V, p)) if p < 1.0 and t else m
            for p_V, t, p, m in zip(x_BV, filters.temperature, filters.top_p, filters.min_p, strict=True)
        ]
        x_BV *= x_BV >= np.array(cut_B, np.float32)[:, None]
    return x_BV


def _top_p_cut_row(weight_V: Rows, top_p: float) -> float:
    """`top_p_cut` for one row whose largest weight is 1. Sorts only the largest where they hold enough of
    the mass, as they do in a language model's distribution."""
    target = top_p * float(weight_V.sum(dtype=np.float64))
    candidate = weight_V[weight_V >= 1e-3]
    if candidate.sum(dtype=np.float64) < target:
        candidate = weight_V.copy()
    candidate[::-1].sort()
    place = int(candidate.cumsum(dtype=np.float64).searchsorted(target))
    return float(candidate[min(place, candidate.size - 1)]) if candidate.size else 0.0


def _choose_cpu(weight_BV: Rows, u_B: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """`choose` in numpy."""
    B, V = weight_BV.shape
    cdf_BN = np.add.reduceat(weight_BV, np.arange(0, V, _BLOCK), axis=1, dtype=np.float64).cumsum(1)
    total_B = cdf_BN[:, -1]
    target_B = np.minimum(u_B * total_B, total_B * _BELOW_ONE)
    n_B = np.minimum((cdf_BN <= target_B[:, None]).sum(1), cdf_BN.shape[1] - 1)
    row_B = np.arange(B)
    before_B = np.where(n_B > 0, cdf_BN[row_B, n_B - 1], 0.0)
    index_BW = n_B[:, None] * _BLOCK + np.arange(_BLOCK)
    inside_BW = index_BW < V
    weight_BW = weight_BV[row_B[:, None], np.where(inside_BW, index_BW, 0)] * inside_BW
    inner_BW = weight_BW.cumsum(1, dtype=np.float64)
    rest_B = np.minimum(target_B - before_B, inner_BW[:, -1] * _BELOW_ONE)
    w_B = np.minimum((inner_BW <= rest_B[:, None]).sum(1), _BLOCK - 1)
    return np.minimum(n_B * _BLOCK + w_B, V - 1)


def filtered_probabilities(logits_BV: Tensor, filters: Filters) -> Tensor:
    """float32 [B, V]: softmax after temperature and top-k; 0 for what top-p and min-p cut off (not
    renormalised)."""
    x_BV = logits_BV.float() / filters.temperature_B.unsqueeze(1)
    if filters.top_k_B is not None:
        x_BV = x_BV.masked_fill_(x_BV < top_k_cut(x_BV, filters.top_k, filters.top_k_B), float("-inf"))
    p_BV = x_BV.softmax(-1)
    cuts = []
    if filters.top_p_B is not None:
        cuts.append(top_p_cut(p_BV, filters.top_p_B))
    if filters.min_p_B is not None:
        cuts.append((filters.min_p_B * p_BV.amax(-1)).unsqueeze(1))
    for cut_B1 in cuts:
        p_BV = p_BV.masked_fill_(p_BV < cut_B1, 0.0)
    return p_BV


def probabilities(logits_BV: Tensor, filters: Filters) -> Tensor:
    """float32 [B, V]: the distributions that `sample` draws from, each of sum 1; NaN in rows that fail."""
    if logits_BV.device.type == "cpu":
        l_BV = logits_BV.detach().numpy()
        with np.errstate(invalid="ignore", divide="ignore"):  # in rows that fail
            weight_BV = _weights_cpu(l_BV - l_BV.max(-1, keepdims=True), filters)
            return torch.from_numpy(weight_BV / weight_BV.sum(-1, keepdims=True))
    p_BV = filtered_probabilities(logits_BV, filters)
    return p_BV / p_BV.sum(-1, keepdim=True)


def top_k_cut(x_BV: Tensor, top_k: Sequence[int], top_k_B: Tensor) -> Tensor:
    """[B, 1]: the k-th largest of each row; −∞ where k is 0 or not below V. `top_k`: the same on the host."""
    V = x_BV.shape[1]
    largest = max((k for k in top_k if k < V), default=1) or 1
    value_BK = x_BV.topk(largest, dim=-1).values
    cut_B1 = value_BK.gather(1, (top_k_B.unsqueeze(1) - 1).clamp(0, largest - 1))
    off_B1 = ((top_k_B <= 0) | (top_k_B >= V)).unsqueeze(1)
    return cut_B1.masked_fill(off_B1, float("-inf"))


def top_p_cut(p_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """[B, 1]: the largest c such that the probabilities ≥ c hold at least top_p of the mass; 0 where top_p
    is 1.

    Without a sort and without the host: bisection over the bit patterns of float32, which are ordered as
    the numbers are for p ≥ 0. 30 passes find the cut exactly.
    """
    bits_BV = p_BV.view(torch.int32)
    mass_B1 = p_BV.sum(-1, dtype=torch.float64).unsqueeze(1)
    target_B1 = top_p_B.unsqueeze(1) * mass_B1
    low_B1 = torch.zeros_like(bits_BV[:, :1])  # mass(p ≥ low) ≥ target > mass(p ≥ high)
    high_B1 = torch.full_like(low_B1, 0x3F800001)
    for _ in range(30):
        middle_B1 = low_B1 + (high_B1 - low_B1) // 2
        mass_B1 = torch.where(bits_BV >= middle_B1, p_BV, 0.0).sum(-1, dtype=torch.float64).unsqueeze(1)
        enough_B1 = mass_B1 >= target_B1
        low_B1 = torch.where(enough_B1, middle_B1, low_B1)
        high_B1 = torch.where(enough_B1, high_B1, middle_B1)
    return low_B1.view(torch.float32).masked_fill(top_p_B.unsqueeze(1) >= 1.0, 0.0)


def choose(weight_BV: Tensor, u_B: Tensor) -> Tensor:
    """Inverse CDF: the first index whose cumulative weight exceeds u · (sum of weights), int64 [B]. Weights
    ≥ 0 need not sum to 1; a weight of 0 is never chosen. Two levels: sums of blocks of 128 in float64, then
    inside one block."""
    B, V = weight_BV.shape
    if V % _BLOCK:
        weight_BV = pad(weight_BV, (0, -V % _BLOCK))
    block_BNW = weight_BV.unflatten(1, (-1, _BLOCK))
    sum_BN = block_BNW.sum(-1, dtype=torch.float64)
    cdf_BN = sum_BN.cumsum(-1)
    total_B1 = cdf_BN[:, -1:]
    target_B1 = torch.minimum(u_B.unsqueeze(1) * total_B1, total_B1 * _BELOW_ONE)
    n_B1 = torch.searchsorted(cdf_BN, target_B1, right=True).clamp_(max=cdf_BN.shape[1] - 1)
    rest_B1 = target_B1 - (cdf_BN.gather(1, n_B1) - sum_BN.gather(1, n_B1))
    inner_BW = block_BNW.gather(1, n_B1.unsqueeze(2).expand(B, 1, _BLOCK)).squeeze(1).double().cumsum(-1)
    rest_B1 = torch.minimum(rest_B1.clamp_(min=0.0), inner_BW[:, -1:] * _BELOW_ONE)
    w_B1 = torch.searchsorted(inner_BW, rest_B1, right=True).clamp_(max=_BLOCK - 1)
    return (n_B1 * _BLOCK + w_B1).squeeze(1).clamp_(max=V - 1)


# --- log-probabilities ----------------------------------------------------------------------------------


def logprobs(logits_BV: Tensor, token_B: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax at `token` [B], and its `top_n` largest entries: values [B, n] and ids [B, n], sorted. A
    token < 0 (FAILED) gives the value of token 0."""
    if is_exact():
        norm_B1 = invariant.logsumexp(logits_BV).unsqueeze(1)
    else:
        norm_B1 = logits_BV.logsumexp(-1, keepdim=True)
    chosen_B = (logits_BV.gather(1, token_B.clamp(min=0).unsqueeze(1)) - norm_B1).squeeze(1)
    if top_n == 0:
        empty = logits_BV.new_empty(logits_BV.shape[0], 0)
        return chosen_B, empty, empty.long()
    if logits_BV.device.type == "cpu":
        id_Bn = _top_ids_cpu(logits_BV, top_n)
        return chosen_B, logits_BV.gather(1, id_Bn) - norm_B1, id_Bn
    top = logits_BV.topk(top_n, dim=-1)
    return chosen_B, top.values - norm_B1, top.indices


def _top_ids_cpu(logits_BV: Tensor, n: int) -> Tensor:
    """The n largest of each row, largest first, smaller ids first among equals; a third of topk's time at V
    = 129k."""
    ids = np.empty((logits_BV.shape[0], n), np.int64)
    for row, l_V in enumerate(logits_BV.detach().numpy()):
        place = max(l_V.size - n, 0)
        found = np.flatnonzero(~(l_V < np.partition(l_V, place)[place]))  # NaN counts as large, as in torch
        ids[row] = found[np.argsort(-l_V[found], kind="stable")[:n]]
    return torch.from_numpy(ids)


# --- the reference --------------------------------------------------------------------------------------


def probabilities_reference(
    logits: Sequence[float],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    bias: dict[int, float] | None = None,
    banned: Sequence[int] = (),
) -> list[float]:
    """The distribution that one row is drawn from, word for word as the head of this file says, in Python
    floats."""
    x = [float(value) for value in logits]
    for t in {*prompt, *output}:
        x[t] = x[t] / repetition if x[t] > 0 else x[t] * repetition
    for t in set(output):
        x[t] -= frequency * list(output).count(t) + presence
    for t, value in (bias or {}).items():
        x[t] += value
    for t in banned:
        x[t] = float("-inf")
    if temperature == 0:
        return [1.0 if t == x.index(max(x)) else 0.0 for t in range(len(x))]
    x = [value / temperature for value in x]
    if 0 < top_k < len(x):
        cut = sorted(x, reverse=True)[top_k - 1]
        x = [value if value >= cut else float("-inf") for value in x]
    weight = np.exp(np.array(x) - max(x)).tolist()
    p = [value / sum(weight) for value in weight]
    if top_p < 1:
        cut, mass = 0.0, 0.0
        for value in sorted(p, reverse=True):
            cut, mass = value, mass + value
            if mass >= top_p:
                break
        p = [value if value >= cut else 0.0 for value in p]
    p = [value if value >= min_p * max(p) else 0.0 for value in p]
    return [value / sum(p) for value in p]
