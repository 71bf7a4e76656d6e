"""The client of the public API: streams, refusals and broken connections, all in plain words."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import pytest

from hadal.ui.answer import Runs
from hadal.ui.api import Client, Model, ServerError, plain, presented_key
from hadal.ui.conversation import Conversation
from hadal.ui.settings import Settings, request_body
from tests.ui.fake_server import Fake


def client(fake: Fake) -> Client:
    return Client("http://127.0.0.1:1", httpx.ASGITransport(fake.app))


def body(question: str) -> dict[str, Any]:
    conversation = Conversation.new(0.0)
    conversation.ask(question, 0.0)
    return request_body(conversation, Settings(model="hadal-mini"))


async def ask(talk: Client, question: str, key: str = "") -> list[dict[str, Any]]:
    return [chunk async for chunk in talk.chat(body(question), key)]


def test_models() -> None:
    models = asyncio.run(client(Fake()).models())
    assert models == [
        Model("hadal-mini", 2048, ""),
        Model("other", None, "", "always", {"temperature": 0.25}),
    ]


def test_chat_streams_chunks_and_asks_for_usage() -> None:
    fake = Fake(pace=0)
    chunks = asyncio.run(ask(client(fake), "1 + 2"))
    assert (
        "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks[:-1])
        == "The sum is **3** (asked 1)."
    )
    assert chunks[-1]["usage"]["prompt_tokens"] == 24
    assert (
        fake.requests[0]["stream_options"] == {"include_usage": True} and fake.requests[0]["stream"] is True
    )


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("busy", "The server has too much to do: its queue is full. Press Retry in 7 s."),
        ("long", "This conversation has become longer than the model can read. Start a new one"),
        ("cut", "The server ended the answer early."),
        ("die 1 2 3", "The answer was broken off. The server says: the engine stopped."),
    ],
)
def test_failures_in_plain_words(question: str, message: str) -> None:
    with pytest.raises(ServerError) as caught:
        asyncio.run(ask(client(Fake(pace=0)), question))
    assert str(caught.value).startswith(message)


def test_a_key_is_sent_and_its_lack_is_said() -> None:
    fake = Fake(key="secret-key", pace=0)
    with pytest.raises(ServerError, match=r"asks for an API key\. Enter it under Settings") as caught:
        asyncio.run(client(fake).models())
    assert caught.value.status == 401
    assert asyncio.run(client(fake).models("secret-key"))[0].id == "hadal-mini"
    assert asyncio.run(ask(client(fake), "1", "secret-key"))


def test_a_stopped_server() -> None:
    gone = Client("http://127.0.0.1:9")  # the discard port: nothing listens
    for call in (gone.models(), ask(gone, "hi")):
        with pytest.raises(ServerError, match=r"http://127.0.0.1:9 does not answer. Is it still running\?"):
            asyncio.run(call)


def test_a_server_that_is_none() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    with pytest.raises(ServerError, match="not like a model server"):
        asyncio.run(Client("http://127.0.0.1:1", transport).models())


def test_connection_cut_and_silence() -> None:
    async def cut() -> Any:
        yield b'data: {"choices": []}\n\n'
        raise httpx.ReadError("reset")

    async def silence() -> Any:
        yield b'data: {"choices": []}\n\n'
        raise httpx.ReadTimeout("silent")

    for stream, message in ((cut, "broke off in the middle"), (silence, "silent for too long")):
        transport = httpx.MockTransport(lambda request, s=stream: httpx.Response(200, content=s()))
        with pytest.raises(ServerError, match=message):
            asyncio.run(ask(Client("http://127.0.0.1:1", transport), "hi"))


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    with pytest.raises(ServerError, match="does not answer"):
        asyncio.run(Client("http://127.0.0.1:9").models())
    assert not Client("http://127.0.0.1:9")._http("").trust_env


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (
            403,
            {"message": "Host 'x' is unknown"},
            "refuses requests from this page. The server says: Host 'x' is unknown.",
        ),
        (404, {"message": "no model 'y'"}, "does not have this model"),
        (413, {}, "too large"),
        (429, {}, "too much to do"),
        (
            503,
            {"message": "the engine is dead", "code": "engine_dead"},
            "cannot answer now. The server says: the engine is dead.",
        ),
        (500, "boom", "its fault, not yours. The server says: boom."),
        (
            400,
            {"message": "temperature must be at most 2."},
            "The server says: temperature must be at most 2.",
        ),
    ],
)
def test_plain(status: int, error: object, message: str) -> None:
    assert message in plain(status, error)


def test_presented_key() -> None:
    basic = base64.b64encode(b"me:pass:word").decode()
    assert presented_key("Bearer abc ") == "abc"
    assert presented_key(f"Basic {basic}") == "pass:word"
    assert presented_key("Basic !!!") == presented_key("") == presented_key("Digest x") == ""


def steps(question: str, settings: Settings, fake: Fake) -> tuple[Conversation, list[str], int]:
    """Run one answer; (the conversation, the steps of the page, runs left over)."""

    async def run() -> tuple[Conversation, list[str], int]:
        runs, seen = Runs(), []
        conversation = Conversation.new(0.0)
        conversation.ask(question, 0.0)
        async for step in runs.answer(client(fake), conversation, settings, "tab"):
            seen.append(step)
        return conversation, seen, len(runs)

    return asyncio.run(run())


def test_an_answer_runs_to_its_end() -> None:
    conversation, seen, left = steps("2 + 3", Settings(model="m"), Fake())
    turn = conversation.turns[0]
    assert (seen[0], seen[-1], left) == ("save", "end", 0)
    assert turn.status == "done" and turn.answer.startswith("The sum is **5**")
    assert turn.figures is not None and turn.figures.completion_tokens > 5
    json.dumps(conversation.to_dict())


def test_a_failure_ends_in_the_turn() -> None:
    conversation, seen, left = steps("busy", Settings(model="m"), Fake())
    assert (seen, left) == (["save", "end"], 0)
    assert conversation.turns[0].status == "failed" and "queue is full" in conversation.turns[0].error
