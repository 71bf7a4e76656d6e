"""Prometheus metrics under vLLM's names, so that existing dashboards work; one registry per app, none global.

Gauges and the engine's own counters are read from `EngineStats` when scraped; the rest is counted where it
happens. Histograms are in seconds, from the engine's own clock readings where it has them (queue, first
token).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from hadal.engine.request import Update

if TYPE_CHECKING:
    from hadal.engine.speculation import SpeculationStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_FINISHED = {"stop": "stop", "length": "length", "abort": "abort", "error": "error"}

StatsSource = Callable[[], Iterable[tuple[str, Any]]]


class _EngineCollector(Collector):
    """What the engines know themselves, read at scrape time."""

    GAUGES = (
        ("vllm:num_requests_running", "Sequences that run now.", "running"),
        ("vllm:num_requests_waiting", "Sequences that wait for a place.", "waiting"),
        ("vllm:kv_cache_usage_perc", "Share of the cache's pages in use, 0 to 1.", "cache_usage"),
    )
    COUNTERS = (
        ("vllm:num_preemptions", "Sequences set back because the cache was full.", "preemptions"),
        ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries"),
        ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hits"),
        ("vllm:prompt_tokens", "Prompt tokens processed.", "prompt_tokens"),
        ("vllm:generation_tokens", "Tokens generated.", "generation_tokens"),
    )

    def __init__(self, source: StatsSource) -> None:
        self.source = source

    def collect(self) -> Iterator[Any]:
        stats = list(self.source())
        for name, text, attribute in self.GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            for model, values in stats:
                gauge.add_metric([model], float(getattr(values, attribute)))
            yield gauge
        for name, text, attribute in self.COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            for model, values in stats:
                counter.add_metric([model], float(getattr(values, attribute)))
            yield counter
        yield from self._speculation([(model, values.speculation) for model, values in stats])

    SPECULATION = (
        ("num_drafts", "Steps of a sequence that verified drafts.", "drafts"),
        ("num_draft_tokens", "Tokens drafted and verified.", "drafted"),
        ("num_accepted_tokens", "Of these, accepted.", "accepted"),
    )

    def _speculation(self, stats: list[tuple[str, SpeculationStats | None]]) -> Iterator[Any]:
        known = [(model, values) for model, values in stats if values is not None]
        for name, text, attribute in self.SPECULATION:
            counter = CounterMetricFamily(f"vllm:spec_decode_{name}", text, labels=["model_name"])
            for model, values in known:
                counter.add_metric([model], float(getattr(values, attribute)))
            yield counter
        by_place = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted, by the draft's place in its step.",
            labels=["model_name", "position"],
        )
        for model, values in known:
            for place, number in enumerate(values.accepted_by_place):
                by_place.add_metric([model, str(place)], float(number))
        yield by_place
        gauge = GaugeMetricFamily(
            "hadal:speculation_resting", "1 while no drafts are made.", labels=["model_name"]
        )
        for model, values in known:
            gauge.add_metric([model], float(bool(values.resting)))
        yield gauge


class Metrics:
    """All metrics of one app. `source` yields (model name, engine stats) for each loaded engine."""

    def __init__(self, source: StatsSource) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(source))
        label = ["model_name"]
        self.success = Counter(
            "vllm:request_success", "Finished sequences.", [*label, "finished_reason"], registry=self.registry
        )
        self.refused = Counter(
            "hadal:requests_refused", "Requests answered with an error.", ["status"], registry=self.registry
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _LONG
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between tokens of a sequence.", _SHORT
        )
        self.whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", _LONG)
        self.queue = self._histogram("request_queue_time_seconds", "Waiting for a place.", _LONG)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)

    def finished(self, model: str, update: Update) -> None:
        """Count a sequence at its last update."""
        self.success.labels(model, _FINISHED.get(update.finish_reason or "abort", "error")).inc()
        times = update.metrics
        if times is None:
            return
        if times.queue_time is not None:
            self.queue.labels(model).observe(times.queue_time)
        if times.ttft is not None:
            self.first_token.labels(model).observe(times.ttft)
        if times.finished is not None:
            self.whole.labels(model).observe(times.finished - times.arrival)
            if times.first_token is not None and times.completion_tokens > 1:
                # One observation per token, of their mean: the engine delivers several tokens in one update.
                gap = (times.finished - times.first_token) / (times.completion_tokens - 1)
                self.inter_token.labels(model).observe(gap)

    def text(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
