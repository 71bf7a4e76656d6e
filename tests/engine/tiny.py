"""Tiny random models of both kinds of attention, and engines on them with tight, odd sizes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from hadal.config import Gqa, Mla, ModelConfig, Moe
from hadal.engine.engine import Engine
from hadal.model.context import Cache
from hadal.model.transformer import Transformer

VOCAB = 300
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large, so that the most likely token stands out
}
MLA = ModelConfig(
    model_type="deepseek_v3",
    attention=Mla(24, 16, 8, 8, 8),
    moe=Moe(8, 1, 2, 24, 1, 1, "sigmoid", "noaux_tc", 4, 2, True, 1.5),
    **COMMON,
)
GQA = ModelConfig(model_type="qwen2", attention=Gqa(2, 8, True), **COMMON)


@functools.cache
def tiny_model(kind: str = "mla", vocab_size: int = VOCAB) -> Transformer:
    config = {"mla": MLA, "gqa": GQA}[kind]
    if vocab_size != VOCAB:
        config = ModelConfig(**{**config.__dict__, "vocab_size": vocab_size})
    return Transformer(config).init_weights(seed=1).eval()


def tiny_engine(kind: str = "mla", *, pages: int = 64, page_size: int = 4, **options: Any) -> Engine:
    """An engine with exactly `pages` pages to give out."""
    tokenizer = options.get("tokenizer")
    model = tiny_model(kind, tokenizer.padded_vocab_size if tokenizer else VOCAB)
    page_bytes = Cache.bytes_per_page(model.config, page_size, torch.float32)
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": min(512, pages * page_size)}
    engine = Engine(
        model, page_size=page_size, cache_bytes=(pages + 1) * page_bytes, **{**defaults, **options}
    )
    # Few seats would make the cache smaller than asked for.
    assert engine.scheduler.pages.capacity <= pages
    return engine


@functools.cache
def tiny_tokenizer(folder: str) -> Any:
    from hadal.text.tokenizer import Tokenizer
    from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

    make_tiny_tokenizer(Path(folder))
    return Tokenizer.load(Path(folder))


def prompts(number: int, *, length: int = 17, vocab_size: int = VOCAB, seed: int = 0) -> list[list[int]]:
    """Random prompts of various lengths around `length`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 2 * length, (number,), generator=generator).tolist()
    return [torch.randint(3, vocab_size, (size,), generator=generator).tolist() for size in sizes]
