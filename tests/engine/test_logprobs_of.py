"""Log-probabilities of the distribution that tokens are drawn from: what reinforcement learning needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hadal.engine.engine import Engine
from hadal.engine.request import RequestError, SamplingParams
from hadal.model.context import Cache, Context
from tests.engine.tiny import prompts
from tests.weights import tiny
from tests.weights.helpers import random_model


def engine(model: Any, **options: Any) -> Engine:
    size = Cache.bytes_per_page(model.config, 4, model.dtype, extra_layers=1)
    return Engine(model, page_size=4, cache_bytes=200 * size, max_model_len=64, max_num_seqs=4, **options)


@pytest.mark.parametrize("speculation", ["off", "mtp"])
def test_they_are_tempered_and_biased(speculation: str) -> None:
    """Beside a request for the model's own, in one batch: each is what its formula says."""
    model = random_model(tiny.V3, seed=1)
    running = engine(model, speculation=speculation, speculation_adaptive=False)
    many = prompts(2, length=10, vocab_size=100, seed=3)
    bias = {5: -100.0, 7: 1.5}
    plain = SamplingParams(max_tokens=8, temperature=0.6, logprobs=2, seed=1, ignore_eos=True)
    drawn = SamplingParams(
        max_tokens=8, temperature=0.6, logprobs=2, seed=1, ignore_eos=True, logit_bias=bias,
        logprobs_of="sampler",
    )  # fmt: skip
    for prompt, params, done in zip(
        many, (plain, drawn), running.generate(many, [plain, drawn]), strict=True
    ):
        ids = prompt + done.token_ids
        with torch.no_grad():
            logits = model.logits(model(torch.tensor(ids), Context.packed([len(ids)])))[len(prompt) - 1 : -1]
        if params.logprobs_of == "sampler":
            for token, value in bias.items():
                logits[:, token] += value
            logits = logits / 0.6
        want = logits.log_softmax(-1)
        assert done.logprobs is not None
        for row, entry in zip(want, done.logprobs, strict=True):
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=2e-5)
            assert entry.top[0][1] == pytest.approx(row.max().item(), abs=2e-5)


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0}, {"presence_penalty": 1.0},
     {"min_tokens": 3}],
)  # fmt: skip
def test_what_a_trainer_cannot_repeat_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="a trainer must be able to repeat it"):
        SamplingParams(logprobs=0, logprobs_of="sampler", max_tokens=9, **changes)


def test_only_two_kinds_are_known() -> None:
    with pytest.raises(RequestError, match='"model" or "sampler"'):
        SamplingParams(logprobs_of="raw")  # type: ignore[arg-type]
