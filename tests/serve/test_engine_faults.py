"""The server on a real engine when clients leave and the engine fails (cases 25, 32 to 35)."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from hadal.engine import AsyncEngine
from hadal.text.templates import TEMPLATES
from hadal.text.tokenizer import Tokenizer
from tests.engine.tiny import tiny_engine
from tests.helpers.live_server import LiveServer, live_server
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer
from tests.serve.test_faults import post, until

BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "one two",
    "max_tokens": 400,
    "ignore_eos": True,
    "temperature": 0,
}
SHORT = {**BODY, "max_tokens": 4}


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[LiveServer, AsyncEngine]]:
    tokenizer = Tokenizer.load(make_tiny_tokenizer(tmp_path))
    engine = AsyncEngine(
        tiny_engine(
            tokenizer=tokenizer, template=TEMPLATES["deepseek-r1"], name="tiny", pages=200, page_size=8
        ),
        watchdog_seconds=0.5,
    )
    with live_server(engine) as server:
        yield server, engine
    engine.shutdown(drain=False)


def ask(server: LiveServer, body: dict[str, Any] = SHORT) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, trust_env=False, timeout=20)


@pytest.mark.parametrize("stream", [False, True])
def test_25_a_killed_client_frees_its_pages(live: tuple[LiveServer, AsyncEngine], stream: bool) -> None:
    server, engine = live
    with socket.create_connection(("127.0.0.1", server.port), 5) as raw:
        raw.sendall(post({**BODY, "stream": stream, "n": 3}, "/v1/completions"))
        until(lambda: engine.engine.stats().running == 3)
    until(lambda: engine.engine.stats().running == 0, 2.0)
    until(lambda: not engine.engine.has_work(), 2.0)
    engine.engine.check_integrity()
    assert server.state.in_flight() == 0


def test_32_out_of_memory_in_a_step(
    live: tuple[LiveServer, AsyncEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, engine = live
    runner = engine.engine.runner
    whole = runner.run

    def fails(plan: Any) -> Any:
        monkeypatch.setattr(runner, "run", whole)
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = ask(server).json()["choices"][0]["text"]
    monkeypatch.setattr(runner, "run", fails)
    failed = ask(server)
    assert failed.status_code == 500
    assert "memory" in failed.json()["error"]["message"]
    assert ask(server).json()["choices"][0]["text"] == before
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200


def test_34_engine_killed(live: tuple[LiveServer, AsyncEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """/health says so within a second, running streams end with an error, new requests get 503."""
    server, engine = live
    ended: list[str] = []

    def listen() -> None:
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**BODY, "stream": True}, trust_env=False
        ) as response:
            for line in response.iter_lines():
                ended.extend([line] if line else [])

    thread = threading.Thread(target=listen)
    thread.start()
    until(lambda: len(ended) > 2)

    def dies() -> None:
        raise SystemError("killed")

    monkeypatch.setattr(engine.engine, "step", dies)
    until(lambda: httpx.get(f"{server.url}/health", trust_env=False).status_code == 503, 1.0)
    thread.join(5)
    assert any("the engine stopped" in line for line in ended[-2:])
    assert ended[-1] == "data: [DONE]"
    refused = ask(server)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")


def test_35_frozen_step(live: tuple[LiveServer, AsyncEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    server, engine = live
    step, release = engine.engine.step, threading.Event()

    def frozen() -> Any:
        release.wait(90)
        return step()

    monkeypatch.setattr(engine.engine, "step", frozen)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(ask(server)))
    thread.start()
    until(lambda: httpx.get(f"{server.url}/health", trust_env=False).status_code == 503, 30.0)
    start = time.monotonic()
    assert ask(server).status_code == 503
    assert time.monotonic() - start < 20
    release.set()
    thread.join(10)
    assert answers[0].status_code == 200
    until(lambda: httpx.get(f"{server.url}/health", trust_env=False).status_code == 200)


def test_33_not_a_number(live: tuple[LiveServer, AsyncEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence whose logits are NaN fails; another in the same batch goes on."""
    server, engine = live
    model = engine.engine.model
    whole = model.logits
    calls = 0

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        logits = whole(hidden)
        if logits.shape[0] == 2:
            calls += 1
            logits = logits.clone()
            logits[0] = float("nan")
        return logits

    monkeypatch.setattr(model, "logits", poisoned)
    answers: list[int] = []

    def listen() -> None:
        answers.append(ask(server, {**BODY, "max_tokens": 200}).status_code)

    threads = [threading.Thread(target=listen) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls > 0
    assert sorted(answers) == [200, 500]
    monkeypatch.undo()
    assert ask(server).status_code == 200
