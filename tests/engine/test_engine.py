"""The engine on tiny random models: the same tokens however they are batched, chunked, cached or
preempted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hadal.engine.engine import Engine
from hadal.engine.request import Completion, EngineError, RequestError, SamplingParams, Update
from hadal.model.context import Context
from tests.engine.tiny import VOCAB, prompts, tiny_engine, tiny_model, tiny_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
KINDS = ["mla", "gqa"]


def naive_greedy(kind: str, prompt: list[int], new: int) -> list[int]:
    """The whole sequence through the model again for each token, without a cache."""
    tokens = list(prompt)
    model = tiny_model(kind)
    with torch.no_grad():
        for _ in range(new):
            hidden = model(torch.tensor(tokens), Context.packed([len(tokens)]))
            tokens.append(int(model.logits(hidden[-1:]).argmax()))
    return tokens[len(prompt) :]


def tokens_of(engine: Engine, many: list[list[int]], params: Any = GREEDY) -> list[list[int]]:
    out = [completion.token_ids for completion in engine.generate(many, params)]
    engine.check_integrity()
    return out


# --- the same output, whatever happens ---


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_the_model_run_naively(kind: str) -> None:
    many = prompts(6)
    expected = [naive_greedy(kind, prompt, 12) for prompt in many]
    assert tokens_of(tiny_engine(kind), many) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_singles(kind: str) -> None:
    many = prompts(9, seed=1)
    singles = [tiny_engine(kind).generate(prompt, GREEDY).token_ids for prompt in many]
    assert tokens_of(tiny_engine(kind, max_num_seqs=9, pages=200), many) == singles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [8, 9, 13])
def test_chunked_prefill_equals_whole(kind: str, budget: int) -> None:
    many = prompts(4, length=60, seed=2)
    whole = tokens_of(tiny_engine(kind, pages=300, max_num_batched_tokens=512), many)
    assert tokens_of(tiny_engine(kind, pages=300, max_num_batched_tokens=budget), many) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_cache_hit_equals_miss(kind: str) -> None:
    shared = prompts(1, length=40, seed=3)[0]
    many = [shared + tail for tail in prompts(4, length=5, seed=4)]
    engine = tiny_engine(kind, pages=200)
    first = tokens_of(engine, many)
    again = engine.generate(many, GREEDY)
    assert [c.token_ids for c in again] == first
    assert all(c.cached_tokens >= len(shared) // 4 * 4 for c in again)
    off = tiny_engine(kind, pages=200, prefix_caching=False)
    assert tokens_of(off, many) == first
    assert [c.cached_tokens for c in off.generate(many, GREEDY)] == [0] * 4
    stats = engine.stats()
    assert 0 < stats.prefix_hits < stats.prefix_queries


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=1.5, seed=5, max_tokens=12, ignore_eos=True)]
)
def test_preemption_changes_nothing(kind: str, params: SamplingParams) -> None:
    many = [prompt[:14] for prompt in prompts(6, length=12, seed=5)]
    calm = tiny_engine(kind, pages=200)
    tight = tiny_engine(kind, pages=9)
    assert tokens_of(tight, many, params) == tokens_of(calm, many, params)
    assert tight.stats().preemptions > 0 and calm.stats().preemptions == 0
    assert tight.stats().cache_usage == 0.0


def test_seeded_sampling_is_the_same_under_any_batching() -> None:
    many = prompts(8, seed=6)
    params = [
        SamplingParams(
            temperature=1.2, top_p=0.95, top_k=50, min_p=0.01, seed=i, max_tokens=10, ignore_eos=True
        )
        for i in range(8)
    ]
    batch = tokens_of(tiny_engine(pages=200), many, params)
    engine = tiny_engine(max_num_batched_tokens=9)
    singles = [engine.generate(prompt, p).token_ids for prompt, p in zip(many, params, strict=True)]
    assert batch == singles
    backwards = tokens_of(tiny_engine(pages=200, max_num_seqs=3), many[::-1], params[::-1])
    assert backwards[::-1] == batch
    assert len({tuple(engine.generate(many[0], p).token_ids) for p in params}) > 4, "seeds make a difference"


def test_unseeded_requests_differ_and_an_engine_seed_repeats_them() -> None:
    params = SamplingParams(temperature=2.0, max_tokens=10, ignore_eos=True)
    runs = [tokens_of(tiny_engine(seed=seed), [[5, 6, 7]] * 2, params) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_streams_interleave_and_agree_with_generate() -> None:
    many = prompts(3, seed=7)
    engine = tiny_engine()
    expected = [c.token_ids for c in engine.generate(many, GREEDY)]
    streams = [engine.stream(prompt, GREEDY) for prompt in many]
    got: list[list[int]] = [[], [], []]
    first = next(streams[0])
    got[0] += first.token_ids
    assert first.finish_reason is None and first.prompt_tokens == len(many[0])
    for updates, out in zip(streams, got, strict=True):
        for update in updates:
            out += update.token_ids
            assert update.completion_tokens == len(out)
    assert got == expected


# --- the end of a request ---


def test_length_and_context_end() -> None:
    engine = tiny_engine(pages=16)  # 64 tokens
    assert engine.max_model_len == 64
    done = engine.generate([7] * 50, SamplingParams(temperature=0, ignore_eos=True))
    assert done.finish_reason == "length" and len(done.token_ids) == 14
    with pytest.raises(RequestError) as caught:
        engine.generate([7] * 64)
    assert caught.value.code == "context_length_exceeded" and "64" in str(caught.value)
    with pytest.raises(RequestError, match="lower max_tokens to 14"):
        engine.generate([7] * 50, SamplingParams(max_tokens=15))
    assert engine.generate([7] * 63, GREEDY_ONE).finish_reason == "length"


GREEDY_ONE = SamplingParams(temperature=0, max_tokens=1)


def test_stop_token_ids_and_min_tokens() -> None:
    engine = tiny_engine()
    plain = engine.generate([5, 9, 11], GREEDY).token_ids
    stop = plain[3]
    place = plain.index(stop)
    done = engine.generate([5, 9, 11], SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop,)))
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    assert done.token_ids == plain[: place + 1]
    later = engine.generate(
        [5, 9, 11], SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop,), min_tokens=place + 3)
    )
    assert len(later.token_ids) >= place + 3 and stop not in later.token_ids[: place + 2]


def test_grammar_constrains_and_ends_the_output() -> None:
    class Only:
        """Allows 10, then 20, then 30, and is done."""

        def __init__(self) -> None:
            self.left = [30, 20, 10]

        def mask(self) -> torch.Tensor:
            allowed = torch.zeros(VOCAB, dtype=torch.bool)
            allowed[self.left[-1]] = True
            return allowed

        def accept(self, token_id: int) -> None:
            assert token_id == self.left.pop()

        def is_done(self) -> bool:
            return not self.left

    engine = tiny_engine()
    free = engine.generate([4, 5, 6], GREEDY).token_ids
    both = engine.generate(
        [[4, 5, 6], [4, 5, 6]], [SamplingParams(grammar=Only, temperature=1.0, max_tokens=9), GREEDY]
    )
    assert (both[0].token_ids, both[0].finish_reason) == ([10, 20, 30], "stop")
    assert both[1].token_ids == free


def test_a_broken_grammar_fails_alone() -> None:
    class Broken:
        def mask(self) -> Any:
            raise ValueError("no mask today")

        def accept(self, token_id: int) -> None: ...

        def is_done(self) -> bool:
            return False

    engine = tiny_engine()
    done = engine.generate([[4, 5], [4, 5]], [SamplingParams(grammar=Broken, max_tokens=3), GREEDY])
    assert done[0].finish_reason == "error" and "no mask today" in (done[0].error or "")
    assert done[1].finish_reason == "length"
    engine.check_integrity()


# --- text ---


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(str(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def text_engine(tokenizer: Any) -> Engine:
    from hadal.text.templates import TEMPLATES

    return tiny_engine(tokenizer=tokenizer, template=TEMPLATES["deepseek-r1"], pages=200)


def test_text_prompts_get_bos_and_come_back_as_text(text_engine: Engine, tokenizer: Any) -> None:
    done = text_engine.generate("Hello there", GREEDY)
    assert done.prompt_tokens == 1 + len(tokenizer.encode("Hello there"))
    assert done.text == done.content == tokenizer.decode(done.token_ids)
    streamed = list(text_engine.stream("Hello there", GREEDY))
    assert "".join(update.text for update in streamed) == done.text
    assert streamed[-1].metrics is not None and streamed[-1].metrics.ttft is not None


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens(text_engine: Engine, include: bool) -> None:
    whole = text_engine.generate("abc", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)).text
    assert len(whole) > 20
    for start in range(4, 14, 3):
        stop = whole[start : start + 5]
        params = SamplingParams(
            temperature=0, max_tokens=40, ignore_eos=True, stop=(stop,), include_stop=include
        )
        updates = list(text_engine.stream("abc", params))
        text = "".join(update.text for update in updates)
        end = whole.index(stop)
        assert text == whole[: end + len(stop) if include else end]
        assert (updates[-1].finish_reason, updates[-1].stop_reason) == ("stop", stop)


def test_end_of_text_has_no_text(text_engine: Engine, tokenizer: Any) -> None:
    eos = tokenizer.eos_ids[0]
    done = text_engine.generate("abc", SamplingParams(max_tokens=5, logit_bias={eos: 100}, temperature=0))
    assert (done.finish_reason, done.stop_reason, done.text) == ("stop", None, "")
    assert done.token_ids == [eos]
    kept = text_engine.generate(
        "abc", SamplingParams(max_tokens=5, logit_bias={eos: 100}, temperature=0, min_tokens=3)
    )
    assert len(kept.token_ids) == 4 and kept.token_ids.index(eos) == 3


def test_chat_splits_reasoning(text_engine: Engine, tokenizer: Any) -> None:
    close = tokenizer.special["</think>"]

    class Script:
        def __init__(self) -> None:
            self.left = [*tokenizer.encode("I think"), close, *tokenizer.encode("answer")]

        def mask(self) -> torch.Tensor:
            allowed = torch.zeros(text_engine.vocab_size, dtype=torch.bool)
            allowed[self.left[0]] = True
            return allowed

        def accept(self, token_id: int) -> None:
            self.left.pop(0)

        def is_done(self) -> bool:
            return not self.left

    messages = [{"role": "user", "content": "Question?"}]
    done = text_engine.chat(messages, SamplingParams(grammar=Script, max_tokens=60))
    assert (done.reasoning, done.content) == ("I think", "answer")
    assert done.text == "I think</think>answer"
    streamed = "".join(
        u.text for u in text_engine.chat_stream(messages, SamplingParams(grammar=Script, max_tokens=60))
    )
    assert streamed == done.text


def test_without_tokenizer_text_is_refused() -> None:
    engine = tiny_engine()
    for call in (
        lambda: engine.generate("text"),
        lambda: engine.chat([{"role": "user", "content": "x"}]),
        lambda: engine.generate([1, 2], SamplingParams(stop=("x",))),
    ):
        with pytest.raises(RequestError):
            call()


# --- log-probabilities and embeddings ---


def full_logprobs(kind: str, tokens: list[int]) -> torch.Tensor:
    model = tiny_model(kind)
    with torch.no_grad():
        return model.logits(model(torch.tensor(tokens), Context.packed([len(tokens)]))).log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_the_raw_distribution(kind: str) -> None:
    engine = tiny_engine(kind, max_num_batched_tokens=9)
    prompt = prompts(1, length=30, seed=8)[0]
    params = SamplingParams(
        temperature=0.5, top_k=3, repetition_penalty=1.5, logit_bias={9: 5.0}, seed=3, max_tokens=6,
        logprobs=4, prompt_logprobs=2, ignore_eos=True,
    )  # fmt: skip
    done = engine.generate(prompt, params)
    expected = full_logprobs(kind, prompt + done.token_ids)
    assert done.logprobs is not None and done.prompt_logprobs is not None
    for place, entry in enumerate(done.logprobs):
        row = expected[len(prompt) + place - 1]
        assert entry.token_id == done.token_ids[place]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert [t for t, _ in entry.top] == row.topk(4).indices.tolist()
    assert len(done.prompt_logprobs) == len(prompt) and done.prompt_logprobs[0] is None
    for place, scored in enumerate(done.prompt_logprobs[1:], start=1):
        assert scored is not None and scored.token_id == prompt[place] and len(scored.top) == 2
        assert scored.logprob == pytest.approx(expected[place - 1, prompt[place]].item(), abs=1e-4)


def test_prompt_logprobs_survive_the_prefix_cache_and_preemption() -> None:
    many = [p[:14] for p in prompts(5, length=12, seed=5)]
    params = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0, ignore_eos=True)
    calm, tight = tiny_engine(pages=200), tiny_engine(pages=9, max_num_batched_tokens=8)
    first = calm.generate(many, params)
    for engine in (calm, tight, tight):
        for a, b in zip(engine.generate(many, params), first, strict=True):
            assert (
                a.token_ids == b.token_ids and a.prompt_logprobs is not None and b.prompt_logprobs is not None
            )
            values = [
                [e.logprob for e in done if e is not None] for done in (a.prompt_logprobs, b.prompt_logprobs)
            ]
            assert len(a.prompt_logprobs) == len(b.prompt_logprobs)
            assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert tight.stats().preemptions > 0


def test_logprobs_only_where_asked() -> None:
    engine = tiny_engine()
    done = engine.generate(
        [[3, 4], [5, 6], [7]], [GREEDY, SamplingParams(temperature=0, logprobs=0, max_tokens=3), GREEDY]
    )
    assert done[0].logprobs is None and done[2].logprobs is None
    assert done[1].logprobs is not None and not any(entry.top for entry in done[1].logprobs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "last", "weighted"])
@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_embeddings(kind: str, pooling: Any, layer: int) -> None:
    engine = tiny_engine(kind, max_num_batched_tokens=11, pages=100)
    many = [*prompts(4, length=20, seed=9), [5]]
    vectors = engine.embed(many, pooling=pooling, layer=layer)
    model = tiny_model(kind)
    for prompt, vector in zip(many, vectors, strict=True):
        key = model.config.num_hidden_layers if layer == -1 else layer
        context = Context.packed([len(prompt)])
        context.capture_layers = frozenset([key])
        with torch.no_grad():
            model(torch.tensor(prompt), context)
        hidden = context.captured[key].double()
        weight = torch.arange(1, len(prompt) + 1).double()
        expected = {
            "mean": hidden.mean(0),
            "last": hidden[-1],
            "weighted": (weight[:, None] * hidden).sum(0) / weight.sum(),
        }[pooling]
        assert torch.allclose(torch.tensor(vector).double(), expected / expected.norm(), atol=1e-4)
        assert math.hypot(*vector) == pytest.approx(1.0, abs=1e-5)
    engine.check_integrity()
    alone = engine.embed(many[:1], pooling=pooling, layer=layer)[0]
    assert alone == pytest.approx(vectors[0], abs=1e-5), "neighbours and cached prefixes do not matter"


def test_embeddings_beside_generation_and_their_bounds() -> None:
    engine = tiny_engine(pages=16)
    stream = engine.stream([3, 4, 5], GREEDY)
    next(stream)
    raw = engine.embed([[8, 9, 10]], normalize=False)[0]
    assert math.hypot(*raw) != pytest.approx(1.0)
    assert len(engine.embed([[7] * 64])[0]) == 32
    with pytest.raises(RequestError, match="65 tokens"):
        engine.embed([[7] * 65])
    with pytest.raises(RequestError, match="layer must be from -1 to 3"):
        engine.embed([[7]], layer=4)
    assert [t for u in stream for t in u.token_ids] == naive_greedy("mla", [3, 4, 5], 12)[1:]


# --- bad requests, aborts, faults ---


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([-1], {}),
        ([VOCAB], {}),
        ([2**40], {}),
        ([1], {"logit_bias": {VOCAB: 1.0}}),
        ([1], {"stop_token_ids": (VOCAB,)}),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(prompt: list[int], params: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"ids go from 0 to {VOCAB - 1}"):
        tiny_engine().generate(prompt, SamplingParams(**params))


def test_one_bad_prompt_stops_the_batch_before_it_starts() -> None:
    engine = tiny_engine()
    with pytest.raises(RequestError):
        engine.generate([[1], [VOCAB]], GREEDY)
    with pytest.raises(RequestError, match="2 prompts, but 1"):
        engine.generate([[1], [2]], [GREEDY])
    assert not engine.has_work() and engine.stats().steps == 0
    assert engine.generate([], GREEDY) == []


def test_request_ids_are_unique() -> None:
    engine = tiny_engine()
    engine.add([1], GREEDY, request_id="a")
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add([1], GREEDY, request_id="a")
    assert engine.abort("a") and not engine.abort("a")


def test_abort_gives_the_pages_back_and_says_so() -> None:
    engine = tiny_engine()
    seen: list[Update] = []
    name = engine.add([5] * 30, GREEDY, on_update=seen.append)
    waiting = engine.add([6] * 30, GREEDY)
    engine.step()
    engine.step()
    assert engine.stats().cache_usage > 0
    engine.abort(name)
    engine.abort(waiting)
    assert seen[-1].finish_reason == "abort" and seen[-1].metrics is not None
    assert engine.stats().cache_usage == 0 and not engine.has_work()
    engine.check_integrity()


def test_closing_a_stream_aborts() -> None:
    engine = tiny_engine()
    for _ in engine.stream([1, 2, 3], GREEDY):
        break
    stream = engine.stream([1, 2, 3], GREEDY)
    next(stream)
    stream.close()
    assert not engine.has_work()
    engine.check_integrity()


def test_deadline_in_the_queue() -> None:
    engine = tiny_engine(max_num_seqs=1)
    engine.add([1, 2], GREEDY)
    engine.step()
    late: list[Update] = []
    engine.add([3, 4], GREEDY, deadline=0.0, on_update=late.append)
    engine.step()
    assert [u.finish_reason for u in late] == ["abort"] and "deadline" in (late[0].error or "")
    assert late[0].metrics is not None and late[0].metrics.first_scheduled is None


def test_random_adds_steps_and_aborts_conserve_everything() -> None:
    import random

    rng = random.Random(0)
    engine = tiny_engine(pages=12, max_num_seqs=4, max_num_batched_tokens=16)
    ended: list[str] = []
    alive: list[str] = []
    for _ in range(400):
        action = rng.random()
        if action < 0.3:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
            alive.append(engine.add(prompt, SamplingParams(max_tokens=rng.randint(1, 9), temperature=0.7)))
        elif action < 0.4 and engine._requests:
            engine.abort(rng.choice(list(engine._requests)))
        else:
            ended += [name for name, update in engine.step() if update.finish_reason]
        engine.check_integrity()
    while engine.has_work():
        ended += [name for name, update in engine.step() if update.finish_reason]
    stats = engine.stats()
    assert stats.cache_usage == 0 and sum(stats.finished.values()) == len(alive)
    assert stats.finished["abort"] > 10 and len(ended) + stats.finished["abort"] == len(alive)


def run_with_fault(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[Completion]:
    def fault(*args: Any) -> Any:
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(engine.runner.model, "forward", fault)
    return engine.generate([[1, 2], [3]], GREEDY)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory in a step of 3 tokens and 2 sequences"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory in a step",
        ),
        (ValueError("something else"), "ValueError: something else"),
    ],
)
def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    engine = tiny_engine()
    failed = run_with_fault(engine, monkeypatch, error)
    assert [done.finish_reason for done in failed] == ["error", "error"]
    assert all(says in (done.error or "") for done in failed)
    engine.check_integrity()
    assert engine.stats().cache_usage == 0 and engine.failure is None
    assert engine.generate([[1, 2]], GREEDY)[0].token_ids == naive_greedy("mla", [1, 2], 12)


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=1.0, seed=1, max_tokens=12, logprobs=2, ignore_eos=True)]
)
def test_nan_logits_fail_one_request(monkeypatch: pytest.MonkeyPatch, params: SamplingParams) -> None:
    engine = tiny_engine()
    many = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13]]
    healthy = [engine.generate(prompt, params).token_ids for prompt in many]
    engine.scheduler.pages.forget_prefixes()
    logits = engine.runner.model.logits
    calls = 0

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        out = logits(hidden)
        if calls == 4:
            out[1] = math.nan
        return out

    monkeypatch.setattr(engine.runner.model, "logits", poisoned)
    done = engine.generate(many, params)
    assert [d.finish_reason for d in done] == ["length", "error", "length"]
    assert "not finite" in (done[1].error or "") and done[1].token_ids == healthy[1][:3]
    assert [done[0].token_ids, done[2].token_ids] == [healthy[0], healthy[2]]
    engine.check_integrity()
    again = engine.generate([many[1]], params)[0]
    assert again.cached_tokens == 0 and again.token_ids == healthy[1], "its pages are not shared"


def test_a_raising_callback_ends_its_own_request() -> None:
    engine = tiny_engine()

    def burst(update: Update) -> None:
        raise KeyError("reader is gone")

    engine.add([1, 2, 3], GREEDY, on_update=burst)
    good = engine.add([1, 2, 3], GREEDY)
    engine.step()
    assert list(engine._requests) == [good]
    engine.check_integrity()


# --- sizes ---


def test_cache_that_is_too_small_is_refused_and_a_default_context_is_cut() -> None:
    with pytest.raises(EngineError, match=r"one context of 512 tokens takes .* lower max_model_len"):
        tiny_engine(pages=16, max_model_len=512)
    assert tiny_engine(pages=40, max_model_len=None).max_model_len == 160
    with pytest.raises(EngineError, match="max_model_len must be from 2 to 512"):
        tiny_engine(pages=400, max_model_len=513)


def test_cpu_cache_is_no_larger_than_needed() -> None:
    engine = Engine(tiny_model(), max_num_seqs=2, page_size=16)
    assert engine.scheduler.pages.capacity == 2 * 512 // 16 and engine.max_model_len == 512


def test_penalties_reach_the_output() -> None:
    engine = tiny_engine()
    plain = engine.generate(
        [5, 6, 7], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    ).token_ids
    params = SamplingParams(
        temperature=0, max_tokens=60, ignore_eos=True, presence_penalty=2, repetition_penalty=100.0
    )
    mixed = engine.generate(
        [[5, 6, 7], [5, 6, 7]], [params, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)]
    )
    assert mixed[1].token_ids == plain
    assert len(set(mixed[0].token_ids)) > len(set(plain))
    assert len(set(mixed[0].token_ids)) == 60, "so strong a penalty leaves no repetition"
    tight = tiny_engine(pages=18, page_size=4, max_model_len=64)
    other = [
        tight.generate(
            [[5, 6, 7]] * 3,
            [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, repetition_penalty=100.0)] * 3,
        )
    ]
    assert tight.stats().preemptions > 0
    assert all(done.token_ids == mixed[0].token_ids[:40] for done in other[0])


def test_load_from_a_folder(tmp_path: Path) -> None:
    from hadal import weights
    from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

    make_tiny_tokenizer(tmp_path)
    tokenizer = tiny_tokenizer(str(tmp_path))
    weights.save(tiny_model("mla", tokenizer.padded_vocab_size), tmp_path / "model")
    make_tiny_tokenizer(tmp_path / "model")
    seen: list[tuple[int, int]] = []
    engine = Engine.load(
        tmp_path / "model", max_model_len=64, progress=lambda done, total: seen.append((done, total))
    )
    assert engine.name == "model" and engine.folder == tmp_path / "model" and engine.max_model_len == 64
    assert engine.dtype == torch.float32 and seen[-1][0] == seen[-1][1]
    live = tiny_engine(tokenizer=tokenizer, max_model_len=64)
    assert engine.generate("Hello", GREEDY).token_ids == live.generate("Hello", GREEDY).token_ids
    with pytest.raises(EngineError, match="max_model_len"):
        Engine.load(tmp_path / "model", max_model_len=10**9)
    with pytest.raises(EngineError, match="dtype 'int3' is unknown"):
        Engine.load(tmp_path / "model", dtype="int3")
    with pytest.raises(EngineError, match="device"):
        Engine.load(tmp_path / "model", device="cuda:99")
