"""Scheduler: budget, order, sharing, preemption and deadlines, on a model without tensors (simulation.py)."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from hadal.engine.blocks import IntegrityError, PageAllocator
from hadal.engine.request import PoolingParams, Request, RequestError, SamplingParams, Status
from hadal.engine.scheduler import Scheduler
from tests.engine.simulation import VOCAB, Simulation, expected_output


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + i) % VOCAB for i in range(length)]


def test_one_request_from_prompt_to_end() -> None:
    sim = Simulation(budget=16)
    request = sim.add(prompt(10), max_tokens=3)
    first, second, third = sim.step(), sim.step(), sim.step()
    assert [s.num_tokens for s in first.sequences] == [10] and first.num_decodes == 0
    assert second.num_decodes == third.num_decodes == 1
    assert request.status is Status.FINISHED and request.output_ids == expected_output(request)
    assert not sim.scheduler.has_work
    sim.scheduler.check_integrity()


def test_decodes_come_first_and_prompts_fill_the_budget() -> None:
    sim = Simulation(num_pages=40, budget=8)
    sim.add(prompt(3), max_tokens=20)
    sim.step()
    sim.add(prompt(20, 7), max_tokens=2)
    sizes = [[(s.num_tokens, s.is_decode, s.samples) for s in sim.step().sequences] for _ in range(3)]
    assert sizes == [
        [(1, True, True), (7, False, False)],
        [(1, True, True), (7, False, False)],
        [(1, True, True), (6, False, True)],
    ]


def test_two_prompts_share_one_step() -> None:
    sim = Simulation(num_pages=40, budget=10)
    sim.add(prompt(6), max_tokens=2)
    sim.add(prompt(9, 20), max_tokens=2)
    assert [s.num_tokens for s in sim.step().sequences] == [6, 4]


def test_cached_prefix_is_skipped_but_never_the_last_token() -> None:
    sim = Simulation(budget=32)
    sim.add(prompt(8), max_tokens=1)
    sim.run()
    again = sim.add(prompt(8), max_tokens=1)
    longer = sim.add(prompt(11), max_tokens=1)
    plan = sim.step()
    assert [(s.start, s.num_tokens) for s in plan.sequences] == [(4, 4), (8, 3)]
    assert (again.cached_tokens, longer.cached_tokens) == (4, 8)
    assert sim.scheduler.stats.prefix_queries == 8 + 8 + 11
    assert sim.scheduler.stats.prefix_hits == 12


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    sim = Simulation(num_pages=40, budget=64)
    request = sim.add(prompt(6), max_tokens=12)
    sim.run()
    turn = sim.add(request.token_ids + prompt(3), max_tokens=1)
    sim.run()
    assert turn.cached_tokens == 16  # 17 of 18 tokens were computed: four full pages of 4


def test_salt_and_switch_keep_prefixes_apart() -> None:
    sim = Simulation(budget=32)
    sim.add(prompt(9), max_tokens=1, salt="alice")
    sim.run()
    eve = sim.add(prompt(9), max_tokens=1, salt="eve")
    alice = sim.add(prompt(9), max_tokens=1, salt="alice")
    sim.run()
    assert (eve.cached_tokens, alice.cached_tokens) == (0, 8)
    off = Simulation(budget=32, prefix_caching=False)
    off.add(prompt(9), max_tokens=1)
    off.run()
    second = off.add(prompt(9), max_tokens=1)
    off.run()
    assert second.cached_tokens == 0


def test_equal_prompts_at_once_are_computed_once() -> None:
    sim = Simulation(num_pages=60, max_num_seqs=8, budget=64)
    requests = [sim.add(prompt(17), max_tokens=2, seed=i) for i in range(6)]
    sim.run()
    assert sim.computed == 17 + 5 + 6  # the prompt once, its last token for the five others, one decode each
    assert [r.cached_tokens for r in requests] == [0] + [16] * 5
    assert all(r.output_ids == expected_output(r) for r in requests)


def test_rows_that_are_asked_for_are_computed() -> None:
    sim = Simulation(budget=32)
    sim.add(prompt(9), max_tokens=1)
    sim.run()
    scored = sim.add(prompt(9), max_tokens=1, params=SamplingParams(prompt_logprobs=0))
    sim.run()
    assert scored.cached_tokens == 0
    pooled = Request("p", prompt(9), SamplingParams(), 0.0, 0, pooling=PoolingParams())
    sim.scheduler.add(pooled)
    assert [s.num_tokens for s in sim.scheduler.schedule(0.0).sequences] == [9]


def test_too_large_is_refused_at_once() -> None:
    sim = Simulation(num_pages=5, page_size=4)  # 16 tokens
    sim.add(prompt(12), max_tokens=5)  # the last new token is never stored
    with pytest.raises(
        RequestError, match=r"12 prompt tokens and 6 new ones do not fit the cache of 16"
    ) as caught:
        sim.add(prompt(12), max_tokens=6)
    assert caught.value.code == "context_length_exceeded"
    sim.run()


def test_budget_must_cover_the_seats() -> None:
    with pytest.raises(ValueError, match="must be at least max_num_seqs"):
        Scheduler(PageAllocator(5, 4), max_num_seqs=8, max_num_batched_tokens=4)


def test_preemption_takes_the_last_and_changes_nothing() -> None:
    sim = Simulation(num_pages=9, page_size=2, max_num_seqs=4, budget=16)  # 16 tokens for 3 × 12
    requests = [sim.add(prompt(4, 10 * i), max_tokens=9, seed=i) for i in range(3)]
    victims = []
    while sim.scheduler.has_work:
        plan = sim.step()
        victims += [r.request_id for r in plan.preempted]
        sim.scheduler.check_integrity()
        assert requests[0].metrics.preemptions == 0, "the first in the order is never preempted"
    assert victims and sim.scheduler.stats.preemptions == len(victims)
    assert all(r.output_ids == expected_output(r) for r in requests)
    assert list(sim.done) == ["r0", "r1", "r2"]


def test_preempted_goes_before_later_arrivals() -> None:
    sim = Simulation(num_pages=7, page_size=2, max_num_seqs=2, budget=16)
    first = sim.add(prompt(4), max_tokens=8)
    second = sim.add(prompt(4, 20), max_tokens=8)
    third = sim.add(prompt(2, 40), max_tokens=2)
    while not second.metrics.preemptions:
        sim.step()
    assert sim.scheduler.waiting == [second, third] and sim.scheduler.running == [first]
    while third.status is Status.WAITING:
        assert second.metrics.preemptions == 1
        sim.step()
    assert second.status is not Status.WAITING
    sim.run()
    assert second.output_ids == expected_output(second)


def test_priority_before_arrival() -> None:
    sim = Simulation(max_num_seqs=1, budget=8)
    sim.add(prompt(4), max_tokens=2, priority=5)
    sim.add(prompt(4, 10), max_tokens=2, priority=1)
    sim.add(prompt(4, 20), max_tokens=2, priority=1)
    sim.run()
    assert list(sim.done) == ["r1", "r2", "r0"]


def test_deadline_passed_in_the_queue_is_never_computed() -> None:
    sim = Simulation(max_num_seqs=1, budget=8)
    sim.add(prompt(4), max_tokens=6, deadline=1.0)
    late = sim.add(prompt(4, 10), max_tokens=2, deadline=2.0)
    sim.step(now=0.5)
    sim.step(now=1.5)  # the first one has started: its deadline is met
    plan = sim.step(now=2.0)
    assert plan.expired == [late] and late.status is Status.FINISHED and late.metrics.first_scheduled is None
    sim.run()
    assert late.num_computed == 0 and late.output_ids == []


def test_gone_deadlines_are_let_go() -> None:
    sim = Simulation(max_num_seqs=4, budget=16)
    for i in range(300):
        sim.add(prompt(2, i), max_tokens=1, deadline=1e9)
        sim.run()
    assert len(sim.scheduler._deadlines) <= 70


def test_finish_is_idempotent_and_works_anywhere() -> None:
    sim = Simulation(max_num_seqs=1, budget=4)
    running = sim.add(prompt(8), max_tokens=4)
    waiting = sim.add(prompt(8, 10), max_tokens=4)
    sim.step()
    for request in (running, waiting, running):
        sim.scheduler.finish(request)
    sim.scheduler.check_integrity()
    assert not sim.scheduler.has_work and sim.pages.num_free == sim.pages.capacity


def test_poisoned_pages_are_not_found_again() -> None:
    sim = Simulation(budget=32)
    request = sim.add(prompt(9), max_tokens=4)
    sim.step()
    sim.scheduler.finish(request, poisoned=True)
    sim.scheduler.check_integrity()
    again = sim.add(prompt(9), max_tokens=1)
    sim.run()
    assert again.cached_tokens == 0


def test_abort_between_schedule_and_commit() -> None:
    sim = Simulation(budget=32)
    request = sim.add(prompt(9), max_tokens=4)
    plan = sim.scheduler.schedule(0.0)
    sim.scheduler.finish(request)
    sim.scheduler.commit(plan)
    sim.scheduler.check_integrity()
    assert sim.pages.match(request.hashes(4)) == []


def test_a_step_can_be_planned_before_the_one_before_is_committed() -> None:
    sim = Simulation(num_pages=40, budget=8)
    request = sim.add(prompt(20), max_tokens=2)
    plans = [sim.scheduler.schedule(0.0) for _ in range(3)]
    assert [(p.sequences[0].start, p.sequences[0].num_tokens) for p in plans] == [(0, 8), (8, 8), (16, 4)]
    for plan in plans:
        sim.scheduler.commit(plan)
    assert len(sim.pages.match(request.hashes(4))) == 5


def test_drafts_yield_to_the_budget_and_to_free_pages() -> None:
    sim = Simulation(num_pages=9, page_size=4, max_num_seqs=4, budget=6)
    first = sim.add(prompt(3), max_tokens=12)
    second = sim.add(prompt(3, 9), max_tokens=12)
    sim.step()
    for request in (first, second):
        request.draft_ids[:] = [1, 2, 3, 4]
    plan = sim.step()
    assert [(s.num_tokens, s.num_drafts) for s in plan.sequences] == [(1, 0), (5, 4)]
    assert plan.sequences[1].request is first and plan.num_decodes == 1
    full = Simulation(num_pages=3, page_size=4, max_num_seqs=2, budget=8)
    only = full.add(prompt(5), max_tokens=4)
    full.step()
    only.draft_ids[:] = [1, 2, 3, 4, 5, 6]
    assert full.step().sequences[0].num_drafts <= 2 and not full.scheduler.stats.preemptions


@settings(max_examples=120)
@given(
    num_pages=st.integers(6, 30),
    page_size=st.integers(1, 5),
    seats=st.integers(1, 5),
    extra_budget=st.integers(0, 12),
    prefix_caching=st.booleans(),
    drafts=st.booleans(),
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 6),  # steps before it comes
            st.integers(1, 14),  # prompt length
            st.integers(1, 8),  # new tokens
            st.integers(0, 2),  # which shared prefix
            st.integers(0, 2),  # priority
            st.sampled_from(["", "salt"]),
        ),
        min_size=1,
        max_size=14,
    ),
)
def test_everything_finishes_with_the_output_of_a_lonely_run(
    num_pages: int,
    page_size: int,
    seats: int,
    extra_budget: int,
    prefix_caching: bool,
    drafts: bool,
    arrivals: list[tuple[int, int, int, int, int, str]],
) -> None:
    guesses = random.Random(1) if drafts else None
    sim = Simulation(num_pages, page_size, seats, seats + extra_budget, prefix_caching, guesses)
    accepted = []
    for seed, (wait, length, new, prefix, priority, salt) in enumerate(arrivals):
        for _ in range(wait):
            sim.step()
            sim.scheduler.check_integrity()
        try:
            accepted.append(
                sim.add(prompt(length, 17 * prefix), new, priority=priority, salt=salt, seed=seed % 3)
            )
        except RequestError:
            assert sim.pages.pages_for(length + new - 1) > sim.pages.capacity
    while sim.scheduler.has_work:
        sim.step()
        sim.scheduler.check_integrity()
        assert sim.steps < 5000, "no end: somebody starves"
    for request in accepted:
        expected = expected_output(request)
        assert request.output_ids[: len(expected)] == expected
    assert sim.pages.num_free == sim.pages.capacity


@pytest.mark.parametrize("drafts", [False, True])
def test_ten_thousand_random_cycles_lose_no_page(drafts: bool) -> None:
    rng = random.Random(20250 + drafts)
    sim = Simulation(18, 4, 5, 12, drafts=random.Random(3) if drafts else None)
    added = aborted = 0
    for _ in range(10_000):
        action = rng.random()
        if action < 0.25 and len(sim.requests) < 30:
            length, new = rng.randint(1, 30), rng.randint(1, 24)
            sim.add(
                prompt(length, rng.choice((0, 5, 23))),
                new,
                priority=rng.randint(0, 1),
                seed=rng.randint(0, 3),
            )
            added += 1
        elif action < 0.32 and sim.requests:
            sim.abort(rng.choice(list(sim.requests.values())))
            aborted += 1
        else:
            sim.step()
        sim.scheduler.check_integrity()
    sim.run(max_steps=sim.steps + 2000)
    sim.scheduler.check_integrity()
    assert added > 1000 and aborted > 300 and sim.scheduler.stats.preemptions > 100
    assert len(sim.done) + aborted == added and sim.pages.num_free == sim.pages.capacity
    for request in sim.done.values():
        expected = expected_output(request)
        assert request.output_ids[: len(expected)] == expected


def test_lost_page_and_lost_seat_are_noticed() -> None:
    sim = Simulation()
    request = sim.add(prompt(9), max_tokens=4)
    sim.step()
    request.pages.pop()
    with pytest.raises(IntegrityError):
        sim.scheduler.check_integrity()
    other = Simulation()
    seated = other.add(prompt(9), max_tokens=4)
    other.step()
    seated.slot = 3
    with pytest.raises(IntegrityError, match="seat"):
        other.scheduler.check_integrity()
