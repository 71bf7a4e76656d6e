"""Real clients against a live server on a tiny random model: openai, ollama, langchain-deepseek, lm-eval."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest
import torch

from hadal.config import ModelConfig
from hadal.engine import AsyncEngine, Engine, SamplingParams
from hadal.model import Context, Transformer
from hadal.text.templates import TEMPLATES
from hadal.text.tokenizer import Tokenizer
from tests.engine.tiny import MLA
from tests.helpers.live_server import LiveServer, live_server
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

USER: Any = [{"role": "user", "content": "How much is 12 + 30?"}]
NAME = "tiny"


@functools.cache
def tiny_model(vocab_size: int) -> Transformer:
    fields = {**MLA.__dict__, "vocab_size": vocab_size, "max_position_embeddings": 2048}
    return Transformer(ModelConfig(**fields)).init_weights(seed=1).eval()


def make_engine(folder: Path) -> Engine:
    tokenizer = Tokenizer.load(folder)
    return Engine(
        tiny_model(tokenizer.padded_vocab_size),
        tokenizer,
        TEMPLATES["deepseek-r1"],
        name=NAME,
        folder=folder,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        cache_bytes=8 << 20,
        page_size=16,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def direct(folder: Path) -> Engine:
    """The same model, asked without a server."""
    return make_engine(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    engine = AsyncEngine(make_engine(folder))
    try:
        with live_server(engine) as live:
            yield live
    finally:
        engine.shutdown(drain=False)
    engine.engine.check_integrity()


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def llama(server: LiveServer) -> ollama.Client:
    return ollama.Client(host=server.url)


GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
PLAIN: dict[str, Any] = {"thinking": {"type": "disabled"}}


def test_openai_chat(client: openai.OpenAI, direct: Engine) -> None:
    answer = client.chat.completions.create(model=NAME, messages=USER, **GREEDY, extra_body=PLAIN)
    expected = direct.chat(USER, SamplingParams(**GREEDY), thinking=False)
    assert answer.choices[0].message.content == expected.content
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)


def test_openai_chat_reasons(client: openai.OpenAI, direct: Engine) -> None:
    message = client.chat.completions.create(model=NAME, messages=USER, **GREEDY).choices[0].message
    expected = direct.chat(USER, SamplingParams(**GREEDY))
    assert message.reasoning_content == message.reasoning == expected.reasoning  # type: ignore[attr-defined]
    assert expected.reasoning


def test_openai_stream(client: openai.OpenAI, direct: Engine) -> None:
    stream = client.chat.completions.create(
        model=NAME,
        messages=USER,
        **GREEDY,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=PLAIN,
    )
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == direct.chat(USER, SamplingParams(**GREEDY), thinking=False).content
    assert usage is not None
    assert usage.completion_tokens == 24


def test_openai_seed_and_choices(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model=NAME, messages=USER, temperature=1.5, seed=7, n=3, max_tokens=12, extra_body=PLAIN
        )
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) == 3


def test_openai_structured_output(client: openai.OpenAI) -> None:
    """A random model, bound by a schema, writes what the schema says; reasoning before it stays free."""
    schema = {
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "green"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["color", "count"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = client.chat.completions.create(
        model=NAME, messages=USER, temperature=0, max_tokens=300, response_format=form, extra_body=PLAIN
    )
    assert answer.choices[0].finish_reason == "stop"
    value = json.loads(answer.choices[0].message.content or "")
    assert value["color"] in ("red", "green")
    assert 0 <= value["count"] <= 9


def test_openai_forced_tool(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"left": {"type": "boolean"}},
        "required": ["left"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", "function": {"name": "turn", "parameters": parameters}}]
    answer = client.chat.completions.create(
        model=NAME, messages=USER, temperature=0, max_tokens=200, tools=tools, tool_choice="required",
        parallel_tool_calls=False, extra_body=PLAIN,
    )  # fmt: skip
    [call] = answer.choices[0].message.tool_calls or []
    assert call.function.name == "turn"
    assert set(json.loads(call.function.arguments)) == {"left"}
    assert answer.choices[0].finish_reason == "tool_calls"


def test_openai_completions_and_logprobs(client: openai.OpenAI, direct: Engine) -> None:
    answer = client.completions.create(model=NAME, prompt="The sum", logprobs=2, echo=True, **GREEDY)
    ids = direct.encode("The sum")
    [expected] = direct.generate([ids], SamplingParams(**GREEDY, logprobs=2, prompt_logprobs=2))
    assert answer.choices[0].text == "The sum" + expected.text
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    values = [
        entry.logprob
        for entry in [*(expected.prompt_logprobs or [])[1:], *(expected.logprobs or [])]
        if entry
    ]
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx(values, abs=1e-5)


def test_openai_many_at_once(client: openai.OpenAI, direct: Engine) -> None:
    """More requests than seats; each gets the answer that it gets alone."""
    prompts = [f"Question {i}: {'word ' * (i % 7)}" for i in range(20)]
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 10}

    def ask(prompt: str) -> str:
        return client.completions.create(model=NAME, prompt=prompt, **params).choices[0].text

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [done.text for done in direct.generate(prompts, SamplingParams(**params))]


def test_openai_embeddings(client: openai.OpenAI, direct: Engine) -> None:
    """The client asks for base64 by itself."""
    inputs = ["one", "two words", "trois petits mots"]
    answer = client.embeddings.create(model=NAME, input=inputs)
    expected = direct.embed(inputs)
    for entry, vector in zip(answer.data, expected, strict=True):
        assert entry.embedding == pytest.approx(vector, abs=1e-5)
    for pooling, layer in (("last", 0), ("weighted", 1)):
        extra = {"pooling": pooling, "layer": layer}
        answer = client.embeddings.create(
            model=NAME, input=inputs[:1], encoding_format="float", extra_body=extra
        )
        [vector] = direct.embed(inputs[:1], pooling=pooling, layer=layer)  # type: ignore[arg-type]
        assert answer.data[0].embedding == pytest.approx(vector, abs=1e-5)
        assert math.hypot(*answer.data[0].embedding) == pytest.approx(1.0, abs=1e-4)


def test_openai_models_and_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=USER)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="x" * 100_000)
    assert caught.value.code == "context_length_exceeded"


def test_openai_client_leaves_a_stream(client: openai.OpenAI, server: LiveServer) -> None:
    stream = client.chat.completions.create(
        model=NAME, messages=USER, stream=True, extra_body={"ignore_eos": True}, max_tokens=400
    )
    next(iter(stream))
    stream.close()
    engine = server.state.registry.models[0].backend.engine
    for _ in range(100):
        if not engine.has_work():
            break
        torch.ones(1)
        httpx.get(f"{server.url}/health", trust_env=False)
    assert server.state.in_flight() == 0
    assert engine.stats().running == 0


# --- ollama ---


def test_ollama_chat(llama: ollama.Client, direct: Engine) -> None:
    options = {"temperature": 0, "num_predict": 24}
    expected = direct.chat(USER, SamplingParams(**GREEDY), thinking=False)
    answer = llama.chat(model=NAME, messages=USER, options=options, think=False)
    assert answer.message.content == expected.content
    assert answer.eval_count == 24
    assert answer.prompt_eval_count == expected.prompt_tokens
    assert (answer.total_duration or 0) >= (answer.eval_duration or 0) > 0
    parts = list(llama.chat(model=NAME, messages=USER, options=options, think=False, stream=True))
    assert "".join(part.message.content or "" for part in parts) == expected.content
    assert parts[-1].done_reason == expected.finish_reason
    thinking = llama.chat(model=NAME, messages=USER, options=options, think=True).message.thinking
    assert thinking == direct.chat(USER, SamplingParams(**GREEDY)).reasoning


def test_ollama_generate(llama: ollama.Client, direct: Engine) -> None:
    options = {"temperature": 0, "num_predict": 24}
    answer = llama.generate(model=NAME, prompt="The sum", raw=True, options=options)
    assert answer.response == direct.generate("The sum", SamplingParams(**GREEDY)).text
    parts = list(llama.generate(model=NAME, prompt="The sum", raw=True, options=options, stream=True))
    assert "".join(part.response or "" for part in parts) == answer.response
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    bound = llama.generate(
        model=NAME, prompt="x", format=schema, think=False, options={"temperature": 0, "num_predict": 200}
    )
    assert isinstance(json.loads(bound.response or "")["a"], bool)


def test_ollama_models_and_embeddings(llama: ollama.Client, direct: Engine) -> None:
    assert [model.model for model in llama.list().models] == [NAME]
    assert [model.model for model in llama.ps().models] == [NAME]
    shown = llama.show(NAME)
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "deepseek_v3"
    assert "thinking" in (shown.capabilities or [])
    vectors = llama.embed(model=NAME, input=["one", "two words"]).embeddings
    for vector, expected in zip(vectors, direct.embed(["one", "two words"]), strict=True):
        assert list(vector) == pytest.approx(expected, abs=1e-5)
    assert list(llama.embeddings(model=NAME, prompt="one").embedding) == pytest.approx(
        list(vectors[0]), abs=1e-5
    )
    with pytest.raises(ollama.ResponseError, match="not served"):
        llama.chat(model="nope", messages=USER)


# --- langchain-deepseek ---


def test_langchain_deepseek(server: LiveServer, direct: Engine) -> None:
    from langchain_deepseek import ChatDeepSeek

    chat = ChatDeepSeek(model=NAME, api_base=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=24)
    expected = direct.chat(USER, SamplingParams(**GREEDY))
    answer = chat.invoke([("human", USER[0]["content"])])
    assert answer.additional_kwargs["reasoning_content"] == expected.reasoning
    assert answer.content == expected.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 24
    pieces = list(chat.stream([("human", USER[0]["content"])]))
    reasoning = "".join(piece.additional_kwargs.get("reasoning_content", "") for piece in pieces)
    assert reasoning == expected.reasoning


# --- lm-eval ---

QUESTIONS = [
    {"question": "What is 12 + 30?", "choices": ["42", "41", "twelve"], "answer": 0},
    {"question": "Combien font 7 fois 8 ?", "choices": ["54", "56"], "answer": 1},
    {
        "question": "Is the sum larger than the product",
        "choices": ["yes", "no", "maybe", "always"],
        "answer": 2,
    },
]


def expected_loglikelihood(engine: Engine, context: str, continuation: str) -> tuple[float, bool]:
    """Straight from the model, without engine or server."""
    tokenizer, model = engine.tokenizer, engine.model
    assert tokenizer is not None
    ids = tokenizer.encode(context + continuation)
    start = len(tokenizer.encode(context))
    with torch.no_grad():
        hidden = model(torch.tensor(ids), Context.packed([len(ids)], "cpu"))
        logprobs = model.logits(hidden).log_softmax(-1)
    rows = range(start - 1, len(ids) - 1)
    total = sum(logprobs[row, ids[row + 1]].item() for row in rows)
    return total, all(logprobs[row].argmax().item() == ids[row + 1] for row in rows)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_lm_eval_loglikelihoods(server: LiveServer, direct: Engine, tmp_path: Path, batch_size: int) -> None:
    """A multiple-choice task through `local-completions`: token-id prompts, echo, logprobs=1."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    data = tmp_path / "questions.json"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    task = ConfigurableTask(
        config={
            "task": "tiny_choices",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        }
    )
    model = LocalCompletionsAPI(
        model=NAME,
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="remote",
        max_length=direct.max_model_len,
        batch_size=batch_size,
    )
    results = evaluate(lm=model, task_dict={"tiny_choices": task}, bootstrap_iters=0, verbosity="ERROR")
    assert results is not None
    right = 0
    for sample in results["samples"]["tiny_choices"]:
        question = sample["doc"]
        wanted = [expected_loglikelihood(direct, question["question"], f" {c}") for c in question["choices"]]
        for (value, greedy), (expected, is_greedy) in zip(sample["filtered_resps"], wanted, strict=True):
            assert float(value) == pytest.approx(expected, abs=1e-3)
            assert str(greedy) == str(is_greedy)
        right += max(range(len(wanted)), key=lambda i: wanted[i][0]) == question["answer"]
    assert results["results"]["tiny_choices"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


def test_lm_eval_generation_and_text_prompts(server: LiveServer, direct: Engine) -> None:
    """tokenizer_backend None: prompts go as text, as for tasks that only generate."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        model=NAME, base_url=f"{server.url}/v1/completions", tokenizer_backend=None, max_length=500
    )
    until = {"until": ["\n\n"], "max_gen_toks": 24, "temperature": 0}
    requests = [
        Instance("generate_until", {}, (question["question"], until), index)
        for index, question in enumerate(QUESTIONS)
    ]
    answers = model.generate_until(requests, disable_tqdm=True)
    params = SamplingParams(max_tokens=24, temperature=0, stop=("\n\n",))
    assert answers == [direct.generate(str(question["question"]), params).text for question in QUESTIONS]
