"""A block in one CPU call against the same block's operations one by one, on plain and packed weights."""

from __future__ import annotations

import pytest
import torch

from hadal.config import Gqa, Mla, ModelConfig, Moe, Rope
from hadal.model import Transformer, fused
from hadal.model.context import Cache, Context
from hadal.ops import cpu
from hadal.weights.quantise import quantise_model

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.status()[1]}")
V3 = Moe(8, 1, 3, 96, 1, 1, "sigmoid", "noaux_tc", 4, 2, True, 2.5)
ROUTED = Moe(8, 0, 2, 64, 1, 1, "softmax", "greedy", 1, 1, False, 1.0)
CONFIGS = {
    "v3": ModelConfig("deepseek_v3", 300, 160, 224, 2, 4, Mla(96, 64, 32, 16, 48), Rope(1e4), V3),
    "v2-lite": ModelConfig("deepseek_v2", 300, 160, 224, 2, 4, Mla(None, 64, 32, 16, 32), Rope(1e4), ROUTED),
    "qwen": ModelConfig("qwen2", 300, 160, 224, 2, 4, Gqa(2, 40, True), Rope(1e4)),
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def decode_context(config: ModelConfig, dtype: torch.dtype, lengths: list[int]) -> Context:
    """One token for each of sequences of these visible lengths, over a filled cache."""
    generator, size = torch.Generator().manual_seed(1), 8
    pages = [-(-n // size) for n in lengths]
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    first = 1
    for s, count in enumerate(pages):
        table[s, :count] = torch.arange(first, first + count)
        first += count
    cache = Cache(config, first, size, dtype, "cpu")
    for layer in cache.layers:
        layer.copy_(torch.randn(layer.shape, generator=generator))
    last = torch.tensor(lengths) - 1
    slot = table.long().gather(1, (last // size).unsqueeze(1)).squeeze(1) * size + last % size
    context = torch.tensor(lengths, dtype=torch.int32)
    starts = list(range(len(lengths) + 1))
    return Context(last, starts, cache, slot, table, context, lengths, len(lengths))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_equals_one_by_one(name, kind, dtype, monkeypatch):
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(2)
    model = Transformer(config, dtype=dtype, max_positions=128).init_weights(3, std=0.08)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("bias", "norm.weight", "layernorm.weight")):
            parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    if kind:
        quantise_model(model, kind)
    for lengths in ([9], [1, 30, 8, 17, 5]):
        x = torch.randn(len(lengths), config.hidden_size, generator=generator).to(dtype)
        for layer in model.layers:
            contexts = [decode_context(config, dtype, lengths) for _ in range(2)]
            for context in contexts:
                model.prepare(context)
            fast = fused.block(layer, x, contexts[0])
            assert fast is not None
            with monkeypatch.context() as patched:
                patched.setattr(fused, "block", lambda *_: None)
                want = layer(x, contexts[1])
            error = (fast.double() - want.double()).norm() / want.double().norm()
            assert error < TOLERANCE[dtype], (layer.layer, float(error))
            caches = [context.cache.layers[layer.layer].double() for context in contexts]
            assert (caches[0] - caches[1]).norm() / caches[1].norm() < TOLERANCE[dtype]


def test_it_declines():
    config = CONFIGS["v3"]
    model = Transformer(config, max_positions=128).init_weights(0)
    x, layer = torch.randn(2, config.hidden_size), model.layers[1]
    context = decode_context(config, torch.float32, [4, 9])
    model.prepare(context)
    assert fused.block(layer, x, context) is None  # gradients are on
    with torch.no_grad():
        assert fused.block(layer, x, context) is not None
        context.record_routing = True
        assert fused.block(layer, x, context) is None
        context.record_routing, context.num_decodes = False, 1  # a prompt beside a decode
        assert fused.block(layer, x, context) is None
        other = decode_context(config, torch.bfloat16, [4, 9])  # a cache in another dtype
        model.prepare(other)
        assert fused.block(layer, x, other) is None


@torch.no_grad()
def test_a_context_whose_tensors_are_replaced_is_read_again():
    config = CONFIGS["qwen"]
    model = Transformer(config, max_positions=128).init_weights(0)
    x, layer = torch.randn(1, config.hidden_size), model.layers[0]
    context = decode_context(config, torch.float32, [9])
    model.prepare(context)
    first = fused.block(layer, x, context)
    context.context_len_S = torch.tensor([3], dtype=torch.int32)
    assert first is not None and not torch.equal(first, fused.block(layer, x, context))
