"""Verification of drafted tokens: how many are accepted, and which token follows them.

For one draft x that was drawn from q where the target's distribution is p (Leviathan et al. 2023,
arXiv:2211.17192, theorem 1; Chen et al. 2023, arXiv:2302.01318):

    accept x with probability min(1, p(x) / q(x)); else draw from  max(p − q, 0) / Σ max(p − q, 0)

Drafts stand or fall in order: the first that is rejected ends the chain, and its replacement is the last new
token. Where all are accepted, one more token comes from p at the place after them. Every token is then
distributed as p says, whatever q is. A draft that was not drawn (n-gram lookup) has q(x) = 1.

A *matched* row, of a greedy or seeded request, takes the token that would have been drawn without drafts and
accepts a draft that equals it: the output is the same token by token, with or without drafts.

Legend: R rows of logits, S sequences, K most drafts of a sequence, J = K + 1, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hadal.ops.sampling import FAILED, choose

NO_DRAFT = -2  # in place of a draft; differs from FAILED
NO_TOKEN = -3  # after the last new token of a sequence


def matched(token_R: Tensor, draft_R: Tensor) -> Tensor:
    """Which drafts equal the token that was drawn without them, bool [R]."""
    return (token_R == draft_R) & (draft_R >= 0)


def rejection(
    p_RV: Tensor, q_RV: Tensor | None, draft_R: Tensor, accept_R: Tensor, draw_R: Tensor
) -> tuple[Tensor, Tensor]:
    """(accepted bool [R], the token if the chain ends here int64 [R]).

    p, q: probabilities that sum to 1; q None: drafts were not drawn. draft: NO_DRAFT where there is none,
    and the token comes from p. accept, draw: independent uniform numbers, float64 [R]. A row of NaN yields
    FAILED.
    """
    given_R = draft_R >= 0
    draft_R1 = draft_R.clamp(min=0).unsqueeze(1)
    p_R = p_RV.gather(1, draft_R1).squeeze(1).double()
    if q_RV is None:
        accepted_R = given_R & (accept_R < p_R)
        rest_RV = p_RV.scatter(1, draft_R1, 0.0)
    else:
        q_R = q_RV.gather(1, draft_R1).squeeze(1).double()
        accepted_R = given_R & (accept_R * q_R < p_R)
        rest_RV = (p_RV - q_RV).clamp_(min=0.0)
    # nothing is left where p = q to rounding; such a draft is hardly ever rejected, and p is right then
    usable_R1 = given_R.unsqueeze(1) & (rest_RV.sum(-1, keepdim=True) > 0)
    token_R = choose(torch.where(usable_R1, rest_RV, p_RV), draw_R)
    return accepted_R, token_R.where(p_RV.sum(-1).isfinite(), FAILED)


def settle(draft_SK: Tensor, accepted_SK: Tensor, token_SJ: Tensor) -> tuple[Tensor, Tensor]:
    """(new tokens [S, J], accepted drafts [S]): each sequence's accepted drafts, the token where its chain
    ended, and NO_TOKEN behind. token_SJ: the token if the chain ends at that place."""
    number_S = accepted_SK.long().cumprod(1).sum(1)
    place_J = torch.arange(token_SJ.shape[1], device=token_SJ.device)
    pad_S1 = draft_SK.new_full((draft_SK.shape[0], 1), NO_DRAFT)
    number_S1 = number_S.unsqueeze(1)
    new_SJ = torch.where(place_J < number_S1, torch.cat([draft_SK, pad_S1], 1), token_SJ)
    return new_SJ.masked_fill_(place_J > number_S1, NO_TOKEN), number_S
