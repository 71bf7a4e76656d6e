"""What happens inside a model on some texts: hidden states, what the routers chose, attention maps.

Texts lie end to end in streams without padding, texts of like length together, the longest first; results
carry the text's number, so that order is easily restored. Layers are numbered as `hidden_states` in Hugging
Face: 0 is the embedding, i the output of the i-th block, and the last comes after the final norm (the last
block's output before that norm is not among them). Routers and attention maps belong to blocks, which count
from 0: block b makes layer b + 1.

The pass is the network's own, without a cache. What is taken, it lays down in its `Context`; nothing is
computed differently for being watched, but that gates keep their scores. Attention maps are those of the
expanded form: softmax(q·kᵀ·scale) of every head, in FP32, from the same queries and keys.

Legend: T tokens of a stream, n of a text, l layers, D hidden, K chosen experts, E experts, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from hadal.model.context import Context
from hadal.model.transformer import Transformer
from hadal.ops.exact import is_exact

MAX_TOKENS = 4096  # of a stream: more saves nothing on a CPU, and a GPU is busy with it
Ids = Sequence[int]
Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""


class ProbeError(ValueError):
    """A study that cannot be made as asked; the message names cause and remedy."""


@dataclass
class Taken:
    """What one text left, on the model's device. hidden_lnD: FP32, in the order of the layers asked for.
    experts, scores (the router's, before the balancing bias): by MoE block; the experts of a token are in no
    order. attention: by block."""

    hidden_lnD: Tensor
    experts: dict[int, Tensor] = field(default_factory=dict)  # int64 [n, K]
    scores: dict[int, Tensor] = field(default_factory=dict)  # FP32 [n, E]
    attention: dict[int, Tensor] = field(default_factory=dict)  # FP32 [H, n, n]


def layer_numbers(model_layers: int, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Layers as asked for, by number: negative ones count from the end, None is all of them. Raises
    ProbeError."""
    if layers is None:
        return tuple(range(model_layers + 1))
    found = []
    for layer in layers:
        if not -model_layers - 1 <= layer <= model_layers:
            raise ProbeError(
                f"layer {layer} does not exist: this model has 0 (embedding) to {model_layers} (after the "
                "final norm)"
            )
        found.append(layer % (model_layers + 1))
    if not found or len(set(found)) != len(found):
        raise ProbeError(f"layers must be given, each once, not {list(layers)}")
    return tuple(found)


def batches(lengths: Sequence[int], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """Numbers of the texts in streams of at most `max_tokens` (a longer text has one to itself), the longest
    first."""
    found: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not found or lengths[number] > room:
            found.append([])
            room = max_tokens
        found[-1].append(number)
        room -= lengths[number]
    return found


@torch.no_grad()
def extract(
    model: Transformer,
    texts: Sequence[Ids],
    layers: Sequence[int] | None = None,
    *,
    routing: bool = False,
    attention: Sequence[int] = (),
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Taken]]:
    """(number, what was taken) of every text, a list of token ids; in the order of the streams. `attention`:
    the blocks whose maps to keep, H·n² numbers a text and block. Raises ProbeError before anything is
    computed."""
    chosen = layer_numbers(model.config.num_hidden_layers, layers)
    _check(model, texts, routing, attention)
    lengths = [len(ids) for ids in texts]
    done, total = 0, sum(lengths)
    for members in batches(lengths, max_tokens):
        context = Context.packed([lengths[i] for i in members], model.device)
        context.capture_layers, context.capture_attention = frozenset(chosen), frozenset(attention)
        context.record_routing = routing
        model(torch.tensor([t for i in members for t in texts[i]]).to(model.device), context)
        yield from zip(members, _parts(context, chosen), strict=True)
        done += context.num_tokens
        if progress is not None:
            progress(done, total)


def extract_all(model: Transformer, texts: Sequence[Ids], layers: Sequence[int] | None = None, *,
                routing: bool = False, attention: Sequence[int] = (), max_tokens: int = MAX_TOKENS,
                progress: Progress | None = None) -> list[Taken]:  # fmt: skip
    """`extract` of texts that fit into memory together, in their own order."""
    found = dict(
        extract(model, texts, layers, routing=routing, attention=attention, max_tokens=max_tokens,
                progress=progress)
    )  # fmt: skip
    return [found[i] for i in range(len(texts))]


def _check(model: Transformer, texts: Sequence[Ids], routing: bool, attention: Sequence[int]) -> None:
    config = model.config
    for number, ids in enumerate(texts):
        if not ids:
            raise ProbeError(f"text {number} has no tokens")
        if len(ids) > model.max_positions:
            raise ProbeError(
                f"text {number} has {len(ids)} tokens, the model {model.max_positions} positions: shorten it"
            )
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise ProbeError(f"text {number} has token ids outside 0 to {config.vocab_size - 1}")
    if routing and config.moe is None:
        raise ProbeError("this model is dense: it has no routers to watch")
    if outside := [block for block in attention if not 0 <= block < config.num_hidden_layers]:
        raise ProbeError(f"block {outside[0]} does not exist: this model has {config.num_hidden_layers}")
    if attention and is_exact():
        raise ProbeError("attention maps are of the expanded form, which exact mode does not compute")


def _parts(context: Context, layers: Sequence[int]) -> Iterator[Taken]:
    """What each text of a finished pass left."""
    starts = context.cu_seqlens
    for s, (begin, end) in enumerate(pairwise(starts)):
        yield Taken(
            torch.stack([context.captured[layer][begin:end].float() for layer in layers]),
            {r.layer: r.expert_TK[begin:end] for r in context.routing},
            {r.layer: r.score_TE[begin:end] for r in context.routing},
            {block: maps[s] for block, maps in context.attention.items()},
        )
