"""The engine alone: latency of one sequence, throughput of many, each beside its ceiling.

Decode: a step reads what `work.step_work` counts, so steps a second ≤ bandwidth / bytes; with speculation a
step makes several tokens, and the ceiling counts them. Prefill: a prompt costs its FLOP at the measured rate
of matrix products, and at least one reading of the weights. Every run uses new random prompts: no cached
prefix helps. Times are seconds, rates tokens a second.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from hadal.bench.ceilings import Ceilings
from hadal.bench.stats import percentile
from hadal.bench.work import measured_experts, packed_kind, step_work
from hadal.engine import Engine, EngineError, SamplingParams
from hadal.plan.speed import StepWork, prefill_flops

Progress = Callable[[float, float], None]  # done, of


@dataclass
class Trace:
    """When tokens came: seconds since the requests were added, and how many came then; per sequence."""

    arrivals: list[list[tuple[float, int]]] = field(default_factory=list)
    ended: float = 0.0

    @property
    def first(self) -> float:
        """Until the first token of the first sequence."""
        return min(one[0][0] for one in self.arrivals)

    @property
    def filled(self) -> float:
        """Until every sequence had a token: the prompts are computed."""
        return max(one[0][0] for one in self.arrivals)

    @property
    def tokens(self) -> int:
        return sum(count for one in self.arrivals for _, count in one)

    def decoded(self) -> int:
        """Tokens that came after `filled`."""
        return sum(count for one in self.arrivals for at, count in one if at > self.filled)

    def gaps(self) -> list[float]:
        """Seconds between a sequence's tokens; tokens that came together share their gap."""
        found: list[float] = []
        for one in self.arrivals:
            for (before, _), (at, count) in itertools.pairwise(one):
                found += [(at - before) / count] * count
        return found

    def steps(self) -> int:
        """Updates after the first, over all sequences: decode steps that brought tokens."""
        return sum(len(one) - 1 for one in self.arrivals)


def run(engine: Engine, batch: int, prompt: int, output: int, draw: random.Random) -> Trace:
    """`batch` random prompts at once, `output` tokens each, greedy. Raises EngineError when a step fails."""
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    ids = [[draw.randrange(engine.vocab_size) for _ in range(prompt)] for _ in range(batch)]
    started = time.perf_counter()
    arrivals: dict[str, list[tuple[float, int]]] = {engine.add(one, params): [] for one in ids}
    while engine.has_work():
        updates = engine.step()
        now = time.perf_counter() - started
        for request, update in updates:
            if update.finish_reason == "error":
                raise EngineError(f"the engine failed in the benchmark: {update.error}")
            if update.token_ids:
                arrivals[request].append((now, len(update.token_ids)))
    return Trace(list(arrivals.values()), time.perf_counter() - started)


@dataclass
class Latency:
    """One sequence at a time. `*_ceiling`: what the machine would allow; `step_bytes`: read by a decode
    step."""

    prompt: int
    output: int
    repeats: int
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_floor_s: float
    per_token_p50_s: float
    per_token_p95_s: float
    decode_rate: float
    decode_ceiling: float
    tokens_per_step: float
    step_bytes: float
    prompt_flops: float
    acceptance: float | None  # of drafts, if there are any
    startup: dict[str, float] = field(default_factory=dict)

    @property
    def decode_share(self) -> float:
        return self.decode_rate / self.decode_ceiling

    @property
    def ttft_share(self) -> float:
        """The least possible time over the measured one."""
        return self.ttft_floor_s / self.ttft_p50_s

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "decode_share": self.decode_share, "ttft_share": self.ttft_share}


def latency(
    engine: Engine,
    ceilings: Ceilings,
    *,
    prompt: int,
    output: int,
    repeats: int,
    progress: Progress | None = None,
) -> Latency:
    """Batch 1, `repeats` times. The engine's very first request is timed too: what it takes beyond a later
    one is `startup["warm_up_s"]` (kernels built, buffers touched, graphs captured)."""
    draw = random.Random(0)
    cold = run(engine, 1, prompt, min(output, 4), draw)
    traces = []
    for number in range(repeats):
        traces.append(run(engine, 1, prompt, output, draw))
        if progress is not None:
            progress(number + 1, repeats)
    work = step_work(engine)
    read = work.bytes(1, prompt + output / 2)
    gaps = [gap for trace in traces for gap in trace.gaps()]
    per_step = sum(t.decoded() for t in traces) / max(1, sum(t.steps() for t in traces))
    ttft = percentile([t.first for t in traces], 50)
    flops = prefill_flops(engine.config, prompt)
    return Latency(
        prompt=prompt,
        output=output,
        repeats=repeats,
        ttft_p50_s=ttft,
        ttft_p95_s=percentile([t.first for t in traces], 95),
        ttft_floor_s=prefill_floor(engine, work, ceilings, 1, prompt),
        per_token_p50_s=percentile(gaps, 50),
        per_token_p95_s=percentile(gaps, 95),
        decode_rate=max(t.decoded() / (t.ended - t.filled) for t in traces),
        decode_ceiling=per_step * ceilings.bandwidth / read,
        tokens_per_step=per_step,
        step_bytes=read,
        prompt_flops=flops,
        acceptance=_acceptance(engine),
        startup={"first_token_s": cold.first, "warm_up_s": max(0.0, cold.first - ttft)},
    )


def prefill_floor(engine: Engine, work: StepWork, ceilings: Ceilings, batch: int, prompt: int) -> float:
    """Seconds that the prompts must take: their FLOP at the measured rate, or one reading of the weights."""
    rate = ceilings.matmul_for(engine.dtype, packed_kind(engine.model))
    compute = batch * prefill_flops(engine.config, prompt) / rate
    return max(compute, work.bytes(batch * prompt, 0) / ceilings.bandwidth)


@dataclass
class Throughput:
    """A batch of equal requests, all there at the start. Rates are of the whole batch; the fastest repeat."""

    batch: int
    prompt: int
    output: int
    first_token_s: float
    prefill_rate: float
    prefill_ceiling: float
    output_rate: float  # generated tokens over all the time, prompts included
    decode_rate: float  # of the time after the last first token
    decode_ceiling: float
    step_bytes: float
    experts_even: float  # of a layer, that a step touches under even routing
    experts_measured: float | None
    tokens_per_step: float  # of a sequence
    acceptance: float | None

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "prefill_share": self.prefill_rate / self.prefill_ceiling,
            "decode_share": self.decode_rate / self.decode_ceiling,
        }


def throughput(
    engine: Engine,
    ceilings: Ceilings,
    *,
    batch: int,
    prompt: int,
    output: int,
    repeats: int,
    progress: Progress | None = None,
) -> Throughput:
    """`batch` sequences at once; more than the engine has seats wait for one, as offline work does."""
    draw = random.Random(batch)
    run(engine, batch, prompt, 2, draw)  # warm up
    traces = []
    for number in range(repeats):
        traces.append(run(engine, batch, prompt, output, draw))
        if progress is not None:
            progress(number + 1, repeats)
    work = step_work(engine)
    running = min(batch, engine.max_num_seqs)
    touched = measured_experts(engine, running * (1 + work.drafts))
    read = work.bytes(running, prompt + output / 2, touched)
    per_step = sum(t.tokens - batch for t in traces) / max(1, sum(t.steps() for t in traces))
    return Throughput(
        batch=batch,
        prompt=prompt,
        output=output,
        first_token_s=min(t.first for t in traces),
        prefill_rate=max(batch * prompt / t.filled for t in traces),
        prefill_ceiling=batch * prompt / prefill_floor(engine, work, ceilings, batch, prompt),
        output_rate=max(t.tokens / t.ended for t in traces),
        decode_rate=max(_decode_rate(t, running) for t in traces),
        decode_ceiling=per_step * running * ceilings.bandwidth / read,
        step_bytes=read,
        experts_even=work.touched(running * (1 + work.drafts)),
        experts_measured=touched,
        tokens_per_step=per_step,
        acceptance=_acceptance(engine),
    )


def _acceptance(engine: Engine) -> float | None:
    """Share of all drafts so far that were accepted."""
    stats = engine.stats().speculation
    return None if stats is None else stats.acceptance


def _decode_rate(trace: Trace, running: int) -> float:
    """After the last first token; where sequences waited for seats, over all the time, which then has prompts
    in it."""
    if len(trace.arrivals) > running:
        return (trace.tokens - len(trace.arrivals)) / trace.ended
    return trace.decoded() / (trace.ended - trace.filled) if trace.ended > trace.filled else float("nan")
