"""What a forward pass knows beside its tokens: where sequences begin, positions, and their cache pages.

One stream of T tokens holds S sequences back to back. With a cache, the first `num_decodes` sequences have
exactly one token each (absorbed decode); the others are prefill chunks that see their cached prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from hadal.config import Mla, ModelConfig
from hadal.ops.attention import Spans
from hadal.ops.invariant import Stream
from hadal.ops.latent_fp8 import entry_bytes


@dataclass
class Routing:
    """What one gate decided in a recorded forward pass: experts [T, K] and scores [T, E] (FP32)."""

    layer: int
    gate: torch.nn.Module
    expert_TK: Tensor
    score_TE: Tensor


@dataclass
class Context:
    """See the module's docstring. Token tensors have length T, sequence tensors length S."""

    position_T: Tensor  # int64
    cu_seqlens: Sequence[int]  # S + 1 offsets into the stream, on the host
    cache: Cache | None = None
    slot_T: Tensor | None = None  # int64: page · page_size + offset where each token's entry is written
    block_table_SP: Tensor | None = None  # int32: pages of each sequence, padded with page 0
    context_len_S: Tensor | None = None  # int32: keys visible after this step
    context_lens: Sequence[int] = ()  # the same on the host, needed for prefill chunks only
    num_decodes: int = 0
    record_routing: bool = False
    # hidden states to keep, numbered as Hugging Face does: 0 is the embedding, i the output of block i - 1,
    # and num_layers that of the last block after the final norm
    capture_layers: frozenset[int] = frozenset()
    # blocks whose attention maps to keep; only without a cache, where attention has its expanded form
    capture_attention: frozenset[int] = frozenset()
    routing: list[Routing] = field(default_factory=list)
    captured: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, list[Tensor]] = field(default_factory=dict)  # FP32 [H, n, n] of each sequence
    # what the fused CPU kernel reads in every layer (hadal/model/fused.py), and the tensors that it is in
    cpu_step: tuple[tuple[Tensor | Cache | None, ...], list[int]] | None = None
    spans: Spans | None = None  # without a cache: instead of cu_seqlens, which then is empty
    rotation_T2r: Tensor | None = None  # cos and sin of the positions, set by the Transformer once a pass
    _stream: Stream | None = field(default=None, init=False, repr=False)

    @classmethod
    def packed(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Context:
        """Sequences of these lengths from position 0, full causal attention inside each, no cache."""
        position = torch.cat([torch.arange(n) for n in lengths])
        starts = [0]
        for n in lengths:
            starts.append(starts[-1] + n)
        return cls(position.to(device), starts)

    @property
    def num_tokens(self) -> int:
        return self.position_T.shape[0]

    def stream(self) -> Stream:
        """The sequences as the exact kernels take them; built once a pass."""
        if self._stream is None:
            page = 0 if self.cache is None else self.cache.page_size
            self._stream = Stream.build(self.position_T, self.cu_seqlens, self.block_table_SP, page)
        return self._stream

    def packed_lengths(self) -> Sequence[int] | Spans:
        """Of all sequences, for `self_attention`."""
        return self.lengths() if self.spans is None else self.spans

    def lengths(self, first: int = 0) -> list[int]:
        """Query tokens of each sequence from number `first` on."""
        c = self.cu_seqlens
        return [c[i + 1] - c[i] for i in range(first, len(c) - 1)]


class Cache:
    """Per-layer page tensors. Page 0 is scratch for padded rows: the allocator never hands it out.

    MLA: [pages, page_size, kv_lora_rank + qk_rope_head_dim]; GQA: [pages, page_size, 2, kv_heads, head_dim].
    With dtype float8_e4m3fn (MLA only) an entry is the bytes of hadal/ops/latent_fp8.py, V3's 656, in uint8.
    `extra_layers`: MTP blocks that keep a cache of their own (speculation).
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        extra_layers: int = 0,
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        entry, stored = self._entry(config, dtype)
        shape = (num_pages, page_size, *entry)
        layers = config.num_hidden_layers + extra_layers
        self.layers = [torch.zeros(shape, dtype=stored, device=device) for _ in range(layers)]

    @staticmethod
    def _entry(config: ModelConfig, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape of an entry, and the dtype of what is stored. ValueError where FP8 has no layout."""
        a, fp8 = config.attention, dtype == torch.float8_e4m3fn
        if isinstance(a, Mla):
            width = a.kv_lora_rank + a.qk_rope_head_dim
            if fp8:
                return (entry_bytes(a.kv_lora_rank, a.qk_rope_head_dim),), torch.uint8
            return (width,), dtype
        if fp8:
            raise ValueError("an FP8 cache holds the latents of MLA; this model has grouped-query attention")
        return (2, a.num_key_value_heads, a.head_dim), dtype

    @staticmethod
    def bytes_per_page(config: ModelConfig, page_size: int, dtype: torch.dtype, extra_layers: int = 0) -> int:
        """Bytes of one page over all layers."""
        layers = config.num_hidden_layers + extra_layers
        entry, stored = Cache._entry(config, dtype)
        return prod(entry) * stored.itemsize * layers * page_size

    def write(self, layer: int, slot_T: Tensor, entry: Tensor) -> None:
        """Store one entry a token, [T, …] as the layer's pages hold them."""
        self.layers[layer].flatten(0, 1).index_copy_(0, slot_T, entry)
