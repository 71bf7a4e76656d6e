"""Watching a served model: the extraction's own numbers, between the steps of others, and at the end."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from hadal.engine import watching
from hadal.engine.async_engine import AsyncEngine
from hadal.engine.extract import ProbeError, extract_all
from hadal.engine.request import EngineError, SamplingParams
from hadal.engine.watching import Wish
from tests.engine.tiny import prompts, tiny_engine

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_the_numbers_are_the_extractions(pooling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "STREAM_TOKENS", 20)  # so that texts go in several passes
    many = prompts(7)
    asked = AsyncEngine(tiny_engine(pages=200))
    try:
        found = asyncio.run(asked.watch(many, Wish(layers=(0, 1), pooling=pooling, routing=True)))
        wanted = extract_all(asked.engine.model, many, (0, 1), routing=True)
    finally:
        assert asked.shutdown(drain=False)
    for one, ref, ids in zip(found, wanted, many, strict=True):
        hidden = ref.hidden_lnD.numpy()
        expected = {None: hidden, "mean": hidden.mean(1), "last": hidden[:, -1]}[pooling]
        np.testing.assert_allclose(one.states, expected, atol=2e-5)
        assert one.experts.keys() == ref.experts.keys() and one.experts
        for block, experts in one.experts.items():
            assert [sorted(row) for row in experts] == ref.experts[block].sort(-1).values.tolist()
            assert all(row == sorted(row, reverse=True) for row in one.scores[block])
            assert len(experts) == len(ids)


def test_streams_go_on_and_stay_right_meanwhile() -> None:
    many = prompts(6)
    expected = [c.token_ids for c in tiny_engine(pages=200).generate(many, GREEDY)]

    async def main() -> None:
        async with AsyncEngine(tiny_engine(pages=200)) as engine:
            looks = [engine.watch(many, Wish(routing=True)) for _ in range(3)]
            runs = [engine.generate(prompt, GREEDY) for prompt in many]
            *watched, a, b, c, d, e, f = await asyncio.gather(*looks, *runs)
            assert [x.token_ids for x in (a, b, c, d, e, f)] == expected
            assert all(len(w) == len(many) for w in watched)

    asyncio.run(asyncio.wait_for(main(), 120))


def test_what_cannot_be_watched_is_refused_and_the_engine_lives() -> None:
    async def main() -> None:
        async with AsyncEngine(tiny_engine(pages=200)) as engine:
            with pytest.raises(ProbeError, match="layer 99"):
                await engine.watch([[1, 2]], Wish(layers=(99,)))
            with pytest.raises(ProbeError, match="has no tokens"):
                await engine.watch([[]], Wish())
            assert engine.healthy() and len((await engine.generate([1, 2, 3], GREEDY)).token_ids) == 12
        with pytest.raises(EngineError, match="shutting down"):
            await engine.watch([[1, 2]], Wish())

    asyncio.run(asyncio.wait_for(main(), 120))


def test_nobody_waits_for_an_engine_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that is queued when the thread ends is answered with an error."""

    async def main() -> None:
        engine = AsyncEngine(tiny_engine(pages=200))

        def die() -> None:
            raise KeyboardInterrupt("planted")

        engine._commands.put(die)
        with pytest.raises(EngineError, match=r"planted|shutting down"):
            await engine.watch([[1, 2]], Wish())
        assert not engine.healthy()
        engine.shutdown(drain=False)

    asyncio.run(asyncio.wait_for(main(), 120))
