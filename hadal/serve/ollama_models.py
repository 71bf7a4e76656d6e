"""Ollama's routes about models: version, tags, show, ps, embed, pull, delete.

What is listed is what this server serves. Pulling and deleting over HTTP are off unless the operator allows
them: whoever reaches the port could fill or empty the disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import hadal
from hadal.config import Mla
from hadal.serve.completions import FIM_TOKENS
from hadal.serve.embeddings import EmbeddingRequest, embed
from hadal.serve.errors import ApiError, bad
from hadal.serve.fields import Fields
from hadal.serve.jsontext import dumps
from hadal.serve.meta import read_file, title
from hadal.serve.models import Registry, Served
from hadal.serve.ollama_options import LAYOUT, unloads
from hadal.serve.state import App
from hadal.serve.streaming import NDJSON, LiveStream, unless_gone
from hadal.weights import hub
from hadal.weights.errors import HubError, WeightsError

_FOREVER = "2318-01-01T00:00:00Z"  # what Ollama shows for a model that is never unloaded


def _json(body: Any, status: int = 200) -> Response:
    return Response(dumps(body), status, None, "application/json")


async def version(request: Request) -> Response:
    """GET /api/version. Clients compare it with Ollama's own; the part after + says who we are."""
    return _json({"version": f"0.12.0+hadal.{hadal.__version__}"})


async def tags(request: Request) -> Response:
    """GET /api/tags."""
    registry = App.of(request).registry
    entries = [_listed(served, name) for served in registry.models for name in (served.name, *served.aliases)]
    return _json({"models": entries})


async def ps(request: Request) -> Response:
    """GET /api/ps: what is loaded."""
    entries = []
    for served in App.of(request).registry.models:
        if served.backend is not None:
            entry = _listed(served, served.name)
            del entry["modified_at"]
            on_gpu = "cuda" in str(served.info.device)
            entry |= {
                "expires_at": _FOREVER,
                "size_vram": entry["size"] if on_gpu else 0,
                "context_length": served.info.max_model_len,
            }
            entries.append(entry)
    return _json({"models": entries})


async def show(request: Request) -> Response:
    """POST /api/show."""
    app = App.of(request)
    visit = await app.visit(request)
    served = app.registry.of(visit.fields, "name")
    verbose = visit.fields.boolean("verbose")
    for name in ("template", "system", "options"):
        visit.fields.refuse(name, "models are shown as they are served")
    visit.fields.finish()
    return _json(_shown(served, bool(verbose)))


def _shown(served: Served, verbose: bool) -> dict[str, Any]:
    folder = _folder(served)
    body = {
        "modelfile": f"# {title(served)}\nFROM {served.name}\n",
        "parameters": "",
        "template": getattr(served.info.template, "name", ""),
        "license": read_file(folder / "LICENSE", 100_000) if folder else "",
        "details": _details(served),
        "model_info": _model_info(served),
        "capabilities": _capabilities(served),
        "modified_at": _modified(served),
    }
    if verbose and folder:
        body["model_card"] = read_file(folder / "README.md", 100_000)
    return body


def _capabilities(served: Served) -> list[str]:
    template, special = served.info.template, served.info.tokenizer.special
    found = ["completion", "embedding"]
    if any(all(name in special for name in names) for names in FIM_TOKENS):
        found.append("insert")
    if template.tool_format is not None:
        found.append("tools")
    if template.supports_thinking:
        found.append("thinking")
    return found


def _model_info(served: Served) -> dict[str, Any]:
    config = served.info.config
    arch = config.model_type
    info: dict[str, Any] = {
        "general.architecture": arch,
        "general.basename": served.name,
        "general.parameter_count": config.parameters().main,
        "general.description": title(served),
        f"{arch}.context_length": served.info.max_model_len,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope.rope_theta,
        f"{arch}.vocab_size": config.vocab_size,
    }
    if isinstance(config.attention, Mla):
        info[f"{arch}.attention.kv_lora_rank"] = config.attention.kv_lora_rank
    else:
        info[f"{arch}.attention.head_count_kv"] = config.attention.num_key_value_heads
    if config.moe is not None:
        info[f"{arch}.expert_count"] = config.moe.n_routed_experts
        info[f"{arch}.expert_used_count"] = config.moe.num_experts_per_tok
    return info


def _details(served: Served) -> dict[str, Any]:
    config = served.info.config
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": config.model_type,
        "families": [config.model_type],
        "parameter_size": short_count(config.parameters().main),
        "quantization_level": "FP8" if config.fp8 is not None else _dtype_name(served.info.dtype),
    }


def short_count(count: int) -> str:
    """15M, 1.8B, 671B: three digits at most."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            value = count / unit
            return f"{value:.1f}{name}" if value < 10 else f"{value:.0f}{name}"
    return str(count)


def _dtype_name(dtype: Any) -> str:
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    text = str(dtype).rpartition(".")[2]
    return names.get(text, text.upper())


def _listed(served: Served, name: str) -> dict[str, Any]:
    size, digest = _measured(_folder(served), served.name)
    return {
        "name": name,
        "model": name,
        "modified_at": _modified(served),
        "size": size,
        "digest": digest,
        "details": _details(served),
    }


def _folder(served: Served) -> Path | None:
    return Path(served.info.folder) if served.info.folder else None


def _modified(served: Served) -> str:
    folder = _folder(served)
    config = folder / "config.json" if folder else None
    stamp = config.stat().st_mtime if config is not None and config.is_file() else served.created
    return datetime.fromtimestamp(stamp, UTC).isoformat().replace("+00:00", "Z")


@lru_cache(maxsize=64)
def _measured(folder: Path | None, name: str) -> tuple[int, str]:
    """(bytes of the files, SHA-256 over the files' own hashes)."""
    if folder is None or not folder.is_dir():
        return 0, hashlib.sha256(name.encode()).hexdigest()
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()), hub.digest(folder)


async def embed_route(request: Request) -> Response:
    """POST /api/embed: {input} → {embeddings}, each of length one."""
    return await _embed(request, legacy=False)


async def embeddings_route(request: Request) -> Response:
    """POST /api/embeddings, the older form: {prompt} → {embedding}."""
    return await _embed(request, legacy=True)


async def _embed(request: Request, *, legacy: bool) -> Response:
    app = App.of(request)
    visit = await app.visit(request)
    wanted, unload = _read_embed(visit.fields, app.registry, legacy)
    visit.note(model=wanted.served.name)
    vectors, tokens = await unless_gone(request, embed(visit, wanted))
    if unload:
        await wanted.served.unload()
    if legacy:
        return _json({"embedding": vectors[0] if vectors else []})
    duration = round((time.monotonic() - visit.arrival) * 1e9)
    return _json(
        {
            "model": wanted.model,
            "embeddings": vectors,
            "total_duration": duration,
            "load_duration": 0,
            "prompt_eval_count": tokens,
        }
    )


def _read_embed(fields: Fields, registry: Registry, legacy: bool) -> tuple[EmbeddingRequest, bool]:
    served = registry.of(fields, "name")
    field = "prompt" if legacy else "input"
    value = fields.take(field)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > 2048 or not all(isinstance(text, str) for text in texts):
        raise bad(f"{field} must be a string{'' if legacy else ' or an array of up to 2048 strings'}", field)
    fields.neutral(
        "dimensions", int(served.info.config.hidden_size), "the vectors of this model cannot be cut"
    )
    truncate = fields.boolean("truncate") is not False
    options = fields.object("options")
    if options is not None:
        options.ignore(LAYOUT)
        options.finish()
    unload = unloads(fields)
    fields.finish()
    model = str(fields.data.get("model") or fields.data.get("name"))
    return EmbeddingRequest(served, model, texts, truncate=truncate), unload


async def pull(request: Request) -> Response:
    """POST /api/pull: downloads into the cache of huggingface_hub; {status, digest?, total?, completed?}
    lines."""
    app = App.of(request)
    visit = await app.visit(request)
    name = _hub_name(visit.fields)
    insecure, stream = visit.fields.boolean("insecure"), visit.fields.boolean("stream")
    visit.fields.finish()
    if not app.settings.allow_pull:
        raise ApiError(
            403,
            f"pulling over HTTP is off here; run: hadal pull {name} (or start the server with --allow-pull)",
        )
    if insecure:
        raise bad("insecure is not supported: downloads are verified", "insecure")
    if stream is False:
        async for _ in _pulled(name):
            pass
        return _json({"status": "success"})
    return LiveStream(_pulled(name), app.settings, NDJSON, lambda error: dumps(error.ollama_body()) + b"\n")


def _hub_name(fields: Fields) -> str:
    """A request names a model, never a path (Ollama CVE-2024-37032)."""
    name = fields.string("model", max_bytes=200)
    other = fields.string("name", max_bytes=200)
    name = name or other
    if not name:
        raise bad("model is missing", "model")
    try:
        return hub.safe_model_name(name)
    except HubError as error:
        raise bad(str(error), "model") from None


async def _pulled(name: str) -> AsyncGenerator[bytes, None]:
    """Progress lines of a download that runs in a thread."""
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def report(done: int, total: int) -> None:
        lines.put({"status": f"pulling {name}", "digest": name, "total": total, "completed": done})

    yield dumps({"status": "pulling manifest"}) + b"\n"
    work = asyncio.ensure_future(asyncio.to_thread(hub.pull, name, report))
    while not work.done():
        await asyncio.wait({work}, timeout=0.25)
        latest: dict[str, Any] | None = None
        while not lines.empty():
            latest = lines.get()
        if latest is not None:
            yield dumps(latest) + b"\n"
    try:
        work.result()
    except (OSError, WeightsError) as error:
        raise ApiError(500, f"pull {name}: {error}") from None
    yield dumps({"status": "verifying sha256 digest"}) + b"\n"
    yield dumps({"status": "success"}) + b"\n"


async def delete(request: Request) -> Response:
    """DELETE /api/delete: removes a model from the cache."""
    app = App.of(request)
    visit = await app.visit(request)
    name = _hub_name(visit.fields)
    visit.fields.finish()
    if not app.settings.allow_delete:
        raise ApiError(403, f"deleting over HTTP is off here; run: hadal rm {name}")
    if any(name in (served.name, *served.aliases) for served in app.registry.models):
        raise ApiError(400, f"{name} is being served; stop the server before deleting it")
    try:
        await asyncio.to_thread(hub.remove, name)
    except (OSError, HubError) as error:
        raise ApiError(404, str(error)) from None
    return _json({})
