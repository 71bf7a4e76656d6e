"""Vectors from a service over HTTP: anything that speaks OpenAI's POST /embeddings.

A service that has no embeddings is an error that says so. (DeepSeek's own API has none: it answers 404.)
Nothing is ever put in the place of a vector that did not come. What came is kept in a cache on disk, so that
a run that was stopped goes on where it was and pays for nothing twice.

A service says little of itself: the revision of its model is unknown, and so are layer (written as −1) and
pooling. Hadal's own server takes both, and is asked for them.
"""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hadal.probe.backends import Estimate, Item, check_items
from hadal.probe.extract import ProbeError, Progress
from hadal.probe.identity import Embeddings, Floats, issue
from hadal.probe.pooling import TargetPooling

if TYPE_CHECKING:
    import httpx

AGAIN = frozenset([408, 425, 429, 500, 502, 503, 504, 529])
ABSENT = frozenset([404, 405, 501])
LONGEST_WAIT = 120.0  # seconds between two tries
CHARACTERS = 4  # a token, about, where nobody has counted


class EndpointError(ProbeError):
    """A service that does not give what was asked for."""


class Endpoint:
    """A service: `url` as OpenAI's clients take it (…/v1), and the model's name there.

    requests_per_minute, tokens_per_minute: the service's limits, which are kept (tokens are guessed at four
    characters each). price: per million tokens, for the estimate. cache: a file, made where missing. retries:
    tries after the first, for answers that mean "later" and for broken connections, with waits that double,
    or as the service says. Raises EndpointError."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        dimensions: int | None = None,
        cache: str | Path | None = None,
        batch: int = 64,
        retries: int = 6,
        timeout: float = 60.0,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        price: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise EndpointError("a service over HTTP needs httpx: pip install 'hadal[probe]'") from error
        if not url.startswith(("http://", "https://")):
            raise EndpointError(f"{url!r} is no address: it must begin with http:// or https://")
        self.url, self.model, self.dimensions = url.rstrip("/"), model, dimensions
        self.batch, self.retries, self.price = batch, retries, price
        self.requests_per_minute, self.tokens_per_minute = requests_per_minute, tokens_per_minute
        self._sleep, self._clock, self._next = sleep, clock, 0.0
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(timeout=timeout, headers=headers)
        self._failed, self._unreachable = httpx.TransportError, httpx.ConnectError
        self._answered = False  # a service that never answered is a wrong address, and is not waited for
        self.kept = Kept(Path(cache)) if cache is not None else None
        self._reported: set[str] = set()

    def embed(
        self,
        items: Sequence[Item],
        layers: Sequence[int] | None = None,
        pooling: TargetPooling | None = None,
        *,
        progress: Progress | None = None,
    ) -> Embeddings:
        """One vector a text, of the whole text. Layers and pooling only where the service is Hadal's. Raises
        EndpointError."""
        check_items(items)
        extras = self._extras(layers, pooling)
        columns = []
        found_cached = 0
        for extra in extras:
            vectors, cached = self._column(items, extra, progress)
            columns.append(vectors)
            found_cached += cached
        widths = {v.shape[0] for column in columns for v in column}
        if len(widths) > 1:
            raise EndpointError(f"{self.url} gave vectors of different widths: {sorted(widths)}")
        chosen = tuple(layers) if layers is not None else (-1,)
        details = {"url": self.url}
        if self._reported - {self.model}:
            details["answers as"] = ", ".join(sorted(self._reported))
        if found_cached:
            details["from the cache"] = f"{found_cached} of {len(items) * len(extras)}"
        if self.dimensions is not None:
            details["dimensions"] = str(self.dimensions)
        identity = issue(
            "endpoint", model=self.model, revision="unknown: the service does not say", dtype="unknown",
            layers=chosen, pooling=pooling or ("mean" if layers else "the service's own"), details=details,
        )  # fmt: skip
        stacked = np.stack([np.stack(column) for column in columns], 1)
        return Embeddings(stacked, chosen, [item.id for item in items], identity)

    def estimate(self, items: Sequence[Item]) -> Estimate:
        """For what is not in the cache: tokens guessed from characters, seconds from the limits (no faster
        than they allow), cost from the price."""
        check_items(items)
        texts = [item.text for item in items]
        asked = [t for t in texts if self.kept is None or self.kept.get(self._key(t, {})) is None]
        tokens = sum(map(_tokens, asked))
        requests = -(-len(asked) // self.batch)
        limits = [60 * requests / self.requests_per_minute] if self.requests_per_minute else []
        limits += [60 * tokens / self.tokens_per_minute] if self.tokens_per_minute else []
        cost = None if self.price is None else tokens / 1e6 * self.price
        note = f"tokens guessed at {CHARACTERS} characters each; {len(texts) - len(asked)} texts are cached"
        return Estimate(len(items), tokens, requests, max(limits, default=None), cost, note)

    def close(self) -> None:
        """Close connections and cache."""
        self._client.close()
        if self.kept is not None:
            self.kept.close()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what to ask for ---

    def _extras(
        self, layers: Sequence[int] | None, pooling: TargetPooling | None
    ) -> list[dict[str, str | int | bool]]:
        """Fields beyond OpenAI's, for each layer. Others' servers would ignore them, and their vectors would
        pass for what they are not."""
        if layers is None and pooling is None:
            return [{}]
        if pooling is not None and pooling.startswith("span"):
            raise EndpointError(
                f"a service gives one vector a text, so pooling {pooling!r} cannot be had: use a local model"
            )
        try:
            answer = self._client.get(f"{self.url}/models/{self.model}")
        except self._failed as error:
            raise EndpointError(f"{self.url} does not answer: {type(error).__name__}: {error}") from None
        if answer.status_code != 200 or "hadal" not in _object(answer):
            raise EndpointError(
                f"{self.url} is not a Hadal server: it gives the vectors that its model makes, and takes no "
                "layer and no pooling; leave both out, or use a local model"
            )
        pooled = {"pooling": pooling or "mean", "normalize": False}
        return [{**pooled, "layer": layer} for layer in (layers or (-1,))]

    def _column(
        self, items: Sequence[Item], extra: dict[str, str | int | bool], progress: Progress | None
    ) -> tuple[list[Floats], int]:
        """Vectors of all texts, and how many of them the cache had."""
        keys = [self._key(item.text, extra) for item in items]
        found = {key: v for key in keys if self.kept is not None and (v := self.kept.get(key)) is not None}
        cached = sum(key in found for key in keys)
        missing = {key: item.text for key, item in zip(keys, items, strict=True) if key not in found}
        order = sorted(missing, key=lambda key: (len(missing[key]), key))
        for begin in range(0, len(order), self.batch):
            batch = order[begin : begin + self.batch]
            for key, vector in zip(batch, self._ask([missing[k] for k in batch], extra), strict=True):
                found[key] = vector
            if self.kept is not None:
                self.kept.put({key: found[key] for key in batch})
            if progress is not None:
                progress(len(found), len(set(keys)))
        return [found[key] for key in keys], cached

    def _key(self, text: str, extra: dict[str, str | int | bool]) -> bytes:
        whole = [self.url, self.model, self.dimensions, sorted(extra.items()), text]
        return hashlib.sha256(json.dumps(whole).encode()).digest()

    # --- asking ---

    def _ask(self, texts: list[str], extra: dict[str, str | int | bool]) -> list[Floats]:
        """One request, tried until it is answered. Raises EndpointError."""
        body: dict[str, Any] = {"model": self.model, "input": texts, "encoding_format": "float", **extra}
        if self.dimensions is not None:
            body["dimensions"] = self.dimensions
        for attempt in range(self.retries + 1):
            self._keep_pace(sum(map(_tokens, texts)))
            try:
                answer = self._client.post(f"{self.url}/embeddings", json=body)
            except self._failed as error:
                if isinstance(error, self._unreachable) and not self._answered:
                    raise EndpointError(
                        f"nothing answers at {self.url} ({error}): check the address"
                    ) from None
                why, wait = f"{type(error).__name__}: {error}", None
            else:
                self._answered = True
                if answer.status_code == 200:
                    return self._vectors(answer, len(texts))
                if answer.status_code not in AGAIN:
                    raise EndpointError(self._refusal(answer))
                why, wait = f"{answer.status_code} {_message(answer)}", _retry_after(answer)
            if attempt < self.retries:
                doubling = min(2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
                self._sleep(doubling if wait is None else min(wait, LONGEST_WAIT))
        raise EndpointError(
            f"{self.url}/embeddings does not answer after {self.retries + 1} tries: {why}; what came is in "
            "the cache, if there is one: run again later"
        )

    def _keep_pace(self, tokens: int) -> None:
        """Wait until the limits allow another request of so many tokens."""
        now = self._clock()
        if self._next > now:
            self._sleep(self._next - now)
            now = self._clock()
        pause = 60 / self.requests_per_minute if self.requests_per_minute else 0.0
        if self.tokens_per_minute:
            pause = max(pause, 60 * tokens / self.tokens_per_minute)
        self._next = max(now, self._next) + pause

    def _refusal(self, answer: httpx.Response) -> str:
        status, said = answer.status_code, _message(answer)
        where = f"{self.url}/embeddings answers {status}" + (f" ({said})" if said else "")
        if status in ABSENT:
            hint = "DeepSeek's API has none; " if "deepseek.com" in self.url else ""
            return (
                f"{where}: this service has no embeddings, or no model {self.model!r} for them. {hint}"
                "Nothing was put in their place: use a local model, or a server that has them (`hadal serve`)"
            )
        if status in (401, 403):
            return f"{where}: the key is missing or wrong"
        return f"{where}: it refuses the request"

    def _vectors(self, answer: httpx.Response, number: int) -> list[Floats]:
        body = _object(answer)
        try:
            rows = sorted(body["data"], key=lambda row: int(row["index"]))
            vectors = [np.array(row["embedding"], np.float32) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise EndpointError(f"{self.url}/embeddings answers in another form ({error!r})") from error
        if len(vectors) != number or any(v.ndim != 1 or not v.size for v in vectors):
            raise EndpointError(f"{self.url} gave {len(vectors)} vectors for {number} texts, or empty ones")
        if not all(np.isfinite(v).all() for v in vectors):
            raise EndpointError(f"{self.url} gave numbers that are not finite")
        if isinstance(body.get("model"), str):
            self._reported.add(body["model"])
        return vectors


class Kept:
    """Vectors by key, in a file of SQLite; whole batches, so that what was stopped leaves no half."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._base = sqlite3.connect(path)
        try:
            with self._base:
                self._base.execute(
                    "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, made TEXT, value BLOB)"
                )
        except sqlite3.DatabaseError as error:
            self._base.close()
            raise EndpointError(f"{path} is no cache ({error}): name another file") from error

    def get(self, key: bytes) -> Floats | None:
        """The vector, or None."""
        with closing(self._base.execute("SELECT value FROM vectors WHERE key = ?", (key,))) as rows:
            row = rows.fetchone()
        return None if row is None else np.frombuffer(row[0], "<f4").astype(np.float32)

    def put(self, vectors: dict[bytes, Floats]) -> None:
        """Keep these."""
        made = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [(key, made, v.astype("<f4").tobytes()) for key, v in vectors.items()]
        with self._base:
            self._base.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self._base.close()


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS)


def _object(answer: httpx.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        body = None
    return body if isinstance(body, dict) else {}


def _message(answer: httpx.Response) -> str:
    """What the service says of an error, in one short line."""
    error = _object(answer).get("error")
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(said or "").split())[:200]


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds to wait, where the service says them."""
    try:
        return max(0.0, float(answer.headers.get("retry-after", "")))
    except ValueError:
        return None
