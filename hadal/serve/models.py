"""The models that a server serves: names, admission, unloading and loading again.

A `Served` is one engine under its names. A request enters through `use(count)`, which refuses when the server
drains (503), the engine is dead (503) or too many sequences wait (503 with Retry-After), and which counts
sequences until it leaves. With a `load` function a model can be unloaded (Ollama's keep_alive: 0) once its
last request has left, and is loaded again by the next one.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from hadal.engine.pooling import Pooling
from hadal.engine.request import SamplingParams, Update
from hadal.engine.watching import Watched, Wish
from hadal.serve.errors import ApiError, bad, overloaded
from hadal.serve.fields import Fields, shown
from hadal.serve.prompts import Encoder
from hadal.serve.settings import Settings

logger = logging.getLogger("hadal.serve")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")


class Backend(Protocol):
    """What the server uses of `hadal.engine.AsyncEngine`."""

    engine: Any

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Update, None]: ...

    async def embed(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        pooling: Pooling,
        layer: int,
        normalize: bool,
        special: bool = False,
        cache_salt: str = "",
    ) -> list[list[float]]: ...

    async def watch(self, prompts: Sequence[Sequence[int]], wish: Wish) -> list[Watched]: ...

    def healthy(self) -> bool: ...

    def shutdown(self, drain: bool = True, timeout: float | None = None) -> bool: ...


@dataclass
class Served:
    """One model being served. Counts are touched by the event loop's thread only."""

    name: str
    settings: Settings
    backend: Backend | None
    load: Callable[[], Backend] | None = None
    aliases: tuple[str, ...] = ()
    created: float = field(default_factory=time.time)
    in_flight: int = 0
    draining: bool = False
    unload_wanted: bool = False
    load_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.backend is None:
            raise ValueError(f"model {self.name!r} has no engine")
        self._lock = asyncio.Lock()
        self.encoder = Encoder(self.backend.engine)
        self.info = EngineInfo.of(self.backend.engine)

    @property
    def capacity(self) -> int:
        """Sequences that may run or wait at once."""
        return int(self.info.max_num_seqs) + self.settings.max_queue

    def healthy(self) -> bool:
        """Alive (or unloaded and able to come back) and making progress."""
        if self.backend is None:
            return self.load is not None
        return self.backend.healthy()

    @asynccontextmanager
    async def use(self, count: int) -> AsyncIterator[Backend]:
        """Admission of `count` sequences, for as long as the context lasts."""
        if self.draining:
            raise overloaded("the server is shutting down; try another one", self.settings.retry_after)
        if count > self.capacity:
            raise bad(
                f"one request asks for {count} sequences; this server takes at most {self.capacity}", "n"
            )
        if self.in_flight + count > self.capacity:
            raise overloaded(
                f"the queue is full: {self.in_flight} sequences run or wait; try again soon",
                self.settings.retry_after,
            )
        if not self.healthy():
            raise ApiError(
                503, f"the engine of {self.name} is not running; restart the server", code="engine_dead"
            )
        self.in_flight += count
        try:
            yield await self._loaded()
        finally:
            self.in_flight -= count
            if self.unload_wanted and self.in_flight == 0:
                await self._unload()

    async def _loaded(self) -> Backend:
        async with self._lock:
            if self.backend is None:
                assert self.load is not None  # healthy() said so
                start = time.monotonic()
                try:
                    self.backend = await asyncio.to_thread(self.load)
                except (RuntimeError, OSError, ValueError) as error:
                    logger.error("the model %s could not be loaded again", self.name, exc_info=error)
                    raise ApiError(503, f"{self.name} could not be loaded again: {error}") from None
                self.load_seconds = time.monotonic() - start
            self.unload_wanted = False
            return self.backend

    async def unload(self) -> bool:
        """Unload now, or when the last request leaves. False if this server cannot load the model again."""
        if self.load is None:
            return False
        self.unload_wanted = True
        if self.in_flight == 0:
            await self._unload()
        return True

    async def _unload(self) -> None:
        async with self._lock:
            if self.backend is not None and self.in_flight == 0 and self.unload_wanted:
                backend, self.backend = self.backend, None
                await asyncio.to_thread(backend.shutdown)


@dataclass(frozen=True)
class EngineInfo:
    """What the routes show of an engine, kept while it is unloaded."""

    name: str
    config: Any
    tokenizer: Any
    template: Any
    folder: Any
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    device: Any
    dtype: Any
    sampling_defaults: Any

    @classmethod
    def of(cls, engine: Any) -> EngineInfo:
        fields: dict[str, Any] = {name: getattr(engine, name, None) for name in cls.__dataclass_fields__}
        return cls(**fields)


class Registry:
    """All served models by name."""

    def __init__(self, models: Sequence[Served]) -> None:
        self.models = list(models)
        self._by_name: dict[str, Served] = {}
        for model in models:
            for name in (model.name, *model.aliases):
                if not _NAME.fullmatch(name):
                    raise ValueError(f"model name {name!r} must be 1 to 200 of A-Z a-z 0-9 . _ : / -")
                if name in self._by_name:
                    raise ValueError(f"two models are served under the name {name!r}")
                self._by_name[name] = model

    def find(self, name: str) -> Served:
        """The model of that name, with or without Ollama's ":latest". Raises ApiError 404."""
        found = self._by_name.get(name) or self._by_name.get(name.removesuffix(":latest"))
        if found is None:
            served = ", ".join(self._by_name)
            message = f"the model {shown(name, 80)} is not served here; served: {served}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return found

    def of(self, fields: Fields, *aliases: str) -> Served:
        """The model that a request names in `model` (or one of `aliases`). 400 if missing, 404 if unknown."""
        name = fields.string("model", max_bytes=1000)
        for alias in aliases:
            other = fields.string(alias, max_bytes=1000)
            name = other if name is None else name
        if not name:
            raise bad("model is missing; GET /v1/models lists what is served", "model")
        return self.find(name)

    def stats(self) -> list[tuple[str, Any]]:
        """(name, EngineStats) of the loaded ones."""
        return [
            (model.name, model.backend.engine.stats()) for model in self.models if model.backend is not None
        ]


def make_registry(
    engines: Mapping[str, Backend] | Backend,
    settings: Settings,
    loaders: Mapping[str, Callable[[], Backend]] | None = None,
) -> Registry:
    """Registry of one engine (under its own name and `served_names`) or of several by name."""
    if isinstance(engines, Mapping):
        if settings.served_names and len(engines) > 1:
            raise ValueError("served_names needs a single model")
        named = dict(engines)
    else:
        named = {str(engines.engine.name): engines}
    loaders = loaders or {}
    return Registry(
        [
            Served(name, settings, backend, loaders.get(name), aliases=settings.served_names)
            for name, backend in named.items()
        ]
    )
