"""Drafts change how fast tokens come, and nothing else: the same tokens where the output is determined, the
same distribution where it is drawn, and books that add up whatever ends in the middle of a step."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from hadal.engine.engine import Engine
from hadal.engine.request import Completion, EngineError, Request, SamplingParams
from hadal.engine.speculation import PLAIN_STEPS, REST, TRIED_STEPS, Policy
from hadal.model.context import Context
from hadal.model.transformer import Transformer
from hadal.ops import sampling, speculative
from tests.engine.speculative import CONFIGS, drafting_engine, drafting_model
from tests.engine.tiny import prompts

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.3, top_k=6, top_p=0.95, seed=11, max_tokens=24, ignore_eos=True)
KINDS = ["mla", "gqa"]
METHODS = ["mtp", "ngram"]
MANY = prompts(7, vocab_size=8)
PLAIN: dict[str, list[Completion]] = {}


def tokens_of(engine: Engine, many: list[list[int]], params: Any = GREEDY) -> list[list[int]]:
    out = [completion.token_ids for completion in engine.generate(many, params)]
    engine.check_integrity()
    return out


def plain(many: list[list[int]], params: Any, kind: str = "mla") -> list[Completion]:
    """What the target alone gives; many tests ask for the same."""
    key = repr((many, params, kind))
    if key not in PLAIN:
        PLAIN[key] = drafting_engine(kind, speculation="off", pages=200).generate(many, params)
    return PLAIN[key]


def knowing(engine: Engine, many: list[list[int]], params: Any, wrong: float = 0.0) -> Engine:
    """Make an n-gram engine propose what plain decoding is known to give, with some of it spoilt."""
    rng = random.Random(4)
    answers = {
        tuple(prompt): prompt + done.token_ids
        for prompt, done in zip(many, plain(many, replace(params, max_tokens=60)), strict=True)
    }

    def propose(request: Request) -> list[int]:
        here = len(request.token_ids)
        right = answers[tuple(request.prompt_ids)][here : here + engine.speculation.num_tokens]
        return [(token + 1) % 8 if rng.random() < wrong else token for token in right]

    engine.speculation.ngram.propose = propose
    return engine


# --- the same tokens ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_greedy_and_seeded_tokens_are_those_without_drafts(kind: str, method: str, number: int) -> None:
    for params in (GREEDY, SEEDED):
        expected = [done.token_ids for done in plain(MANY, params, kind)]
        engine = drafting_engine(kind, speculation=method, num_speculative_tokens=number, pages=200)
        assert tokens_of(engine, MANY, params) == expected
        stats = engine.stats().speculation
        assert 0 < stats.accepted < stats.drafted and stats.emitted > stats.drafts
        assert sum(stats.accepted_by_place) == stats.accepted
        assert stats.accepted_by_place == sorted(stats.accepted_by_place, reverse=True)


@pytest.mark.parametrize("method", METHODS)
def test_chunked_prompts_preemption_and_prefix_hits_change_nothing(method: str) -> None:
    many = [prompt[:14] for prompt in prompts(6, length=12, seed=5, vocab_size=8)]
    for params in (GREEDY, SEEDED):
        expected = [done.token_ids for done in plain(many, params)]
        chunked = drafting_engine(speculation=method, pages=200, max_num_batched_tokens=9)
        tight = drafting_engine(speculation=method, pages=11)
        for engine in (chunked, tight):
            assert tokens_of(engine, many, params) == expected
            assert tokens_of(engine, many, params) == expected, "again, on cached prefixes"
            assert engine.stats().speculation.drafted > 0
        assert tight.stats().preemptions > 0 and chunked.stats().prefix_hits > 0
        assert tight.stats().cache_usage == 0.0


def test_right_drafts_shorten_the_run() -> None:
    params = replace(GREEDY, max_tokens=41)
    engine = knowing(drafting_engine(speculation="ngram", num_speculative_tokens=4, pages=200), MANY, params)
    assert tokens_of(engine, MANY, params) == [done.token_ids for done in plain(MANY, params)]
    stats = engine.stats().speculation
    assert stats.acceptance == 1.0 and stats.tokens_per_step == 5.0
    assert engine.stats().steps <= 41 / 5 + 8
    assert engine.stats().generation_tokens == 41 * len(MANY)


def test_decode_rows_equal_a_prompt_chunk() -> None:
    """What verification computes as k + 1 rows, a chunk computes, too, to rounding."""
    for kind in KINDS:
        one, other = (drafting_engine(kind, speculation="ngram", pages=40) for _ in range(2))
        ids = [(3 * i * i + i) % 8 for i in range(21)] + [1, 2, 3, 4]
        rows, chunk = [], []
        for engine, out, split in ((one, rows, True), (other, chunk, False)):
            request = engine.prepare(ids[:21], replace(GREEDY, max_tokens=9))
            engine.enqueue(request)
            engine.step()
            request.token_ids[21:] = ids[21:22] if split else ids[21:]
            request.draft_ids[:] = ids[22:] if split else []
            plan = engine.scheduler.schedule()
            assert plan.num_drafted == int(split) and plan.num_tokens == 4
            result = engine.runner.run(plan)
            out.append(engine.model.logits(result.hidden_TD))
        torch.testing.assert_close(rows[0], chunk[0], rtol=1e-4, atol=1e-4)


# --- the same distribution ---

VOCAB = 4
PROMPT = [0, 0, 1, 0, 2, 0, 3, 1, 1, 2, 1, 3, 2, 2, 3, 3, 0]  # every pair of tokens, so that all have matches


def chi_square(counts: dict[tuple[int, ...], int], target: dict[tuple[int, ...], float]) -> float:
    """(χ² − degrees of freedom) / √(2 · degrees of freedom), which is near a standard normal; cells that
    expect fewer than 5 are put together."""
    total, rest_seen, rest_expected, score, cells = sum(counts.values()), 0, 0.0, 0.0, 0
    for outcome, share in target.items():
        seen, expected = counts.get(outcome, 0), share * total
        if expected < 5:
            rest_seen, rest_expected = rest_seen + seen, rest_expected + expected
        else:
            score, cells = score + (seen - expected) ** 2 / expected, cells + 1
    if rest_expected > 1:
        score, cells = score + (rest_seen - rest_expected) ** 2 / rest_expected, cells + 1
    assert cells > 10
    return (score - (cells - 1)) / (2 * (cells - 1)) ** 0.5


def joint(model: Transformer, length: int, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The exact distribution of the next `length` tokens after PROMPT, from whole passes of the network."""
    shares: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        heads = list(shares)
        tokens = torch.tensor([[*PROMPT, *head] for head in heads])
        with torch.no_grad():
            hidden = model(tokens.flatten(), Context.packed([tokens.shape[1]] * len(heads)))
            logits = model.logits(hidden.unflatten(0, tokens.shape)[:, -1])
        grown = {}
        for head, row in zip(heads, logits.tolist(), strict=True):
            p = sampling.probabilities_reference(
                row,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                prompt=PROMPT,
                output=head,
                repetition=params.repetition_penalty,
                frequency=params.frequency_penalty,
                presence=params.presence_penalty,
                bias=dict(params.logit_bias),
            )
            grown |= {(*head, token): shares[head] * p[token] for token in range(VOCAB)}
        shares = grown
    return shares


def statistic(
    method: str, number: int, params: SamplingParams, *, kind: str = "mla", runs: int = 1000
) -> float:
    """How far the tokens of unseeded requests, drafts and all, are from the target."""
    model = drafting_model(kind, VOCAB, seed=3)
    length = max(3, number + 1)  # the first token is drawn after the prompt, the others are verified
    engine = drafting_engine(
        kind, model=model, speculation=method, num_speculative_tokens=number, max_num_seqs=100,
        max_num_batched_tokens=800, speculation_max_batch=100, pages=1000, page_size=8, max_model_len=64,
    )  # fmt: skip
    engine._seeds = random.Random(f"{method} {number} {params}")  # unseeded, but the same on every run
    done = engine.generate([PROMPT] * runs, replace(params, max_tokens=number + 4, ignore_eos=True))
    engine.check_integrity()
    stats = engine.stats().speculation
    assert 0 < stats.accepted < stats.drafted
    counts: dict[tuple[int, ...], int] = {}
    for completion in done:
        head = tuple(completion.token_ids[:length])
        counts[head] = counts.get(head, 0) + 1
    return chi_square(counts, joint(model, length, params))


DRAWN = SamplingParams(temperature=1.0)
CUT = SamplingParams(temperature=1.4, top_k=3, top_p=0.95)
PENALISED = SamplingParams(
    temperature=1.2, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.4, logit_bias={2: 0.7}
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_drawn_tokens_have_the_targets_joint_distribution(method: str, number: int) -> None:
    assert abs(statistic(method, number, DRAWN)) < 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("params", [CUT, PENALISED], ids=["cut", "penalised"])
def test_cuts_and_penalties_hold_at_every_place(method: str, params: SamplingParams) -> None:
    assert abs(statistic(method, 2, params)) < 4


def test_gqa_draws_from_its_target() -> None:
    assert abs(statistic("mtp", 2, DRAWN, kind="gqa")) < 4


def _always(p_RV: Any, q_RV: Any, draft_R: Any, accept_R: Any, draw_R: Any) -> Any:
    accepted, token = speculative.rejection(p_RV, q_RV, draft_R, accept_R * 0.5, draw_R)
    return accepted, token


def _from_p(p_RV: Any, q_RV: Any, draft_R: Any, accept_R: Any, draw_R: Any) -> Any:
    accepted, _ = speculative.rejection(p_RV, q_RV, draft_R, accept_R, draw_R)
    return accepted, sampling.choose(p_RV, draw_R)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [_always, _from_p], ids=["too often", "from p"])
def test_a_wrong_acceptance_is_noticed(method: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hadal.engine.sampler.rejection", wrong)
    assert abs(statistic(method, 2, DRAWN)) > 8


def test_wrong_draft_distributions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """q must be what the draft was drawn from, and each draft's own."""
    from hadal.engine.speculation import Speculator

    right = Speculator._proposals
    monkeypatch.setattr(
        Speculator, "_proposals", lambda *args: q if (q := right(*args)) is None else q.roll(1, 0)
    )
    assert abs(statistic("mtp", 2, DRAWN)) > 8


def test_forced_acceptance_accepts_at_its_rate() -> None:
    engine = drafting_engine(num_speculative_tokens=2, speculation_forced_acceptance=0.85, pages=400)
    engine.generate(prompts(8, vocab_size=8), replace(GREEDY, max_tokens=100))
    stats = engine.stats().speculation
    first, second = (a / d for a, d in zip(stats.accepted_by_place, stats.drafted_by_place, strict=True))
    assert abs(first - 0.85) < 0.05 and abs(second - 0.85**2) < 0.07
    engine.check_integrity()


# --- the MTP block's cache ---


def drafts_by_text(
    engine: Engine, many: list[list[int]], params: Any = GREEDY
) -> dict[tuple[int, ...], list[int]]:
    """What is drafted after each text."""
    found: dict[tuple[int, ...], list[int]] = {}
    attach = engine.speculation.attach

    def record(plan: Any) -> None:
        attach(plan)
        for s in plan.sequences:
            if s.request.draft_ids:
                text = tuple(s.request.token_ids)
                assert found.setdefault(text, list(s.request.draft_ids)) == s.request.draft_ids
        engine.scheduler.check_integrity()

    engine.speculation.attach = record
    engine.generate(many, params)
    engine.speculation.attach = attach
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_do_not_depend_on_how_the_cache_was_filled(kind: str) -> None:
    shared = prompts(1, length=40, seed=3, vocab_size=40)[0][:24]
    many = [[*shared, *tail] for tail in prompts(5, length=6, seed=4, vocab_size=40)]
    options: dict[str, Any] = {"vocab_size": 40, "num_speculative_tokens": 3}
    want: dict[tuple[int, ...], list[int]] = {}
    for prompt in many:  # each from scratch
        want |= drafts_by_text(drafting_engine(kind, pages=200, **options), [prompt])
    assert len(want) > 50
    together = drafting_engine(kind, pages=200, **options)
    chunked = drafting_engine(kind, pages=200, max_num_batched_tokens=9, **options)
    tight = drafting_engine(kind, pages=15, **options)
    off = drafting_engine(kind, pages=200, prefix_caching=False, **options)
    for engine in (together, chunked, tight, off):
        for _ in range(2):
            got = drafts_by_text(engine, many)
            common = got.keys() & want.keys()  # a step that was short of pages goes on from another text
            assert len(common) > 40 and {t: got[t] for t in common} == {t: want[t] for t in common}
    assert together.stats().prefix_hits > 0 and tight.stats().preemptions > 0


def test_a_page_is_shared_only_with_the_token_after_it() -> None:
    """The MTP entry of a page's last token is computed from the token behind the page."""
    shared = prompts(1, length=40, seed=3, vocab_size=40)[0][:8]
    engine = drafting_engine(vocab_size=40, pages=100)
    engine.generate([*shared, 5, 6], GREEDY)
    assert engine.generate([*shared, 5, 7], GREEDY).cached_tokens == 8
    assert engine.generate([*shared, 9, 7], GREEDY).cached_tokens == 4
    other = drafting_engine(vocab_size=40, pages=100, speculation="ngram")
    other.generate([*shared, 5, 6], GREEDY)
    assert other.generate([*shared, 9, 7], GREEDY).cached_tokens == 8


def test_sequences_with_holes_get_no_drafts_and_nobody_is_misled() -> None:
    engine = drafting_engine(vocab_size=40, pages=200)
    prompt = prompts(1, length=40, seed=3, vocab_size=40)[0][:21]
    answer = engine.generate(prompt, replace(GREEDY, max_tokens=40)).token_ids
    longer = [*prompt, *answer[:13]]
    want = drafts_by_text(drafting_engine(vocab_size=40, pages=200), [prompt])
    want_longer = drafts_by_text(drafting_engine(vocab_size=40, pages=200), [longer])
    engine.scheduler.pages.forget_prefixes()
    before = engine.stats().speculation.drafted
    resting = True
    engine.speculation.policy.allows = lambda batch: not resting
    stream = engine.stream(prompt, replace(GREEDY, max_tokens=40))
    for _ in range(10):
        next(stream)
    resting = False
    for _ in range(10):
        next(stream)
    stream.close()
    assert engine.stats().speculation.drafted == before, "its first words have no entries"
    assert drafts_by_text(engine, [longer]) == {}, "nor have their pages, when they are shared"
    assert engine.stats().prefix_hits > len(prompt)
    got = drafts_by_text(engine, [prompt])
    assert got and got == {text: want[text] for text in got}, "a prompt has them, even from then"
    engine.scheduler.pages.forget_prefixes()
    got = drafts_by_text(engine, [longer])
    assert got and got == {t: want_longer[t] for t in got}, "pages given out anew are whole again"
    engine.check_integrity()


# --- what ends or accompanies a request ---


@pytest.mark.parametrize("wrong,number", [(0.0, 8), (0.3, 1), (0.3, 3)])
def test_stops_in_the_middle_of_accepted_drafts(wrong: float, number: int) -> None:
    base = replace(GREEDY, max_tokens=30)
    for params in (
        replace(base, stop_token_ids=(3,)),
        replace(base, stop_token_ids=(5,), min_tokens=7),
        replace(base, max_tokens=2),
        replace(base, max_tokens=11),
        replace(base, ignore_eos=False),
    ):
        want = plain(MANY, params)
        engine = drafting_engine(speculation="ngram", num_speculative_tokens=number, pages=200)
        knowing(engine, MANY, replace(params, stop_token_ids=(), min_tokens=0, ignore_eos=True), wrong)
        got = engine.generate(MANY, params)
        engine.check_integrity()
        for a, b in zip(got, want, strict=True):
            assert (a.token_ids, a.finish_reason, a.stop_reason) == (
                b.token_ids,
                b.finish_reason,
                b.stop_reason,
            )
            assert a.metrics.completion_tokens == len(a.token_ids)
        assert tokens_of(engine, MANY, params) == [done.token_ids for done in want], "again, on cached pages"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("params", [GREEDY, replace(SEEDED, presence_penalty=0.8, repetition_penalty=1.2)])
def test_logprobs_are_those_without_drafts(method: str, params: SamplingParams) -> None:
    params = replace(params, logprobs=3, prompt_logprobs=1)
    engine = drafting_engine(speculation=method, pages=200)
    for got, want in zip(engine.generate(MANY, params), plain(MANY, params), strict=True):
        assert got.token_ids == want.token_ids
        assert [e.token_id for e in got.logprobs] == got.token_ids
        for name in ("logprobs", "prompt_logprobs"):
            for a, b in zip(getattr(got, name), getattr(want, name), strict=True):
                if a is None:
                    assert b is None
                    continue
                assert a.token_id == b.token_id and abs(a.logprob - b.logprob) < 1e-4
                assert [i for i, _ in a.top] == [i for i, _ in b.top]
    assert engine.stats().speculation.accepted > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [None, 5])
def test_penalties_count_the_drafts_before_a_place(method: str, seed: int | None) -> None:
    params = SamplingParams(
        temperature=0.0 if seed is None else 1.0, seed=seed, frequency_penalty=1.1, presence_penalty=0.3,
        repetition_penalty=1.4, min_tokens=9, stop_token_ids=(6,), max_tokens=30, ignore_eos=True,
    )  # fmt: skip
    engine = drafting_engine(speculation=method, num_speculative_tokens=3, pages=200)
    assert tokens_of(engine, MANY, params) == [done.token_ids for done in plain(MANY, params)]
    assert engine.stats().speculation.accepted > 0


class Every:
    """A grammar: tokens go round 0 … 7 by steps of 1 or 2."""

    def __init__(self) -> None:
        self.last = 0

    def mask(self) -> torch.Tensor:
        allowed = torch.zeros(8, dtype=torch.bool)
        allowed[[(self.last + 1) % 8, (self.last + 2) % 8]] = True
        return allowed

    def accept(self, token_id: int) -> None:
        assert (token_id - self.last) % 8 in (1, 2)
        self.last = token_id

    def is_done(self) -> bool:
        return False


@pytest.mark.parametrize("method", METHODS)
def test_mixed_batches(method: str) -> None:
    """Greedy, seeded and drawn requests, one with a grammar (which gets no drafts) and a short prompt."""
    kinds = [
        GREEDY,
        SEEDED,
        replace(GREEDY, grammar=Every, max_tokens=30),
        SamplingParams(temperature=1.0, max_tokens=17, ignore_eos=True),
        replace(GREEDY, logprobs=2, frequency_penalty=1.0),
    ]
    many = [MANY[i % 7] for i in range(10)]
    params = [kinds[i % 5] for i in range(10)]
    engine = drafting_engine(speculation=method, pages=200, max_num_batched_tokens=12)
    got = engine.generate(many, params)
    engine.check_integrity()
    want = plain(many, params)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert len(a.token_ids) == len(b.token_ids) and a.finish_reason == "length"
        if i % 5 != 3:
            assert a.token_ids == b.token_ids
        if i % 5 == 2:
            assert a.metrics.drafted_tokens == 0
        elif method == "mtp":
            assert a.metrics.drafted_tokens > 0
    for i in (3, 8):
        assert got[i].metrics.accepted_tokens <= got[i].metrics.drafted_tokens


@pytest.mark.parametrize("method", METHODS)
def test_random_adds_steps_and_aborts_conserve_everything(method: str) -> None:
    rng = random.Random(method)
    engine = drafting_engine(
        speculation=method, pages=24, num_speculative_tokens=3, max_num_batched_tokens=24
    )
    alive: list[str] = []
    for _ in range(400):
        choice = rng.random()
        if choice < 0.25:
            prompt = [rng.randrange(8) for _ in range(rng.randint(1, 30))]
            params = SamplingParams(
                temperature=rng.choice([0.0, 1.0]),
                max_tokens=rng.randint(1, 20),
                ignore_eos=rng.random() < 0.5,
            )
            alive.append(engine.add(prompt, params))
        elif choice < 0.32 and alive:
            engine.abort(alive.pop(rng.randrange(len(alive))))
        else:
            engine.step()
        engine.check_integrity()
    while engine.has_work():
        engine.step()
        engine.check_integrity()
    assert engine.stats().cache_usage == 0.0
    assert engine.stats().preemptions > 0 and engine.stats().speculation.accepted > 0
    drafter = engine.speculation.mtp or engine.speculation.ngram
    assert not getattr(drafter, "_whole", None) and not getattr(drafter, "_seen", None), (
        "nobody is remembered"
    )


def test_streamed_updates_carry_several_tokens() -> None:
    engine = drafting_engine(speculation="ngram", num_speculative_tokens=4, pages=200)
    knowing(engine, MANY, GREEDY)
    updates = list(engine.stream(MANY[0], GREEDY))
    assert max(len(update.token_ids) for update in updates) == 5
    total = 0
    for update in updates:
        total += len(update.token_ids)
        assert update.completion_tokens == total
    assert [t for u in updates for t in u.token_ids] == plain(MANY[:1], GREEDY)[0].token_ids
    assert updates[-1].metrics.accepted_tokens > 10


def test_a_fault_in_one_row_ends_one_request() -> None:
    engine = drafting_engine(speculation="mtp", pages=200)
    run = engine.runner.run

    def spoilt(plan: Any) -> Any:
        output = run(plan)
        if output.num_drafts and output.num_drafts[0] and len(output.requests) > 1:
            output.logits_BV[0] = float("nan")
        return output

    engine.runner.run = spoilt
    first, *others = engine.generate(MANY, GREEDY)
    engine.check_integrity()
    assert first.finish_reason == "error" and "finite" in first.error
    assert [c.finish_reason for c in others][-1] == "length"


# --- the rule that rests ---


def run_policy(
    policy: Policy, batch: int, steps: int, plain_s: float, drafted_s: float, tokens: float
) -> int:
    """Steps that drafted."""
    drafted = 0
    for _ in range(steps):
        drafts = policy.allows(batch) and policy.wants(batch)
        drafted += drafts
        policy.observe(
            batch,
            drafted_s if drafts else plain_s,
            round(tokens * batch) if drafts else batch,
            drafted=drafts,
        )
    return drafted


def test_policy_rests_where_drafts_lose_and_tries_again() -> None:
    policy = Policy(8, adaptive=True)
    cycle = TRIED_STEPS + REST
    assert run_policy(policy, 2, PLAIN_STEPS + 3 * cycle, 0.010, 0.020, 1.5) == 3 * TRIED_STEPS
    assert "pay" in policy.why
    assert run_policy(policy, 4, 1000, 0.010, 0.014, 1.5) == 1000 - PLAIN_STEPS, "each batch size for itself"
    assert not policy.allows(9) and "9 sequences" in policy.why
    assert policy.allows(8)
    always = Policy(8, adaptive=False)
    assert run_policy(always, 1, 100, 0.010, 1.0, 1.0) == 100


def test_one_slow_step_decides_nothing() -> None:
    policy = Policy(8, adaptive=True)
    run_policy(policy, 1, PLAIN_STEPS, 0.010, 0.0, 1.0)
    for _ in range(300):
        policy.observe(1, 0.011, 2, drafted=True)
        policy.observe(1, 5.0, 2, drafted=True)
        policy.observe(1, 0.011, 2, drafted=True)
        assert policy.allows(1)


def test_large_batches_are_not_drafted_for() -> None:
    engine = drafting_engine(pages=400, speculation_max_batch=3)
    short = [prompt[:5] for prompt in MANY]
    assert tokens_of(engine, short) == [done.token_ids for done in plain(short, GREEDY)]
    assert engine.stats().speculation.drafted == 0
    assert engine.stats().speculation.resting == "7 sequences run, more than 3"
    assert tokens_of(engine, MANY[:2]) == [done.token_ids for done in plain(MANY[:2], GREEDY)]
    assert engine.stats().speculation.drafted > 0
    assert engine.stats().speculation.resting == ""


# --- options ---


def test_options_are_checked() -> None:
    no_mtp = Transformer(replace(CONFIGS["gqa"], num_nextn_predict_layers=0)).init_weights(1)
    with pytest.raises(EngineError, match="no MTP module"):
        Engine(no_mtp, speculation="mtp", cache_bytes=2**22)
    for options, text in (
        ({"speculation": "eagle"}, "auto, mtp, ngram, off"),
        ({"num_speculative_tokens": 0}, "from 1 to 8"),
        ({"num_speculative_tokens": 9}, "from 1 to 8"),
        ({"speculation_max_batch": 0}, "at least 1"),
        ({"speculation_forced_acceptance": 1.5}, "from 0 to 1"),
    ):
        with pytest.raises(EngineError, match=text):
            Engine(no_mtp, cache_bytes=2**22, **options)
    assert Engine(no_mtp, cache_bytes=2**22).speculation is None
    assert Engine(no_mtp, cache_bytes=2**22).stats().speculation is None


def test_the_mtp_layer_is_paid_for() -> None:
    sizes = [
        Engine(drafting_model(), cache_bytes=2**18, speculation=s, max_num_seqs=64).scheduler.pages.capacity
        for s in ("off", "ngram", "mtp")
    ]
    assert sizes[0] == sizes[1] > sizes[2] >= sizes[0] * 3 // 4 - 1  # 3 layers, and one more


def test_ngram_proposes_what_followed_the_longest_match() -> None:
    from hadal.engine.drafters import NgramDrafter

    def drafts(ids: list[int], number: int = 3) -> list[int]:
        return NgramDrafter(number).propose(Request("r", ids, GREEDY, 0.0, 10))

    assert drafts([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5]
    assert drafts([1, 2, 3, 7, 2, 3, 8, 1, 2, 3]) == [7, 2, 3], "three tokens beat the two that came later"
    assert drafts([2, 3, 7, 2, 3, 8, 1, 2, 3]) == [8, 1, 2], "of two equally long, the later"
    assert drafts([5, 5, 5]) == [5, 5, 5], "a short period goes on"
    assert drafts([1, 2, 3, 4]) == [] and drafts([1]) == []
    grown = NgramDrafter(2)
    request = Request("r", [1, 2, 3], GREEDY, 0.0, 10)
    for token, expected in zip([1, 2, 3, 4, 1, 2], [[], [3, 1], [1, 2], [], [], [3, 4]], strict=True):
        request.token_ids.append(token)
        got = grown.propose(request)
        fresh = NgramDrafter(2).propose(Request("r", request.token_ids, GREEDY, 0.0, 10))
        assert got == fresh == expected


def test_hadal_mini_answers_as_without_drafts() -> None:
    """The model on board, loaded with its MTP module where that drafts; nearly all of its drafts stand."""
    plain_engine = Engine.load("hadal-mini", speculation="off")
    assert len(plain_engine.model.mtp) == 0 and plain_engine.speculation is None
    asked = [plain_engine.encode_chat([{"role": "user", "content": text}]) for text in (
        "12 + 35?", "What is 408 - 19?", "Combien font 7 fois 8 ?", "Sort: 5, 3, 9, 1"
    )]  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=80)
    expected = [(done.text, done.finish_reason) for done in plain_engine.generate(asked, params)]
    for method, number, least in (("mtp", 1, 0.9), ("mtp", 3, 0.4), ("ngram", 3, 0.05)):
        engine = Engine.load(
            "hadal-mini", speculation=method, num_speculative_tokens=number, speculation_adaptive=False
        )
        assert len(engine.model.mtp) == (method == "mtp")
        got = engine.generate(asked, params)
        assert [(done.text, done.finish_reason) for done in got] == expected
        assert engine.stats().speculation.acceptance > least
        engine.check_integrity()
