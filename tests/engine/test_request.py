"""Requests: bounds of every parameter, merging of updates, metrics."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hadal.engine.request import (
    Completion,
    PoolingParams,
    Request,
    RequestError,
    RequestMetrics,
    SamplingParams,
    TokenLogprob,
    Update,
    check_token_ids,
    merge_updates,
    resolve_max_tokens,
)

HUGE = 10**5000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_tokens", v) for v in (0, -1, 2**63, HUGE, 1.5, "1", True)),
        *(("min_tokens", v) for v in (-1, 2**40, 0.5)),
        *(("temperature", v) for v in (-1, math.nan, 1e308, math.inf, "hot", HUGE, True, None)),
        *(("top_k", v) for v in (-1, 2**31, 1.0)),
        *(("top_p", v) for v in (0, 0.0, -0.1, 1.1, math.nan)),
        *(("min_p", v) for v in (-0.1, 1.1, math.nan)),
        *(("presence_penalty", v) for v in (-2.1, 2.1, math.nan)),
        *(("frequency_penalty", v) for v in (-2.1, 2.1, math.inf)),
        *(("repetition_penalty", v) for v in (0, -1, 101, math.nan)),
        *(("seed", v) for v in (2**63, -(2**63) - 1, 1.0, HUGE, False)),
        *(("stop", v) for v in ("", [""], ["a"] * 17, ["x" * 1025], [1], 5, {"a": 1})),
        *(("stop_token_ids", v) for v in ([-1], [2**31], ["1"], 5, "12", [1] * 65, [True])),
        *(("logprobs", v) for v in (-1, 21, 1.5, True)),
        *(("prompt_logprobs", v) for v in (-1, 21, HUGE)),
        *(("logit_bias", v) for v in ({-1: 0}, {1: 101}, {1: math.nan}, {"1": 0}, {HUGE: 1}, [1])),
        ("logit_bias", dict.fromkeys(range(1025), 0)),
        *(("ignore_eos", v) for v in (1, "yes", None)),
        ("include_stop", 1),
        ("grammar", "a+"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "value",  # pytest cannot print HUGE either
)  # fmt: skip
def test_out_of_bounds_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name
    assert str(caught.value).startswith(name) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_bounds_are_inclusive() -> None:
    SamplingParams(max_tokens=1, temperature=0, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2)
    SamplingParams(seed=-(2**63), logprobs=20, prompt_logprobs=0, stop=["a"] * 16, min_tokens=5, max_tokens=5)


def test_min_tokens_cannot_exceed_max_tokens() -> None:
    with pytest.raises(RequestError, match="min_tokens must be from 0 to 3"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_params_are_normalised() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[3], logit_bias={7: 1})  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids, dict(params.logit_bias)) == (("END",), (3,), {7: 1.0})


@pytest.mark.parametrize("value", [{"pooling": "max"}, {"layer": -2}, {"layer": True}, {"normalize": 1}])
def test_pooling_is_checked(value: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        PoolingParams(**value)


@pytest.mark.parametrize(
    "ids", [[], [-1], [300], [2**40], [HUGE], [1.0], ["1"], [True], "abc", b"abc", None, 5]
)
def test_bad_prompts_are_refused(ids: Any) -> None:
    with pytest.raises(RequestError) as caught:
        check_token_ids(ids, 300)
    assert caught.value.field == "prompt"


def test_max_tokens_resolves_to_the_rest_of_the_context() -> None:
    assert resolve_max_tokens(10, None, 64) == 54
    assert resolve_max_tokens(10, 54, 64) == 54
    for prompt, wanted in ((64, None), (64, 1), (10, 55), (65, None)):
        with pytest.raises(RequestError, match="64") as caught:
            resolve_max_tokens(prompt, wanted, 64)
        assert caught.value.code == "context_length_exceeded" and str(prompt) in str(caught.value)


def test_hashes_depend_on_every_token_before_and_on_the_salt() -> None:
    def hashes(ids: list[int], salt: str = "") -> list[bytes]:
        return Request("r", ids, SamplingParams(), 0.0, 1, cache_salt=salt).hashes(4)

    base = hashes(list(range(12)))
    assert len(base) == 3 and base == hashes([*range(12), 99])
    assert hashes([*range(8), 9, 9, 9, 9])[:2] == base[:2] and hashes([*range(8), 9, 9, 9, 9])[2] != base[2]
    other = hashes([7, *range(1, 12)])
    assert not set(other) & set(base)
    assert not set(hashes(list(range(12)), "salt")) & set(base)


def test_merge_and_completion() -> None:
    metrics = RequestMetrics(1.0, 1.5, 2.0, 4.0, completion_tokens=3)
    updates = [
        Update(
            "a", [1], [TokenLogprob(1, -0.5)], prompt_tokens=4, prompt_logprobs=[None], completion_tokens=1
        ),
        Update("", [2], [TokenLogprob(2, -0.25)], prompt_tokens=4, completion_tokens=2),
        Update("b", [3], None, "stop", "b", None, 4, 2, 3, metrics=metrics),
    ]
    whole = Completion.from_updates(updates)
    assert (whole.text, whole.token_ids, whole.finish_reason, whole.stop_reason) == (
        "ab",
        [1, 2, 3],
        "stop",
        "b",
    )
    assert whole.logprobs is not None and [e.token_id for e in whole.logprobs] == [1, 2]
    assert whole.prompt_logprobs == [None] and whole.cached_tokens == 2
    assert (metrics.queue_time, metrics.ttft, metrics.tokens_per_s) == (0.5, 1.0, 1.0)
    assert merge_updates(updates[:2]).finish_reason is None
    with pytest.raises(ValueError, match="has not finished"):
        Completion.from_updates(updates[:2])
