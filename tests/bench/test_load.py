"""Open loop: the schedule, the prompts, the booking of answers, a live server, and all that goes wrong."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hadal.bench import client, load
from hadal.bench.client import Answer, Endpoint
from hadal.bench.load import LoadError, Slo
from hadal.engine import AsyncEngine, Engine
from tests.helpers.live_server import live_server

OK = b"HTTP/1.1 200 OK\r\n"
SLO = Slo(ttft=5.0, per_token=5.0)


def test_arrivals_are_poisson_and_repeatable() -> None:
    times = load.arrivals(50.0, 20_000, 1e9, seed=1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((g - mean) ** 2 for g in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert math.sqrt(variance) == pytest.approx(mean, rel=0.03), "exponential gaps: deviation = mean"
    assert times[0] == 0 and times == sorted(times)
    assert times == load.arrivals(50.0, 20_000, 1e9, seed=1) != load.arrivals(50.0, 20_000, 1e9, seed=2)


def test_arrivals_are_bounded() -> None:
    assert len(load.arrivals(10.0, 7, 1e9, 0)) == 7
    within = load.arrivals(100.0, 10_000, 2.0, 0)
    assert within[-1] < 2.0 and len(within) == pytest.approx(200, abs=60)
    assert load.arrivals(float("inf"), 3, 1.0, 0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_no_rate_no_load(rate: float) -> None:
    with pytest.raises(LoadError, match="give one above 0"):
        load.arrivals(rate, 3, 1.0, 0)


def test_random_prompts() -> None:
    prompts = load.random_prompts(50, (3, 9), 100, 12, seed=0)
    lengths = {len(p.fields["prompt"]) for p in prompts}
    assert lengths <= set(range(3, 10)) and {3, 9} <= lengths
    assert all(0 <= t < 100 for p in prompts for t in p.fields["prompt"])
    assert len({tuple(p.fields["prompt"]) for p in prompts}) > 45, "each its own: no cached prefix helps"
    assert prompts[0].fields["max_tokens"] == 12 and prompts[0].fields["ignore_eos"] is True


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    lines = [{"prompt": "abc"}, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = load.prompts_of_file(file, 3, 9)
    assert [p.path for p in found] == ["/v1/completions", "/v1/chat/completions", "/v1/completions"]
    assert [p.fields["max_tokens"] for p in found] == [9, 3, 9]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{]", r"p\.jsonl:1 is not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', r"p\.jsonl:2 needs an object with either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "either"),
        ("\n", "holds no prompts"),
    ],
)
def test_a_bad_file_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(LoadError, match=complaint):
        load.prompts_of_file(tmp_path / "p.jsonl", 5, 4)


def test_summary_by_hand() -> None:
    """Two good answers, one of which is too slow for the objective, and a failed one."""
    quick = Answer(0.0, 1.0, [(0.2, 1), (0.6, 2), (1.0, 1)], input_tokens=5, output_tokens=4)
    slow = Answer(1.0, 4.0, [(3.0, 1), (4.0, 1)], input_tokens=7, output_tokens=2)
    lost = Answer(2.0, 4.0, fault="no end within 2 s")
    found = load.summarise(0.5, [0.0, 1.0, 2.0], [quick, slow, lost], 4.0, Slo(ttft=1.0, per_token=0.5))
    assert (found.requests, found.ok, found.faults) == (3, 2, {"no end within 2 s": 1})
    assert found.offered_rate == 1.0 and found.achieved_rate == 0.5
    assert found.output_rate == 6 / 4 and (found.input_tokens, found.output_tokens) == (12, 6)
    assert found.goodput == 1 / 4
    assert found.ttft["p50"] == pytest.approx((0.2 + 2.0) / 2)
    assert found.itl["p50"] == pytest.approx(0.4)
    assert quick.per_token == pytest.approx(0.8 / 3) and slow.per_token == 1.0
    assert found.e2e["p99"] == pytest.approx(1.0 + 0.99 * 2.0)
    assert found.running == (1.0 + 3.0 + 2.0) / 4


# --- a live server ---


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    engine = Engine.load("hadal-mini", device="cpu", max_num_seqs=4, max_model_len=512)
    runner = AsyncEngine(engine)
    with live_server(runner) as running:
        endpoint = Endpoint.of(running.url)
        (name, *_) = asyncio.run(client.models(endpoint))
        yield replace(endpoint, model=name)
    runner.shutdown(drain=False)


def test_every_token_is_counted(server: Endpoint) -> None:
    prompts = load.random_prompts(5, (4, 12), 500, 7, seed=3)
    seen: list[tuple[float, float]] = []
    found = asyncio.run(
        load.offer(server, prompts, 20.0, seconds=10, timeout=60, slo=SLO, progress=lambda *a: seen.append(a))
    )
    assert found.faults == {}
    assert (found.ok, found.output_tokens) == (5, 35)
    assert found.input_tokens == sum(len(p.fields["prompt"]) for p in prompts)
    assert found.goodput == found.achieved_rate > 0
    assert 0 < found.ttft["p50"] <= found.e2e["p50"]
    assert seen[-1] == (5, 5)


def test_without_counts_in_each_event(server: Endpoint) -> None:
    plain = Endpoint(server.host, server.port, model=server.model, exact=False)
    fields = {"prompt": [5, 6, 7], "max_tokens": 6, "ignore_eos": True}
    answer = asyncio.run(client.ask(plain, "/v1/completions", fields, 60))
    assert answer.fault is None
    assert answer.output_tokens == 6, "the final usage settles the count"
    assert answer.input_tokens == 3


def test_chat(server: Endpoint) -> None:
    fields = {"messages": [{"role": "user", "content": "12 + 35?"}], "max_tokens": 8}
    answer = asyncio.run(client.ask(server, "/v1/chat/completions", fields, 60))
    assert answer.fault is None and 1 <= answer.output_tokens <= 8 and answer.arrivals


def test_refusals_and_timeouts_are_faults(server: Endpoint) -> None:
    long = {"prompt": [1] * 600, "max_tokens": 4}
    refused = asyncio.run(client.ask(server, "/v1/completions", long, 60))
    assert refused.fault is not None and refused.fault.startswith("status 400: ")
    slow = {"prompt": [1] * 100, "max_tokens": 400, "ignore_eos": True}
    given_up = asyncio.run(client.ask(server, "/v1/completions", slow, 0.05))
    assert given_up.fault == "no end within 0.05 s"
    assert given_up.ended - given_up.sent < 5


def test_the_client_is_open_loop() -> None:
    """A server that answers nothing for a while: requests still come at their times."""

    async def scene() -> tuple[list[float], load.LoadResult]:
        came: list[float] = []
        loop = asyncio.get_running_loop()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            came.append(loop.time())
            await asyncio.sleep(5)
            writer.close()

        listening = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        prompts = load.random_prompts(6, (2, 2), 10, 2, 0)
        found = await load.offer(
            Endpoint("127.0.0.1", port, model="m"), prompts, 20.0, seconds=5, timeout=0.6, slo=SLO, seed=4
        )
        listening.close()
        return came, found

    came, found = asyncio.run(scene())
    plan = load.arrivals(20.0, 6, 5, 4)
    assert len(came) == 6
    assert came[-1] - came[0] == pytest.approx(plan[-1], abs=0.3), "no request waited for an answer"
    assert found.ok == 0 and found.faults == {"no end within 0.6 s": 6}
    assert math.isnan(found.ttft["p50"]) and found.goodput == 0


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (OK + b'\r\ndata: {"choices": [{"text": "a"}]}\n\n', "the stream ended early"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n99\r\ndata:", "connection: IncompleteReadError"),
        (OK + b'\r\ndata: {"error": {"message": "engine lost"}}\n\ndata: [DONE]\n\n', "engine lost"),
        (OK + b"\r\ndata: [DONE]\n\n", "the answer has no token"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull", "status 503: full"),
        (b"SSH-2.0-OpenSSH\r\n", "connection: ValueError: the answer is not HTTP"),
        (b"", "connection: ValueError: the answer is not HTTP"),
    ],
)  # fmt: skip
def test_broken_answers_are_faults(reply: bytes, complaint: str) -> None:
    async def scene() -> Answer:
        async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply)
            await writer.drain()
            writer.close()

        listening = await asyncio.start_server(broken, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        answer = await client.ask(
            Endpoint("127.0.0.1", port, model="m"), "/v1/completions", {"prompt": "a"}, 5
        )
        listening.close()
        return answer

    answer = asyncio.run(scene())
    assert answer.fault is not None and answer.fault.startswith(complaint), answer.fault


@pytest.mark.parametrize("url", ["ftp://x", "http://x:notaport", "http://", "http://x:99999"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(client.ServerFault, match="is no server's address"):
        Endpoint.of(url)


def test_addresses() -> None:
    assert Endpoint.of("localhost:8000/v1") == Endpoint("localhost", 8000)
    assert Endpoint.of("https://a.example/llm/v1/").url == "https://a.example:443/llm"
    assert Endpoint.of("http://[::1]:80").url == "http://[::1]:80"
    with pytest.raises(client.ServerFault, match=r"no answer from http://127\.0\.0\.1:1 "):
        asyncio.run(client.models(Endpoint.of("http://127.0.0.1:1")))
