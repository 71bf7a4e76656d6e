"""POST /probe: what happens inside a served model on some texts, in one pass: hidden states of many layers,
pooled or token by token, and what the routers chose. For pages and studies that look at layers: /embeddings
gives one layer of one text at a time.

Bounded in texts, tokens, and numbers answered; the passes are short, and other requests' steps go between.
"""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from hadal.engine.extract import ProbeError
from hadal.engine.pooling import POOLINGS, Pooling
from hadal.engine.watching import Watched, Wish
from hadal.serve.errors import bad
from hadal.serve.fields import Fields, shown
from hadal.serve.jsontext import dumps
from hadal.serve.models import Registry, Served
from hadal.serve.prompts import input_list
from hadal.serve.sampling import HARMLESS
from hadal.serve.state import App, Visit
from hadal.serve.streaming import unless_gone
from hadal.weights.manifest import folder_revision

MAX_INPUTS, MAX_TOKENS_EACH, MAX_TOKENS = 256, 1024, 16_384
MAX_NUMBERS = 4_000_000
"""Of states in one answer: 16 MB, and in base64 21."""
MAX_CHOICES = 1_000_000
"""Of routers in one answer: tokens × blocks × chosen experts."""
HASHED_BYTES = 1 << 33
"""Up to this size a model's files are hashed for its revision, once."""
_REVISIONS: dict[str, str] = {}  # by folder


@dataclass(frozen=True)
class ProbeRequest:
    """A checked request; inputs not yet encoded."""

    served: Served
    model: str
    inputs: list[str | list[Any]]
    layers: tuple[int, ...]
    wish: Wish
    base64: bool


def read_probe(fields: Fields, registry: Registry) -> ProbeRequest:
    """The request. Raises ApiError."""
    served = registry.of(fields)
    inputs = input_list(fields, MAX_INPUTS)
    layers = _layers(fields, int(served.info.config.num_hidden_layers))
    pooling = fields.choice("pooling", (*POOLINGS, "none"))
    special, routing = fields.boolean("pool_special"), fields.boolean("routing")
    if routing and served.info.config.moe is None:
        raise bad(f"{served.name} is dense: it has no routers to watch", "routing")
    form = fields.choice("encoding_format", ("float", "base64"))
    fields.ignore(HARMLESS)
    fields.finish()
    pooled = None if pooling == "none" else cast("Pooling", pooling or "mean")
    wish = Wish(layers, pooled, special is True, routing is True)
    return ProbeRequest(served, str(fields.data["model"]), inputs, layers, wish, form == "base64")


def _layers(fields: Fields, last: int) -> tuple[int, ...]:
    """As numbers from 0; all of them where none are given."""
    given = fields.array("layers", last + 1)
    if given is None:
        return tuple(range(last + 1))
    for layer in given:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -last - 1 <= layer <= last:
            raise bad(f"layers: {shown(layer)} is none of 0 (embedding) to {last} (after the norm)", "layers")
    found = tuple(layer % (last + 1) for layer in given)
    if not found or len(set(found)) != len(found):
        raise bad("layers must hold at least one layer, and each once", "layers")
    return found


async def probe(request: Request) -> Response:
    """The route."""
    app = App.of(request)
    visit = await app.visit(request)
    wanted = read_probe(visit.fields, app.registry)
    visit.note(model=wanted.served.name)
    prompts, watched = await unless_gone(request, _watch(visit, wanted))
    served, config = wanted.served, wanted.served.info.config
    body = {
        "object": "probe",
        "model": wanted.model,
        "identity": {
            "model": served.name,
            "revision": await _revision(served),
            "dtype": str(served.info.dtype).removeprefix("torch."),
            "layers": list(wanted.layers),
            "pooling": wanted.wish.pooling or "none",
            "control_tokens": wanted.wish.special or wanted.wish.pooling is None,
        },
        "width": int(config.hidden_size),
        "experts": config.moe.n_routed_experts if config.moe else 0,
        "data": [
            _entry(served, i, ids, found, wanted)
            for i, (ids, found) in enumerate(zip(prompts, watched, strict=True))
        ],
        "usage": {"prompt_tokens": sum(map(len, prompts)), "total_tokens": sum(map(len, prompts))},
    }
    return Response(dumps(body), media_type="application/json")


def _entry(
    served: Served, index: int, ids: list[int], found: Watched, wanted: ProbeRequest
) -> dict[str, Any]:
    """One text of the answer."""
    states: Any = found.states.tolist()
    if wanted.base64:
        states = base64.b64encode(found.states.astype("<f4").tobytes()).decode("ascii")
    entry: dict[str, Any] = {
        "index": index,
        "tokens": [served.encoder.tokenizer.token_text(token) for token in ids],
        "shape": list(found.states.shape),
        "states": states,
    }
    if wanted.wish.routing:
        entry["routing"] = {
            str(block): {"experts": found.experts[block], "scores": found.scores[block]}
            for block in found.experts
        }
    return entry


async def _watch(visit: Visit, wanted: ProbeRequest) -> tuple[list[list[int]], list[Watched]]:
    """(token ids, what was taken) of each text. Raises ApiError."""
    async with visit.call(wanted.served, 1) as call:
        prompts = await _encoded(wanted)
        try:
            with call.answered():
                watched = await call.backend.watch(prompts, wanted.wish)
        except ProbeError as error:
            raise bad(str(error), "input") from None
    visit.note(prompt_tokens=sum(map(len, prompts)))
    return prompts, watched


async def _encoded(wanted: ProbeRequest) -> list[list[int]]:
    encoder = wanted.served.encoder
    most = min(MAX_TOKENS_EACH, encoder.limit)
    prompts, total = [], 0
    for number, item in enumerate(wanted.inputs):
        if isinstance(item, str) and not item:
            raise bad(f"input {number} is an empty string", "input")
        ids = await encoder.text(item, "input", bos=True) if isinstance(item, str) else item
        if len(ids) > most:
            raise bad(f"input {number} has {len(ids):,} tokens; at most {most:,} are probed", "input")
        total += len(ids)
        if total > MAX_TOKENS:
            raise bad(f"the inputs have more than {MAX_TOKENS:,} tokens together; send fewer", "input")
        prompts.append(encoder.ids(ids, "input"))
    _check_size(wanted, len(prompts), total)
    return prompts


def _check_size(wanted: ProbeRequest, texts: int, tokens: int) -> None:
    config = wanted.served.info.config
    vectors = texts if wanted.wish.pooling else tokens
    numbers = vectors * len(wanted.layers) * int(config.hidden_size)
    if numbers > MAX_NUMBERS:
        raise bad(
            f"the answer would hold {numbers:,} numbers ({vectors:,} vectors × {len(wanted.layers)} layers × "
            f"{config.hidden_size}); at most {MAX_NUMBERS:,}: ask for fewer layers or texts at once",
            "input",
        )
    if wanted.wish.routing:
        choices = tokens * config.num_hidden_layers * config.moe.num_experts_per_tok
        if choices > MAX_CHOICES:
            raise bad(f"the routers would make {choices:,} choices; at most {MAX_CHOICES:,}", "input")


async def _revision(served: Served) -> str:
    """The hash of the model's files as `hadal embed` names it; taken once."""
    folder = served.info.folder
    if str(folder) not in _REVISIONS:
        _REVISIONS[str(folder)] = await asyncio.to_thread(_hash, folder)
    return _REVISIONS[str(folder)]


def _hash(folder: Any) -> str:
    if folder is None:
        return "unknown: no folder"
    try:
        if sum(p.stat().st_size for p in folder.glob("*.safetensors")) > HASHED_BYTES:
            return "unknown: too large to be hashed here"
        return folder_revision(folder)
    except OSError as error:
        return f"unknown: {error.strerror or 'unreadable'}"
