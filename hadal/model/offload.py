"""Routed experts that do not lie where the model does: in host memory, or in the model's files on the disk.

A token needs K of E experts a layer, and some are asked for more often than others. So attention, shared
experts and gates stay on the model's device, with the hottest experts in what memory is left there
(`ExpertCache`); the others come when they are routed to. On a GPU, an expert that is not there multiplies few
rows where it lies, on the CPU: moving 17 MB (V2-Lite) over PCIe takes longer than reading them once. Many
rows are worth the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from hadal.ops.linear import linear
from hadal.ops.packed import Packed

ROWS_WORTH_A_COPY = 8  # rows of one expert from which it is copied to the GPU even if it does not stay there


@dataclass(frozen=True)
class Weights:
    """One expert: gate and up [I, D], down [D, I]."""

    gate: Tensor | Packed
    up: Tensor | Packed
    down: Tensor | Packed

    def __call__(self, x_TD: Tensor) -> Tensor:
        return linear(silu(linear(x_TD, self.gate)) * linear(x_TD, self.up), self.down)

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes

    @property
    def parts(self) -> tuple[Tensor | Packed, ...]:
        return self.gate, self.up, self.down

    def to(self, device: torch.device) -> Weights:
        """On `device`; the same object where it is there already."""
        if self.gate.device == device:
            return self
        return Weights(*(_moved(part, device) for part in self.parts))


def _moved(part: Tensor | Packed, device: torch.device) -> Tensor | Packed:
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    there = Packed(part.kind, part.shape, group=part.group, rows=part.rows, device="meta")
    there.codes, there.scale = (t.to(device, non_blocking=True) for t in part.plain())
    return there


class Source(Protocol):
    """Where the experts of all layers lie. `copies`: `get` makes something new, which is worth keeping, and
    gives no view of the file or memory."""

    copies: bool

    def get(self, layer: int, expert: int) -> Weights:
        """An expert on the host, in the model's dtype or packed."""


@dataclass
class OffloadStats:
    """Uses of experts since the start: from the cache, computed where they lie, brought in; and bytes."""

    hits: int = 0
    on_host: int = 0
    fetched: int = 0
    fetched_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of uses that found their expert on the device."""
        uses = self.hits + self.on_host + self.fetched
        return self.hits / uses if uses else 0.0


class ExpertCache:
    """The hottest experts of all layers on the model's device, at most `capacity` bytes.

    An expert's heat is how often it was used, halved for all every `cool_every` uses, so that old favourites
    make room. One that is asked for replaces the coldest if it is hotter.
    """

    def __init__(
        self, source: Source, device: torch.device, capacity: int, cool_every: int = 1 << 14
    ) -> None:
        self.source, self.device, self.cool_every = source, device, cool_every
        # what the host's memory holds already needs no second place in it
        self.capacity = capacity if device.type != "cpu" or source.copies else 0
        self.stats = OffloadStats()
        self.used_bytes = 0
        self._kept: dict[tuple[int, int], Weights] = {}
        self._heat: dict[tuple[int, int], float] = {}
        self._uses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def ffn(self, layer: int, expert: int, x_TD: Tensor) -> Tensor:
        """The expert's output for these rows, on their device."""
        key = (layer, expert)
        self._warm(key)
        kept = self._kept.get(key)
        if kept is not None:
            self.stats.hits += 1
            return kept(x_TD)
        weights = self.source.get(layer, expert)
        if self._make_room(key, weights.nbytes):
            return self._fetch(weights, key)(x_TD)
        few = x_TD.shape[0] < ROWS_WORTH_A_COPY and isinstance(weights.gate, Tensor)
        if self.device.type == "cpu" or few:
            self.stats.on_host += 1
            return weights(x_TD.cpu()).to(x_TD.device)
        return self._fetch(weights, None)(x_TD)

    def _fetch(self, weights: Weights, key: tuple[int, int] | None) -> Weights:
        """Bring an expert to the device, to stay under `key` or for this once."""
        there = weights.to(self.device)
        self.stats.fetched += 1
        self.stats.fetched_bytes += weights.nbytes
        if key is not None:
            self._kept[key] = there
            self.used_bytes += weights.nbytes
        return there

    def _warm(self, key: tuple[int, int]) -> None:
        self._heat[key] = self._heat.get(key, 0.0) + 1.0
        self._uses += 1
        if self._uses % self.cool_every == 0:
            self._heat = {k: heat / 2 for k, heat in self._heat.items()}

    def _make_room(self, key: tuple[int, int], nbytes: int) -> bool:
        """Whether the expert may stay; drops colder ones for it."""
        if nbytes > self.capacity:
            return False
        while self.used_bytes + nbytes > self.capacity:
            coldest = min(self._kept, key=lambda k: self._heat.get(k, 0.0))
            if self._heat.get(coldest, 0.0) >= self._heat[key]:
                return False
            self.used_bytes -= self._kept.pop(coldest).nbytes
        return True


class OffloadedExperts(nn.Module):
    """The routed experts of one layer, out of a cache that all layers share. For inference."""

    def __init__(self, layer: int, cache: ExpertCache) -> None:
        super().__init__()
        self.layer, self.cache = layer, cache

    def forward(
        self,
        x_TD: Tensor,
        expert_TK: Tensor,
        weight_TK: Tensor,
        shared: Callable[[Tensor], Tensor] | None,
        residual_TD: Tensor,
    ) -> Tensor:
        """Σ_k w_k · expert_k(x) + shared + residual; waits for the GPU to say which experts are wanted."""
        out_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        for expert, pairs in _by_expert(expert_TK).items():
            token, slot = torch.tensor(pairs, device=x_TD.device).unbind(1)
            y = self.cache.ffn(self.layer, expert, x_TD[token]).to(out_TD.dtype)
            out_TD.index_add_(0, token, y * weight_TK[token, slot].unsqueeze(-1).to(out_TD.dtype))
        out = out_TD.to(x_TD.dtype)
        out = out if shared is None else out + shared(x_TD)
        return residual_TD + out


def _by_expert(expert_TK: Tensor) -> dict[int, list[tuple[int, int]]]:
    """(token, slot) pairs of every expert that was chosen, in the experts' order."""
    found: dict[int, list[tuple[int, int]]] = {}
    for token, chosen in enumerate(expert_TK.tolist()):
        for slot, expert in enumerate(chosen):
            found.setdefault(expert, []).append((token, slot))
    return dict(sorted(found.items()))


class InMemory:
    """All experts in host memory, read once from another source; pinned where a GPU will copy them."""

    copies = False

    def __init__(
        self,
        source: Source,
        layers: list[int],
        experts: int,
        *,
        pin: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._kept: dict[tuple[int, int], Weights] = {}
        for n, layer in enumerate(layers):
            for expert in range(experts):
                self._kept[layer, expert] = _own(source.get(layer, expert), pin)
            if progress is not None:
                progress(n + 1, len(layers))

    def get(self, layer: int, expert: int) -> Weights:
        return self._kept[layer, expert]


def _own(found: Weights, pin: bool) -> Weights:
    parts = (p if isinstance(p, Packed) else p.pin_memory() if pin else p.clone() for p in found.parts)
    return Weights(*parts)
