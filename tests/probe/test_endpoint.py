"""Services over HTTP: what they lack is said, what they delay is waited for, what came is kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hadal.probe.backends import Item, Simulation
from hadal.probe.endpoint import Endpoint, EndpointError
from hadal.probe.identity import IdentityError

ITEMS = [Item(str(i), f"text {i} " + "x" * i) for i in range(10)]


def vector_of(text: str) -> list[float]:
    return [float(len(text)), float(sum(text.encode()) % 97), 0.5, -1.0]


@dataclass
class Fake:
    """A service that answers in turn as it is told, and rightly when there is nothing left to tell."""

    url: str = ""
    script: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        self.asked.append(body)
        if self.script:
            return self.script.pop(0)
        data = [{"index": i, "embedding": vector_of(t)} for i, t in enumerate(body["input"])]
        return 200, {}, {"data": data[::-1], "model": "said-v2", "usage": {"prompt_tokens": 1}}


@pytest.fixture
def fake() -> Iterator[Fake]:
    told = Fake()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            told.keys.append(self.headers["authorization"])
            status, headers, body = told.answer(json.loads(self.rfile.read(length)))
            self.reply(status, headers, body)

        def do_GET(self) -> None:
            self.reply(404, {}, {"error": {"message": "no such route"}})

        def reply(self, status: int, headers: dict[str, str], body: Any) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield told
    server.shutdown()
    server.server_close()
    thread.join(60)


@dataclass
class Clock:
    """Time that passes by sleeping alone."""

    now: float = 100.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def endpoint(fake: Fake, **options: Any) -> Endpoint:
    clock = options.pop("timer", Clock())
    return Endpoint(fake.url, "m", sleep=clock.sleep, clock=lambda: clock.now, **options)


def test_vectors_in_order_and_who_made_them(fake: Fake) -> None:
    with endpoint(fake, batch=4, api_key="sk-x") as service:
        found = service.embed(ITEMS)
    np.testing.assert_array_equal(found.at(-1), [vector_of(i.text) for i in ITEMS])
    assert found.ids == [i.id for i in ITEMS] and [len(b["input"]) for b in fake.asked] == [4, 4, 2]
    assert set(fake.keys) == {"Bearer sk-x"} and fake.asked[0]["encoding_format"] == "float"
    who = found.identity
    assert (who.backend, who.model, who.pooling) == ("endpoint", "m", "the service's own")
    assert dict(who.details) == {"url": fake.url, "answers as": "said-v2"} and "unknown" in who.revision


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_service_without_embeddings_is_an_error_that_says_so(fake: Fake, status: int) -> None:
    fake.script = [(status, {}, {"error": {"message": "Not found"}})] * 9
    with endpoint(fake) as service, pytest.raises(EndpointError, match=r"has no embeddings.*Nothing was put"):
        service.embed(ITEMS)
    assert len(fake.asked) == 1, "asking again would not help"


@pytest.mark.parametrize(
    ("status", "body", "match"),
    [
        (401, {"error": {"message": "no"}}, "key"),
        (400, {"error": {"message": "too long"}}, "too long"),
        (200, {"data": []}, "0 vectors for"),
        (200, {"object": "list"}, "another form"),
        (200, "<html>", "another form"),
        (200, {"data": [{"index": i, "embedding": []} for i in range(10)]}, "empty"),
        (200, {"data": [{"index": i, "embedding": [1e99] * 4} for i in range(10)]}, "not finite"),
        (200, {"data": [{"index": i, "embedding": [1.0] * (1 + i)} for i in range(10)]}, "different widths"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_answers_that_are_no_vectors(fake: Fake, status: int, body: Any, match: str) -> None:
    fake.script = [(status, {}, body)]
    with endpoint(fake) as service, pytest.raises(EndpointError, match=match):
        service.embed(ITEMS)


def test_later_means_later(fake: Fake) -> None:
    clock = Clock()
    fake.script = [
        (429, {"retry-after": "7"}, {}),
        (503, {}, ""),
        (500, {}, {}),
        (429, {"retry-after": "1e9"}, {}),
    ]
    with endpoint(fake, timer=clock) as service:
        service.embed(ITEMS)
    first, second, third, last = clock.slept
    assert (first, last) == (7.0, 120.0) and 1.0 <= second <= 2.0 and 2.0 <= third <= 4.0
    fake.script = [(503, {}, {"error": {"message": "busy"}})] * 4
    with endpoint(fake, retries=2) as service, pytest.raises(EndpointError, match=r"3 tries: 503 busy"):
        service.embed(ITEMS)


def test_a_service_that_is_not_there() -> None:
    clock = Clock()
    nobody = Endpoint("http://127.0.0.1:9/v1", "m", retries=1, sleep=clock.sleep, clock=lambda: clock.now)
    with nobody, pytest.raises(EndpointError, match="nothing answers at"):
        nobody.embed(ITEMS)
    with pytest.raises(EndpointError, match="does not answer: Connect"):
        Endpoint("http://127.0.0.1:9/v1", "m").embed(ITEMS, layers=(1,))
    with pytest.raises(EndpointError, match="no address"):
        Endpoint("localhost:1", "m")


def test_limits_are_kept(fake: Fake) -> None:
    clock = Clock()
    with endpoint(fake, timer=clock, batch=1, requests_per_minute=30) as service:
        service.embed(ITEMS)
    assert clock.slept == pytest.approx([2.0] * 9)
    clock = Clock()
    with endpoint(fake, timer=clock, batch=1, tokens_per_minute=60) as service:
        service.embed(ITEMS[:3])
    assert clock.slept == pytest.approx([2.0, 2.0]), (
        "two tokens, guessed from eight characters, a second each"
    )


def test_a_run_goes_on_where_it_was_stopped(fake: Fake, tmp_path: Path) -> None:
    cache = tmp_path / "kept" / "c.sqlite"
    good = fake.answer({"input": [i.text for i in sorted(ITEMS, key=lambda i: len(i.text))[:4]]})
    fake.asked.clear()
    fake.script = [good, (401, {}, {})]
    with endpoint(fake, batch=4, cache=cache) as service, pytest.raises(EndpointError):
        service.embed(ITEMS)
    fake.asked.clear()
    with endpoint(fake, batch=4, cache=cache, price=2.0, requests_per_minute=1) as service:
        told = service.estimate(ITEMS)
        assert (told.requests, told.seconds) == (2, 120.0) and "4 texts are cached" in told.note
        assert told.cost == pytest.approx(told.tokens * 2e-6) and not fake.asked
        found = service.embed(ITEMS)
    assert sum(len(b["input"]) for b in fake.asked) == 6
    np.testing.assert_array_equal(found.at(-1), [vector_of(i.text) for i in ITEMS])
    assert dict(found.identity.details)["from the cache"] == "4 of 10"
    fake.asked.clear()
    with endpoint(fake, cache=cache) as service:
        assert np.array_equal(service.embed(ITEMS).vectors, found.vectors) and not fake.asked
    with endpoint(fake, cache=cache, dimensions=4) as service:
        service.embed(ITEMS[:1])
    assert len(fake.asked) == 1 and fake.asked[0]["dimensions"] == 4, "another question, another answer"
    (tmp_path / "text").write_text("this is no cache " * 100)
    with pytest.raises(EndpointError, match="no cache"):
        endpoint(fake, cache=tmp_path / "text")


def test_what_a_service_cannot_do_is_refused(fake: Fake) -> None:
    with endpoint(fake) as service:
        for wanted in ({"layers": (3,)}, {"pooling": "last"}):
            with pytest.raises(EndpointError, match="not a Hadal server"):
                service.embed(ITEMS, **wanted)  # type: ignore[arg-type]
        with pytest.raises(EndpointError, match="use a local model"):
            service.embed(ITEMS, pooling="span")
    assert not fake.asked


def test_a_simulation_behind_a_service_stays_one(fake: Fake) -> None:
    made = Simulation(width=32).embed(ITEMS, (0,)).at(0).tolist()
    data = [{"index": i, "embedding": v} for i, v in enumerate(made)]
    fake.script = [(200, {}, {"data": data})]
    with endpoint(fake) as service, pytest.raises(IdentityError, match="mark of a simulation"):
        service.embed(ITEMS)
