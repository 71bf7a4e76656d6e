"""How much memory there is, and how many cache pages fit in it.

    CPU   cache = min(half of the memory that is free now, need)
    GPU   cache = min(utilization · total − everybody's use − the peak of a step, need)

The need is max_num_seqs sequences of max_model_len tokens. The peak of a step is measured: one chunk of the
whole token budget at the end of the longest context.
"""

from __future__ import annotations

import gc

import torch

from hadal.config import ModelConfig
from hadal.engine.host import host_memory
from hadal.engine.request import EngineError
from hadal.model.context import Cache, Context
from hadal.model.transformer import Transformer

CPU_CACHE_SHARE = 0.5
_SAMPLING_COPIES = 5  # tensors of [sequences, vocabulary] in FP32 that sampling may hold at once


def gib(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"


def available_memory() -> int:
    """Bytes that this process may still take."""
    return host_memory()[1]


@torch.no_grad()
def step_peak(
    model: Transformer, num_tokens: int, max_model_len: int, page_size: int, mtp: bool = False
) -> int:
    """Bytes on the GPU that a step of `num_tokens` at the end of a context of `max_model_len` takes for a
    moment.

    The dummy context reads and writes the same page all over, so that two pages are cache enough to measure.
    """
    device = model.device
    num_tokens = min(num_tokens, max_model_len)
    cache = Cache(model.config, 2, page_size, model.dtype, device, int(mtp))
    position_T = torch.arange(max_model_len - num_tokens, max_model_len, device=device)
    context = Context(
        position_T=position_T,
        cu_seqlens=[0, num_tokens],
        cache=cache,
        slot_T=page_size + position_T % page_size,
        block_table_SP=torch.ones(1, -(-max_model_len // page_size), dtype=torch.int32, device=device),
        context_len_S=torch.tensor([max_model_len], dtype=torch.int32, device=device),
        context_lens=[max_model_len],
    )
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    token_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    hidden_TD = model(token_T, context)
    model.logits(hidden_TD[-1:])
    if mtp:
        model.mtp_forward(hidden_TD, token_T, context)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del hidden_TD, context, cache, position_T
    release()
    return int(peak)


def release() -> None:
    """Give unused memory back: cyclic garbage, and the GPU allocator's empty blocks."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def cache_budget(
    model: Transformer,
    *,
    max_rows: int,
    num_tokens: int,
    max_model_len: int | None,
    page_size: int,
    utilization: float,
    mtp: bool = False,
) -> tuple[int, int]:
    """Bytes that the cache may take on the model's device, and the longest context that a step was found to
    bear. max_rows: rows of logits that are sampled at once.

    Without a wish for max_model_len, a context whose attention alone exhausts the GPU is halved until it
    does not.
    """
    length = max_model_len or model.max_positions
    if model.device.type != "cuda":
        return int(available_memory() * CPU_CACHE_SHARE), length
    while True:
        try:
            peak = step_peak(model, num_tokens, length, page_size, mtp)
            break
        except torch.OutOfMemoryError as error:
            release()
            if max_model_len is not None or length < 1024:
                raise EngineError(
                    f"one step of {min(num_tokens, length)} tokens at the end of {length} does not fit "
                    "the GPU beside the weights: lower max_model_len or max_num_batched_tokens"
                ) from error
            length //= 2
    sampling = max_rows * model.config.vocab_size * 4 * _SAMPLING_COPIES
    free, total = torch.cuda.mem_get_info(model.device)
    reusable = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return int(utilization * total) - (total - free - reusable) - peak - sampling, length


def pick_cache_dtype(model: Transformer, asked: str, exact: bool = False) -> torch.dtype:
    """The cache's dtype: the model's ("auto"), or FP8 for the latents of MLA. EngineError says why not."""
    if asked == "auto":
        return model.dtype
    if asked != "fp8":
        raise EngineError(f"cache_dtype is {asked!r}; use auto or fp8")
    if exact:
        raise EngineError("exact mode keeps the cache in the model's dtype; leave cache_dtype at auto")
    try:
        Cache.bytes_per_page(model.config, 1, torch.float8_e4m3fn)
    except ValueError as error:
        raise EngineError(f"cache_dtype fp8 does not fit this model: {error}") from None
    return torch.float8_e4m3fn


def fit_cache(
    config: ModelConfig,
    budget: int,
    *,
    max_num_seqs: int,
    max_model_len: int | None,
    longest: int,
    page_size: int,
    dtype: torch.dtype,
    extra_layers: int = 0,
) -> tuple[int, int]:
    """(pages, max_model_len) for a cache of at most `budget` bytes. extra_layers: of MTP blocks.

    Without a wish for max_model_len it is `longest`, cut to what the budget holds. Raises EngineError
    when the wish, or not even 128 tokens, fits.
    """
    page_bytes = Cache.bytes_per_page(config, page_size, dtype, extra_layers)
    wanted = max_model_len or longest
    affordable = budget // page_bytes - 1  # one page is scratch
    room = affordable * page_size
    if room < (wanted if max_model_len else min(wanted, 128)):
        need = (-(-wanted // page_size) + 1) * page_bytes
        raise EngineError(
            f"the key/value cache for one context of {wanted} tokens takes {gib(need)}, and "
            f"{gib(max(budget, 0))} are left: lower max_model_len, free memory, or take a smaller model"
        )
    length = min(wanted, room)
    return 1 + min(affordable, max_num_seqs * -(-length // page_size)), length
