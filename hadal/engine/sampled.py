"""What sampling gives: tokens by request, log-probabilities on their way to the host, and as a caller has
them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hadal.engine.request import Request
from hadal.engine.updates import TokenLogprob

Found = tuple[float, Sequence[float], Sequence[int]]
"""A token's log-probability; values and ids of the likeliest."""


@dataclass
class Sampled:
    """Tokens in the order of the requests. A token of FAILED (−1) has its reason in `errors` by row.

    `counts`: new tokens of each request, where some have several; None: one each.
    """

    tokens: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    errors: dict[int, str] = field(default_factory=dict)
    counts: list[int] | None = None

    def by_request(self) -> Iterator[tuple[list[int], Sequence[TokenLogprob | None]]]:
        """Each request's new tokens and their log-probabilities, in order."""
        if self.counts is None:
            one = self.logprobs or [None] * len(self.tokens)
            yield from (([token], [logprob]) for token, logprob in zip(self.tokens, one, strict=True))
            return
        begin = 0
        for count in self.counts:
            end = begin + count
            logprobs = self.logprobs[begin:end] if self.logprobs else [None] * count
            yield self.tokens[begin:end], logprobs
            begin = end


@dataclass
class Logprobs:
    """Log-probabilities of some rows, first on the device: of their tokens, and the likeliest with their
    ids."""

    rows: list[int]
    value_B: Tensor
    top_Bn: Tensor
    id_Bn: Tensor

    def to_host(self) -> None:
        """Start their copies; who reads them waits for an event of the stream first."""

        def copy(x: Tensor) -> Tensor:
            return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.numel() > 0).copy_(x, non_blocking=True)

        self.value_B, self.top_Bn, self.id_Bn = copy(self.value_B), copy(self.top_Bn), copy(self.id_Bn)


def by_row(found: list[Logprobs]) -> dict[int, Found]:
    """Log-probabilities on the host, by row of the batch."""
    known: dict[int, Found] = {}
    for one in found:
        if not one.top_Bn.shape[1]:  # the usual case of a trainer: no lists for nothing
            known |= {row: (value, (), ()) for row, value in zip(one.rows, one.value_B.tolist(), strict=True)}
            continue
        columns = (tensor.tolist() for tensor in (one.value_B, one.top_Bn, one.id_Bn))
        known |= dict(zip(one.rows, zip(*columns, strict=True), strict=True))
    return known


def entry_of(request: Request, token: int, found: Found | None) -> TokenLogprob | None:
    """As the request asked for it; None where nothing was found."""
    if found is None:
        return None
    value, top_values, top_ids = found
    n = request.params.logprobs or 0
    if not n:
        return TokenLogprob(token, value)
    return TokenLogprob(token, value, list(zip(top_ids[:n], top_values[:n], strict=True)))
