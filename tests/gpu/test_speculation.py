"""Drafts on a CUDA device: the same tokens with graphs, without, and without drafts; the right distribution;
one reading of the device a step."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from hadal.engine.engine import Engine
from hadal.engine.request import SamplingParams
from hadal.model.transformer import Transformer
from tests.engine.speculative import CONFIGS
from tests.engine.test_speculation import DRAWN, PROMPT, VOCAB, chi_square, joint
from tests.engine.tiny import prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.2, top_p=0.95, seed=7, max_tokens=24, ignore_eos=True)


def model_on_gpu(kind: str, vocab_size: int = 8) -> Transformer:
    return Transformer(replace(CONFIGS[kind], vocab_size=vocab_size), device="cuda").init_weights(3).eval()


def engine_on_gpu(model: Transformer, **options: Any) -> Engine:
    defaults = {
        "max_num_seqs": 8, "page_size": 16, "cache_bytes": 2**22, "max_model_len": 256,
        "speculation": "mtp", "num_speculative_tokens": 3, "speculation_max_batch": 8,
        "speculation_adaptive": False,
    }  # fmt: skip
    return Engine(model, **{**defaults, **options})


@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("method", ["mtp", "ngram"])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("at_start", [False, True])
def test_drafts_and_graphs_change_no_token(kind: str, method: str, number: int, at_start: bool) -> None:
    model = model_on_gpu(kind)
    many = prompts(7, vocab_size=8)
    plain = engine_on_gpu(model, speculation="off", cuda_graphs=False)
    options = {"speculation": method, "num_speculative_tokens": number}
    eager = engine_on_gpu(model, cuda_graphs=False, **options)
    replayed = engine_on_gpu(model, capture_at_start=at_start, **options)
    for params in (GREEDY, SEEDED):
        expected = [done.token_ids for done in plain.generate(many, params)]
        for engine in (eager, replayed, replayed):  # the last on cached prefixes
            assert [done.token_ids for done in engine.generate(many, params)] == expected
            engine.check_integrity()
    assert replayed.stats().speculation.accepted > 0
    assert replayed.runner.graphs.broken is None and replayed.runner.graphs.captured
    mtp = replayed.runner._mtp_graphs
    assert (method == "mtp") == (mtp is not None)
    assert mtp is None or (mtp.broken is None and mtp.captured)


def test_drafts_replayed_are_those_computed() -> None:
    """The MTP block's graphs see the step that they follow: the same drafts as without graphs."""
    model = model_on_gpu("mla", 40)
    found = []
    for graphs in (False, True):
        engine = engine_on_gpu(model, cuda_graphs=graphs)
        seen: dict[tuple[int, ...], list[int]] = {}
        attach = engine.speculation.attach

        def record(plan: Any, engine: Engine = engine, seen: Any = seen, attach: Any = attach) -> None:
            attach(plan)
            for request in engine.scheduler.running:
                seen[tuple(request.token_ids)] = list(request.draft_ids)

        engine.speculation.attach = record
        engine.generate(prompts(6, vocab_size=40), GREEDY)
        found.append(seen)
    assert found[0] == found[1] and len(found[0]) > 50


@pytest.mark.parametrize("method", ["mtp", "ngram"])
@pytest.mark.parametrize("graphs", [False, True])
def test_drawn_tokens_have_the_targets_joint_distribution(method: str, graphs: bool) -> None:
    model = model_on_gpu("mla", VOCAB)
    engine = engine_on_gpu(
        model, speculation=method, num_speculative_tokens=2, max_num_seqs=128, speculation_max_batch=128,
        cuda_graphs=graphs, cache_bytes=2**24,
    )  # fmt: skip
    engine._seeds = random.Random(f"{method} {graphs}")
    done = engine.generate([PROMPT] * 8000, replace(DRAWN, max_tokens=6, ignore_eos=True))
    counts: dict[tuple[int, ...], int] = {}
    for completion in done:
        head = tuple(completion.token_ids[:3])
        counts[head] = counts.get(head, 0) + 1
    on_cpu = Transformer(model.config).eval()
    on_cpu.load_state_dict(model.state_dict())
    assert abs(chi_square(counts, joint(on_cpu, 3, DRAWN))) < 4
    assert engine.stats().speculation.accepted > 0


def test_look_ahead_gives_way_and_comes_back() -> None:
    """Steps are started ahead while drafting rests, and never while drafts are due; no token changes."""
    model = model_on_gpu("mla")
    plain = engine_on_gpu(model, speculation="off", cuda_graphs=False)
    engine = engine_on_gpu(model)
    rng = random.Random(2)
    resting = [False]
    engine.speculation.policy.allows = lambda batch: not resting[0]
    many = [prompt[:12] for prompt in prompts(8, vocab_size=8)]
    params = replace(GREEDY, max_tokens=80)
    expected = [done.token_ids for done in plain.generate(many, params)]
    started = []
    look_ahead = engine.runner.look_ahead
    engine.runner.look_ahead = lambda *args: (started.append(resting[0]), look_ahead(*args))[1]
    streams = [engine.stream(prompt, params) for prompt in many]
    got: list[list[int]] = [[] for _ in many]
    for turn in range(4000):
        resting[0] = rng.random() < 0.7 if turn % 5 == 0 else resting[0]
        place = rng.randrange(8)
        update = next(streams[place], None)
        if update is not None:
            got[place] += update.token_ids
    assert got == expected
    assert started and all(started)
    engine.check_integrity()


def test_a_drafted_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_on_gpu("mla")
    engine = engine_on_gpu(model, num_speculative_tokens=2)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    engine.generate([1, 2, 3], params)  # graphs are captured, kernels compiled
    stream = engine.stream([1, 2, 3], params)
    for _ in range(4):
        next(stream)
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(self.is_cuda), tolist(self))[1])
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as warned:
            next(stream)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    stream.close()
    assert sum(reads) == 1
    assert sum("synchroniz" in str(w.message) for w in warned) <= 2, "the reading, and the event before it"
