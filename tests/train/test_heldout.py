"""Held-out losses and exact documents, against a literal computation."""

import math

import numpy as np
import pytest
import torch

from hadal.model.context import Context
from hadal.train.batches import Rows
from hadal.train.heldout import evaluate
from tests.train import tiny


def test_losses_are_means_over_all_counted_tokens():
    network = tiny.model()
    source = tiny.RandomRows()
    held = evaluate(network, source, rows=5, micro_rows=2, mask_documents=True)
    packed = source.rows(0, 5)
    token_T, weight_T = packed.token_RC.flatten(), packed.weight_RC.flatten()
    total = count = start = 0
    for length, padding in zip(packed.lengths, packed.padding, strict=True):
        token = torch.from_numpy(token_T[start : start + length])
        logprob = network.logits(network(token, Context.packed([length]))).log_softmax(-1)
        for i in range(0 if padding else length - 1):
            weight = weight_T[start + i + 1]
            total -= weight * logprob[i, token[i + 1]].item()
            count += weight
        start += length
    assert held.loss == pytest.approx(total / count, abs=1e-5)
    assert held.tokens == count
    assert held.mtp_loss == pytest.approx(math.log(tiny.VOCAB), abs=0.3)
    assert held.documents == sum(not p for p in packed.padding)
    assert held.exact == 0.0


@pytest.mark.parametrize("mask_documents", [True, False])
def test_exact_counts_documents_whose_every_counted_token_is_likely(mask_documents, monkeypatch):
    """Three documents: faultless; one unlikely token; the only unlikely token is in the prompt."""
    rows = Rows(
        token_RC=np.arange(12)[None],
        weight_RC=np.array([[0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1]], dtype=np.float32),
        lengths=[4, 4, 4],
        padding=[False] * 3,
    )
    nll_T = torch.full((12,), 0.1)
    nll_T[5] = 0.7  # predicts token 6, of the second document; ln 2 = 0.69
    nll_T[8] = 5.0  # predicts token 9, a prompt
    nll_T[7] = 5.0  # predicts the first token of the third document, which is not counted

    class Source:
        def rows(self, start, count):
            return rows

    network = tiny.model(mtp=0)
    monkeypatch.setattr("hadal.train.heldout.cross_entropies", lambda model, micro, context: [nll_T])
    held = evaluate(network, Source(), rows=1, micro_rows=1, mask_documents=mask_documents)
    assert (held.exact, held.documents) == (2 / 3, 3)


def test_evaluation_leaves_no_gradient_behind():
    network = tiny.model()
    evaluate(network, tiny.RandomRows(), rows=2, micro_rows=2, mask_documents=True)
    assert all(p.grad is None for p in network.parameters())
