"""What one decode step of a live model must read: counted on its tensors, whatever their format."""

from __future__ import annotations

import random

import torch

from hadal.engine import Engine
from hadal.model.context import Context
from hadal.model.transformer import Transformer
from hadal.ops.packed import Packed
from hadal.plan.speed import StepWork

_PROBE_TOKENS = 8  # of each sequence whose routing is looked at


def step_work(engine: Engine) -> StepWork:
    """Counts the tensors of an engine's model and cache. The input embedding is read by rows, so not counted.
    A drafter that rests now is not counted either."""
    main, head, mtp = weight_bytes(engine.model)
    cache = engine.runner.cache
    layers = cache.layers[: engine.config.num_hidden_layers]
    tokens = cache.num_pages * cache.page_size
    moe = engine.config.moe
    drafts, drafter = _drafts(engine)
    return StepWork(
        main[0] + head,
        main[1],
        moe.n_routed_experts if moe else 0,
        moe.num_experts_per_tok if moe else 0,
        sum(layer.nbytes for layer in layers) / tokens,
        drafts=drafts,
        draft_always=mtp[0] + head if drafter == "mtp" else 0,
        draft_routed=mtp[1] if drafter == "mtp" else 0,
    )


def _drafts(engine: Engine) -> tuple[int, str]:
    """(drafts of a sequence's step, who makes them); (0, "") without speculation, or while it rests."""
    stats = engine.stats().speculation
    return (0, "") if stats is None or stats.resting else (stats.num_tokens, stats.method)


def packed_kind(model: Transformer) -> str | None:
    """The format of the model's packed matrices, the narrowest if there are several; None if nothing is
    packed."""
    kinds = {module.kind for module in model.modules() if isinstance(module, Packed)}
    return next((kind for kind in ("int4", "int8", "fp8") if kind in kinds), None)


def weight_bytes(model: Transformer) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """Bytes of (blocks and norms, their routed experts), of the head, and of (MTP modules, their experts)."""
    main, mtp, head = [0, 0], [0, 0], 0
    tied = model.lm_head is None
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith("lm_head.") or (tied and name.startswith("embed_tokens.")):
            head += tensor.nbytes
        elif not name.startswith("embed_tokens."):
            (mtp if name.startswith("mtp.") else main)[".experts." in name] += tensor.nbytes
    return (main[0], main[1]), head, (mtp[0], mtp[1])


@torch.inference_mode()
def measured_experts(engine: Engine, batch: int, seed: int = 0) -> float | None:
    """Experts of a layer that the next tokens of `batch` sequences really touch, on average over the layers;
    None without experts. Random tokens: one short packed pass, whose last positions are looked at."""
    if engine.config.moe is None:
        return None
    draw = random.Random(seed)
    count = batch * _PROBE_TOKENS
    ids = torch.tensor([draw.randrange(engine.vocab_size) for _ in range(count)], device=engine.device)
    context = Context.packed([_PROBE_TOKENS] * batch, engine.device)
    context.record_routing = True
    engine.model(ids, context)
    last = torch.arange(_PROBE_TOKENS - 1, count, _PROBE_TOKENS, device=engine.device)
    seen = [routing.expert_TK[last].unique().numel() for routing in context.routing]
    return sum(seen) / len(seen) if seen else None
