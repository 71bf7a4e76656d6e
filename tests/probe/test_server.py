"""The server's vectors are the study's: one numbering of layers, one pooling, control tokens in neither."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import openai
import pytest

from hadal.engine import AsyncEngine, Engine
from hadal.probe.backends import Item, Local
from hadal.probe.endpoint import Endpoint, EndpointError
from tests.helpers.live_server import LiveServer, live_server

ITEMS = [
    Item(str(i), t) for i, t in enumerate(["I know.", "Où est la lune ?", "one two three four five six"])
]
TEXTS = [item.text for item in ITEMS]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("hadal-mini", device="cpu", dtype="float32", cache_bytes=32 << 20)


@pytest.fixture(scope="module")
def local(engine: Engine) -> Local:
    assert engine.tokenizer is not None
    return Local.of(engine.model, engine.tokenizer, "hadal-mini")


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[LiveServer]:
    with live_server(AsyncEngine(engine)) as running:
        yield running


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_client_of_everybodys_notes(server: LiveServer, local: Local) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.embeddings.create(model="hadal-mini", input=TEXTS)
    mine = [entry.embedding for entry in answer.data]
    np.testing.assert_allclose(mine, unit(local.embed(ITEMS, (-1,)).at(8)), atol=1e-5)
    tokens = [e.ids for e in local.encode(ITEMS)]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, tokens))
    by_ids = client.embeddings.create(model="hadal-mini", input=tokens, encoding_format="float")
    np.testing.assert_allclose([entry.embedding for entry in by_ids.data], mine, atol=1e-5)
    one = client.embeddings.create(model="hadal-mini", input=TEXTS[0], dimensions=len(mine[0]))
    np.testing.assert_allclose(one.data[0].embedding, mine[0], atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="cannot be cut"):
        client.embeddings.create(model="hadal-mini", input="x", dimensions=8)


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted"])
def test_our_own_endpoint_gives_what_a_local_model_gives(
    server: LiveServer, local: Local, pooling: str
) -> None:
    with Endpoint(f"{server.url}/v1", "hadal-mini") as service:
        found = service.embed(ITEMS, (0, 3, 8), pooling)  # type: ignore[arg-type]
        with pytest.raises(EndpointError, match="layer"):
            service.embed(ITEMS, (9,))
    expected = local.embed(ITEMS, (0, 3, 8), pooling)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.vectors, expected.vectors, rtol=1e-4, atol=1e-4)
    assert found.layers == expected.layers and found.identity.backend == "endpoint"
    assert found.identity.pooling == pooling


def test_control_tokens_only_where_asked_for(server: LiveServer, local: Local) -> None:
    both = Local.of(local.model, local.tokenizer, "hadal-mini", special=True)
    without, within = local.embed(ITEMS, (4,)), both.embed(ITEMS, (4,))
    assert not np.allclose(unit(without.at(4)), unit(within.at(4)), atol=1e-2)
    assert within.identity.pooling == "mean, with control tokens"
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.embeddings.create(
        model="hadal-mini", input=TEXTS, extra_body={"layer": 4, "pool_special": True}
    )
    np.testing.assert_allclose([e.embedding for e in answer.data], unit(within.at(4)), atol=1e-5)
