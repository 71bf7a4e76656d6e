"""Exact mode on a CUDA device: the same bits alone, in any batch, in chunks, decoded, in CUDA graphs, and in
the packed pass with gradients; in FP32 and BF16."""

from __future__ import annotations

import random

import pytest
import torch

from hadal.ops import invariant
from hadal.ops.exact import exact
from tests.engine import test_exact as engines
from tests.engine.tiny import prompts
from tests.model.test_exact import Cached, packed, same, sequences
from tests.weights import tiny
from tests.weights.helpers import random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ["v3", "v2", "v2-lite", "moe-16b", "qwen2", "llama"]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 2, 17, 32, 33, 64, 257])
def test_a_product_does_not_know_its_rows(rows, dtype):
    x, w = torch.randn(300, 576, device="cuda").to(dtype), torch.randn(200, 576, device="cuda").to(dtype)
    whole = invariant.linear(x, w)
    for first in (0, 1, 43):
        assert torch.equal(invariant.linear(x[first : first + rows], w), whole[first : first + rows])
    order = torch.randperm(300, device="cuda")
    assert torch.equal(invariant.linear(x[order], w), whole[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_has_the_same_logits_everywhere(name, dtype):
    model = random_model(tiny.ALL[name], seed=1, dtype=dtype).cuda()
    many, chooser = sequences(model, 64), random.Random(name)
    with exact(), torch.no_grad():
        alone = [packed(model, [t])[0] for t in many]
        order = list(range(len(many)))
        chooser.shuffle(order)
        assert same(packed(model, [many[i] for i in order]), [alone[i] for i in order])
        for page, most in ((4, 40), (64, 9)):
            assert same(Cached(model, many, page).finish(chooser, most), alone), f"chunks of up to {most}"
        few = range(0, len(many), 8)
        assert same(Cached(model, [many[i] for i in few], 16).finish(chooser, 1), [alone[i] for i in few])
    with exact():
        trained = packed(model, many)
    assert same([x.detach() for x in trained], alone), "packed, with gradients"


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["v3", "v2-lite", "qwen2"])
def test_engines_agree_with_the_trainer(kind, dtype):
    """In CUDA graphs with look-ahead and without, alone, in a batch, preempted: equal tokens and numbers, and
    no gap to the packed pass with gradients."""
    model = random_model(tiny.ALL[kind], seed=1, dtype=dtype).cuda()
    many = prompts(7, length=25, vocab_size=100, seed=4)
    alone = engines.generate(engines.engine(model, max_num_seqs=1, prefix_caching=False), many)
    want = [engines.told(completion) for completion in alone]
    for options in ({}, {"cuda_graphs": False}, {"max_num_batched_tokens": 9}, {"pages": 40}):
        running = engines.engine(model, **options)
        assert [engines.told(c) for c in engines.generate(running, many)] == want, options
        if not options:
            assert running.runner.graphs is not None and running.runner.graphs.broken is None
    with exact():
        assert [engines.gap(model, p, c) for p, c in zip(many, alone, strict=True)] == [0.0] * len(many)
