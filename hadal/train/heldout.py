"""Held-out loss in the loop, by domain, and how many documents the model could write without a fault.

    bits per byte = Σ w·nll / ln 2 / Σ w·bytes(token)     over the predicted tokens that are text

Control tokens (`<think>`, the end of a sentence, …) stand for no bytes and count in neither sum. Losses in
nats a token depend on the tokenizer; bits per byte do not.

`exact` is the share of documents of which *every* token that counts in full (none of a prompt, whatever
`data.prompt_weight`) has probability above one half: greedy decoding then reproduces such a document letter
by letter from its prompt. For worked puzzles it is a lower bound of the accuracy. The forward pass is the one
that training uses, gradients enabled and not taken, so that the numbers are comparable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from hadal.data.stream import PackedRows, Rows
from hadal.model.transformer import Transformer
from hadal.ops.recompute import recompute
from hadal.train.batches import Floats, Ints, MicroBatch, Source, build
from hadal.train.domains import Domains
from hadal.train.losses import cross_entropies

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """The main model on one domain: nats per counted token, bits per byte (None without bytes)."""

    loss: float
    bits_per_byte: float | None
    exact: float
    documents: int
    tokens: int


@dataclass(frozen=True)
class Heldout:
    """Losses in nats per counted token. `documents`: how many `exact` is a share of. `domains`: by name;
    those without a counted token are left out."""

    loss: float
    mtp_loss: float
    exact: float
    documents: int
    tokens: int
    bits_per_byte: float | None = None
    domains: Mapping[str, Score] = field(default_factory=dict)


@dataclass
class _Sums:
    """What is summed over rows, by domain (the last entry: documents of none)."""

    nats_N: Doubles
    weight_N: Doubles
    text_nats_N: Doubles
    bytes_N: Doubles
    right_N: Ints
    documents_N: Ints

    @classmethod
    def zero(cls, count: int) -> _Sums:
        return cls(*(np.zeros(count, dtype=d) for d in 4 * [np.float64] + 2 * [np.int64]))  # type: ignore[arg-type]

    def add(self, nll_T: Floats, micro: MicroBatch, rows: Rows, number_L: Ints, bytes_V: Ints | None) -> None:
        """Take in a micro-batch whose documents, in the order of `rows.lengths`, are of domains
        `number_L`."""
        count = len(self.nats_N)
        weight_T = micro.weight_KT[0].double().numpy()
        predicted_T = np.roll(np.repeat(np.arange(len(rows.lengths)), rows.lengths), -1)
        domain_T = number_L[predicted_T]  # of the token that position i predicts, i + 1
        cost_T = nll_T.astype(np.float64) * weight_T

        def total(value_T: Doubles) -> Doubles:
            return cast(Doubles, np.bincount(domain_T, weights=value_T, minlength=count))

        self.nats_N += total(cost_T)
        self.weight_N += total(weight_T)
        if bytes_V is not None:
            bytes_T = bytes_V[micro.target_KT[0].numpy()]
            self.text_nats_N += total(cost_T * (bytes_T > 0))
            self.bytes_N += total(weight_T * bytes_T)
        counted, right = _exact(nll_T, weight_T, predicted_T, len(rows.lengths))
        self.documents_N += np.bincount(number_L[counted], minlength=count)
        self.right_N += np.bincount(number_L[right], minlength=count)

    def score(self, which: int | slice = slice(None)) -> Score:
        """The score of one domain, or of all."""
        nats, weight, text, size, right, documents = (
            value[which].sum().item()
            for value in (self.nats_N, self.weight_N, self.text_nats_N, self.bytes_N, self.right_N,
                          self.documents_N)
        )  # fmt: skip
        bits = text / math.log(2) / size if size else None
        return Score(nats / max(1, weight), bits, right / max(1, documents), int(documents), int(weight))


def evaluate(
    model: Transformer,
    source: Source,
    *,
    rows: int,
    micro_rows: int,
    mask_documents: bool,
    recomputed: Sequence[str] = (),
    domains: Domains | None = None,
    bytes_V: Ints | None = None,
) -> Heldout:
    """Evaluate on a held-out source (waits for the device): on the rows that `domains` names, or on the first
    `rows`. `bytes_V`: bytes of each token id, 0 for control tokens. `recomputed` as in training, so that it
    needs no more memory."""
    depths = len(model.mtp)
    names = domains.names if domains is not None else ()
    sums, mtp_K, weight_K = _Sums.zero(len(names) + 1), np.zeros(depths), np.zeros(depths)
    for start, count in _pieces(domains.stretches if domains is not None else ((0, rows),), micro_rows):
        packed = source.rows(start, count)
        micro = build(packed, depths=depths, mask_documents=mask_documents)
        with torch.enable_grad(), recompute(recomputed):  # the kernels of training, not those of inference
            on_device = micro.to(model.device)
            nll_K = cross_entropies(model, on_device, on_device.context())
        nll_KT = torch.stack(nll_K).detach().cpu()
        number_L = np.full(len(packed.lengths), len(names))
        if domains is not None and names:
            assert isinstance(source, PackedRows)
            number_L = domains.of(source.first_document(start), packed)
            number_L[number_L < 0] = len(names)
        sums.add(nll_KT[0].numpy(), micro, packed, number_L, bytes_V)
        mtp_K += (nll_KT * micro.weight_KT).sum(1, dtype=torch.float64).numpy()[1:]
        weight_K += micro.weight_KT.sum(1, dtype=torch.float64).numpy()[1:]
    everything = sums.score()
    scores = {name: score for i, name in enumerate(names) if (score := sums.score(slice(i, i + 1))).tokens}
    return Heldout(
        loss=everything.loss,
        mtp_loss=float((mtp_K / np.maximum(weight_K, 1)).mean()) if depths else 0.0,
        exact=everything.exact,
        documents=everything.documents,
        tokens=everything.tokens,
        bits_per_byte=everything.bits_per_byte,
        domains=scores,
    )


def _pieces(stretches: Sequence[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each forward pass."""
    for first, end in stretches:
        for start in range(first, end, most):
            yield start, min(most, end - start)


def _exact(nll_T: Floats, weight_T: Doubles, predicted_T: Ints, documents: int) -> tuple[Ints, Ints]:
    """(documents with a token that counts in full, those of them without a fault)."""
    full_T = weight_T >= 1
    counts = np.bincount(predicted_T[full_T], minlength=documents) > 0
    faulty = np.bincount(predicted_T[full_T & (nll_T >= math.log(2))], minlength=documents) > 0
    return np.flatnonzero(counts), np.flatnonzero(counts & ~faulty)
