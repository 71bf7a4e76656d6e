"""The sampler's books: what it keeps between steps never leaks from one request, slot or batch to another."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from hadal.engine.request import Request, SamplingParams
from hadal.engine.sampler import Sampler
from hadal.ops import sampling

VOCAB = 200
CPU = torch.device("cpu")


def make(params: SamplingParams, slot: int, prompt: list[int], seed: int = 7) -> Request:
    request = Request(f"r{slot}", prompt, params, 0.0, 100, seed=seed if params.seed is None else params.seed)
    request.slot = slot
    request.eos_ids = frozenset([2])
    return request


def reference_token(logits: torch.Tensor, request: Request) -> int:
    """One row, word for word."""
    p = request.params
    banned = [2, *p.stop_token_ids] if request.num_generated < p.min_tokens else []
    weights = sampling.probabilities_reference(
        logits.tolist(),
        temperature=0.0 if p.is_greedy else p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        prompt=list(request.prompt_ids),
        output=request.output_ids,
        repetition=p.repetition_penalty,
        frequency=p.frequency_penalty,
        presence=p.presence_penalty,
        bias=dict(p.logit_bias),
        banned=banned,
    )
    u = sampling.uniform_reference(request.seed, len(request.token_ids))
    mass = 0.0
    for token, weight in enumerate(weights):
        mass += weight
        if mass > u:
            return token
    return max(t for t, weight in enumerate(weights) if weight)


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.5, 1.0, 1.5]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        presence_penalty=rng.choice([0.0, 0.0, 1.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.7]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.4]),
        logit_bias=rng.choice([{}, {5: 4.0, 2: 3.0}, {9: -100.0}]),
        min_tokens=rng.choice([0, 4]),
        stop_token_ids=rng.choice([(), (5,)]),
        seed=rng.randrange(1000),
    )


@pytest.mark.parametrize("seats", [5, 20])  # the two ways to draw uniform numbers
def test_changing_batches_equal_the_transcription(seats: int) -> None:
    """Requests come, go, are preempted to other slots and share batches; every token is the reference's."""
    rng = random.Random(seats)
    sampler = Sampler(VOCAB, seats, CPU)
    generator = torch.Generator().manual_seed(0)
    free = list(range(seats))
    alive: list[Request] = []
    for _ in range(60):
        while free and rng.random() < 0.7:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
            alive.append(make(random_params(rng), free.pop(), prompt))
        if alive and rng.random() < 0.3:
            gone = alive.pop(rng.randrange(len(alive)))
            free.insert(0, gone.slot)
        if alive and free and rng.random() < 0.3:  # preempted, and seated elsewhere
            moved = rng.choice(alive)
            free.insert(0, moved.slot)
            moved.slot = free.pop()
        batch = alive if rng.random() < 0.6 else rng.sample(alive, rng.randint(0, len(alive)))
        if not batch:
            continue
        logits = torch.randn(len(batch), VOCAB, generator=generator) * 2
        expected = [reference_token(row, request) for row, request in zip(logits, batch, strict=True)]
        sampled = sampler.sample(logits.clone(), batch)
        assert sampled.tokens == expected and not sampled.errors
        for request, token in zip(batch, sampled.tokens, strict=True):
            request.token_ids.append(token)


def test_all_greedy_is_argmax_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("choose", "penalize", "logprobs", "filtered_probabilities", "uniform", "uniform_reference"):
        monkeypatch.setattr(sampling, name, None)
    sampler = Sampler(VOCAB, 4, CPU)
    requests = [make(SamplingParams(temperature=0, top_k=5, top_p=0.5), slot, [1]) for slot in range(3)]
    logits = torch.randn(3, VOCAB + 8)
    logits[:, VOCAB:] = 100.0  # rows of the table that no token has
    assert sampler.sample(logits, requests).tokens == logits[:, :VOCAB].argmax(-1).tolist()


def test_logprobs_are_raw_though_the_logits_are_changed() -> None:
    sampler = Sampler(VOCAB, 4, CPU)
    params = SamplingParams(temperature=0, logit_bias={3: 100.0}, logprobs=2)
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1)
    sampled = sampler.sample(
        logits.clone(), [make(SamplingParams(temperature=0), 0, [1]), make(params, 1, [1])]
    )
    assert sampled.logprobs is not None and sampled.logprobs[0] is None
    entry = sampled.logprobs[1]
    assert entry is not None and entry.token_id == 3
    assert entry.logprob == pytest.approx(expected[1, 3].item(), abs=1e-5)
    assert [t for t, _ in entry.top] == expected[1].topk(2).indices.tolist() != [3]


@pytest.mark.parametrize("form", ["bool", "short bool", "words"])
def test_grammar_masks_in_both_forms(form: str) -> None:
    class Even:
        def mask(self) -> Any:
            allowed = torch.arange(VOCAB) % 2 == 0
            if form == "words":
                padded = torch.nn.functional.pad(allowed, (0, -VOCAB % 32)).view(-1, 32).long()
                words = (padded << torch.arange(32)).sum(-1)
                return torch.where(words >= 2**31, words - 2**32, words).int().numpy()
            return allowed[: VOCAB // 2] if form == "short bool" else allowed

        def accept(self, token_id: int) -> None: ...

        def is_done(self) -> bool:
            return False

    sampler = Sampler(VOCAB, 32, CPU)
    requests = [
        make(SamplingParams(temperature=2.0, grammar=Even), slot, [1], seed=slot) for slot in range(32)
    ]
    for request in requests[:-1]:
        request.matcher = Even()
    tokens = sampler.sample(torch.randn(32, VOCAB), requests).tokens
    assert all(token % 2 == 0 for token in tokens[:-1]) and len(set(tokens)) > 10
    if form == "short bool":
        assert max(tokens[:-1]) < VOCAB // 2


def test_everything_banned_is_an_error_of_that_row() -> None:
    class Nothing:
        def mask(self) -> Any:
            return torch.zeros(VOCAB, dtype=torch.bool)

    sampler = Sampler(VOCAB, 2, CPU)
    requests = [make(SamplingParams(temperature=0), slot, [1]) for slot in range(2)]
    requests[0].matcher = Nothing()  # type: ignore[assignment]
    sampled = sampler.sample(torch.randn(2, VOCAB), requests)
    assert (
        sampled.tokens[0] == sampling.FAILED
        and "not finite" in sampled.errors[0]
        and list(sampled.errors) == [0]
    )


def test_tokens_that_came_another_way_are_counted() -> None:
    """Speculation appends several tokens at once: the counts must follow the request, not the sampler's own
    draws."""
    sampler = Sampler(VOCAB, 2, CPU)
    request = make(SamplingParams(temperature=0, frequency_penalty=2.0), 0, [1])
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 3.0, 2.0
    request.token_ids.append(sampler.sample(logits.clone(), [request]).tokens[0])
    assert request.output_ids == [7]
    request.token_ids += [8, 8]
    assert reference_token(logits[0], request) == 7
    assert sampler.sample(logits.clone(), [request]).tokens == [7]
    request.token_ids += [7, 7]
    assert sampler.sample(logits.clone(), [request]).tokens == [reference_token(logits[0], request)] == [0]
