"""Open-loop load on a server: a request comes when its time has come, whether or not earlier ones are done.

Arrivals are Poisson: gaps are exponential with mean 1/rate, drawn from a seed, so that two servers can be
given the very same load. Every request is streamed through the public API; the client notes when its
tokens came. A closed loop, which waits for answers, would slow down with the server and hide its queue.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hadal.bench.client import Answer, Endpoint, ask
from hadal.bench.stats import percentiles

Progress = Callable[[float, float], None]  # requests done, of


class LoadError(RuntimeError):
    """A load that cannot be made; one line with cause and remedy."""


@dataclass(frozen=True)
class Prompt:
    """What one request asks: the API's path and the fields that say it."""

    path: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Slo:
    """What a good answer keeps to, in seconds: the first token's wait, and the mean one of each later."""

    ttft: float
    per_token: float

    def met(self, answer: Answer) -> bool:
        return answer.ok and answer.ttft <= self.ttft and answer.per_token <= self.per_token


def arrivals(rate: float, count: int, seconds: float, seed: int) -> list[float]:
    """Times of at most `count` arrivals within `seconds`, from 0 on; rate inf: all at once.

    The first request comes at 0; a rate is requests a second. Raises LoadError for one that is not above 0.
    """
    if math.isnan(rate) or rate <= 0:
        raise LoadError(
            f"a rate of {rate:g} requests a second is none; give one above 0, or inf for all at once"
        )
    if math.isinf(rate):
        return [0.0] * count
    draw, at = random.Random(seed), 0.0
    times: list[float] = []
    while len(times) < count and at < seconds:
        times.append(at)
        at += draw.expovariate(rate)
    return times


def random_prompts(count: int, lengths: tuple[int, int], vocab: int, output: int, seed: int) -> list[Prompt]:
    """Completions of random token ids; lengths even between two bounds."""
    draw = random.Random(seed)
    prompts = []
    for _ in range(count):
        ids = [draw.randrange(vocab) for _ in range(draw.randint(*lengths))]
        prompts.append(Prompt("/v1/completions", {"prompt": ids, "max_tokens": output, "ignore_eos": True}))
    return prompts


def prompts_of_file(path: Path, count: int, output: int) -> list[Prompt]:
    """Prompts from a JSONL file, from the beginning again when it ends. A line is an object with `prompt`
    (text or token ids) or `messages`, and perhaps `max_tokens`. Raises LoadError naming the line."""
    prompts = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as fault:
            raise LoadError(f"{path}:{number} is not JSON ({fault})") from None
        if not isinstance(found, dict) or ("prompt" in found) == ("messages" in found):
            raise LoadError(f"{path}:{number} needs an object with either prompt or messages")
        key = "prompt" if "prompt" in found else "messages"
        api = "/v1/completions" if key == "prompt" else "/v1/chat/completions"
        prompts.append(Prompt(api, {key: found[key], "max_tokens": found.get("max_tokens", output)}))
        if len(prompts) == count:
            break
    if not prompts:
        raise LoadError(f"{path} holds no prompts; a line is an object with prompt or messages")
    return [prompts[i % len(prompts)] for i in range(count)]


@dataclass
class LoadResult:
    """One rate. Times are seconds, rates a second; `late_s` is how much later than planned the client itself
    sent a request at worst: if it is large, the client was the limit."""

    rate: float
    requests: int
    ok: int
    seconds: float
    offered_rate: float
    achieved_rate: float
    output_rate: float
    input_tokens: int
    output_tokens: int
    goodput: float
    slo: dict[str, float]
    ttft: dict[str, float]
    itl: dict[str, float]
    per_token: dict[str, float]
    e2e: dict[str, float]
    running: float  # requests at once, on average
    late_s: float
    faults: dict[str, int] = field(default_factory=dict)
    output_ceiling: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


async def offer(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    rate: float,
    *,
    seconds: float,
    timeout: float,
    slo: Slo,
    seed: int = 0,
    progress: Progress | None = None,
) -> LoadResult:
    """Send the prompts at their times and gather all answers; what takes more than `timeout` is given up."""
    plan = arrivals(rate, len(prompts), seconds, seed)
    started = time.perf_counter()
    done = 0

    async def one(at: float, prompt: Prompt) -> Answer:
        nonlocal done
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        answer = await ask(endpoint, prompt.path, prompt.fields, timeout)
        answer.late = answer.sent - started - at
        done += 1
        if progress is not None:
            progress(done, len(plan))
        return answer

    answers = await asyncio.gather(*(one(at, p) for at, p in zip(plan, prompts, strict=False)))
    return summarise(rate, plan, answers, time.perf_counter() - started, slo)


def summarise(
    rate: float, plan: Sequence[float], answers: Sequence[Answer], seconds: float, slo: Slo
) -> LoadResult:
    """Percentiles over the answers that succeeded; rates over the time until the last one ended."""
    good = [a for a in answers if a.ok]
    faults: dict[str, int] = {}
    for answer in answers:
        if answer.fault is not None:
            faults[answer.fault] = faults.get(answer.fault, 0) + 1
    tokens = sum(a.output_tokens for a in good)
    offered = (len(plan) - 1) / plan[-1] if len(plan) > 1 and plan[-1] > 0 else float("inf")
    return LoadResult(
        rate=rate,
        requests=len(answers),
        ok=len(good),
        seconds=seconds,
        offered_rate=offered,
        achieved_rate=len(good) / seconds,
        output_rate=tokens / seconds,
        input_tokens=sum(a.input_tokens for a in good),
        output_tokens=tokens,
        goodput=sum(slo.met(a) for a in good) / seconds,
        slo={"ttft_s": slo.ttft, "per_token_s": slo.per_token},
        ttft=percentiles([a.ttft for a in good]),
        itl=percentiles([gap for a in good for gap in a.gaps()]),
        per_token=percentiles([a.per_token for a in good if a.output_tokens > 1]),
        e2e=percentiles([a.ended - a.sent for a in good]),
        running=sum(a.ended - a.sent for a in answers) / seconds,
        late_s=max((a.late for a in answers), default=0.0),
        faults=faults,
    )
