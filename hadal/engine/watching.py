"""Watching a running engine's model: the states of texts at many layers and what the routers chose, by the
extraction of studies (extract.py), on the weights that are served.

A pass of its own, without the cache, in the engine's thread between two steps; bounded, since others wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from hadal.engine.extract import Taken, batches, extract, layer_numbers
from hadal.engine.pooling import Pooling
from hadal.engine.request import PoolingParams
from hadal.ops.exact import exact as exact_operations

if TYPE_CHECKING:
    from hadal.engine.engine import Engine

STREAM_TOKENS = 1024  # of a pass: others wait as long as for a long prompt's step
STREAM_BYTES = 1 << 28  # of the states that one pass keeps on the device


@dataclass(frozen=True)
class Wish:
    """What to take. layers: as in extract.py, None for all. pooling None: the state of every token."""

    layers: tuple[int, ...] | None = None
    pooling: Pooling | None = "mean"
    special: bool = False
    routing: bool = False


@dataclass(frozen=True)
class Watched:
    """Of one text. states: FP32 [l, D], or [l, n, D] without pooling. experts and scores (the router's,
    before the balancing bias): by MoE block, [n, K], the highest score first."""

    states: NDArray[np.float32]
    experts: dict[int, list[list[int]]] = field(default_factory=dict)
    scores: dict[int, list[list[float]]] = field(default_factory=dict)


def streams(engine: Engine, prompts: Sequence[Sequence[int]], wish: Wish) -> list[list[int]]:
    """Numbers of the texts in passes of bounded size."""
    config = engine.config
    layers = len(layer_numbers(config.num_hidden_layers, wish.layers))
    fitting = STREAM_BYTES // (layers * config.hidden_size * engine.dtype.itemsize)
    return batches([len(ids) for ids in prompts], max(1, min(STREAM_TOKENS, fitting)))


def watch(engine: Engine, prompts: Sequence[Sequence[int]], wish: Wish) -> Iterator[tuple[int, Watched]]:
    """(number, what was taken) of every text. Raises ProbeError as `extract` does."""
    longest = max(map(len, prompts), default=1)
    with exact_operations(engine.exact):
        for number, taken in extract(
            engine.model, prompts, wish.layers, routing=wish.routing, max_tokens=max(longest, STREAM_TOKENS)
        ):
            yield number, _watched(engine, prompts[number], taken, wish)


def _watched(engine: Engine, ids: Sequence[int], taken: Taken, wish: Wish) -> Watched:
    states_lnD = taken.hidden_lnD
    if wish.pooling is not None:
        weight_n = engine._pool_weights(ids, PoolingParams(wish.pooling, special=wish.special))
        states_lnD = torch.from_numpy(weight_n).to(states_lnD.device) @ states_lnD
    found = Watched(states_lnD.cpu().numpy())
    for block, expert_nK in taken.experts.items():
        score_nK, order_nK = taken.scores[block].gather(1, expert_nK).sort(descending=True)
        found.experts[block] = expert_nK.gather(1, order_nK).tolist()
        found.scores[block] = score_nK.tolist()
    return found
