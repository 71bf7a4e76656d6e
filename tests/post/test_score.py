"""Scores of completions against whole logits; in exact mode against what the engine reported, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hadal.engine.engine import Engine
from hadal.engine.request import SamplingParams
from hadal.model.context import Cache, Context
from hadal.model.transformer import Transformer
from hadal.ops import exact_cpu, invariant
from hadal.ops.exact import exact
from hadal.ops.log_probs import Law
from hadal.post.score import Sample, law_of, pack, score, score_all, share_out
from hadal.train.batches import build
from hadal.train.losses import cross_entropies
from tests.train import tiny as train_tiny
from tests.weights import tiny
from tests.weights.helpers import random_model

needs_exact = pytest.mark.skipif(exact_cpu.status()[0] is None, reason=f"exact: {exact_cpu.status()[1]}")
BANNED = {2: -100.0}  # what a tokenizer calls padding


def sampled(model: Transformer, count: int = 5, **changes: Any) -> tuple[list[Sample], list[torch.Tensor]]:
    """Completions by the engine on the model's own tensors, and what it reported of them."""
    size = Cache.bytes_per_page(model.config, 4, model.dtype, extra_layers=1)
    options = {"exact": False, "speculation": "off"} | changes
    running = Engine(model, page_size=4, cache_bytes=300 * size, max_model_len=64, max_num_seqs=4, **options)
    params = [
        SamplingParams(temperature=0.7, max_tokens=4 + 3 * i, logprobs=0, logprobs_of="sampler", seed=i,
                       logit_bias=BANNED, ignore_eos=True)
        for i in range(count)
    ]  # fmt: skip
    prompts = [list(range(3 + i, 12 + 2 * i)) for i in range(count)]
    done = running.generate(prompts, params)
    samples = [Sample(p, d.token_ids) for p, d in zip(prompts, done, strict=True)]
    reported = []
    for one in done:
        assert one.logprobs is not None
        reported.append(torch.tensor([entry.logprob for entry in one.logprobs]))
    return samples, reported


LAW = Law(0.7, bias=tuple(BANNED.items()))


@needs_exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["v3", "moe-16b", "qwen2", "qwen2-tied"])
def test_in_exact_mode_the_gap_is_zero(kind: str, dtype: torch.dtype) -> None:
    """MLA and MoE with MTP, GQA with MoE, dense GQA: trained scores are the sampler's, to the bit."""
    model = random_model(tiny.ALL[kind], seed=1, dtype=dtype)
    samples, reported = sampled(model, exact=True)
    packed = pack(samples, depths=len(model.mtp))
    with exact():
        found = score(model, packed, LAW, entropy=True, mtp=True)
    assert found.logprob_N.requires_grad
    assert torch.equal(found.logprob_N.detach(), torch.cat(reported))
    found.logprob_N.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("mtp"))


@needs_exact
def test_in_exact_mode_drafts_and_packs_change_nothing() -> None:
    model = random_model(tiny.V3, seed=2)
    samples, reported = sampled(model, exact=True, speculation="mtp", speculation_adaptive=False)
    with exact():
        found = score_all(model, samples, LAW, max_tokens=40)
    assert all(torch.equal(a, b) for a, b in zip(found, reported, strict=True))


def test_ordinary_scores_have_a_gap() -> None:
    """The test above can fail."""
    model = random_model(tiny.V3, seed=1)
    samples, reported = sampled(model)
    gap = (score(model, pack(samples), LAW).logprob_N - torch.cat(reported)).abs().max()
    assert 0.0 < gap < 1e-4


def test_logits_t_score_token_t_plus_one() -> None:
    """Sample by sample against whole logits, temperature and bias applied; entropies too."""
    model = random_model(tiny.V2_LITE, seed=3)
    samples, _ = sampled(model)
    found = score(model, pack(samples), LAW, entropy=True)
    assert found.entropy_N is not None
    at = 0
    for sample in samples:
        ids = torch.tensor([*sample.prompt, *sample.completion])
        logits = model.logits(model(ids, Context.packed([len(ids)])))
        logits[:, 2] -= 100.0
        log_p = (logits / 0.7).log_softmax(-1)
        for t in range(len(sample.prompt) - 1, len(ids) - 1):
            torch.testing.assert_close(found.logprob_N[at], log_p[t, ids[t + 1]], rtol=1e-4, atol=1e-4)
            entropy = -(log_p[t].exp() * log_p[t]).sum()
            torch.testing.assert_close(found.entropy_N[at], entropy, rtol=1e-4, atol=1e-4)
            at += 1
    assert at == found.logprob_N.shape[0]


def test_temperature_scales_the_trainers_logits_too() -> None:
    model = random_model(tiny.QWEN2, seed=3)
    samples, reported = sampled(model)
    cold = score(model, pack(samples), LAW).logprob_N
    warm = score(model, pack(samples), replace(LAW, temperature=1.0)).logprob_N
    want = torch.cat(reported)
    assert (cold - want).abs().max() < 1e-4 < 0.05 < (warm - want).abs().max()


def test_a_banned_token_is_banned_on_both_sides() -> None:
    model = random_model(tiny.QWEN2, seed=3)
    samples, reported = sampled(model)
    assert all(2 not in sample.completion for sample in samples)
    free = score(model, pack(samples), Law(0.7)).logprob_N
    assert (free - torch.cat(reported)).abs().max() > 1e-4


@pytest.mark.parametrize("mtp", [False, True])
def test_gate_biases_are_frozen_and_mtp_trains_itself_alone(mtp: bool) -> None:
    model = train_tiny.model()
    before = [b.clone() for b in model.buffers()]
    samples = [Sample([5, 6, 7], [8, 9, 10, 11]), Sample([1], [2, 3])]
    found = score(model, pack(samples, depths=1), mtp=True, record_routing=True)
    (sum(x.mean() for x in found.mtp_nll) if mtp else found.logprob_N.sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert len(found.routing) == 3  # two layers with experts, and the MTP module
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert not reached or name.startswith("mtp.") == mtp, name


def test_mtp_losses_are_those_of_pre_training() -> None:
    """On one document whose completion counts."""
    from hadal.data.stream import Rows

    model = train_tiny.model()
    prompt, completion = [5, 9, 33, 2], [7, 7, 50, 61, 3]
    ids = torch.tensor([prompt + completion])
    rows = Rows(ids.numpy(), torch.ones(1, 9).numpy(), [9], [False])
    micro = build(rows, depths=1, mask_documents=True)
    nll = cross_entropies(model, micro, micro.context())
    found = score(model, pack([Sample(prompt, completion)], depths=1), mtp=True)
    torch.testing.assert_close(found.logprob_N, -nll[0][3:8])
    torch.testing.assert_close(found.mtp_nll[0], nll[1][2:7])


def test_completions_too_short_for_a_depth_have_no_mtp_loss() -> None:
    model = train_tiny.model()
    found = score(model, pack([Sample([1], [2])], depths=1), mtp=True)
    assert found.mtp_nll[0].shape == (0,)
    (found.logprob_N.sum() + found.mtp_nll[0].sum()).backward()


def test_the_law_is_the_engines() -> None:
    model = random_model(tiny.QWEN2)
    running = Engine(model, page_size=4, cache_bytes=1 << 20, max_model_len=64, max_num_seqs=1)
    params = SamplingParams(temperature=0.7, logprobs=0, logprobs_of="sampler", logit_bias=BANNED)
    assert law_of(running, params) == replace(LAW, vocab_size=130)
    with pytest.raises(ValueError, match="the sampler's"):
        law_of(running, SamplingParams(logprobs=0))


def test_packs_hold_everybody_once() -> None:
    """Samples of 6, 17, 1, 6, 7 and 31 tokens into 18: the longest alone, the others best-fit."""
    samples = [Sample([1] * p, [2] * c) for p, c in ((3, 4), (9, 9), (1, 1), (2, 5), (4, 4), (30, 2))]
    assert share_out(samples, 18) == [[5], [1, 2], [0, 4], [3]]


def test_what_cannot_be_scored_is_refused() -> None:
    model = random_model(tiny.QWEN2_TIED)
    with pytest.raises(ValueError, match="tokens on both sides"):
        Sample([1], [])
    long = Sample([1] * 600, [2])
    with pytest.raises(ValueError, match="512 positions"):
        score(model, pack([long]))
    with pytest.raises(ValueError, match="depths=1"):
        score(train_tiny.model(), pack([Sample([1], [2])]), mtp=True)


@needs_exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unused_rows_of_the_head_change_no_bit(dtype: torch.dtype) -> None:
    """The sampler cuts logits at the tokenizer's end, scores cut the head."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 144, generator=generator).to(dtype)
    w = torch.randn(150, 144, generator=generator).to(dtype)
    whole = invariant.linear(x, w, wide=True)
    for size in (150, 149, 131, 17):
        assert torch.equal(invariant.linear(x, w[:size], wide=True), whole[:, :size])
        assert torch.equal(invariant.logsumexp(whole[:, :size]), invariant.logsumexp(whole[:, :size].clone()))
