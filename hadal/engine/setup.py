"""What an engine settles before its first step: how large it is, and whether exact mode can be kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hadal.engine.errors import EngineError
from hadal.engine.memory import cache_budget, fit_cache
from hadal.engine.speculation import Method, SpeculationOptions, max_rows
from hadal.model.offload import OffloadedExperts
from hadal.model.transformer import Transformer
from hadal.ops.exact import unavailable
from hadal.ops.packed import Packed

SEATS = {"cuda": 64}  # sequences at once; elsewhere 16
STEP_TOKENS = {"cuda": 8192}  # tokens of a step; elsewhere 1024


@dataclass(frozen=True)
class Wishes:
    """Sizes as the caller of the engine asks for them. None: chosen for the device."""

    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    gpu_memory_utilization: float  # share of the GPU's memory, weights included
    cache_bytes: int | None  # instead of what is measured
    page_size: int  # tokens


@dataclass(frozen=True)
class Sizes:
    """What an engine is built with. max_rows: rows of logits in the largest step of a known size;
    extra_layers: of the cache, for MTP's block."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_rows: int
    max_model_len: int
    num_pages: int
    extra_layers: int


def choose_sizes(
    model: Transformer, wishes: Wishes, dtype: torch.dtype, speculation: SpeculationOptions,
    method: Method | None,
) -> Sizes:  # fmt: skip
    """Sizes for a model on its device, with a cache of `dtype`. On a GPU the peak of a step is measured.

    Raises EngineError where max_model_len is none, or the cache cannot hold one context.
    """
    device = model.device
    seats = wishes.max_num_seqs or SEATS.get(device.type, 16)
    budget = wishes.max_num_batched_tokens or max(STEP_TOKENS.get(device.type, 1024), seats)
    wanted = wishes.max_model_len
    if wanted is not None and not 2 <= wanted <= model.max_positions:
        raise EngineError(f"max_model_len must be from 2 to {model.max_positions}, not {wanted}")
    rows = max_rows(speculation, method, seats, device)
    cache_bytes, longest = wishes.cache_bytes, model.max_positions
    if cache_bytes is None:
        cache_bytes, longest = cache_budget(
            model,
            max_rows=rows,
            num_tokens=budget,
            max_model_len=wanted,
            page_size=wishes.page_size,
            utilization=wishes.gpu_memory_utilization,
            mtp=method == "mtp",
        )
    extra_layers = 1 if method == "mtp" else 0
    num_pages, max_model_len = fit_cache(
        model.config,
        cache_bytes,
        max_num_seqs=seats,
        max_model_len=wanted,
        longest=longest,
        page_size=wishes.page_size,
        dtype=dtype,
        extra_layers=extra_layers,
    )
    return Sizes(seats, budget, rows, max_model_len, num_pages, extra_layers)


def check_exact(model: Transformer) -> None:
    """Raises EngineError, with the remedy, where exact mode cannot be kept on this machine and weights."""
    why = unavailable(model.device, model.dtype)
    packed = next((m.kind for m in model.modules() if isinstance(m, Packed)), None)
    if why is None and packed is not None:
        why = f"exact mode has no operations on {packed} weights; load them unquantised"
    if why is None and any(isinstance(m, OffloadedExperts) for m in model.modules()):
        why = "exact mode has no operations on offloaded experts; load the whole model"
    if why is not None:
        raise EngineError(why)
