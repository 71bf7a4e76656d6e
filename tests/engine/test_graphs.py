"""CUDA graphs: the ladder of sizes here, and on a GPU that replayed steps give what eager steps give."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from hadal.engine.graphs import graph_sizes
from hadal.engine.request import SamplingParams
from hadal.engine.runner import Ahead
from tests.engine.tiny import GQA, MLA, prompts

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("seats", [1, 2, 3, 5, 8, 16, 37, 64, 100, 256, 300, 512, 1000, 2048])
def test_sizes_climb_to_the_seats(seats: int) -> None:
    sizes = graph_sizes(seats)
    assert sizes == sorted(set(sizes)) and sizes[-1] == seats and sizes[0] == 1
    for low, high in itertools.pairwise(sizes):
        assert high <= max(low * 2, low + 128), "padding at most doubles a small step"


def test_sizes_are_the_usual_ones() -> None:
    assert graph_sizes(128) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [MLA, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize("at_start", [False, True])
def test_graphs_change_nothing(config: object, at_start: bool) -> None:
    from hadal.engine.engine import Engine
    from hadal.model.transformer import Transformer

    model = Transformer(config, dtype=torch.float32, device="cuda").init_weights(1).eval()  # type: ignore[arg-type]
    options = {"max_num_seqs": 8, "page_size": 16, "cache_bytes": 2**22, "max_model_len": 256}
    eager = Engine(model, cuda_graphs=False, **options)  # type: ignore[arg-type]
    replayed = Engine(model, capture_at_start=at_start, **options)  # type: ignore[arg-type]
    many = prompts(7)
    expected = [done.token_ids for done in eager.generate(many, GREEDY)]
    assert [done.token_ids for done in replayed.generate(many, GREEDY)] == expected
    assert replayed.runner.graphs is not None and replayed.runner.graphs.broken is None
    assert replayed.runner.graphs.captured
    sampled = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=24, ignore_eos=True)
    assert replayed.generate(many[0], sampled).token_ids == eager.generate(many[0], sampled).token_ids
    replayed.check_integrity()


@pytest.mark.gpu
@pytest.mark.parametrize("config", [MLA, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize("at_start", [False, True])
def test_replayed_prompts_change_nothing(config: object, at_start: bool) -> None:
    """Alone, so that each is a step of its own; three times, since a size is captured at its second; with a
    first token of the whole vocabulary's log-probabilities."""
    from hadal.engine.engine import Engine
    from hadal.model.transformer import Transformer

    model = Transformer(config, dtype=torch.float32, device="cuda").init_weights(1).eval()  # type: ignore[arg-type]
    options = {"page_size": 16, "cache_bytes": 2**22, "max_model_len": 256, "prefix_caching": False}
    eager = Engine(model, cuda_graphs=False, **options)  # type: ignore[arg-type]
    replayed = Engine(model, capture_at_start=at_start, **options)  # type: ignore[arg-type]
    graphs = replayed.runner.prompt_graphs
    assert graphs is not None and eager.runner.prompt_graphs is None
    asked = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=5, prompt_logprobs=0)
    for length in (2, 31, 32, 33, 100):
        prompt = [3 + (7 * i + length) % 50 for i in range(length)]
        want = eager.generate(prompt, asked)
        for _ in range(3):
            got = replayed.generate(prompt, asked)
            assert got.token_ids == want.token_ids
            for ours, theirs in ((got.logprobs, want.logprobs), (got.prompt_logprobs, want.prompt_logprobs)):
                assert ours is not None and theirs is not None and len(ours) == len(theirs)
                for a, b in zip(ours, theirs, strict=True):
                    assert (a is None) == (b is None)
                    assert a is None or b is None or a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert graphs.broken is None and graphs.captured == (graphs.sizes if at_start else [32, 64, 128])
    replayed.check_integrity()


def test_a_step_started_ahead_serves_plans_that_it_holds() -> None:
    """The plan's sequences in their order, some gone; none that is new, elsewhere by now, or seated anew."""
    requests, pages = [object() for _ in range(4)], [[n] for n in range(4)]
    ahead = Ahead([(requests[n], 10 + n, pages[n]) for n in range(4)], torch.empty(4, 2))

    def rows(*wanted: int, start: int = 10, seated: list[list[int]] = pages) -> list[int] | None:
        plan = [SimpleNamespace(request=requests[n], start=start + n, pages=seated[n]) for n in wanted]
        return ahead.rows_of(plan)  # type: ignore[arg-type]

    assert rows(0, 1, 2, 3) == [0, 1, 2, 3] and rows(1, 3) == [1, 3] and rows() == []
    assert rows(2, 1) is None and rows(1, 1) is None
    assert rows(0, 2, start=11) is None
    assert rows(0, 2, seated=[list(one) for one in pages]) is None
    requests.append(object())
    assert rows(3, 4, seated=[*pages, [4]]) is None


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_steps_started_ahead_change_nothing(seed: int) -> None:
    """Requests of other lengths come, go and are aborted while the next step is already under way; seeded and
    greedy outputs and their log-probabilities equal those of an engine without graphs, and no page is
    lost."""
    import random

    from hadal.engine.engine import Engine
    from hadal.model.transformer import Transformer

    model = Transformer(MLA, dtype=torch.float32, device="cuda").init_weights(1).eval()
    options = {"max_num_seqs": 6, "page_size": 4, "cache_bytes": 2**20, "max_model_len": 128}
    draw = random.Random(seed)
    work = [(prompt, draw.randint(1, 40), draw.random() < 0.5) for prompt in prompts(14)]
    results = []
    for graphs in (False, True):
        engine = Engine(model, cuda_graphs=graphs, **options)  # type: ignore[arg-type]
        arrivals, found, told = random.Random(seed), {}, {}
        pending = list(enumerate(work))
        while pending or engine.has_work():
            while pending and (not engine.has_work() or arrivals.random() < 0.15):
                index, (prompt, length, greedy) = pending.pop(0)
                params = SamplingParams(
                    temperature=0.0 if greedy else 1.0, seed=index, max_tokens=length, ignore_eos=True,
                    logprobs=(None, 0, 2)[index % 3], logprobs_of="model" if greedy else "sampler",
                )  # fmt: skip
                found[engine.add(prompt, params, request_id=str(index))] = []
            for request_id, update in engine.step():
                found[request_id] += update.token_ids
                told.setdefault(request_id, []).extend(update.logprobs or ())
            if engine.has_work() and arrivals.random() < 0.02:
                engine.abort(next(iter(engine._requests)))
        engine.check_integrity()
        results.append((found, told))
    for request_id, tokens in results[0][0].items():
        other = results[1][0][request_id]
        n = min(len(tokens), len(other))  # an abort may fall on another step
        assert tokens[:n] == other[:n], request_id
        for a, b in zip(results[0][1].get(request_id, ()), results[1][1].get(request_id, ()), strict=False):
            assert a.token_id == b.token_id and a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert len(a.top) == len(b.top)
    assert sum(map(len, results[1][0].values())) > 100
    assert sum(map(len, results[1][1].values())) > 50


@pytest.mark.gpu
def test_sampling_on_the_gpu_equals_the_cpu() -> None:
    from hadal.ops import sampling
    from hadal.ops.sampling import Filters

    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0)) * 3
    rows = range(40)
    columns = (
        [(0.0, 0.7, 1.0)[i % 3] for i in rows],
        [(0, 20)[i % 2] for i in rows],
        [(1.0, 0.9, 0.5)[i % 3] for i in rows],
        [(0.0, 0.1)[i // 20] for i in rows],
    )
    seed, position = torch.arange(40), torch.arange(40) * 3
    tokens = []
    for device in ("cpu", "cuda"):
        filters = Filters.build(*columns, device)
        u = sampling.uniform(seed.to(device), position.to(device))
        tokens.append(sampling.sample(logits.to(device), filters, u).tolist())
    assert tokens[0] == tokens[1]
