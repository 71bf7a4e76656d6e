"""An exact engine: what it samples and reports has the same bits in every batch, chunked, cached, preempted,
speculated; and the log-probabilities are those of the trainer's packed pass with gradients, gap 0.0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from hadal.engine.engine import Engine
from hadal.engine.request import Completion, EngineError, SamplingParams
from hadal.model.context import Cache, Context
from hadal.model.transformer import Transformer
from hadal.ops import exact_cpu
from hadal.ops.cross_entropy import linear_cross_entropy
from hadal.ops.exact import exact
from hadal.ops.packed import pack
from tests.engine.tiny import prompts
from tests.weights import tiny
from tests.weights.helpers import random_model

pytestmark = pytest.mark.skipif(exact_cpu.status()[0] is None, reason=f"exact: {exact_cpu.status()[1]}")
KINDS = ["v3", "v2", "v2-lite", "moe-16b", "qwen2"]
SAMPLED = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, logprobs=3)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    exact_cpu.set_threads(2)
    yield
    exact_cpu.set_threads(torch.get_num_threads())


def engine(model: Transformer, *, pages: int = 400, page_size: int = 4, **options: Any) -> Engine:
    page_bytes = Cache.bytes_per_page(model.config, page_size, model.dtype, extra_layers=1)
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128, "exact": True}
    return Engine(model, page_size=page_size, cache_bytes=(pages + 1) * page_bytes, **{**defaults, **options})


def told(completion: Completion) -> list[Any]:
    """All numbers of a completion."""
    assert completion.logprobs is not None
    return [(entry.token_id, entry.logprob, entry.top) for entry in completion.logprobs]


def gap(model: Transformer, prompt: list[int], completion: Completion) -> float:
    """Largest difference between reported log-probabilities and those of the packed pass, with gradients."""
    ids = torch.tensor(prompt + completion.token_ids, device=model.device)
    hidden = model.norm(model(ids[:-1], Context.packed([len(ids) - 1], model.device)))
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    loss = linear_cross_entropy(hidden, head.matrix, ids[1:])
    assert loss.requires_grad and completion.logprobs is not None
    reported = torch.tensor([entry.logprob for entry in completion.logprobs])
    return float((reported + loss.detach().cpu()[len(prompt) - 1 :]).abs().max())


def generate(running: Engine, many: list[list[int]], **changes: Any) -> list[Completion]:
    params = [replace(SAMPLED, seed=number, **changes) for number in range(len(many))]
    done = running.generate(many, params)
    running.check_integrity()
    return done


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sampled_does_not_depend_on_how(kind: str, dtype: torch.dtype) -> None:
    model = random_model(tiny.ALL[kind], seed=1, dtype=dtype)
    shared = prompts(1, length=20, vocab_size=100, seed=3)[0]
    many = [shared + tail for tail in prompts(7, length=25, vocab_size=100, seed=4)]
    alone = generate(engine(model, max_num_seqs=1, prefix_caching=False), many)
    want = [told(completion) for completion in alone]

    assert [told(c) for c in generate(engine(model), many)] == want, "in a batch"
    small = engine(model, max_num_batched_tokens=9)
    assert [told(c) for c in generate(small, many)] == want, "in small chunks"
    again = generate(small, many)
    assert [told(c) for c in again] == want, "from the cache"
    assert max(c.cached_tokens for c in again) > 16
    tight = engine(model, pages=40)
    assert [told(c) for c in generate(tight, many)] == want, "preempted"
    assert tight.stats().preemptions > 0
    with exact():
        assert [gap(model, p, c) for p, c in zip(many, alone, strict=True)] == [0.0] * len(many)


@pytest.mark.parametrize("method", ["mtp", "ngram"])
def test_speculation_does_not_change_a_bit(method: str) -> None:
    """Verified drafts are rows like any other: tokens and log-probabilities stay the same, and so does the
    trainer's gap."""
    model = random_model(tiny.ALL["v3"], seed=1)
    many = prompts(4, length=20, vocab_size=100, seed=4)
    cold = 0.3 if method == "mtp" else 0.0  # greedy tokens repeat themselves: something for n-grams
    plain = generate(engine(model), many, temperature=cold, max_tokens=60)
    running = engine(model, speculation=method, num_speculative_tokens=2, speculation_adaptive=False, seed=0)
    drafted = generate(running, many, temperature=cold, max_tokens=60)
    stats = running.stats().speculation
    assert stats is not None and stats.drafted > 0
    assert [told(c) for c in drafted] == [told(c) for c in plain]
    with exact():
        assert [gap(model, p, c) for p, c in zip(many, drafted, strict=True)] == [0.0] * len(many)


def test_prompt_log_probabilities_are_exact_in_chunks() -> None:
    model = random_model(tiny.ALL["v3"], seed=2)
    prompt = prompts(1, length=80, vocab_size=100, seed=9)[0]
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    whole = engine(model, max_num_batched_tokens=256).generate(prompt, asked).prompt_logprobs
    chunked = engine(model, max_num_batched_tokens=7, max_num_seqs=1).generate(prompt, asked).prompt_logprobs
    assert whole is not None and chunked is not None and len(whole) == len(prompt)
    assert [e and e.logprob for e in whole] == [e and e.logprob for e in chunked]


def test_an_ordinary_engine_has_a_gap() -> None:
    """The tests above can fail: without exact mode decoding and training disagree."""
    model = random_model(tiny.ALL["v3"], seed=1)
    many = prompts(8, length=25, vocab_size=100, seed=4)
    done = generate(engine(model, exact=False), many)
    assert max(gap(model, p, c) for p, c in zip(many, done, strict=True)) > 0.0


def test_exact_and_ordinary_engines_run_side_by_side() -> None:
    """Two engines on one model, a step in turns: the switch is not the process's."""
    model = random_model(tiny.ALL["v3"], seed=1)
    many = prompts(5, length=20, vocab_size=100, seed=6)
    want = [told(c) for c in generate(engine(model), many)]
    exactly, ordinary = engine(model), engine(model, exact=False)
    streams = [exactly.stream(p, replace(SAMPLED, seed=i)) for i, p in enumerate(many)]
    others = [ordinary.stream(p, replace(SAMPLED, seed=i)) for i, p in enumerate(many)]
    updates: list[list[Any]] = [[] for _ in many]
    for _ in range(SAMPLED.max_tokens or 0):
        for mine, stream, other in zip(updates, streams, others, strict=True):
            mine += [update for update in [next(stream, None)] if update is not None]
            next(other, None)
    found = [told(Completion.from_updates(mine)) for mine in updates]
    assert found == want
    assert exactly.stats().exact and not ordinary.stats().exact


def test_what_cannot_be_exact_is_refused() -> None:
    half = random_model(tiny.ALL["qwen2"]).to(torch.float16)
    with pytest.raises(EngineError, match="float32 or bfloat16, not in float16"):
        engine(half)
    quantised = random_model(tiny.ALL["qwen2"])
    layer: Any = quantised.layers[0]
    weight = layer.mlp.down_proj.weight
    del layer.mlp.down_proj.weight
    layer.mlp.down_proj.weight = pack(weight.detach(), "int8")
    with pytest.raises(EngineError, match="no operations on int8 weights"):
        engine(quantised)
