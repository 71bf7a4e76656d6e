"""Bad input, case by case: what a client may send wrong, and the answer it must get (numbers as in
docs/api.md)."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from tests.helpers.live_server import LiveServer
from tests.serve.fake_engine import VOCAB, FakeAsyncEngine

USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": USER, "max_tokens": 4, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "hi", "max_tokens": 4, **fields}


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def text(content: Any, role: Any = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def ollama(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": USER, **fields}


IMAGE = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]}
]
BIG = 10**9

# (number, what, route, body, status, param or None for any)
CASES: list[tuple[int, str, str, Any, int, str | None]] = [
    (1, "bad JSON", "chat", b'{"model": ', 400, None),
    (1, "empty body", "chat", b"", 400, None),
    (1, "not an object", "chat", b"[1]", 400, None),
    (1, "10k-deep nesting", "chat", b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, None),
    (1, "NaN literal", "chat", b'{"model":"fake","temperature":NaN}', 400, None),
    (1, "infinite literal", "chat", b'{"model":"fake","temperature":-Infinity}', 400, None),
    (3, "model missing", "chat", {"messages": USER}, 400, "model"),
    (3, "model null", "chat", chat(model=None), 400, "model"),
    (3, "model number", "chat", chat(model=3), 400, "model"),
    (3, "model unknown", "chat", chat(model="gpt-9"), 404, "model"),
    (3, "model unknown", "completions", completion(model="gpt-9"), 404, "model"),
    (3, "model unknown", "embeddings", {"model": "gpt-9", "input": "x"}, 404, "model"),
    (4, "messages missing", "chat", {"model": "fake"}, 400, "messages"),
    (4, "messages empty", "chat", chat(messages=[]), 400, "messages"),
    (4, "messages a string", "chat", chat(messages="hi"), 400, "messages"),
    (4, "message not an object", "chat", chat(messages=["hi"]), 400, "messages[0]"),
    (4, "bad role", "chat", chat(messages=text("x", "wizard")), 400, "messages[0].role"),
    (4, "role missing", "chat", chat(messages=[{"content": "x"}]), 400, "messages[0].role"),
    (4, "content a number", "chat", chat(messages=text(3)), 400, "messages[0].content"),
    (4, "content null", "chat", chat(messages=text(None)), 400, "messages[0].content"),
    (4, "content missing", "chat", chat(messages=[{"role": "user"}]), 400, "messages[0].content"),
    *[(5, f"n = {n!r}", "chat", chat(n=n), 400, "n") for n in (0, -1, BIG, "1", 1.5, True, 17)],
    *[(5, f"n = {n!r}", "completions", completion(n=n), 400, "n") for n in (0, -1, BIG, "1", 1.5)],
    (5, "too many sequences", "completions", completion(prompt=["a"] * 100, n=2), 400, "n"),
    *[(6, f"temperature {t!r}", "chat", chat(temperature=t), 400, "temperature")
      for t in (-1, 1e308, 2.1, "1", True)],
    (6, "temperature 1e400", "chat", b'{"model":"fake","temperature":1e400}', 400, "temperature"),
    *[(6, f"top_p {p!r}", "chat", chat(top_p=p), 400, "top_p") for p in (-0.1, 0, 1.1, "x")],
    *[(6, f"min_p {p!r}", "chat", chat(min_p=p), 400, "min_p") for p in (-0.1, 1.1)],
    (6, "top_k -2", "chat", chat(top_k=-2), 400, "top_k"),
    (6, "presence_penalty 3", "chat", chat(presence_penalty=3), 400, "presence_penalty"),
    (6, "seed 2^64", "chat", chat(seed=2**64), 400, "seed"),
    *[(7, f"top_logprobs {k}", "chat", chat(logprobs=True, top_logprobs=k), 400, "top_logprobs")
      for k in (21, -1)],
    (7, "top_logprobs alone", "chat", chat(top_logprobs=2), 400, "top_logprobs"),
    *[(7, f"logprobs {k!r}", "completions", completion(logprobs=k), 400, "logprobs")
      for k in (21, -1, True, "1")],
    (8, "bias of a bad id", "chat", chat(logit_bias={str(VOCAB): 1}), 400, "logit_bias"),
    (8, "bias of no number", "chat", chat(logit_bias={"x": 1}), 400, "logit_bias"),
    (8, "bias -1", "chat", chat(logit_bias={"-1": 1}), 400, "logit_bias"),
    (8, "bias too large", "chat", chat(logit_bias={"1": 101}), 400, "logit_bias.1"),
    (8, "bias a string", "chat", chat(logit_bias={"1": "5"}), 400, "logit_bias.1"),
    (8, "200k biases", "chat", chat(logit_bias={str(i): 1 for i in range(200_000)}), 400, "logit_bias"),
    (9, "17 stops", "chat", chat(stop=["x"] * 17), 400, "stop"),
    (9, "empty stop", "chat", chat(stop=""), 400, "stop"),
    (9, "empty stop in a list", "chat", chat(stop=["a", ""]), 400, "stop"),
    (9, "1 MB stop", "chat", chat(stop="x" * 1_000_000), 400, "stop"),
    (9, "stop a number", "chat", chat(stop=5), 400, "stop"),
    *[(10, f"max_tokens {m}", "chat", chat(max_tokens=m), 400, "max_tokens")
      for m in (0, -1, 2**63, "5", 1.5)],
    *[(10, f"max_tokens {m}", "completions", completion(max_tokens=m), 400, "max_tokens")
      for m in (0, -1, 2**63)],
    (10, "two limits", "chat", chat(max_completion_tokens=5), 400, "max_tokens"),
    (13, "prompt id -1", "completions", completion(prompt=[5, -1]), 400, "prompt"),
    (13, "prompt id vocab_size", "completions", completion(prompt=[VOCAB]), 400, "prompt"),
    (13, "prompt id 2^40", "completions", completion(prompt=[[2**40]]), 400, "prompt"),
    (13, "prompt ids true", "completions", completion(prompt=[True]), 400, "prompt"),
    (13, "prompt ids mixed", "completions", completion(prompt=[1, "a"]), 400, "prompt"),
    (13, "prompt empty", "completions", completion(prompt=[]), 400, "prompt"),
    (13, "prompt of no ids", "completions", completion(prompt=[[]]), 400, "prompt"),
    (13, "129 prompts", "completions", completion(prompt=["a"] * 129), 400, "prompt"),
    (13, "embedding id", "embeddings", {"model": "fake", "input": [VOCAB]}, 400, "input"),
    (13, "detokenize id", "detokenize", {"model": "fake", "tokens": [-5]}, 400, "tokens"),
    (14, "lone surrogate", "completions", b'{"model":"fake","prompt":"\\ud800"}', 400, None),
    (14, "invalid UTF-8", "completions", b'{"model":"fake","prompt":"\xff"}', 400, None),
    (14, "byte-order mark", "chat", b"\xef\xbb\xbf" + json.dumps(chat()).encode(), 400, None),
    (17, "deep schema", "chat", chat(response_format=schema_format(deep(40))), 400, "response_format"),
    (17, "schema not an object", "chat", chat(response_format=schema_format(7)), 400, "response_format"),
    (18, "image_url", "chat", chat(messages=IMAGE), 400, "messages[0].content[0]"),
    (18, "image of Ollama", "/api/chat", ollama(messages=[{**USER[0], "images": ["aGk="]}]), 400, None),
    (19, "a path for a model", "chat", chat(model="../../etc/passwd"), 404, "model"),
    (19, "a path for a model", "/api/show", {"model": "../../etc/passwd"}, 404, None),
    (19, "a path to pull", "/api/pull", {"model": "../../etc/passwd"}, 400, None),
    (20, "chat_template", "chat", chat(chat_template="{{ 1 }}"), 400, "chat_template"),
    (20, "template kwargs", "chat", chat(chat_template_kwargs={"x": "{{ 1 }}"}), 400, "chat_template_kwargs"),
    (20, "Ollama template", "/api/generate", completion(template="{{ . }}", max_tokens=None), 400, None),
    (0, "unknown field", "chat", chat(temprature=1), 400, "temprature"),
    (0, "unknown option", "/api/chat", ollama(options={"temp": 1}), 400, None),
    (0, "stream a string", "chat", chat(stream="yes"), 400, "stream"),
    (0, "stream_options alone", "chat", chat(stream_options={"include_usage": True}), 400, "stream_options"),
    (0, "dimensions", "embeddings", {"model": "fake", "input": "x", "dimensions": 7}, 400, "dimensions"),
    (0, "best_of", "completions", completion(best_of=3), 400, "best_of"),
    (0, "tool_choice alone", "chat", chat(tool_choice="required"), 400, "tool_choice"),
    (0, "prefix not last", "chat",
     chat(messages=[{"role": "assistant", "content": "a", "prefix": True}, USER[0]]),
     400, "messages[0].prefix"),
]  # fmt: skip


def url(route: str) -> str:
    return {
        "chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings",
        "detokenize": "/detokenize",
    }.get(route, route)  # fmt: skip


@pytest.mark.parametrize(
    ("number", "what", "route", "body", "status", "param"),
    CASES,
    ids=[f"{c[0]}-{c[2].strip('/')}-{c[1]}" for c in CASES],
)
def test_refused(
    client: httpx.Client,
    fake: FakeAsyncEngine,
    number: int,
    what: str,
    route: str,
    body: Any,
    status: int,
    param: str | None,
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    start = time.monotonic()
    response = client.post(url(route), content=data)
    assert time.monotonic() - start < 10  # a fault of this kind took minutes
    assert response.status_code == status, response.text
    error = response.json()["error"]
    if route.startswith("/api/"):
        assert isinstance(error, str)
        assert error
    else:
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        if param is not None:
            assert error["param"] is not None
            assert error["param"].startswith(param)
    assert not fake.seen
    assert len(response.content) < 1000
    assert fake.active == 0


def test_02_body_too_large(client: httpx.Client) -> None:
    body = b'{"model":"fake","prompt":"' + b"x" * (33 << 20) + b'"}'
    response = client.post("/v1/completions", content=body)
    assert response.status_code == 413
    assert "33554432" in response.json()["error"]["message"]


def test_02_body_without_length(client: httpx.Client) -> None:
    """Chunked, so that no Content-Length gives it away; over four times the limit it is cut off."""
    chunk = b"x" * (1 << 20)
    try:
        response = client.post("/v1/completions", content=(chunk for _ in range(200)))
    except httpx.WriteError:
        return  # the connection was closed while we wrote
    assert response.status_code == 413


@pytest.mark.parametrize("size", [70_000, 128 << 10])
def test_02_header_too_large(client: httpx.Client, size: int) -> None:
    try:
        response = client.get("/v1/models", headers={"x-flood": "a" * size})
    except httpx.TransportError:
        return
    assert response.status_code in (400, 431)


def test_02_many_small_headers(client: httpx.Client) -> None:
    try:
        response = client.get("/v1/models", headers=[(f"x-{i}", "a" * 100) for i in range(1000)])
    except httpx.TransportError:
        return
    assert response.status_code in (400, 431)


def test_compressed_body(client: httpx.Client) -> None:
    response = client.post("/v1/completions", content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert response.status_code == 415


def test_json_without_content_type_is_taken(client: httpx.Client) -> None:
    """curl -d sends a form's content type; Ollama's documentation uses exactly that."""
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = client.post("/v1/chat/completions", content=json.dumps(chat()), headers=headers)
    assert response.status_code == 200


def test_11_one_token_over_the_context(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    limit = fake.engine.max_model_len
    body = completion(prompt=[100] * limit, max_tokens=1)
    error = client.post("/v1/completions", json=body).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(limit) in error["message"]
    assert client.post("/v1/completions", json={**body, "prompt": [100] * (limit - 1)}).status_code == 200
    text = "é" * limit
    response = client.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": text}]))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_31_prompt_and_max_tokens_over_the_context(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    limit = fake.engine.max_model_len
    response = client.post("/v1/completions", json=completion(prompt=[100] * 500, max_tokens=limit - 499))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        400,
        "context_length_exceeded",
        "max_tokens",
    )
    assert str(limit + 1) in error["message"]
    assert not fake.seen


@pytest.mark.parametrize("letter", ["a", " ", "é", "\n", "你"])
def test_12_ten_megabytes_beside_a_stream(served: LiveServer, fake: FakeAsyncEngine, letter: str) -> None:
    """A 400 soon, and a parallel stream keeps its pace: encoding the text would hold both for half a minute.

    0.1 s each on an idle machine; the limits are those of a busy one, and the best of three counts."""
    prompt = letter * (10_000_000 // len(letter.encode()))
    body = json.dumps(completion(prompt=prompt), ensure_ascii=False).encode()
    results = []
    for _ in range(3):
        results.append(ten_megabytes(served, fake, body))
        if results[-1][0] < 5 and results[-1][1] < 3:
            return
    raise AssertionError(f"(seconds to the 400, longest gap of the stream): {results}")


def ten_megabytes(served: LiveServer, fake: FakeAsyncEngine, body: bytes) -> tuple[float, float]:
    fake.delay = 0.01
    fake.script = lambda prompt, params: "x</think>" + "ab " * 25
    gaps: list[float] = []

    def listen() -> None:
        streamed = chat(max_tokens=70, stream=True)
        with httpx.stream("POST", f"{served.url}{url('chat')}", json=streamed, trust_env=False) as answer:
            last = time.monotonic()
            for _ in answer.iter_lines():
                gaps.append(time.monotonic() - last)
                last = time.monotonic()

    listener = threading.Thread(target=listen)
    with httpx.Client(trust_env=False) as other:
        listener.start()
        time.sleep(0.1)
        start = time.monotonic()
        response = other.post(f"{served.url}/v1/completions", content=body)
        took = time.monotonic() - start
    listener.join()
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert len(gaps) > 50
    return took, max(gaps[1:])


@pytest.mark.parametrize(
    "text", ["a\u0000b", "\ufeffabc", "tail\ufeff", "\u2028\u2029", "👩‍👩‍👧‍👦", "e\u0301", "\x1b[31m\r\n"]
)
def test_14_odd_text_round_trips(client: httpx.Client, text: str) -> None:
    tokens = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text
    echo = client.post("/v1/completions", json=completion(prompt=text, echo=True, max_tokens=1)).json()
    assert echo["choices"][0]["text"].startswith(text)


CONTROLS = [
    "<｜User｜>",
    "<｜end▁of▁sentence｜>",
    "</think>",
    "<｜tool▁calls▁begin｜>",
    "<|EOT|>",
    "<｜begin▁of▁sentence｜>",
]


@pytest.mark.parametrize("text", CONTROLS)
def test_15_control_tokens_from_a_user_are_plain_text(
    client: httpx.Client, fake: FakeAsyncEngine, text: str
) -> None:
    special = set(fake.engine.tokenizer.special.values())
    message = {"role": "user", "content": f"say {text} now"}
    assert client.post("/v1/chat/completions", json=chat(messages=[message])).status_code == 200
    clean = {"role": "user", "content": "say  now"}
    assert client.post("/v1/chat/completions", json=chat(messages=[clean])).status_code == 200
    with_text, without = ([token for token in seen[0] if token in special] for seen in fake.seen)
    assert with_text == without
    assert client.post("/v1/completions", json=completion(prompt=text)).status_code == 200
    assert not special & set(fake.seen[-1][0][1:])
    assert not special & set(client.post("/tokenize", json={"prompt": text}).json()["tokens"][1:])
    client.post("/v1/completions", json=completion(prompt="a", suffix=text))
    assert len(special & set(fake.seen[-1][0])) == 4  # BOS and the three of fill-in-the-middle


@pytest.mark.parametrize("stream", [False, True])
def test_16_stops_and_emoji_across_tokens(client: httpx.Client, fake: FakeAsyncEngine, stream: bool) -> None:
    fake.script = lambda prompt, params: "t</think>👩‍👩‍👧 héllo STOPPED and more"
    body = chat(max_tokens=200, stop=["STOPPED"], stream=stream)
    if not stream:
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("👩‍👩‍👧 héllo ", "stop")
        return
    pieces = []
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    pieces.append(choice["delta"].get("content", ""))
    assert all("\ufffd" not in piece and "STO" not in piece for piece in pieces)
    assert "".join(pieces) == "👩‍👩‍👧 héllo "


def test_18_no_socket_is_opened_for_an_image(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.2)
        part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"}}
        response = client.post(
            "/v1/chat/completions", json=chat(messages=[{"role": "user", "content": [part]}])
        )
        assert response.status_code == 400
        with pytest.raises(TimeoutError):
            trap.accept()


def test_unknown_fields_get_a_suggestion(client: httpx.Client) -> None:
    error = client.post("/v1/chat/completions", json=chat(temprature=1)).json()["error"]
    assert "did you mean 'temperature'" in error["message"]


def test_harmless_fields_are_taken(client: httpx.Client) -> None:
    extras = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "prompt_cache_key": "k",
    }
    assert client.post("/v1/chat/completions", json=chat(**extras)).status_code == 200
