"""The mixture: how much of each source, which documents, in which order.

Weights are shares of the *tokens*. With w_s the share of source s and T_s its tokens, a set of T tokens needs
w_s·T ≤ max_epochs·T_s for every s; without a wish, T is the largest that does. Each source's documents come
in an order drawn from the seed, another one in each epoch; the mixture is shuffled over the whole set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hadal.data.recipe import Mixture
from hadal.data.strict import RecipeError
from hadal.data.words import Hashes, mixed

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """The documents of a part: tokens, bytes, a random number, and whether it is held out."""

    lengths: NDArray[np.uint32]
    bytes: NDArray[np.uint32]
    order: Hashes
    heldout: NDArray[np.uint8]


@dataclass(frozen=True)
class PlannedShard:
    """Rows `begin` to `end` of the plan."""

    name: str
    heldout: bool
    begin: int
    end: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """places: int32 [M, 2], (part, document of the part)."""

    places: NDArray[np.int32]
    shards: list[PlannedShard]
    sources: dict[str, dict[str, Any]]
    heldout: dict[str, dict[str, int]]


def hash_order(hashes: Hashes, chosen: Ints, salt: int = 0) -> Ints:
    """`chosen` in an order that its hashes decide; equal hashes keep theirs."""
    return chosen[np.argsort(mixed(hashes[chosen] + np.uint64(salt)), kind="stable")]


def budgets(tokens: dict[str, int], weights: dict[str, float], mixture: Mixture) -> dict[str, float]:
    """Tokens wanted of each source. Raises RecipeError where one has too few."""
    weighted = any(weights.values())
    whole = sum(weights.values()) if weighted else max(1, sum(tokens.values()))
    shares = {s: (weights[s] if weighted else tokens[s]) / whole for s in tokens}
    empty = [s for s in tokens if not tokens[s] and weighted]
    if empty:
        raise RecipeError(f"source {empty[0]!r} has a weight, but no document of it is left; see the report")
    limit = min((tokens[s] * mixture.max_epochs / shares[s] for s in tokens if shares[s]), default=0.0)
    if not weighted and not mixture.tokens:
        limit = float(sum(tokens.values()))
    if mixture.tokens > limit:
        short = min((s for s in tokens if shares[s]), key=lambda s: tokens[s] / shares[s], default="")
        raise RecipeError(
            f"mixture.tokens is {mixture.tokens:,}, but source {short!r} allows {int(limit):,} within "
            f"max_epochs {mixture.max_epochs:g}; ask for fewer, lower its weight, or raise mixture.max_epochs"
        )
    return {s: shares[s] * (mixture.tokens or limit) for s in tokens}


def make_plan(
    tables: Sequence[Table], source_of: Sequence[str], weights: dict[str, float], mixture: Mixture,
    per_shard: int,
) -> Plan:  # fmt: skip
    """The plan of a whole set. `source_of`: the source of each part."""
    part = np.repeat(np.arange(len(tables)), [len(t.lengths) for t in tables])
    at = np.concatenate([np.arange(len(t.lengths)) for t in tables])
    lengths = np.concatenate([t.lengths for t in tables]).astype(np.int64)
    sizes = np.concatenate([t.bytes for t in tables]).astype(np.int64)
    order = np.concatenate([t.order for t in tables]).astype(np.uint64)
    aside = np.concatenate([t.heldout for t in tables]).astype(bool)
    number = {name: i for i, name in enumerate(weights)}
    source = np.array([number[s] for s in source_of], dtype=np.int64)[part]
    have = {s: int(lengths[(source == i) & ~aside].sum()) for s, i in number.items()}
    wanted = budgets(have, weights, mixture)
    chosen: list[Ints] = []
    salts: list[Ints] = []
    facts: dict[str, dict[str, Any]] = {}
    for name, i in number.items():
        mine, epoch_of = _take(np.flatnonzero((source == i) & ~aside), lengths, order, wanted[name])
        chosen.append(mine)
        salts.append(epoch_of)
        facts[name] = {
            "available_tokens": have[name], "tokens": int(lengths[mine].sum()), "documents": len(mine),
            "bytes": int(sizes[mine].sum()), "wanted_tokens": round(wanted[name]),
        }  # fmt: skip
    train, salt = np.concatenate(chosen), np.concatenate(salts)
    train = train[np.argsort(mixed(mixed(order[train]) + salt.astype(np.uint64)), kind="stable")]
    shards = _cut("train", False, lengths[train], per_shard, 0)
    rows, held = [train], {}
    done = len(train)
    for name, i in number.items():
        mine = hash_order(order, np.flatnonzero((source == i) & aside))
        if len(mine):
            shards += _cut(f"heldout-{name}", True, lengths[mine], per_shard, done)
            held[name] = {
                "tokens": int(lengths[mine].sum()),
                "documents": len(mine),
                "bytes": int(sizes[mine].sum()),
            }
            rows.append(mine)
            done += len(mine)
    everything = np.concatenate(rows)
    places = np.stack([part[everything], at[everything]], axis=1).astype(np.int32)
    return Plan(places, shards, facts, held)


def _take(documents: Ints, lengths: Ints, order: Hashes, wanted: float) -> tuple[Ints, Ints]:
    """Documents of about `wanted` tokens in all, epoch after epoch, and the epoch of each."""
    taken: list[Ints] = []
    left, epoch = wanted, 0
    while left > 0.5 and len(documents):
        these = hash_order(order, documents, epoch)
        fit = int(np.searchsorted(np.cumsum(lengths[these]), left + 0.5, side="right"))
        if fit < len(these):
            these = these[: fit or (0 if taken else 1)]
            left = 0.0
        taken.append(these)
        left -= float(lengths[these].sum())
        epoch += 1
    epochs = [np.full(len(these), e, dtype=np.int64) for e, these in enumerate(taken)]
    nothing = np.empty(0, dtype=np.int64)
    return np.concatenate([*taken, nothing]), np.concatenate([*epochs, nothing])


def _cut(name: str, heldout: bool, lengths: Ints, per_shard: int, first: int) -> list[PlannedShard]:
    """Shards of whole documents: each ends with the document that fills it."""
    ends = np.cumsum(lengths)
    shards: list[PlannedShard] = []
    begin = 0
    while begin < len(lengths):
        before = int(ends[begin - 1]) if begin else 0
        end = min(len(lengths), int(np.searchsorted(ends, before + per_shard, side="left")) + 1)
        size = int(ends[end - 1]) - before
        shards.append(PlannedShard(f"{name}-{len(shards):05d}", heldout, first + begin, first + end, size))
        begin = end
    return shards
