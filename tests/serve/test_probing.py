"""POST /probe on the scripted engine: form, bounds, refusals. The numbers: tests/engine/test_watching.py."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from hadal.weights.manifest import folder_revision
from tests.helpers.live_server import live_server
from tests.serve.fake_engine import FakeAsyncEngine

ASK = {"model": "fake", "input": ["hi", "hello you"]}


def test_states_of_all_layers_with_who_made_them(client: httpx.Client, fake: FakeAsyncEngine) -> None:
    found = client.post("/v1/probe", json={**ASK, "routing": True}).json()
    assert found["identity"] == {
        "model": "fake", "revision": found["identity"]["revision"], "dtype": "float32", "layers": [0, 1, 2],
        "pooling": "mean", "control_tokens": False,
    }  # fmt: skip
    assert (found["width"], found["experts"]) == (32, 4)
    for entry in found["data"]:
        assert entry["shape"] == [3, 32] == list(np.shape(entry["states"]))
        assert len(entry["routing"]["1"]["experts"]) == len(entry["tokens"])
    assert found["usage"]["prompt_tokens"] == sum(len(e["tokens"]) for e in found["data"])
    packed = client.post("/probe", json={**ASK, "encoding_format": "base64"}).json()
    for entry, plain in zip(packed["data"], found["data"], strict=True):
        states = np.frombuffer(base64.b64decode(entry["states"]), "<f4").reshape(entry["shape"])
        np.testing.assert_allclose(states, plain["states"])
        assert "routing" not in entry


def test_layers_and_every_token(client: httpx.Client) -> None:
    found = client.post("/v1/probe", json={**ASK, "layers": [-1, 0], "pooling": "none"}).json()
    assert found["identity"]["layers"] == [2, 0] and found["identity"]["control_tokens"] is True
    assert [e["shape"] for e in found["data"]] == [[2, len(e["tokens"]), 32] for e in found["data"]]


def test_the_revision_is_that_of_the_files(tmp_path: Any) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    engine = FakeAsyncEngine()
    engine.engine.folder = tmp_path
    with live_server(engine) as server:
        found = httpx.post(server.url + "/v1/probe", json=ASK, timeout=60, trust_env=False).json()
    assert found["identity"]["revision"] == folder_revision(tmp_path)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input is missing", "input"),
    ({"input": ["a", ""]}, "input 1 is an empty string", "input"),
    ({"input": "x" * 100_000}, "maximum context length is 2048", "input"),
    ({"input": [[5] * 1025]}, "1,025 tokens; at most 1,024", "input"),
    ({"input": [[5] * 1000] * 17}, "more than 16,384 tokens", "input"),
    ({"input": [[5]] * 257}, "", "input"),
    ({"input": [[10**9]]}, "token id 1000000000", "input"),
    ({"layers": [3]}, "3 is none of 0 (embedding) to 2", "layers"),
    ({"layers": [2, -1]}, "each once", "layers"),
    ({"layers": []}, "at least one", "layers"),
    ({"layers": [True]}, "True is none", "layers"),
    ({"pooling": "max"}, "pooling must be one of", "pooling"),
    ({"encoding_format": "hex"}, "encoding_format must be", "encoding_format"),
    ({"layrs": [1]}, "did you mean 'layers'", "layrs"),
]


@pytest.mark.parametrize(("change", "said", "param"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(client: httpx.Client, change: dict[str, Any], said: str, param: str) -> None:
    response = client.post("/v1/probe", json={**ASK, **change})
    error = response.json()["error"]
    assert response.status_code == 400 and said in error["message"] and error["param"] == param


def test_an_answer_beyond_bounds_is_refused_before_the_model_runs(
    client: httpx.Client, monkeypatch: Any
) -> None:
    monkeypatch.setattr("hadal.serve.probing.MAX_NUMBERS", 3 * 32 * 2 - 1)
    assert (
        "192 numbers (2 vectors × 3 layers × 32)"
        in client.post("/v1/probe", json=ASK).json()["error"]["message"]
    )
    assert client.post("/v1/probe", json={**ASK, "layers": [0, 1]}).status_code == 200
    monkeypatch.setattr("hadal.serve.probing.MAX_CHOICES", 1)
    routed = client.post("/v1/probe", json={**ASK, "layers": [0], "routing": True})
    assert "choices; at most 1" in routed.json()["error"]["message"]


def test_a_key_is_asked_for_on_both_routes() -> None:
    with live_server(FakeAsyncEngine(), api_keys=("a-long-enough-key",)) as server:
        for path, body in (("/v1/probe", ASK), ("/v1/plan", {"ask": "devices"})):
            assert httpx.post(server.url + path, json=body, timeout=60, trust_env=False).status_code == 401
