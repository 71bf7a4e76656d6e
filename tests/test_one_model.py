"""Trainer and sampler share one model: the engine runs on the tensors that a training step has changed."""

from __future__ import annotations

import pytest
import torch

from hadal.engine import Engine, SamplingParams
from hadal.model import Context
from tests.train import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_engine_samples_from_the_tensors_that_the_trainer_trains() -> None:
    model = tiny.model()
    engine = Engine(model, max_num_seqs=2, max_model_len=64, page_size=4, cache_bytes=1 << 20)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    prompt = list(range(5, 25))

    def by_engine() -> torch.Tensor:
        done = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
        assert done.prompt_logprobs is not None
        return torch.tensor([entry.logprob for entry in done.prompt_logprobs[1:] if entry is not None])

    @torch.no_grad()
    def by_model() -> torch.Tensor:
        token = torch.tensor(prompt)
        hidden = model(token, Context.packed([len(prompt)]))
        return model.logits(hidden)[:-1].log_softmax(-1).gather(-1, token[1:, None]).squeeze(-1)

    before = by_engine()
    torch.testing.assert_close(before, by_model(), rtol=1e-5, atol=1e-5)
    trainer = tiny.trainer(model)
    for _ in range(2):
        trainer.step()
    engine.scheduler.pages.forget_prefixes()  # keys of the old weights
    after = by_engine()
    torch.testing.assert_close(after, by_model(), rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3
    assert addresses == {name: p.data_ptr() for name, p in model.named_parameters()}
    engine.check_integrity()
