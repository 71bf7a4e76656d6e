"""Where vectors come from: a model run here, or a simulation. (A service over HTTP: endpoint.py.)

Every backend takes items and gives `Embeddings`, whose identity it alone issues. None stands in for another:
what a backend cannot do is an error.

    Local("hadal-mini").embed(items, layers=(0, 4, 8), pooling="span")
    Simulation(groups={"1": "mental", "2": "mental", "3": "space"}, effect=0.5, seed=1).embed(items)
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hadal.config.packing import resident_kind
from hadal.engine.loading import check_weights_fit, pick_device, pick_dtype
from hadal.model.transformer import Transformer
from hadal.probe.extract import MAX_TOKENS, ProbeError, Progress, Taken, batches, extract, layer_numbers
from hadal.probe.identity import Embeddings, Floats, issue, simulation
from hadal.probe.pooling import Encoded, Spans, TargetPooling, encode, joined, pool_weights, span_tokens
from hadal.text.tokenizer import Tokenizer
from hadal.weights import hub
from hadal.weights import load as load_weights
from hadal.weights.layout import read_config
from hadal.weights.manifest import folder_revision


@dataclass(frozen=True)
class Item:
    """A text with a name, and the characters [begin, end) of its target, in one or several pieces."""

    id: str
    text: str
    spans: Spans = ()


@dataclass(frozen=True)
class Estimate:
    """What a run will take: seconds None where nothing is known of the speed, cost None where nothing is
    charged or no price was given."""

    texts: int
    tokens: int
    requests: int
    seconds: float | None
    cost: float | None = None
    note: str = ""


class Backend(Protocol):
    """What all of them can do."""

    def embed(
        self,
        items: Sequence[Item],
        layers: Sequence[int] | None = None,
        pooling: TargetPooling | None = None,
        *,
        progress: Progress | None = None,
    ) -> Embeddings:
        """One vector an item and layer, in the items' order; None leaves a choice to the backend."""

    def estimate(self, items: Sequence[Item]) -> Estimate:
        """What `embed` of these will take."""


def check_items(items: Sequence[Item]) -> None:
    """Raises ProbeError for no items, empty texts, or ids that are there twice."""
    if not items:
        raise ProbeError("there are no texts")
    seen: set[str] = set()
    for item in items:
        if not item.text.strip():
            raise ProbeError(f"text {item.id!r} is empty")
        if item.id in seen:
            raise ProbeError(f"two texts have the id {item.id!r}; ids must differ")
        seen.add(item.id)


# --- a model run here ---


class Local:
    """A model on this machine: "hadal-mini", a preset's name, a repository in the cache, or a folder."""

    def __init__(
        self,
        model: str | Path = "hadal-mini",
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        random_weights: int | None = None,
        max_tokens: int = MAX_TOKENS,
        special: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """random_weights: a seed; the same network with weights that learned nothing, as a baseline.
        special: pool control tokens too. `progress` of loading. Raises as `Engine.load` does."""
        folder = hub.resolve(model)
        config = read_config(folder)
        where = pick_device(device)
        packing = resident_kind(config, quantize)
        kind = pick_dtype(config, where, dtype, packing)
        check_weights_fit(config, where, kind, packing)
        self.name = str(model) if not isinstance(model, Path) and hub.find_preset(str(model)) else folder.name
        self.details: dict[str, str] = {}
        if random_weights is None:
            self.model = load_weights(
                folder, dtype=kind, device=where, with_mtp=False, quantize=packing or "off", progress=progress
            )
            self.revision = folder_revision(folder)
            if packing is not None:
                self.details["quantized"] = packing
        else:
            self.model = Transformer(config, dtype=kind, device=where).init_weights(random_weights).eval()
            self.name, self.revision = f"{self.name} (random weights)", weights_revision(self.model)
            self.details["weights"] = f"random, seed {random_weights}"
        self.tokenizer = Tokenizer.load(folder)
        self.max_tokens, self.special = max_tokens, special

    @classmethod
    def of(cls, model: Transformer, tokenizer: Tokenizer, name: str, **options: Any) -> Local:
        """A model that is in memory already; its revision is the hash of its weights as they are now."""
        self = cls.__new__(cls)
        self.model, self.tokenizer, self.name, self.details = model, tokenizer, name, {}
        self.revision = weights_revision(model)
        self.max_tokens, self.special = options.pop("max_tokens", MAX_TOKENS), options.pop("special", False)
        if options:
            raise TypeError(f"Local.of does not take {', '.join(options)}")
        return self

    @property
    def num_layers(self) -> int:
        """The number of the last layer: 0 to this are there."""
        return self.model.config.num_hidden_layers

    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        """Token ids with offsets, BOS in front."""
        check_items(items)
        return [encode(self.tokenizer, item.text) for item in items]

    def embed(
        self,
        items: Sequence[Item],
        layers: Sequence[int] | None = None,
        pooling: TargetPooling | None = None,
        *,
        progress: Progress | None = None,
    ) -> Embeddings:
        """layers: default all. pooling: default mean; see pooling.py."""
        way = pooling or "mean"
        return self.embed_ways(items, layers, (way,), progress=progress)[way]

    def embed_ways(
        self,
        items: Sequence[Item],
        layers: Sequence[int] | None,
        poolings: Sequence[TargetPooling],
        *,
        progress: Progress | None = None,
    ) -> dict[TargetPooling, Embeddings]:
        """Several poolings of one pass."""
        encoded, chosen = self.encode(items), layer_numbers(self.num_layers, layers)
        weight = [
            [torch.from_numpy(pool_weights(e, item.spans, way, special=self.special)).to(self.model.device)
             for way in poolings]
            for e, item in zip(encoded, items, strict=True)
        ]  # fmt: skip
        shape = (len(items), len(chosen), self.model.config.hidden_size)
        found = {way: np.empty(shape, np.float32) for way in poolings}
        for number, taken in self._pass(encoded, chosen, progress):
            for way, weight_n in zip(poolings, weight[number], strict=True):
                found[way][number] = (weight_n @ taken.hidden_lnD).cpu().numpy()
        ids = [item.id for item in items]
        return {
            way: Embeddings(
                vectors, chosen, ids, self._identity(chosen, way),
                [joined(item.text, item.spans) for item in items] if way.startswith("span") else [],
            )
            for way, vectors in found.items()
        }  # fmt: skip

    def _pass(self, encoded: Sequence[Encoded], layers: Sequence[int], progress: Progress | None) -> Any:
        return extract(
            self.model, [e.ids for e in encoded], layers, max_tokens=self.max_tokens, progress=progress
        )

    def _identity(self, layers: Sequence[int], pooling: str) -> Any:
        dtype = str(self.model.dtype).removeprefix("torch.")
        pooling = f"{pooling}, with control tokens" if self.special else pooling
        return issue("local", model=self.name, revision=self.revision, dtype=dtype, layers=layers,
                     pooling=pooling, details=self.details)  # fmt: skip

    def clipped(self, items: Sequence[Item]) -> list[str]:
        """Ids of the items of which a target's token holds a neighbour's characters too."""
        pairs = zip(items, self.encode(items), strict=True)
        return [item.id for item, e in pairs if item.spans and span_tokens(e, item.spans)[1]]

    def watch(self, item: Item, layers: Sequence[int] | None = None, *, routing: bool | None = None,
              attention: Sequence[int] = ()) -> tuple[Encoded, Taken]:  # fmt: skip
        """Everything of one text, token by token; routing: default where the model has routers."""
        [encoded] = self.encode([item])
        routed = self.model.config.moe is not None if routing is None else routing
        [(_, taken)] = extract(self.model, [encoded.ids], layers, routing=routed, attention=attention)
        return encoded, taken

    def estimate(self, items: Sequence[Item]) -> Estimate:
        """Tokens exactly; seconds from running the stream of middle lengths, or all that there is."""
        encoded = self.encode(items)
        streams = batches([len(e.ids) for e in encoded], self.max_tokens)
        sample = [encoded[i] for i in streams[len(streams) // 2]]
        self._run(sample[:1])  # the first pass pays for more than itself
        begin = time.perf_counter()
        self._run(sample)
        rate = sum(len(e.ids) for e in sample) / (time.perf_counter() - begin)
        tokens = sum(len(e.ids) for e in encoded)
        note = f"measured: {rate:,.0f} tokens/s"
        return Estimate(len(items), tokens, len(streams), tokens / rate, note=note)

    def _run(self, encoded: Sequence[Encoded]) -> None:
        for _ in self._pass(encoded, (-1,), None):
            pass


def weights_revision(model: Transformer) -> str:
    """SHA-256 over names, shapes and bits of the weights in memory, packed ones included."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


# --- no model at all ---


class Simulation:
    """Made-up vectors with an effect of known size, to learn what a test can find and what it finds in
    nothing. Vectors are normal noise of variance 1 a dimension, different at each layer. On top:

    groups     id → label: each label has a centre, at a distance of `effect`·√d from 0: with effect e,
               e²/(1 + e²) of the variance of a dimension is between groups
    squares    (s1, s2, not_s1, not_s2), ids of semiotic squares: s1 and not_s2 lie on one side of a direction
               that all squares share, s2 and not_s1 on the other; the negated terms on the far side of a
               second one, so that a term and its contradictory are antipodes
    mixtures   id → {name: amount}: a sum of directions by name, of amounts scaled to a length of 1, at a
               distance of about `effect`·√d from 0

    effect 0 leaves the noise alone. `layers` of it carry the effect; default all. The result says that it is
    simulated, in its identity and in its numbers, and nothing that reads it lets that be changed.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        num_layers: int = 4,
        seed: int = 0,
        effect: float = 0.0,
        groups: Mapping[str, str] | None = None,
        squares: Sequence[tuple[str, str, str, str]] = (),
        mixtures: Mapping[str, Mapping[str, float]] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        if not (math.isfinite(effect) and effect >= 0):
            raise ProbeError(f"effect must be 0 or more, not {effect}")
        if width < 16:
            raise ProbeError(f"width must be 16 or more, not {width}: narrower vectors cannot be marked")
        self.width, self.num_layers, self.seed, self.effect = width, num_layers, seed, effect
        self.groups, self.squares, self.mixtures = dict(groups or {}), list(squares), dict(mixtures or {})
        self.where = layer_numbers(num_layers, layers)

    def embed(
        self,
        items: Sequence[Item],
        layers: Sequence[int] | None = None,
        pooling: TargetPooling | None = None,
        *,
        progress: Progress | None = None,
    ) -> Embeddings:
        """`pooling` changes nothing: texts are not read. A vector depends on seed, id and layer alone."""
        check_items(items)
        ids, chosen = [item.id for item in items], layer_numbers(self.num_layers, layers)
        vectors = np.stack([self._layer(ids, layer) for layer in chosen], 1)
        if progress is not None:
            progress(len(items), len(items))
        details = {"seed": str(self.seed), "planted effect": f"{self.effect:g}"}
        return simulation(vectors, chosen, ids, details)

    def _layer(self, ids: Sequence[str], layer: int) -> Floats:
        values = np.stack([self._draw("text", name, layer) for name in ids])
        if self.effect and layer in self.where:
            for row, name in enumerate(ids):
                if name in self.groups:
                    values[row] += self.effect * self._draw("group", self.groups[name], layer)
                if parts := self.mixtures.get(name):
                    length = math.hypot(*parts.values())
                    for part, amount in parts.items():
                        values[row] += self.effect * amount / length * self._draw("part", part, layer)
            place = {name: row for row, name in enumerate(ids)}
            axis, other = (self._draw("axis", kind, layer) for kind in ("contrary", "negation"))
            for corners in self.squares:
                for name, a, b in zip(corners, (1, -1, -1, 1), (1, 1, -1, -1), strict=True):
                    if name in place:
                        values[place[name]] += self.effect * (a * axis + b * other)
        return values.astype(np.float32)

    def _draw(self, kind: str, name: str, layer: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Standard normal [width] of this name."""
        key = hashlib.sha256(f"{self.seed}\0{kind}\0{name}\0{layer}".encode()).digest()
        return np.random.default_rng(list(key)).standard_normal(self.width)

    def estimate(self, items: Sequence[Item]) -> Estimate:
        """Nothing to speak of."""
        return Estimate(len(items), 0, 0, 0.0, note="simulated: no model runs")
