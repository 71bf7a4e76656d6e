"""POST /embeddings: one vector per input, from the hidden states of a generating model.

DeepSeek's own service has no such route (it answers 404); users' code calls it all the same. Extras beside
OpenAI's fields: `pooling` (mean, last, weighted; never of control tokens unless `pool_special`), `layer` (0:
the embedding, i: the output of the i-th block, -1 and the last: after the final norm), `normalize`.
"""

from __future__ import annotations

import base64
from array import array
from dataclasses import dataclass
from sys import byteorder
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from hadal.engine.pooling import POOLINGS, Pooling
from hadal.serve.errors import bad
from hadal.serve.fields import Fields
from hadal.serve.jsontext import dumps
from hadal.serve.models import Registry, Served
from hadal.serve.prompts import input_list, too_long
from hadal.serve.sampling import HARMLESS
from hadal.serve.state import App, Visit
from hadal.serve.streaming import unless_gone

MAX_INPUTS = 2048


@dataclass(frozen=True)
class EmbeddingRequest:
    """A checked request; inputs not yet encoded."""

    served: Served
    model: str
    inputs: list[str | list[Any]]
    base64: bool = False
    pooling: Pooling = "mean"
    layer: int = -1
    normalize: bool = True
    special: bool = False
    truncate: bool = False
    """Keep the beginning of an input that is too long, instead of refusing it (Ollama's way)."""


def read_embedding(fields: Fields, registry: Registry) -> EmbeddingRequest:
    """The request. Raises ApiError."""
    served = registry.of(fields)
    inputs = input_list(fields, MAX_INPUTS)
    layers = int(served.info.config.num_hidden_layers)
    layer = fields.integer("layer", -1, layers)
    normalize = fields.boolean("normalize")
    special = fields.boolean("pool_special")
    form = fields.choice("encoding_format", ("float", "base64"))
    pooling = cast("Pooling | None", fields.choice("pooling", POOLINGS))
    width = int(served.info.config.hidden_size)
    fields.neutral("dimensions", width, "the vectors of this model cannot be cut")
    fields.ignore(HARMLESS)
    fields.finish()
    return EmbeddingRequest(
        served,
        str(fields.data["model"]),
        inputs,
        base64=form == "base64",
        pooling=pooling or "mean",
        layer=-1 if layer is None else layer,
        normalize=normalize is not False,
        special=special is True,
    )


async def embeddings(request: Request) -> Response:
    """The route."""
    app = App.of(request)
    visit = await app.visit(request)
    wanted = read_embedding(visit.fields, app.registry)
    visit.note(model=wanted.served.name)
    vectors, tokens = await unless_gone(request, embed(visit, wanted))
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if wanted.base64 else vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": wanted.model, "usage": usage}
    return Response(dumps(body), media_type="application/json")


async def embed(visit: Visit, wanted: EmbeddingRequest) -> tuple[list[list[float]], int]:
    """(vectors, number of prompt tokens). Raises ApiError."""
    encoder = wanted.served.encoder
    async with visit.call(wanted.served, 1) as call:
        prompts = []
        for item in wanted.inputs:
            if isinstance(item, str) and not item:
                raise bad("input must not hold an empty string", "input")
            if isinstance(item, str):
                item = encoder.beginning(item) if wanted.truncate else item
                ids = await encoder.text(item, "input", bos=True, limited=not wanted.truncate)
            else:
                ids = item
            if wanted.truncate:
                ids = ids[: encoder.limit]
            if len(ids) > encoder.limit:
                raise too_long(len(ids), encoder.limit, "input")
            prompts.append(encoder.ids(ids, "input"))
        with call.answered():
            vectors = await call.backend.embed(
                prompts,
                pooling=wanted.pooling,
                layer=wanted.layer,
                normalize=wanted.normalize,
                special=wanted.special,
                cache_salt=call.cache_salt,
            )
    tokens = sum(map(len, prompts))
    visit.note(prompt_tokens=tokens)
    return vectors, tokens


def _packed(vector: list[float]) -> str:
    """Base64 of little-endian float32, as OpenAI's clients ask for by default."""
    numbers = array("f", vector)
    if byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")
