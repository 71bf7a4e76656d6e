"""Held-out loss in the loop, and how many documents the model could write without a fault.

`exact` is the share of documents of which *every* counted token has probability above one half: greedy
decoding then reproduces such a document letter by letter from its prompt. For worked puzzles it is a lower
bound of the accuracy. The forward pass is the one that training uses, gradients enabled and not taken, so
that the numbers are comparable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hadal.data.stream import Rows
from hadal.model.transformer import Transformer
from hadal.ops.recompute import recompute
from hadal.train.batches import Floats, Source, build
from hadal.train.losses import cross_entropies


@dataclass(frozen=True)
class Heldout:
    """Losses in nats per counted token. `documents`: how many `exact` is a share of."""

    loss: float
    mtp_loss: float
    exact: float
    documents: int
    tokens: int


def evaluate(
    model: Transformer,
    source: Source,
    *,
    rows: int,
    micro_rows: int,
    mask_documents: bool,
    recomputed: Sequence[str] = (),
) -> Heldout:
    """Evaluate on the first `rows` rows of a held-out source (waits for the device). `recomputed` as in
    training, so that it needs no more memory."""
    depths = len(model.mtp)
    sums_K = torch.zeros(depths + 1, dtype=torch.float64)
    weights_K = torch.zeros(depths + 1, dtype=torch.float64)
    right = documents = 0
    for start in range(0, rows, micro_rows):
        packed = source.rows(start, min(micro_rows, rows - start))
        micro = build(packed, depths=depths, mask_documents=mask_documents)
        with torch.enable_grad(), recompute(recomputed):  # the kernels of training, not those of inference
            on_device = micro.to(model.device)
            nll_K = cross_entropies(model, on_device, on_device.context())
        nll_KT = torch.stack(nll_K).detach().cpu()
        sums_K += (nll_KT * micro.weight_KT).sum(1, dtype=torch.float64)
        weights_K += micro.weight_KT.sum(1, dtype=torch.float64)
        faultless, counted = _exact(nll_KT[0].numpy(), micro.weight_KT[0].numpy(), packed)
        right, documents = right + faultless, documents + counted
    mean_K = (sums_K / weights_K.clamp(min=1)).tolist()
    return Heldout(
        loss=mean_K[0],
        mtp_loss=sum(mean_K[1:]) / max(1, depths),
        exact=right / max(1, documents),
        documents=documents,
        tokens=int(weights_K[0].item()),
    )


def _exact(nll_T: Floats, weight_T: Floats, rows: Rows) -> tuple[int, int]:
    """(documents without a fault, documents with a counted token)."""
    document_T = np.repeat(np.arange(len(rows.lengths)), rows.lengths)
    predicted_T = np.roll(document_T, -1)  # position i predicts token i + 1
    counts = np.bincount(predicted_T[weight_T > 0], minlength=len(rows.lengths)) > 0
    faulty = (
        np.bincount(predicted_T[(weight_T > 0) & (nll_T >= math.log(2))], minlength=len(rows.lengths)) > 0
    )
    return int((counts & ~faulty).sum()), int(counts.sum())
