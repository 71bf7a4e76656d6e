"""Who made a set of vectors. It travels with them, in memory and in files, and cannot be taken off.

An `Identity` is issued by what makes vectors (backends.py), never typed in. A simulation is marked twice:
its identity says so, and so do its numbers: the low byte of every float32 follows a fixed pattern, which
moves a value by less than 2⁻¹⁵ of itself. `Embeddings` refuses marked numbers under any other identity, so
a file whose label was rewritten does not open (a digest over label and data catches slips as well).

Legend: n texts, l layers, d width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hadal import __version__

Kind = Literal["local", "endpoint", "simulation", "given"]
Floats = NDArray[np.float32]
_SEAL = object()  # only this module issues identities
_MARK = np.frombuffer(
    b"".join(hashlib.sha256(b"hadal: simulated, not measured %d" % i).digest() for i in range(8)), np.uint8
).clip(1)  # never 0: the low bytes of numbers that were rounded to BF16 are


class IdentityError(ValueError):
    """Vectors and the identity that they are shown under do not belong together."""


@dataclass(frozen=True)
class Identity:
    """What made some vectors. backend: "local" (a model run here), "endpoint" (a service), "simulation" (no
    model at all) or "given" (a caller's array, for which nobody vouches). revision: a hash of the weights, or
    what is known instead. layers: numbers of hidden states (extract.py). steps: what was done to the vectors
    afterwards, in order. details: the backend's own settings, as text."""

    model: str
    revision: str
    backend: Kind
    dtype: str
    layers: tuple[int, ...]
    pooling: str
    hadal: str
    date: str
    steps: tuple[str, ...] = ()
    details: tuple[tuple[str, str], ...] = ()
    seal: InitVar[object] = None

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise IdentityError(
                "an identity is issued by the backend that makes the vectors, not set by hand: use Local, "
                "Endpoint or Simulate of hadal.probe.backends"
            )
        if self.backend not in get_args(Kind):
            raise IdentityError(
                f"no backend is called {self.backend!r}; there are {', '.join(get_args(Kind))}"
            )

    @property
    def is_simulation(self) -> bool:
        return self.backend == "simulation"

    def label(self) -> str:
        """One line for figures and reports."""
        layers = f"layer {_ranges(self.layers)}"
        detail = f" ({', '.join(f'{k} {v}' for k, v in self.details)})" if self.details else ""
        done = "".join(f" · {step}" for step in self.steps)
        if self.is_simulation:
            return f"SIMULATION, no model{detail} · {layers}{done}"
        revision = self.revision.partition(":")[0]  # "unknown: …" without its reason
        who = f"{self.model} @ {revision[:12]}"
        return f"{who} · {self.backend} · {self.dtype} · {layers} · {self.pooling}{detail}{done}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; `identity_of` reads it back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **values,
            "layers": list(self.layers),
            "steps": list(self.steps),
            "details": dict(self.details),
        }

    def _changed(self, **values: Any) -> Identity:
        return Identity(**{f.name: getattr(self, f.name) for f in fields(self)} | values, seal=_SEAL)


def _ranges(numbers: Sequence[int]) -> str:
    """0-4, 7: consecutive numbers joined."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def issue(
    backend: Literal["local", "endpoint"],
    *,
    model: str,
    revision: str,
    dtype: str,
    layers: Iterable[int],
    pooling: str,
    details: dict[str, str] | None = None,
) -> Identity:
    """For the backends: an identity of today's date and this version."""
    return _issue(backend, model, revision, dtype, layers, pooling, details)


def _issue(
    backend: Kind, model: str, revision: str, dtype: str, layers: Iterable[int], pooling: str,
    details: dict[str, str] | None,
) -> Identity:  # fmt: skip
    today = datetime.now(UTC).date().isoformat()
    return Identity(
        model, revision, backend, dtype, tuple(layers), pooling, __version__, today,
        details=tuple((details or {}).items()), seal=_SEAL,
    )  # fmt: skip


def identity_of(data: Any) -> Identity:
    """An identity read from a file. Raises IdentityError for data of another shape."""
    try:
        texts = {k: data[k] for k in ("model", "revision", "backend", "dtype", "pooling", "hadal", "date")}
        if not all(isinstance(v, str) for v in texts.values()):
            raise TypeError("a field is not text")
        return Identity(
            **texts,
            layers=tuple(int(n) for n in data["layers"]),
            steps=tuple(str(s) for s in data["steps"]),
            details=tuple((str(k), str(v)) for k, v in data["details"].items()),
            seal=_SEAL,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, IdentityError):
            raise
        raise IdentityError(f"the identity of these vectors cannot be read ({error})") from error


# --- the mark of a simulation ---


def marked(vectors: NDArray[Any]) -> Floats:
    """A copy in float32 whose low bytes follow the pattern."""
    bits = np.ascontiguousarray(vectors, np.float32).copy().view(np.uint32)
    pattern = np.resize(_MARK, bits.shape[-1]).astype(np.uint32)
    return ((bits & np.uint32(0xFFFFFF00)) | pattern).view(np.float32)


def is_marked(vectors: NDArray[Any]) -> bool:
    """Whether some vector carries the mark. By accident a byte agrees once in 256, so half of 16 never do;
    narrower vectors are judged together."""
    values = np.ascontiguousarray(vectors, np.float32)
    if values.size < 16:
        return False
    width = values.shape[-1]
    low = (values.view(np.uint32) & np.uint32(0xFF)).reshape(-1, width)
    share = (low == np.resize(_MARK, width)).mean(1)
    return bool(share.max() >= 0.5) if width >= 16 else bool(share.mean() >= 0.5)


# --- vectors with their identity ---


@dataclass(frozen=True, eq=False)
class Embeddings:
    """vectors[i, j]: text `ids[i]` at layer `layers[j]`, float32 [n, l, d], read-only. Raises IdentityError
    where a simulation's numbers come under another identity, ValueError for shapes that do not agree."""

    vectors: Floats
    layers: tuple[int, ...]
    ids: list[str]
    identity: Identity
    spans: list[str] = field(default_factory=list)
    """The pooled text of each, where spans were pooled; else empty."""

    def __post_init__(self) -> None:
        values = self.vectors
        if values.dtype != np.float32 or values.ndim != 3:
            raise ValueError(f"vectors are float32 [n, layers, d], not {values.dtype} {list(values.shape)}")
        if values.shape[:2] != (len(self.ids), len(self.layers)):
            raise ValueError(
                f"{len(self.ids)} ids and {len(self.layers)} layers, but vectors {list(values.shape)}"
            )
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"two texts have the id {_first_double(self.ids)!r}; ids must differ")
        if self.identity.layers != self.layers:
            raise IdentityError(f"the identity speaks of layers {self.identity.layers}, not {self.layers}")
        if self.spans and len(self.spans) != len(self.ids):
            raise ValueError(f"{len(self.ids)} ids, but {len(self.spans)} spans")
        if is_marked(values) != self.identity.is_simulation and values.size >= 16:
            raise IdentityError(
                "these vectors carry the mark of a simulation and are shown as "
                f"{self.identity.backend!r} of {self.identity.model!r}: they are no model's"
                if not self.identity.is_simulation
                else "these vectors are shown as a simulation and do not carry its mark: they were changed"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"vectors of {self.identity.model!r} hold numbers that are not finite")
        values.flags.writeable = False

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, layer: int) -> Floats:
        """[n, d] of one layer, by its number."""
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not extracted; there are {_ranges(self.layers)}")
        return self.vectors[:, self.layers.index(layer)]

    def select(self, ids: Sequence[str]) -> Embeddings:
        """The rows of these ids, in their order."""
        place = {name: i for i, name in enumerate(self.ids)}
        if missing := [name for name in ids if name not in place]:
            raise ValueError(f"no vector has the id {missing[0]!r}")
        rows = [place[name] for name in ids]
        spans = [self.spans[i] for i in rows] if self.spans else []
        return Embeddings(self.vectors[rows], self.layers, list(ids), self.identity, spans)

    def only(self, layers: Sequence[int]) -> Embeddings:
        """These layers alone."""
        picked = np.stack([self.at(layer) for layer in layers], 1)
        named = self.identity._changed(layers=tuple(layers))
        return Embeddings(picked, tuple(layers), self.ids, named, self.spans)

    def derived(self, vectors: NDArray[Any], step: str) -> Embeddings:
        """The same texts and layers after `step`, of the same shape but for the width. The identity stays,
        and a simulation stays marked."""
        values = np.array(vectors, np.float32)
        values = marked(values) if self.identity.is_simulation else values
        identity = self.identity._changed(steps=(*self.identity.steps, step))
        return Embeddings(values, self.layers, self.ids, identity, self.spans)

    def digest(self) -> str:
        """SHA-256 over identity, ids, layers, shape and numbers."""
        head = {"identity": self.identity.to_json(), "ids": self.ids, "shape": list(self.vectors.shape)}
        head |= {"spans": self.spans}
        text = json.dumps(head, sort_keys=True, ensure_ascii=True).encode()
        return hashlib.sha256(text + self.vectors.astype("<f4").tobytes()).hexdigest()


def _first_double(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def simulation(
    vectors: NDArray[Any], layers: Sequence[int], ids: Sequence[str], details: dict[str, str]
) -> Embeddings:
    """Made-up vectors [n, l, d], marked."""
    identity = _issue("simulation", "no model", "none", "float32", layers, "none", details)
    return Embeddings(marked(np.asarray(vectors)), tuple(layers), list(ids), identity)


def given(vectors: NDArray[Any], layers: Sequence[int], ids: Sequence[str], source: str) -> Embeddings:
    """A caller's own array [n, l, d], named by where it is from: for baselines and vectors of other tools.
    It never passes for a model's."""
    identity = _issue("given", source, "unknown", str(vectors.dtype), layers, "unknown", None)
    return Embeddings(np.array(vectors, np.float32), tuple(layers), list(ids), identity)
