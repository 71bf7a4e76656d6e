"""The engine in a thread of its own: streams, slow readers, cancellation, faults, health, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import torch

from hadal.engine.async_engine import AsyncEngine, QueueFullError, _Box
from hadal.engine.request import (
    EngineError,
    RequestError,
    SamplingParams,
    TokenLogprob,
    Update,
    merge_updates,
)
from tests.engine.tiny import prompts, tiny_engine

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    made = AsyncEngine(tiny_engine(pages=200, max_num_seqs=8))
    yield made
    assert made.shutdown(drain=False)
    made.engine.check_integrity()
    assert made.engine.stats().cache_usage == 0


def run(main: Callable[[], Coroutine[Any, Any, Any]], timeout: float = 60) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main(), timeout)

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.005)


def test_many_streams_at_once_equal_the_offline_run(engine: AsyncEngine) -> None:
    many = prompts(12)
    expected = [c.token_ids for c in tiny_engine(pages=200).generate(many, GREEDY)]

    async def one(prompt: list[int]) -> list[int]:
        updates = [update async for update in engine.stream(prompt, GREEDY)]
        assert updates[-1].finish_reason == "length" and updates[-1].metrics is not None
        assert all(update.finish_reason is None for update in updates[:-1])
        return merge_updates(updates).token_ids

    async def main() -> list[list[int]]:
        return await asyncio.gather(*map(one, many))

    assert run(main) == expected
    assert engine.healthy()


def test_generate_and_embed(engine: AsyncEngine) -> None:
    async def main() -> tuple[Any, Any]:
        return await asyncio.gather(
            engine.generate([5, 6, 7], GREEDY),
            engine.embed([[5, 6, 7], [8]], pooling="last", layer=1, normalize=True),
        )

    completion, vectors = run(main)
    other = tiny_engine()
    assert completion.token_ids == other.generate([5, 6, 7], GREEDY).token_ids
    assert vectors[0] == pytest.approx(other.embed([[5, 6, 7]], pooling="last", layer=1)[0], abs=1e-5)
    assert len(vectors) == 2


def test_bad_requests_raise_in_the_caller(engine: AsyncEngine) -> None:
    async def main() -> None:
        with pytest.raises(RequestError, match="is empty"):
            await engine.generate([], GREEDY)
        with pytest.raises(RequestError) as caught:
            await engine.generate([1] * 600, GREEDY)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(RequestError, match="layer"):
            await engine.embed([[1]], layer=99)
        stream = engine.stream([1, 2], LONG, request_id="same")
        await anext(stream)
        with pytest.raises(RequestError, match="'same' is in use"):
            await engine.generate([1], GREEDY, request_id="same")
        await stream.aclose()
        await until(lambda: engine.engine.stats().finished == {"abort": 1})

    run(main)


def test_leaving_a_stream_frees_its_pages(engine: AsyncEngine) -> None:
    async def main() -> None:
        stream = engine.stream([1, 2, 3], LONG)
        async for _ in stream:
            break
        await stream.aclose()
        await until(lambda: not engine.engine.has_work())
        assert engine.engine.stats().finished == {"abort": 1}

    run(main)


def test_cancelling_the_reader_frees_its_pages_and_no_one_elses(engine: AsyncEngine) -> None:
    async def main() -> None:
        tasks = [asyncio.ensure_future(engine.generate([1, 2, n], LONG)) for n in range(4)]
        await until(lambda: engine.engine.stats().running == 4)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        done = await asyncio.gather(tasks[0], tasks[2], tasks[3])
        assert all(len(completion.token_ids) == 200 for completion in done)

    run(main)
    assert engine.engine.stats().finished == {"abort": 1, "length": 3}


def test_abort_ends_the_stream(engine: AsyncEngine) -> None:
    async def main() -> Update:
        stream = engine.stream([1, 2, 3], LONG, request_id="x")
        updates = [await anext(stream)]
        await engine.abort("x")
        updates += [update async for update in stream]
        return updates[-1]

    assert run(main).finish_reason == "abort"


def test_a_slow_reader_gets_everything_in_few_updates(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, logprobs=1)

    async def main() -> list[Update]:
        stream = engine.stream([4, 5, 6], params)
        updates = [await anext(stream)]
        await until(lambda: not engine.engine.has_work())
        updates += [update async for update in stream]
        return updates

    updates = run(main)
    whole = merge_updates(updates)
    assert len(updates) <= 3, "what was not fetched is folded into one"
    offline = tiny_engine(pages=200).generate([4, 5, 6], params)
    assert whole.token_ids == offline.token_ids and len(whole.logprobs or []) == 150
    assert updates[-1].completion_tokens == 150


def test_a_box_folds_what_merge_updates_would() -> None:
    class Owner:
        def _pushed(self, box: Any) -> None: ...

    loop = asyncio.new_event_loop()
    updates = [
        Update(
            "a", [1], [TokenLogprob(1, -1.0)], prompt_logprobs=[None], completion_tokens=1, prompt_tokens=3
        ),
        Update("", [2], None, completion_tokens=2, prompt_tokens=3),
        Update("b", [3], [TokenLogprob(3, -2.0)], "stop", "b", None, 3, 1, 3),
        Update("late", [4]),
    ]
    expected = merge_updates([Update(**{f: getattr(u, f) for f in Update.__slots__}) for u in updates[:3]])
    box = _Box(Owner(), None, loop)  # type: ignore[arg-type]
    for update in updates:
        box.push(update)
    assert box.take() == expected and box.take() is None
    loop.close()


def test_queue_bound() -> None:
    engine = AsyncEngine(tiny_engine(max_num_seqs=1), max_queue=1)

    async def main() -> None:
        tasks = [asyncio.ensure_future(engine.generate([1, n], LONG)) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="the queue is full: 2") as caught:
            await engine.generate([3], GREEDY)
        assert caught.value.code == "queue_full"
        for task in tasks:
            await task
        await engine.generate([3], GREEDY)

    run(main)
    assert engine.shutdown()


def test_a_failed_step_is_survived(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: Any) -> Any:
        monkeypatch.undo()
        raise torch.OutOfMemoryError("injected")

    async def main() -> None:
        monkeypatch.setattr(engine.engine.runner.model, "forward", fault)
        failed = await engine.generate([1, 2, 3], GREEDY)
        assert failed.finish_reason == "error" and "out of memory" in (failed.error or "")
        assert (await engine.generate([1, 2, 3], GREEDY)).finish_reason == "length"

    run(main)
    assert engine.healthy()


def test_when_the_thread_dies_streams_end_and_health_says_so(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any) -> Any:
        raise SystemExit("killed")

    async def main() -> None:
        stream = engine.stream([1, 2, 3], LONG)
        waiting = asyncio.ensure_future(engine.generate([4], LONG))
        await anext(stream)
        monkeypatch.setattr(engine.engine, "step", die)
        start = time.monotonic()
        last = [update async for update in stream][-1]
        assert last.finish_reason == "error" and "SystemExit: killed" in (last.error or "")
        assert (await waiting).finish_reason == "error"
        await until(lambda: not engine.healthy())
        assert time.monotonic() - start < 20
        with pytest.raises(EngineError, match="is down"):
            await engine.generate([1], GREEDY)

    run(main)


def test_a_frozen_step_is_noticed_and_its_stacks_are_written(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = AsyncEngine(tiny_engine(), watchdog_seconds=0.3)
    release = threading.Event()
    step = engine.engine.step

    def frozen_step() -> Any:
        release.wait(20)
        return step()

    async def main() -> None:
        await engine.generate([1], GREEDY)
        await asyncio.sleep(0.5)
        assert engine.healthy(), "idle is not stalled"
        monkeypatch.setattr(engine.engine, "step", frozen_step)
        task = asyncio.ensure_future(engine.generate([1, 2], GREEDY))
        await until(lambda: not engine.healthy())
        await asyncio.sleep(0.3)
        release.set()
        assert (await task).finish_reason == "length"
        assert engine.healthy()

    run(main)
    assert "frozen_step" in capfd.readouterr().err
    assert engine.shutdown()


def test_shutdown_drains_or_ends_at_once() -> None:
    async def start(engine: AsyncEngine) -> list[asyncio.Task[Any]]:
        tasks = [asyncio.ensure_future(engine.generate([1, n], LONG)) for n in range(3)]
        await until(lambda: engine.engine.stats().running == 3)
        return tasks

    async def main(drain: bool) -> list[str]:
        engine = AsyncEngine(tiny_engine(pages=200))
        tasks = await start(engine)
        closing = asyncio.ensure_future(asyncio.to_thread(engine.shutdown, drain))
        await asyncio.sleep(0)
        await until(lambda: engine._closing)
        with pytest.raises(EngineError):
            await engine.generate([1], GREEDY)
        done = await asyncio.gather(*tasks)
        assert await closing and engine.shutdown()
        assert not engine.healthy()
        engine.engine.check_integrity()
        assert engine.engine.generate([[1]], GREEDY)[0].finish_reason == "length", "the engine is free again"
        return [completion.finish_reason for completion in done]

    assert run(lambda: main(True)) == ["length"] * 3
    assert "abort" in run(lambda: main(False))


def test_only_one_may_run_an_engine(engine: AsyncEngine) -> None:
    with pytest.raises(RuntimeError, match="AsyncEngine runs this engine"):
        engine.engine.generate([1, 2], GREEDY)
    with pytest.raises(EngineError, match="is run by"):
        AsyncEngine(engine.engine)


def test_a_closed_loop_leaves_nothing_behind(engine: AsyncEngine) -> None:
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        stream = engine.stream([1, 2, 3], LONG)
        await anext(stream)
        return stream

    stream = loop.run_until_complete(begin())
    loop.close()
    end = time.monotonic() + 10
    while engine.engine.has_work():
        assert time.monotonic() < end
        time.sleep(0.005)
    assert engine.engine.stats().finished == {"abort": 1}
    del stream


def test_a_grammar_is_compiled_beside_the_loop(engine: AsyncEngine) -> None:
    names: list[str] = []

    class Anything:
        def __init__(self) -> None:
            names.append(threading.current_thread().name)
            time.sleep(0.2)

        def mask(self) -> torch.Tensor:
            return torch.ones(300, dtype=torch.bool)

        def accept(self, token_id: int) -> None: ...

        def is_done(self) -> bool:
            return False

    async def main() -> None:
        task = asyncio.ensure_future(engine.generate([1], SamplingParams(grammar=Anything, max_tokens=2)))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks > 8
        assert (await task).finish_reason == "length"

    run(main)
    assert names and names[0] not in ("MainThread", "hadal-engine")
