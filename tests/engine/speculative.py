"""Tiny models with an MTP module, and engines that draft on them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from hadal.engine.engine import Engine
from hadal.model.context import Cache
from hadal.model.transformer import Transformer
from tests.engine.tiny import GQA, MLA

CONFIGS = {
    "mla": replace(MLA, num_nextn_predict_layers=1),
    "gqa": replace(GQA, num_nextn_predict_layers=1),
}


@functools.cache
def drafting_model(kind: str = "mla", vocab_size: int = 8, seed: int = 1) -> Transformer:
    """A random model. The fewer words it knows, the more often its drafts are right."""
    return Transformer(replace(CONFIGS[kind], vocab_size=vocab_size)).init_weights(seed=seed).eval()


def drafting_engine(
    kind: str = "mla",
    *,
    model: Transformer | None = None,
    vocab_size: int = 8,
    pages: int = 64,
    page_size: int = 4,
    speculation: str = "mtp",
    **options: Any,
) -> Engine:
    """An engine with `pages` pages to give out, which always drafts unless told otherwise."""
    model = model or drafting_model(kind, vocab_size)
    extra = 1 if speculation == "mtp" else 0
    page_bytes = Cache.bytes_per_page(model.config, page_size, torch.float32, extra)
    defaults = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": min(512, pages * page_size),
        "num_speculative_tokens": 2,
        "speculation_max_batch": 8,
        "speculation_adaptive": False,
    }
    return Engine(
        model,
        page_size=page_size,
        cache_bytes=(pages + 1) * page_bytes,
        speculation=speculation,
        **{**defaults, **options},
    )
