"""Ollama's surface on a scripted engine: lines, durations, thinking, options, unloading, what is off."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hadal.weights import hub
from tests.helpers.live_server import LiveServer, live_server
from tests.serve.conftest import fake_with
from tests.serve.fake_engine import FakeAsyncEngine
from tests.serve.test_openai_surface import CALL, USER, WEATHER, allowed


def ask(client: httpx.Client, path: str = "/api/chat", **fields: Any) -> dict[str, Any]:
    prompt = {"messages": USER} if path == "/api/chat" else {"prompt": "hi"}
    response = client.post(path, json={"model": "fake", "stream": False, **prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def lines(client: httpx.Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    response = client.post(path, json={"model": "fake", **fields})
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")  # Page Assist drops a last line without
    return [json.loads(line) for line in response.text.splitlines()]


def test_root_and_version(client: httpx.Client) -> None:
    assert client.get("/").text == "Ollama is running"
    assert client.head("/").status_code == 200
    assert client.get("/", headers={"accept": "text/html"}).text.startswith("Hadal is running")
    assert client.get("/api/version").json()["version"].split("+")[1].startswith("hadal.")


def test_chat_streams_by_default(client: httpx.Client) -> None:
    parts = lines(client, "/api/chat", messages=USER)
    assert all(not part["done"] for part in parts[:-1])
    assert "".join(part["message"]["content"] for part in parts) == "Hello, world"
    assert "".join(part["message"].get("thinking", "") for part in parts) == "thought"
    last = parts[-1]
    assert (last["done"], last["done_reason"], last["model"]) == (True, "stop", "fake")
    for name in ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration"):
        assert isinstance(last[name], int)
        assert last[name] >= 0
    assert last["total_duration"] > last["eval_duration"]
    assert (last["prompt_eval_count"], last["eval_count"]) == (7, 17)
    assert all(part["created_at"].endswith("Z") for part in parts)


def test_chat_whole(client: httpx.Client) -> None:
    answer = ask(client)
    assert answer["message"] == {"role": "assistant", "content": "Hello, world", "thinking": "thought"}
    assert answer["done"] is True


def test_generate(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    parts = lines(client, "/api/generate", prompt="hi", system="Be brief.")
    assert "".join(part["response"] for part in parts) == "Hello, world"
    assert "".join(part.get("thinking", "") for part in parts) == "thought"
    assert "Be brief.<｜User｜>hi" in fake.engine.tokenizer.decode(fake.seen[-1][0], skip_control=False)
    fake.script = lambda prompt, params: "raw text"
    assert ask(client, "/api/generate", raw=True)["response"] == "raw text"
    assert fake.seen[-1][0] == [0, *fake.engine.tokenizer.encode("hi")]
    ask(client, "/api/generate", prompt="a", suffix="b")
    middle = "<｜begin▁of▁sentence｜><｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>"
    assert fake.engine.tokenizer.decode(fake.seen[-1][0], skip_control=False) == middle


@pytest.mark.parametrize(("think", "thinks"), [(None, True), (True, True), (False, False), ("low", True)])
def test_think(client: httpx.Client, fake: FakeAsyncEngine, think: object, thinks: bool) -> None:
    fake.script = lambda prompt, params: "hm</think>a" if thinks else "a"
    answer = ask(client, think=think)
    assert ("thinking" in answer["message"]) == thinks
    assert answer["message"]["content"] == "a"


def test_options(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    options = {
        "num_predict": 5,
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.75,
        "min_p": 0.25,
        "seed": 4,
        "stop": ["x"],
        "repeat_penalty": 1.5,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "num_ctx": 2048,
        "num_gpu": 1,
        "num_thread": 2,
        "mirostat": 0,
        "typical_p": 1.0,
        "repeat_last_n": -1,
    }
    ask(client, options=options)
    params = fake.seen[-1][1]
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (5, 0.5, 9, 0.75)
    assert (params.min_p, params.seed, params.stop, params.repetition_penalty) == (0.25, 4, ("x",), 1.5)
    assert (params.presence_penalty, params.frequency_penalty) == (1.0, 0.5)
    ask(client, options={"num_predict": -1})
    assert fake.seen[-1][1].max_tokens is None
    ask(client, options={"num_predict": 100_000})  # more than fits: until the context ends, as Ollama does
    assert fake.seen[-1][1].max_tokens == fake.engine.max_model_len - len(fake.seen[-1][0])
    ask(client, options={"repeat_penalty": 1.5, "repeat_last_n": 0})
    assert fake.seen[-1][1].repetition_penalty == 1.0


BAD = [
    {"num_predict": 0},
    {"num_predict": "5"},
    {"temperature": -1},
    {"mirostat": 2},
    {"tfs_z": 0.5},
    {"typo": 1},
    {"seed": 1.5},
    {"stop": [""]},
    {"repeat_penalty": 1.5, "repeat_last_n": 64},
    {"top_k": -5},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_options(client: httpx.Client, fake: FakeAsyncEngine, options: dict[str, Any]) -> None:
    response = client.post("/api/chat", json={"model": "fake", "messages": USER, "options": options})
    assert response.status_code == 400
    assert response.json()["error"].startswith(("options.", "unknown field 'options."))
    assert not fake.seen


@pytest.mark.parametrize(
    "fields",
    [
        {"think": "very"},
        {"keep_alive": "soon"},
        {"format": "xml"},
        {"format": 3},
        {"messages": [{"role": "x"}]},
        {"modell": "x"},
        {"top_logprobs": 2},
        {"model": ""},
    ],
    ids=str,
)
def test_bad_fields(client: httpx.Client, fields: dict[str, Any]) -> None:
    response = client.post("/api/chat", json={"model": "fake", "messages": USER, **fields})
    assert response.status_code == 400
    assert isinstance(response.json()["error"], str)


def test_format(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    ask(client, format={"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
    assert allowed(fake, 'x</think>{"', "a|b") == [True, False]
    ask(client, format="json", think=False)
    assert allowed(fake, "", "{|H") == [True, False]
    ask(client, format="")
    assert fake.seen[-1][1].grammar is None


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client: httpx.Client, fake: FakeAsyncEngine, stream: bool) -> None:
    fake.script = lambda prompt, params: "</think>" + CALL
    if stream:
        parts = lines(client, "/api/chat", messages=USER, tools=[WEATHER])
        calls = [call for part in parts for call in part["message"].get("tool_calls", [])]
    else:
        calls = ask(client, tools=[WEATHER])["message"]["tool_calls"]
    assert calls[0] == {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    history = [
        *USER,
        {"role": "assistant", "content": "", "thinking": "hidden", "tool_calls": calls[:1]},
        {"role": "tool", "tool_name": "weather", "content": "sunny"},
    ]
    ask(client, messages=history, tools=[WEATHER])
    text = fake.engine.tokenizer.decode(fake.seen[-1][0], skip_control=False)
    assert "sunny" in text
    assert "hidden" not in text


def test_logprobs(client: httpx.Client) -> None:
    answer = ask(client, "/api/generate", logprobs=True, top_logprobs=2)
    assert answer["logprobs"][0]["logprob"] == -0.5
    assert len(answer["logprobs"][0]["top_logprobs"]) == 2


def test_tags_show_ps(client: httpx.Client) -> None:
    [tag] = client.get("/api/tags").json()["models"]
    assert (tag["name"], tag["model"], tag["details"]["format"]) == ("fake", "fake", "safetensors")
    assert tag["size"] > 0
    assert len(tag["digest"]) == 64
    [loaded] = client.get("/api/ps").json()["models"]
    assert loaded["digest"] == tag["digest"]
    assert loaded["context_length"] == 2048
    for body in ({"model": "fake"}, {"name": "fake:latest"}):
        shown = client.post("/api/show", json=body).json()
        info = shown["model_info"]
        assert info["general.architecture"] == "deepseek_v3"
        assert info["deepseek_v3.context_length"] == 2048
        assert info["general.parameter_count"] > 0
        assert {"completion", "thinking", "tools", "insert", "embedding"} == set(shown["capabilities"])
    assert client.post("/api/show", json={"model": "no"}).status_code == 404


def test_capabilities_are_what_the_template_has() -> None:
    engine = fake_with(template="deepseek-v2")
    with live_server(engine) as server:
        shown = httpx.post(f"{server.url}/api/show", json={"model": "fake"}, trust_env=False).json()
    assert not {"thinking", "tools"} & set(shown["capabilities"])


def test_embed(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    answer = client.post(
        "/api/embed", json={"model": "fake", "input": ["a", "b"], "options": {"num_ctx": 9}}
    ).json()
    assert len(answer["embeddings"]) == 2
    assert answer["prompt_eval_count"] == 4
    assert client.post("/api/embed", json={"model": "fake", "input": "a"}).json()["embeddings"][0][0] == 2.0
    assert client.post("/api/embeddings", json={"model": "fake", "prompt": "a"}).json()["embedding"][0] == 2.0
    long = {"model": "fake", "input": "é" * 3000}
    assert client.post("/api/embed", json=long).json()["prompt_eval_count"] == fake.engine.max_model_len
    assert client.post("/api/embed", json={**long, "truncate": False}).status_code == 400
    assert client.post("/api/embed", json={"model": "fake", "input": [1]}).status_code == 400


@pytest.fixture
def reloadable() -> Iterator[tuple[LiveServer, list[FakeAsyncEngine]]]:
    engines = [FakeAsyncEngine()]

    def load() -> FakeAsyncEngine:
        engines.append(FakeAsyncEngine(engine=engines[0].engine))
        return engines[-1]

    with live_server(engines[0], loaders={"fake": load}) as server:
        yield server, engines


def test_keep_alive_zero_unloads(reloadable: tuple[LiveServer, list[FakeAsyncEngine]]) -> None:
    server, engines = reloadable
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        assert ask(http, keep_alive=0)["message"]["content"] == "Hello, world"
        assert engines[0].shut
        assert http.get("/api/ps").json() == {"models": []}
        assert http.get("/health").json()["models"] == {"fake": "unloaded"}
        assert len(http.get("/v1/models").json()["data"]) == 1
        assert ask(http)["message"]["content"] == "Hello, world"  # loaded again
        assert len(engines) == 2
        assert not engines[1].shut
        assert ask(http, messages=[], keep_alive="0s")["done_reason"] == "unload"
        assert engines[1].shut
        assert ask(http, messages=[])["done_reason"] == "load"
        assert len(engines) == 3
        assert ask(http, messages=[], keep_alive="5m")["done_reason"] == "load"
        assert len(engines) == 3


def test_unloading_waits_for_running_requests(reloadable: tuple[LiveServer, list[FakeAsyncEngine]]) -> None:
    server, engines = reloadable
    engines[0].delay = 0.05
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        with http.stream("POST", "/api/chat", json={"model": "fake", "messages": USER}) as response:
            parts = response.iter_lines()
            next(parts)
            ask(http, messages=[], keep_alive=0)
            assert not engines[0].shut
            rest = list(parts)
        assert json.loads(rest[-1])["done_reason"] == "stop"
        end = time.monotonic() + 2
        while not engines[0].shut:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_without_a_loader_a_model_stays(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    assert ask(client, messages=[], keep_alive=0)["done_reason"] == "load"
    assert fake.alive


def test_pull_and_delete_are_off(client: httpx.Client) -> None:
    pull = client.post("/api/pull", json={"model": "org/repo"})
    assert (pull.status_code, "hadal pull org/repo" in pull.json()["error"]) == (403, True)
    delete = client.request("DELETE", "/api/delete", json={"model": "org/repo"})
    assert (delete.status_code, "hadal rm" in delete.json()["error"]) == (403, True)
    for path in ("/api/create", "/api/copy", "/api/push"):
        assert client.post(path, json={}).status_code == 404


def test_pull_and_delete_when_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []

    def pull(name: str, progress: Any) -> Path:
        if name == "org/none":
            raise hub.NotFoundError("org/none is not there")
        for done in (1, 50, 100):
            progress(done, 100)
            time.sleep(0.3)
        return Path()

    monkeypatch.setattr(hub, "pull", pull)
    monkeypatch.setattr(hub, "remove", removed.append)
    with (
        live_server(fake_with(), allow_pull=True, allow_delete=True) as server,
        httpx.Client(base_url=server.url, trust_env=False) as http,
    ):
        parts = lines(http, "/api/pull", model="org/repo")
        assert parts[0] == {"status": "pulling manifest"}
        assert parts[-1] == {"status": "success"}
        progress = [(part["completed"], part["total"]) for part in parts if "total" in part]
        assert progress == sorted(progress)
        assert len(progress) >= 2
        assert http.post("/api/pull", json={"model": "org/repo", "stream": False}).json() == {
            "status": "success"
        }
        assert lines(http, "/api/pull", model="org/none")[-1]["error"].endswith("is not there")
        assert http.post("/api/pull", json={"model": "x", "insecure": True}).status_code == 400
        assert http.request("DELETE", "/api/delete", json={"model": "org/repo"}).status_code == 200
        assert http.request("DELETE", "/api/delete", json={"model": "fake"}).status_code == 400
    assert removed == ["org/repo"]


def test_think_false_is_refused_where_the_model_always_thinks() -> None:
    engine = fake_with(template="hadal-mini")
    with live_server(engine) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "think": False}
        refused = http.post("/api/chat", json=body)
        assert (refused.status_code, "always reasons first" in refused.json()["error"]) == (400, True)
        assert not engine.seen
