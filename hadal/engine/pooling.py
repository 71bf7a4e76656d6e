"""From the hidden states of a text's tokens to one vector: a weight for each token, Σ = 1.

    mean      every token the same
    weighted  the j-th token in proportion to j, counted from 1 (SGPT, arXiv 2202.08904): in a causal model
              later tokens have seen more
    last      the last token alone
Control tokens (BOS, turn markers) get no weight unless asked for: BOS in particular draws attention that
has no other place to go, and its state is many times as long as a word's. There is no padding to leave out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Pooling = Literal["mean", "last", "weighted"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def pooled(ids: Sequence[int], special: Collection[int]) -> list[int]:
    """Positions of the tokens that are not `special`; all of them where nothing else is left."""
    return [i for i, token in enumerate(ids) if token not in special] or list(range(len(ids)))


def weights(length: int, positions: Sequence[int], pooling: Pooling) -> NDArray[np.float32]:
    """Weights [length] of a text's tokens, of which those at `positions` (ascending) are pooled."""
    weight = np.zeros(length)
    if pooling == "last":
        weight[positions[-1]] = 1.0
    elif pooling == "weighted":
        weight[list(positions)] = np.arange(1, len(positions) + 1)
    else:
        weight[list(positions)] = 1.0
    return (weight / weight.sum()).astype(np.float32)
