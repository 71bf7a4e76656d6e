"""Rejection sampling on its own: the token that comes out is distributed as the target, whoever drafts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hadal.ops.sampling import FAILED, Filters, choose, filtered_probabilities, probabilities
from hadal.ops.speculative import NO_DRAFT, NO_TOKEN, matched, rejection, settle

N, VOCAB = 40_000, 7


def numbers(generator: torch.Generator, count: int) -> list[Tensor]:
    return [torch.rand(N, dtype=torch.float64, generator=generator) for _ in range(count)]


def emitted(p_V: Tensor, q_V: Tensor | None, draft_N: Tensor, u: list[Tensor]) -> tuple[Tensor, float]:
    """Frequencies of what stands at the draft's place, and the share of drafts that were accepted."""
    p, q = p_V.expand(N, -1), None if q_V is None else q_V.expand(N, -1)
    accepted, token = rejection(p, q, draft_N, u[0], u[1])
    out = torch.where(accepted, draft_N, token)
    return torch.bincount(out, minlength=VOCAB) / N, accepted.double().mean().item()


@pytest.mark.parametrize("seed", range(4))
def test_the_token_has_the_targets_distribution(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p_V, q_V = (torch.rand(VOCAB, generator=generator) ** 3 for _ in range(2))
    p_V[seed % VOCAB] = 0.0  # tokens that one of them never says
    q_V[(seed + 2) % VOCAB] = 0.0
    p_V, q_V = p_V / p_V.sum(), q_V / q_V.sum()
    *u, drawn = numbers(generator, 3)
    share_V, rate = emitted(p_V, q_V, choose(q_V.expand(N, -1), drawn), u)
    assert ((share_V - p_V).abs() < 5 * (p_V * (1 - p_V) / N).sqrt() + 1e-9).all()
    assert abs(rate - torch.minimum(p_V, q_V).sum().item()) < 0.012, "Leviathan et al., theorem 3.5"
    draft_N = torch.randint(VOCAB, (N,), generator=generator)
    accepted = [emitted(p_V, None, torch.full((N,), token), u) for token in range(VOCAB)]
    for token, (share_V, rate) in enumerate(accepted):
        assert ((share_V - p_V).abs() < 5 * (p_V * (1 - p_V) / N).sqrt() + 1e-9).all()
        assert abs(rate - p_V[token]) < 0.012
    assert ((emitted(p_V, None, draft_N, u)[0] - p_V).abs() < 0.012).all()


def test_one_number_for_both_would_be_wrong() -> None:
    """The two uniform numbers must be independent; this shows that the test above would see it."""
    generator = torch.Generator().manual_seed(0)
    p_V = torch.tensor([0.3, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1])
    u, drawn = numbers(generator, 2)
    share_V, _ = emitted(p_V, None, choose(p_V.flip(0).expand(N, -1), drawn), [u, u])
    assert (share_V - p_V).abs().max() > 0.02


def test_rows_without_drafts_equal_distributions_and_faults() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0]] * 5)
    q = p.clone()
    p[4] = float("nan")
    draft = torch.tensor([NO_DRAFT, 0, 1, 3, 0])
    u = torch.full((5,), 0.999999, dtype=torch.float64)
    accepted, token = rejection(p, q, draft, u, torch.full_like(u, 0.1))
    assert accepted.tolist() == [False, True, True, False, False], "equal: always; impossible or NaN: never"
    assert token.tolist() == [0, 0, 0, 0, FAILED]
    assert matched(torch.tensor([1, 2, FAILED]), torch.tensor([1, 3, NO_DRAFT])).tolist() == [
        True,
        False,
        False,
    ]


def test_settle_ends_at_the_first_rejection() -> None:
    draft = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, NO_DRAFT, NO_DRAFT], [NO_DRAFT] * 3])
    accepted = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    token = torch.tensor([[1, 2, 3, 4]] * 5)
    new, number = settle(draft, accepted, token)
    x = NO_TOKEN
    assert new.tolist() == [[5, 6, 7, 4], [5, 2, x, x], [1, x, x, x], [5, 2, x, x], [1, x, x, x]]
    assert number.tolist() == [3, 1, 0, 1, 0]
    empty, none = settle(draft[:, :0], accepted[:, :0], token[:, :1])
    assert empty.tolist() == [[1]] * 5 and none.tolist() == [0] * 5


def test_probabilities_are_what_sample_draws_from() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 300, generator=generator) * 4
    filters = Filters.build(
        [0.5 + i / 20 for i in range(40)], [i % 3 * 10 for i in range(40)],
        [1.0 - i % 4 * 0.1 for i in range(40)], [i % 5 * 0.01 for i in range(40)], "cpu",
    )  # fmt: skip
    p = probabilities(logits, filters)
    want = filtered_probabilities(logits.double(), filters)
    torch.testing.assert_close(p, want / want.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert logits.isfinite().all(), "the logits are left alone"
    logits[3, 5] = float("nan")
    logits[4] = float("-inf")
    spoilt = probabilities(logits, filters)
    assert spoilt[3:5].isnan().any(-1).all() and spoilt[5:].isfinite().all()
