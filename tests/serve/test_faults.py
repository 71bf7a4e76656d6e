"""What happens when clients leave, queues fill, engines die and signals come (cases 25, 27, 28, 34 to 37)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hadal.serve import ServerError, Settings, run_server
from hadal.serve.run import listen
from tests.helpers.live_server import LiveServer, live_server
from tests.serve.fake_engine import FakeAsyncEngine

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
ROOT = Path(__file__).resolve().parents[2]


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def post(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_25_client_killed(served: LiveServer, fake: FakeAsyncEngine, stream: bool, n: int, path: str) -> None:
    """In the middle of an answer, streamed or not: all its sequences are aborted at once."""
    fake.delay = 0.02
    fake.script = lambda prompt, params: "</think>" + "x" * 300
    before, body = fake.aborted, {**CHAT, "stream": stream}
    if path.startswith("/v1"):
        body["n"] = n
    else:
        n = 1
    with socket.create_connection(("127.0.0.1", served.port), 5) as raw:
        raw.sendall(post(body, path))
        until(lambda: fake.active == n)
        if stream:
            raw.recv(100)
    until(lambda: fake.active == 0, 1.0)
    assert fake.aborted == before + n
    assert served.state.in_flight() == 0


def test_25_client_killed_before_the_first_token(served: LiveServer, fake: FakeAsyncEngine) -> None:
    fake.frozen = True
    with socket.create_connection(("127.0.0.1", served.port), 5) as raw:
        raw.sendall(post({**CHAT, "stream": True}))
        until(lambda: fake.active == 1)
    until(lambda: fake.active == 0, 1.0)


def test_27_slow_reader_is_dropped(fake: FakeAsyncEngine) -> None:
    """A client that takes nothing: the server buffers little, and after the write timeout drops it."""
    text = "y" * 400
    fake.script = lambda prompt, params: "</think>" + text
    with live_server(fake, write_timeout=0.5) as server, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.connect(("127.0.0.1", server.port))
        # logprobs make each event large, so that the buffers between us fill
        body = {**CHAT, "n": 16, "stream": True, "logprobs": True, "top_logprobs": 20}
        raw.sendall(post(body))
        before = fake.aborted
        until(lambda: fake.active > 0)
        until(lambda: fake.active == 0, 4.0)
        assert fake.aborted > before
        assert server.state.in_flight() == 0


@pytest.fixture
def narrow() -> Iterator[tuple[LiveServer, FakeAsyncEngine]]:
    engine = FakeAsyncEngine()
    engine.engine.max_num_seqs = 1
    with live_server(engine, max_queue=1, retry_after=2) as server:
        yield server, engine


def test_28_queue_full(narrow: tuple[LiveServer, FakeAsyncEngine]) -> None:
    server, engine = narrow
    engine.frozen = True
    answers: list[int] = []

    def ask() -> None:
        answers.append(
            httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, trust_env=False).status_code
        )

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: engine.active == 2)
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        for body in (CHAT, {**CHAT, "stream": True}):
            full = http.post("/v1/chat/completions", json=body)
            assert full.status_code == 503
            assert full.headers["retry-after"] == "2"
            assert full.json()["error"]["code"] == "overloaded"
        assert http.get("/ready").status_code == 503
        assert http.get("/health").status_code == 200
        too_many = http.post("/v1/chat/completions", json={**CHAT, "n": 3})
        assert too_many.status_code == 400
        engine.frozen = False
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_28_openai_client_succeeds_by_retry(narrow: tuple[LiveServer, FakeAsyncEngine]) -> None:
    import openai

    server, engine = narrow
    engine.frozen = True
    threads = [
        threading.Thread(
            target=lambda: httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, trust_env=False)
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    until(lambda: engine.active == 2)
    threading.Timer(0.5, lambda: setattr(engine, "frozen", False)).start()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=3)
    start = time.monotonic()
    answer = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "Hello, world"
    assert time.monotonic() - start > 1.5  # it waited for Retry-After
    for thread in threads:
        thread.join()


def test_29_deadline_in_the_queue(fake: FakeAsyncEngine) -> None:
    fake.delay = 0.1
    with live_server(fake, queue_timeout=0.05) as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, trust_env=False)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/api/chat"])
@pytest.mark.parametrize("stream", [False, True])
def test_32_failed_sequence(client: httpx.Client, fake: FakeAsyncEngine, path: str, stream: bool) -> None:
    fake.error = "out of memory in step 7"
    body = {**CHAT, "stream": stream}
    if path.endswith("/completions") and "chat" not in path:
        body = {"model": "fake", "prompt": "x", "stream": stream}
    answer = client.post(path, json=body)
    assert answer.status_code == 500
    assert "out of memory in step 7" in answer.text
    fake.error = None
    assert client.post(path, json=body).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_34_error_in_the_middle_of_a_stream(client: httpx.Client, fake: FakeAsyncEngine, path: str) -> None:
    fake.delay = 0.02
    fake.script = lambda prompt, params: "</think>" + "x" * 50
    lines = []
    with client.stream("POST", path, json={**CHAT, "stream": True}) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 10:
                fake.error = "the engine died"
    errors = [line for line in lines if "the engine died" in line]
    assert len(errors) == 1
    assert json.loads(errors[0].removeprefix("data: "))["error"]
    assert lines[-2:] == ["data: [DONE]", ""] if path.startswith("/v1") else errors[0] == lines[-1]


def test_34_engine_dead(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    fake.alive = False
    health = client.get("/health")
    assert (health.status_code, health.json()["models"]) == (503, {"fake": "dead"})
    assert client.get("/ready").status_code == 503
    answer = client.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    assert client.get("/v1/models").status_code == 200
    fake.alive = True
    assert client.get("/health").status_code == 200


def test_sse_comments_keep_a_waiting_stream_open(fake: FakeAsyncEngine) -> None:
    fake.frozen = True
    with (
        live_server(fake, sse_comment_interval=0.1) as server,
        httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json={**CHAT, "stream": True}, trust_env=False
        ) as response,
    ):
        lines = response.iter_lines()
        assert next(lines) == ": keep-alive"
        fake.frozen = False
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]


def test_error_after_a_comment_is_an_event(fake: FakeAsyncEngine) -> None:
    """Once a comment was sent there is no status left to send: the error comes as an event."""
    fake.frozen = True
    with (
        live_server(fake, sse_comment_interval=0.1) as server,
        httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json={**CHAT, "stream": True}, trust_env=False
        ) as response,
    ):
        lines = response.iter_lines()
        assert next(lines) == ": keep-alive"
        fake.error = "too bad"
        fake.frozen = False
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert response.status_code == 200
    assert events[-1]["error"]["message"] == "too bad"


def test_36_drain(fake: FakeAsyncEngine) -> None:
    """What runs ends, what comes gets 503, then the server leaves."""
    fake.delay = 0.05
    fake.script = lambda prompt, params: "</think>" + "x" * 15
    with live_server(fake) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, trust_env=False))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: fake.active == 1)
        server.drain()
        until(lambda: http.get("/ready").status_code == 503)
        refused = http.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        assert http.get("/health").status_code == 200
        thread.join()
        assert answers[0].json()["choices"][0]["message"]["content"] == "x" * 15
        server.thread.join(5)
        assert not server.thread.is_alive()


SCRIPT = """
import logging, sys
from hadal.serve import Settings, run_server
from tests.serve.fake_engine import FakeAsyncEngine
engine = FakeAsyncEngine()
engine.delay = 0.05
engine.script = lambda prompt, params: "</think>" + "x" * int(sys.argv[1])
run_server(engine, Settings(port=0), say=lambda line: print(line, flush=True))
"""


def start(length: int) -> tuple[subprocess.Popen[str], str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(length)], stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert "fake" in lines[0]
    url = lines[1].split()[-1].removesuffix("/v1")
    until(lambda: _answers(url), 10)
    return process, url


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_36_signal_under_load(name: str) -> None:
    process, url = start(20)
    answers: list[int] = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/chat/completions", json=CHAT, trust_env=False).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: 'num_requests_running{model_name="fake"} 1' in _metrics(url))
    process.send_signal(getattr(signal, name))
    time.sleep(0.2)
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, trust_env=False).status_code == 503
    thread.join()
    assert answers == [200]
    assert process.wait(10) == 0


def _metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics", trust_env=False).text


def test_36_second_signal_exits_at_once() -> None:
    process, url = start(400)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5) as raw:
        raw.sendall(post(CHAT))
        until(lambda: 'num_requests_running{model_name="fake"} 1' in _metrics(url))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert time.monotonic() - began < 20


def test_37_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} .* in use .* --port") as caught:
            run_server(FakeAsyncEngine(), Settings(port=port))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "word"), [("192.0.2.1", "not an address"), ("no.such.host.invalid", "not an address")]
)
def test_37_no_such_address(host: str, word: str) -> None:
    with pytest.raises(ServerError, match=word):
        listen(host, 0)
