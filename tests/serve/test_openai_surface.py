"""The OpenAI and DeepSeek surface, field by field, on a scripted engine."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import httpx
import pytest

from tests.serve.conftest import fake_with
from tests.serve.fake_engine import FakeAsyncEngine

USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)


def ask(client: httpx.Client, path: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
    body = {"model": "fake", "messages": USER, **fields}
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(client: httpx.Client, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "fake", "stream": True, **({"messages": USER} if "chat" in path else {}), **fields}
    lines = client.post(path, json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.parametrize("prefix", ["", "/v1", "/beta"])
def test_chat_shape(client: httpx.Client, prefix: str) -> None:
    answer = ask(client, f"{prefix}/chat/completions")
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "fake"
    [choice] = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hello, world",
        "reasoning_content": "thought",
        "reasoning": "thought",
    }
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = answer["usage"]
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_cache_hit_tokens"] == 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_reasoning_tokens_are_those_up_to_the_tag(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    answer = ask(client)
    count = len(fake.engine.tokenizer.encode("thought")) + 1
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == count
    assert (
        ask(client, thinking={"type": "disabled"})["usage"]["completion_tokens_details"]["reasoning_tokens"]
        == 0
    )


def test_stream_is_the_whole_answer(client: httpx.Client) -> None:
    chunks = events(client, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello, world"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "thought"
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "thought"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == ask(client)["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    running = events(client, stream_options={"continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in running]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices(client: httpx.Client, fake: FakeAsyncEngine, stream: bool) -> None:
    fake.script = lambda prompt, params: f"</think>seed {params.seed}"
    texts = ["", "", ""]
    if stream:
        for chunk in events(client, n=3, seed=2**63 - 2):
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
    else:
        answer = ask(client, n=3, seed=2**63 - 2)
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert answer["usage"]["prompt_tokens"] == len(fake.seen[0][0])
    assert texts == [f"seed {2**63 - 2}", f"seed {2**63 - 1}", f"seed {-(2**63)}"]


def test_parameters_reach_the_engine(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    ask(
        client,
        max_completion_tokens=9,
        temperature=0.25,
        top_p=0.5,
        top_k=7,
        min_p=0.125,
        seed=3,
        stop=["a", "b"],
        presence_penalty=1.5,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        logit_bias={"5": -100},
        ignore_eos=True,
        min_tokens=2,
        stop_token_ids=[9],
        include_stop_str_in_output=True,
        logprobs=True,
        top_logprobs=4,
    )
    params = fake.seen[-1][1]
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (
        9,
        0.25,
        0.5,
        7,
        0.125,
    )
    assert (params.seed, params.stop, params.presence_penalty, params.frequency_penalty) == (
        3,
        ("a", "b"),
        1.5,
        -1.5,
    )
    assert (params.repetition_penalty, dict(params.logit_bias), params.ignore_eos) == (
        1.25,
        {5: -100.0},
        True,
    )
    assert (params.min_tokens, params.stop_token_ids, params.include_stop, params.logprobs) == (
        2,
        (9,),
        True,
        4,
    )
    ask(client, top_k=-1, stop="x")
    assert (fake.seen[-1][1].top_k, fake.seen[-1][1].stop, fake.seen[-1][1].max_tokens) == (0, ("x",), None)


def test_logprobs(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    fake.script = lambda prompt, params: "ab</think>é"
    logprobs = ask(client, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    names = [entry["token"] for entry in logprobs["reasoning_content"]]
    assert "".join(names) == "ab</think>"
    data = b"".join(bytes(entry["bytes"]) for entry in logprobs["content"])
    assert data == "é<｜end▁of▁sentence｜>".encode()
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs["content"])
    assert logprobs["content"][0]["logprob"] == -0.5
    streamed = [
        entry["token"]
        for chunk in events(client, logprobs=True)
        for kind in ("reasoning_content", "content")
        for entry in ((chunk["choices"][0]["logprobs"] or {}).get(kind) or [])
    ]
    whole = [entry["token"] for kind in ("reasoning_content", "content") for entry in logprobs[kind]]
    assert streamed == whole


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
    ],
)
def test_thinking(client: httpx.Client, fake: FakeAsyncEngine, fields: dict[str, Any], thinks: bool) -> None:
    fake.script = lambda prompt, params: "</think>a" if thinks else "a"
    message = ask(client, **fields)["choices"][0]["message"]
    tokens = [fake.engine.tokenizer.special[tag] for tag in ("<think>", "</think>")]
    prompt = fake.seen[-1][0]
    assert ("reasoning_content" in message) == thinks
    assert (tokens[0] in prompt and tokens[1] not in prompt) == thinks
    assert message["content"] == "a"


def test_thinking_contradicted(client: httpx.Client) -> None:
    body = {"model": "fake", "messages": USER, "thinking": {"type": "enabled"}, "reasoning_effort": "none"}
    assert "contradict" in client.post("/v1/chat/completions", json=body).json()["error"]["message"]


def test_history_with_reasoning_and_text_parts(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    """What an openai client sends back of an answer is taken as it is; reasoning is never required."""
    history = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {
            "role": "assistant",
            "content": "three",
            "reasoning_content": "hidden",
            "reasoning": "hidden",
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        },
        {"role": "user", "content": "four", "name": "Ann"},
    ]
    ask(client, messages=history)
    text = fake.engine.tokenizer.decode(fake.seen[-1][0], skip_control=False)
    assert "Be brief.<｜User｜>one\ntwo<｜Assistant｜>three" in text
    assert "hidden" not in text


def test_prefix_completion(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    messages = [*USER, {"role": "assistant", "content": "```python\n", "prefix": True}]
    ask(client, "/beta/chat/completions", messages=messages, thinking={"type": "disabled"})
    text = fake.engine.tokenizer.decode(fake.seen[-1][0], skip_control=False)
    assert text.endswith("```python\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [True, False])
def test_tool_calls(client: httpx.Client, fake: FakeAsyncEngine, stream: bool, parallel: bool) -> None:
    fake.script = lambda prompt, params: "think</think>I look. " + CALL
    fields = {"tools": [WEATHER, TIME], "parallel_tool_calls": parallel}
    if stream:
        chunks = [chunk["choices"][0] for chunk in events(client, **fields)]
        calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
        content = "".join(chunk["delta"].get("content", "") for chunk in chunks)
        reason = chunks[-1]["finish_reason"]
        assert [call["index"] for call in calls] == [0, 1][: 1 + parallel]
    else:
        choice = ask(client, **fields)["choices"][0]
        calls, content, reason = (
            choice["message"]["tool_calls"],
            choice["message"]["content"],
            choice["finish_reason"],
        )
    assert content.strip() == "I look."
    assert reason == "tool_calls"
    assert [call["function"]["name"] for call in calls] == ["weather", "time"][: 1 + parallel]
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Paris"}
    assert len({call["id"] for call in calls}) == len(calls)
    assert "weather" in fake.engine.tokenizer.decode(fake.seen[-1][0])


def test_tool_result_goes_back(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    call = {
        "id": "call-1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "sunny"},
    ]
    ask(client, messages=messages, tools=[WEATHER])
    text = fake.engine.tokenizer.decode(fake.seen[-1][0], skip_control=False)
    assert '{"city": "Rome"}' in text
    assert "sunny" in text


def test_tool_choice_none_shows_no_tools(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    ask(client, tools=[WEATHER], tool_choice="none")
    assert "weather" not in fake.engine.tokenizer.decode(fake.seen[-1][0])
    assert fake.seen[-1][1].grammar is None


def allowed(fake: FakeAsyncEngine, text: str, then: str) -> list[bool]:
    """Whether the grammar that the engine got allows `text`, and after it the first token of `then`."""
    tokenizer = fake.engine.tokenizer
    grammar = fake.seen[-1][1].grammar
    assert grammar is not None
    matcher = grammar()
    for token in tokenizer.encode_with_controls(text):
        matcher.accept(token)
    words = matcher.mask()
    tokens = [tokenizer.encode_with_controls(piece)[0] for piece in then.split("|")]
    return [bool(words[token // 32] >> (token % 32) & 1) for token in tokens]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_tool_choice(client: httpx.Client, fake: FakeAsyncEngine, choice: Any) -> None:
    fake.script = lambda prompt, params: "</think>" + CALL
    ask(client, tools=[WEATHER, TIME], tool_choice=choice)
    begin = "why</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    assert allowed(fake, "why</think>", "<｜tool▁calls▁begin｜>|H") == [True, False]
    assert allowed(fake, begin, "weather|time") == [True, choice == "required"]
    assert allowed(fake, begin + 'weather\n```json\n{"', "c|x") == [True, False]


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": value}}


def test_response_format_holds_after_the_reasoning(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    ask(client, response_format={"type": "json_object"})
    assert allowed(fake, "anything { goes", "H|}") == [True, True]
    assert allowed(fake, "x</think>", "{|H") == [True, False]
    ask(client, response_format=schema({"enum": ["red", "blue"]}), thinking={"type": "disabled"})
    assert allowed(fake, '"', "r|b|x") == [True, True, False]
    ask(client, response_format={"type": "text"})
    assert fake.seen[-1][1].grammar is None
    client.post(
        "/v1/completions",
        json={"model": "fake", "prompt": "x", "response_format": schema({"type": "integer"})},
    )
    assert allowed(fake, "1", "2|x") == [True, False]


HARD = {
    "heavy recursion without end": schema({"$ref": "#"}),
    "reference to nowhere": schema({"$ref": "#/nowhere"}),
    "reference to the net": schema({"$ref": "http://127.0.0.1:9/x"}),
    "bad regex": schema({"type": "string", "pattern": "(((("}),
    "back-reference": schema({"type": "string", "pattern": r"(a)\1"}),
    "unknown type": schema({"type": "wizard"}),
    "heavy repeats": schema({"type": "string", "pattern": "((((a{1,9999}){1,9999}){1,9999}){1,9999})"}),
    "heavy regex": {"type": "regex", "pattern": "(x+x+)+y" * 2000},
    "heavy alternation": schema(
        {"anyOf": [{"type": "string", "pattern": f"(a|b)*{i}"} for i in range(4000)]}
    ),
    "misspelt": {"type": "json_schema", "schema": {}},
}


@pytest.mark.parametrize("what", HARD)
def test_17_hard_grammars(client: httpx.Client, fake: FakeAsyncEngine, what: str) -> None:
    """400 within 5 s (or, where compiling is only hard, an answer), and the next request is served."""
    body = {"model": "fake", "messages": USER, "response_format": HARD[what]}
    response = client.post("/v1/chat/completions", json=body, timeout=10)
    assert response.status_code in ((400, 200) if what.startswith("heavy") else (400,))
    assert response.elapsed.total_seconds() < 6
    if response.status_code == 400:
        assert response.json()["error"]["param"].startswith("response_format")
    assert client.post("/v1/chat/completions", json={"model": "fake", "messages": USER}).status_code == 200


# --- completions ---


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "fake", "max_tokens": 3, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_four_forms_of_a_prompt(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    fake.script = lambda prompt, params: str(len(prompt))
    tokenizer = fake.engine.tokenizer
    encoded = [tokenizer.bos_id, *tokenizer.encode("hi")]
    for prompt, expected in (
        ("hi", [encoded]),
        (["hi", "h"], [encoded, [tokenizer.bos_id, *tokenizer.encode("h")]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ):
        fake.seen.clear()
        answer = complete(client, prompt=prompt)
        assert [seen[0] for seen in fake.seen] == expected
        assert [choice["text"] for choice in answer["choices"]] == [str(len(ids)) for ids in expected]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    complete(client, prompt="hi", add_special_tokens=False)
    assert fake.seen[-1][0] == encoded[1:]


def test_prompts_times_n(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    fake.script = lambda prompt, params: f"{prompt[0]}.{params.seed}"
    answer = complete(client, prompt=[[5], [6]], n=2, seed=1, max_tokens=9)
    assert [choice["text"] for choice in answer["choices"]] == ["5.1", "5.2", "6.1", "6.2"]
    assert answer["usage"]["prompt_tokens"] == 2


def test_echo_with_legacy_logprobs(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    """What lm-eval counts on: four lists over prompt and completion, the first value null."""
    tokenizer = fake.engine.tokenizer
    ids = tokenizer.encode("naïve 🙂")
    choice = complete(client, prompt=[ids], echo=True, logprobs=1, max_tokens=1)["choices"][0]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {len(ids) + 1}
    assert logprobs["token_logprobs"] == [None] + [-0.5] * len(ids)
    assert logprobs["top_logprobs"][0] is None
    assert all(max(top.values()) == -0.5 for top in logprobs["top_logprobs"][1:])
    assert choice["text"].startswith("naïve 🙂")
    assert logprobs["text_offset"][-1] == len("naïve 🙂")
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])
    plain = complete(client, prompt=[ids], logprobs=0, max_tokens=2)["choices"][0]["logprobs"]
    assert [len(top) for top in plain["top_logprobs"]] == [1, 1]


def test_streamed_completion_is_the_whole_one(client: httpx.Client) -> None:
    fields = {"prompt": ["hi", "you"], "echo": True, "logprobs": 1, "n": 2, "max_tokens": 4, "temperature": 0}
    whole = complete(client, **fields)
    texts: dict[int, str] = {}
    tokens: dict[int, list[str]] = {}
    for chunk in events(client, "/v1/completions", **fields, stream_options={"include_usage": True}):
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            tokens.setdefault(choice["index"], []).extend((choice["logprobs"] or {}).get("tokens", []))
    assert texts == {choice["index"]: choice["text"] for choice in whole["choices"]}
    assert tokens == {choice["index"]: choice["logprobs"]["tokens"] for choice in whole["choices"]}
    assert chunk["usage"] == whole["usage"]


def test_fill_in_the_middle(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    response = client.post(
        "/beta/completions", json={"model": "fake", "prompt": "def f(", "suffix": "return", "max_tokens": 2}
    )
    assert response.status_code == 200
    text = fake.engine.tokenizer.decode(fake.seen[-1][0], skip_control=False)
    assert text == "<｜begin▁of▁sentence｜><｜fim▁begin｜>def f(<｜fim▁hole｜>return<｜fim▁end｜>"


def test_default_max_tokens_is_openais(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    client.post("/v1/completions", json={"model": "fake", "prompt": "x"})
    assert fake.seen[-1][1].max_tokens == 16


# --- embeddings, models, tokens ---


def test_embeddings(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    answer = client.post("/v1/embeddings", json={"model": "fake", "input": ["hi", "hello you"]}).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    assert answer["data"][0]["embedding"][1:] == [0.5, -0.25]
    assert answer["usage"]["prompt_tokens"] == sum(len(ids) for ids in fake.embedded[-1][0])
    packed = client.post(
        "/v1/embeddings", json={"model": "fake", "input": [5, 6], "encoding_format": "base64"}
    ).json()
    assert struct.unpack("<3f", base64.b64decode(packed["data"][0]["embedding"])) == (2.0, 0.5, -0.25)
    extras = {"pooling": "weighted", "layer": 1, "normalize": False, "dimensions": 32}
    assert client.post("/v1/embeddings", json={"model": "fake", "input": [[5]], **extras}).status_code == 200
    assert fake.embedded[-1] == ([[5]], "weighted", 1, False)
    for wrong in (
        {"layer": 3},
        {"pooling": "max"},
        {"dimensions": 31},
        {"input": ""},
        {"input": ["x"] * 2049},
    ):
        assert client.post("/v1/embeddings", json={"model": "fake", "input": "x", **wrong}).status_code == 400
    long = {"model": "fake", "input": [5] * 2049}
    assert client.post("/v1/embeddings", json=long).json()["error"]["code"] == "context_length_exceeded"


def test_models(client: httpx.Client) -> None:
    [entry] = client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["object"], entry["max_model_len"]) == ("fake", "model", 2048)
    assert entry["description"]
    assert client.get("/models/fake").json() == entry
    assert client.get("/v1/models/a/b").status_code == 404
    assert client.get("/v1/models/..%2f..%2fetc%2fpasswd").status_code == 404


def test_several_models_and_names() -> None:
    from tests.helpers.live_server import live_server

    engines = {"one": fake_with(name="one"), "org/two": fake_with(name="two", template="deepseek-v3")}
    with live_server(engines) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        assert [entry["id"] for entry in http.get("/v1/models").json()["data"]] == ["one", "org/two"]
        assert http.get("/v1/models/org/two").status_code == 200
        ask(http, model="org/two")
        assert (len(engines["one"].seen), len(engines["org/two"].seen)) == (0, 1)
        thinking = {"model": "org/two", "messages": USER, "thinking": {"type": "enabled"}}
        assert http.post("/v1/chat/completions", json=thinking).status_code == 400
        assert http.post("/tokenize", json={"prompt": "x"}).status_code == 400
    with (
        live_server(fake_with(), served_names=("deepseek-reasoner",)) as server,
        httpx.Client(base_url=server.url, trust_env=False) as http,
    ):
        assert ask(http, model="deepseek-reasoner")["model"] == "deepseek-reasoner"


def test_tokenize(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    tokenizer = fake.engine.tokenizer
    answer = client.post(
        "/tokenize", json={"model": "fake", "prompt": "hi", "return_token_strs": True}
    ).json()
    assert answer["tokens"] == [tokenizer.bos_id, *tokenizer.encode("hi")]
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    chat = client.post("/tokenize", json={"messages": USER}).json()["tokens"]
    ask(client)
    assert chat == fake.seen[-1][0]
    assert client.post("/tokenize", json={"messages": USER, "prompt": "x"}).status_code == 400
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    info = client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["eos_token_ids"], info["bos_token_id"]) == (None, [1], 0)


def test_metrics_under_vllms_names(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    ask(client)
    client.post("/v1/chat/completions", json={})
    text = client.get("/metrics").text
    names = """num_requests_running num_requests_waiting kv_cache_usage_perc num_preemptions_total
        prefix_cache_queries_total prefix_cache_hits_total prompt_tokens_total generation_tokens_total
        request_success_total time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket
        e2e_request_latency_seconds_bucket request_queue_time_seconds_bucket"""
    for name in names.split():
        assert f"vllm:{name}{{" in text, name
    assert 'vllm:request_success_total{finished_reason="stop",model_name="fake"}' in text
    assert 'hadal:requests_refused_total{status="400"}' in text
    for name, value in (("drafts", 10), ("draft_tokens", 20), ("accepted_tokens", 14)):
        assert f'vllm:spec_decode_num_{name}_total{{model_name="fake"}} {value}.0' in text
    for place, value in ((0, 9), (1, 5)):
        label = f'{{model_name="fake",position="{place}"}}'
        assert f"vllm:spec_decode_num_accepted_tokens_per_pos_total{label} {value}.0" in text
    assert 'hadal:speculation_resting{model_name="fake"} 0.0' in text
    assert client.get("/metrics").headers["content-type"].startswith("text/plain")


def test_what_is_not_here(client: httpx.Client) -> None:
    for method, path in (
        ("POST", "/v1/responses"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
    ):
        response = client.request(method, path)
        assert response.status_code == 404
        assert "docs/api.md" in response.json()["error"]["message"]
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.get("/api/chat").json() == {"error": "GET is not allowed on /api/chat"}


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_thinking_off_is_refused_where_the_model_always_thinks(fields: dict[str, Any]) -> None:
    from tests.helpers.live_server import live_server

    fake = fake_with(template="hadal-mini")
    with live_server(fake) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        refused = http.post("/v1/chat/completions", json={"model": "fake", "messages": USER, **fields})
        assert refused.status_code == 400
        assert "always reasons" in refused.json()["error"]["message"]
        assert not fake.seen
        thinking = {"model": "fake", "messages": USER, "thinking": {"type": "enabled"}}
        assert http.post("/v1/chat/completions", json=thinking).status_code == 200


@pytest.mark.parametrize(
    ("template", "thinking", "tools"),
    [
        ("hadal-mini", "always", False),
        ("deepseek-r1", "optional", True),
        ("deepseek-v3.1", "optional", True),
        ("deepseek-v3", "never", True),
        ("r1-distill-qwen", "optional", False),
    ],
)
def test_models_say_what_they_can_do(template: str, thinking: str, tools: bool) -> None:
    from hadal.serve.meta import model_entry
    from hadal.serve.models import make_registry
    from hadal.serve.settings import Settings

    served = make_registry(fake_with(template=template), Settings()).find("fake")
    assert model_entry(served, "fake")["hadal"] == {
        "template": template, "thinking": thinking, "tools": tools, "sampling": {},
    }  # fmt: skip


def test_what_the_request_leaves_open_is_the_models_own() -> None:
    from tests.helpers.live_server import live_server

    fake = fake_with()
    fake.engine.sampling_defaults = {"temperature": 0.6, "top_p": 0.95}
    with live_server(fake) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        ask(http)
        ask(http, temperature=0)
        http.post("/v1/completions", json={"model": "fake", "prompt": "a", "top_p": 0.5})
        http.post("/api/chat", json={"model": "fake", "messages": USER, "stream": False})
        options = {"temperature": 0.25}
        http.post("/api/chat", json={"model": "fake", "messages": USER, "stream": False, "options": options})
        said = [(params.temperature, params.top_p) for _, params, *_ in fake.seen]
        assert said == [(0.6, 0.95), (0.0, 0.95), (0.6, 0.5), (0.6, 0.95), (0.25, 0.95)]
        entry = http.get("/v1/models/fake").json()
        assert entry["hadal"]["sampling"] == {"temperature": 0.6, "top_p": 0.95}
