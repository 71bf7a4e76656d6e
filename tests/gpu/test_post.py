"""Post-training on a CUDA device: scores equal the sampler's to the bit, fused statistics of the head,
adapters under graphs, a whole run of `hadal sft`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hadal.engine.engine import Engine
from hadal.engine.request import SamplingParams
from hadal.ops import invariant
from hadal.ops.exact import exact
from hadal.ops.log_probs import Law, linear_log_probs, log_probs_reference
from hadal.post.lora import Adapters, LoraRecipe
from hadal.post.score import Sample, pack, score
from hadal.post.sft import sft
from hadal.train.graphs import PassGraphs
from hadal.train.optimizer import AdamW
from tests.gpu.test_training import WIDE
from tests.post.bases import base, chats, recipe, write
from tests.train import tiny as train_tiny
from tests.weights import tiny
from tests.weights.helpers import random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
BIAS = {2: -100.0}


def sampled(model: Any, exactly: bool) -> tuple[list[Sample], torch.Tensor]:
    running = Engine(
        model, cache_bytes=1 << 26, max_model_len=128, max_num_seqs=8, exact=exactly, speculation="off"
    )
    prompts = [list(range(3 + i, 20 + 2 * i)) for i in range(8)]
    params = [
        SamplingParams(temperature=0.7, max_tokens=8 + 4 * i, logprobs=0, logprobs_of="sampler", seed=i,
                       logit_bias=BIAS, ignore_eos=True)
        for i in range(8)
    ]  # fmt: skip
    done = running.generate(prompts, params)
    reported = [e.logprob for d in done for e in d.logprobs or []]
    return [Sample(p, d.token_ids) for p, d in zip(prompts, done, strict=True)], torch.tensor(reported)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["v3", "v2-lite", "moe-16b", "qwen2", "llama"])
def test_in_exact_mode_the_gap_is_zero(kind: str, dtype: torch.dtype) -> None:
    model = random_model(tiny.ALL[kind], seed=1, dtype=dtype).cuda()
    samples, reported = sampled(model, True)
    packed = pack(samples, depths=len(model.mtp)).to(model.device)
    law = Law(0.7, bias=tuple(BIAS.items()))
    with exact():
        found = score(model, packed, law, entropy=True, mtp=True)
    assert torch.equal(found.logprob_N.detach().cpu(), reported)
    found.logprob_N.sum().backward()
    with exact(), torch.no_grad():
        assert torch.equal(score(model, packed, law).logprob_N.cpu(), reported)
    samples, reported = sampled(model, False)
    gap = score(model, pack(samples).to(model.device), law).logprob_N.detach().cpu() - reported
    print(f"{kind} {dtype}: ordinary gap {gap.abs().max():.2e}")
    # in BF16 a gate that decides otherwise moves single tokens by nats
    assert gap.abs().max() < 1e-2 if dtype == torch.float32 else gap.abs().mean() < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unused_rows_of_the_head_change_no_bit(dtype: torch.dtype) -> None:
    x, w = torch.randn(37, 144, device="cuda").to(dtype), torch.randn(150, 144, device="cuda").to(dtype)
    whole = invariant.linear(x, w, wide=True)
    for size in (149, 131, 17):
        assert torch.equal(invariant.linear(x, w[:size], wide=True), whole[:, :size])
        assert torch.equal(invariant.logsumexp(whole[:, :size]), invariant.logsumexp(whole[:, :size].clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("law", [Law(), Law(0.6, 30_000, ((3, -100.0),))], ids=["plain", "tempered"])
def test_log_probabilities_entropies_and_gradients(law: Law, dtype: torch.dtype) -> None:
    hidden = torch.randn(700, 256, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(32_000, 256, device="cuda") / 8).to(dtype).requires_grad_()
    token = torch.randint(0, 30_000, (700,), device="cuda")
    found, entropy = linear_log_probs(hidden, weight, token, law, entropy=True, chunk_tokens=256)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want, want_entropy = log_probs_reference(*wide, token, law)
    assert entropy is not None
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-4, atol=2e-3)
    share = torch.randn(700, device="cuda")
    (found * share).sum().backward()
    (want * share.double()).sum().backward()
    for mine, other in zip((hidden, weight), wide, strict=True):
        assert mine.grad is not None and other.grad is not None
        error = (mine.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < (1e-3 if dtype == torch.float32 else 1e-2)


def test_adapters_are_the_same_with_and_without_graphs() -> None:
    """Ten steps in BF16: merged weights follow A and B, graphs or not, and the loss falls."""
    results = []
    for graphs in (False, True):
        model = train_tiny.model(dtype=torch.bfloat16, **WIDE).cuda()
        adapters = Adapters(model, LoraRecipe(rank=4))
        trainer = train_tiny.trainer(model, speed=0.0, alpha=0.0, rate=1e-2)
        trainer.optimizer = AdamW(adapters.named_parameters())
        adapters.attach(trainer.optimizer)
        if graphs:
            trainer.graphs = PassGraphs(model, trainer.optimizer, required=True)
        stream = trainer.batches
        trainer.batches = (batch.to(model.device) for batch in stream)
        stats = [one for _ in range(10) for one in trainer.step()] + trainer.arrived(wait=True)
        if graphs:
            assert trainer.graphs is not None and trainer.graphs.recorded
        for item in adapters.items:
            want = (item.base.double() + adapters.scale * (item.b.double() @ item.a.double())).to(
                torch.bfloat16
            )
            torch.testing.assert_close(item.weight.detach(), want, rtol=2**-7, atol=1e-5)
        results.append(torch.cat([p.detach().flatten() for _, p in adapters.named_parameters()]))
        assert len(stats) == 10 and stats[-1].loss < stats[0].loss
    assert (results[0] - results[1]).norm() < 0.05 * results[0].norm()


@pytest.mark.parametrize("rank", [0, 8], ids=["all", "lora"])
def test_a_whole_run(rank: int, tmp_path: Path) -> None:
    start = base(tmp_path / "base", "qwen2")
    file = write(tmp_path / "talk.jsonl", chats(200))
    path = recipe(tmp_path / "r.toml", start, [file], lora={"rank": rank}, train={"epochs": 3},
                  learning_rate={"peak": 2e-2 if rank else 5e-3})  # fmt: skip
    outcome = sft(path, out=tmp_path / "run", device="cuda", console=Console(quiet=True))
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [s["loss"] for s in steps if s["kind"] == "step"]
    assert outcome.finished and losses[-1] < losses[0] - 0.5
    assert Engine.load(outcome.export, max_model_len=64).generate([5, 6, 7], SamplingParams(max_tokens=4))


def test_the_smoke_recipe(tmp_path: Path) -> None:
    """hadal-mini (MLA, experts, MTP) in BF16 with LoRA, as CUDA graphs where they can be."""
    smoke = Path(__file__).resolve().parents[2] / "recipes" / "sft-smoke.toml"
    outcome = sft(smoke, out=tmp_path / "run", device="cuda", console=Console(quiet=True))
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [s["loss"] for s in steps if s["kind"] == "step"]
    assert outcome.finished and losses[-1] < 0.5 * losses[0]
    done = Engine.load(outcome.export, max_model_len=512).chat(
        [{"role": "user", "content": "6 × 37 = ?"}], SamplingParams(temperature=0, max_tokens=200)
    )
    print(done.text)
    assert done.content and "Answer" in done.content
