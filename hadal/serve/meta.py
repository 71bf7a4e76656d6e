"""Routes about the server rather than about a text: models, tokenize, detokenize, version, health, ready,
metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import hadal
from hadal.config import PRESETS
from hadal.serve.chat_request import read_thinking
from hadal.serve.errors import ApiError, bad
from hadal.serve.jsontext import dumps
from hadal.serve.messages import read_messages, read_tools
from hadal.serve.metrics import CONTENT_TYPE
from hadal.serve.models import Served
from hadal.serve.prompts import too_long
from hadal.serve.state import App


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(body), status, headers, "application/json")


def title(served: Served) -> str:
    """What the model truly is, in one sentence: the preset's words, or the architecture."""
    info = served.info
    for preset in PRESETS.values():
        if info.name in (preset.name, preset.repo_id):
            return preset.title
    return f"{info.name}: {info.config.model_type}, {info.config.parameters().main:,} parameters"


def model_entry(served: Served, name: str) -> dict[str, Any]:
    """One entry of /models."""
    return {
        "id": name,
        "object": "model",
        "created": int(served.created),
        "owned_by": "hadal",
        "root": served.name,
        "parent": None,
        "max_model_len": served.info.max_model_len,
        "description": title(served),
        "permission": [],
        "hadal": _abilities(served),
    }


def _abilities(served: Served) -> dict[str, Any]:
    """What OpenAI's entry has no word for: how the model reasons, and the sampling that it asks for."""
    template = served.info.template
    if template is None:
        return {"thinking": "never", "tools": False, "sampling": served.info.sampling_defaults or {}}
    optional = "optional" if template.supports_thinking else "never"
    return {
        "template": template.name,
        "thinking": "always" if template.always_thinks else optional,
        "tools": template.supports_tools,
        "sampling": served.info.sampling_defaults or {},
    }


async def models(request: Request) -> Response:
    """GET /models."""
    entries = [
        model_entry(served, name)
        for served in App.of(request).registry.models
        for name in (served.name, *served.aliases)
    ]
    return _json({"object": "list", "data": entries})


async def model(request: Request) -> Response:
    """GET /models/{id}; the id may hold slashes."""
    name = str(request.path_params["model_id"])
    return _json(model_entry(App.of(request).registry.find(name), name))


async def tokenize(request: Request) -> Response:
    """POST /tokenize: ids of a prompt, or of a chat as the model would see it. Control tokens written in a
    prompt stay plain text, as in every other route."""
    app = App.of(request)
    visit = await app.visit(request)
    fields = visit.fields
    served = (
        app.registry.of(fields)
        if fields.has("model") or len(app.registry.models) > 1
        else app.registry.models[0]
    )
    fields.ignore(("model",))
    special, strings = fields.boolean("add_special_tokens"), fields.boolean("return_token_strs")
    generation = fields.boolean("add_generation_prompt")
    prompt = fields.string("prompt")
    if (prompt is None) == (not fields.has("messages")):
        raise bad("send either prompt or messages", "prompt")
    encoder = served.encoder
    if prompt is not None:
        fields.finish()
        ids = await encoder.text(prompt, "prompt", bos=special is not False)
    else:
        messages, tools, thinking = read_messages(fields), read_tools(fields), read_thinking(fields)
        fields.finish()
        parts = encoder.render(
            messages, tools=tools or None, thinking=thinking, add_generation_prompt=generation is not False
        )
        ids = await encoder.parts(parts, "messages")
    body: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": served.info.max_model_len}
    body["token_strs"] = [encoder.tokenizer.token_text(token) for token in ids] if strings else None
    return _json(body)


async def detokenize(request: Request) -> Response:
    """POST /detokenize: the text of token ids, control tokens included."""
    app = App.of(request)
    visit = await app.visit(request)
    fields = visit.fields
    served = (
        app.registry.of(fields)
        if fields.has("model") or len(app.registry.models) > 1
        else app.registry.models[0]
    )
    fields.ignore(("model",))
    tokens = fields.array("tokens", 1 << 20)
    if tokens is None:
        raise bad("tokens is missing", "tokens")
    fields.finish()
    if len(tokens) > 4 * served.encoder.limit:
        raise too_long(len(tokens), served.encoder.limit, "tokens")
    ids = served.encoder.ids(tokens, "tokens") if tokens else []
    return _json({"prompt": served.encoder.tokenizer.decode(ids, skip_control=False)})


async def tokenizer_info(request: Request) -> Response:
    """GET /tokenizer_info, for lm-eval's remote tokenizer. The texts of BOS and EOS are null on purpose: a
    client would send them to /tokenize to learn their ids, and there text is never a control token."""
    served = App.of(request).registry.models[0]
    tokenizer = served.encoder.tokenizer
    return _json(
        {
            "tokenizer_class": "hadal",
            "vocab_size": served.info.vocab_size,
            "bos_token": None,
            "eos_token": None,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_ids": list(tokenizer.eos_ids),
            "model_max_length": served.info.max_model_len,
        }
    )


async def version(request: Request) -> Response:
    """GET /version."""
    return _json({"version": hadal.__version__, **App.of(request).settings.extra})


async def health(request: Request) -> Response:
    """GET /health: 200 while every engine lives and makes progress, else 503."""
    states = {served.name: _state(served) for served in App.of(request).registry.models}
    alive = all(state in ("ok", "unloaded") for state in states.values())
    return _json({"status": "ok" if alive else "dead", "models": states}, 200 if alive else 503)


def _state(served: Served) -> str:
    if served.backend is None:
        return "unloaded" if served.load is not None else "dead"
    return "ok" if served.backend.healthy() else "dead"


async def ready(request: Request) -> Response:
    """GET /ready: 200 when a request sent now would be taken; 503 while draining, dead or full."""
    app = App.of(request)
    retry = {"retry-after": str(app.settings.retry_after)}
    for served in app.registry.models:
        if served.draining:
            return _json({"status": "draining"}, 503, retry)
        if not served.healthy():
            return _json({"status": "dead"}, 503)
        if served.in_flight >= served.capacity:
            return _json({"status": "full"}, 503, retry)
    return _json({"status": "ready"})


async def metrics(request: Request) -> Response:
    """GET /metrics: Prometheus text."""
    return Response(App.of(request).metrics.text(), 200, None, CONTENT_TYPE)


async def not_here(request: Request) -> Response:
    """Routes of OpenAI's service that have no counterpart, by name instead of a bare 404."""
    raise ApiError(404, f"{request.url.path} is not part of this server; see docs/api.md for what is")


def read_file(path: Path, limit: int) -> str:
    """A small text file of a model folder; "" if there is none."""
    try:
        return path.read_text(encoding="utf-8")[:limit] if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return ""
