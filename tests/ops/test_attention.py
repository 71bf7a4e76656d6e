"""Attention of many sequences on a CPU: batches of similar lengths against one at a time in FP64."""

from __future__ import annotations

import pytest
import torch

from hadal.ops import attention as ops

LENGTHS = (5, 1, 7, 70, 4, 0, 4, 6, 64, 7, 5, 5, 40, 4, 63, 33, 6, 5, 4, 4)


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 24), (6, 2, 16), (1, 1, 10)])
def test_sequences_of_many_lengths_and_their_gradients(heads: int, groups: int, width: int) -> None:
    torch.manual_seed(3)
    tokens = sum(LENGTHS)
    made = [torch.randn(tokens, n, w) for n, w in ((heads, 24), (groups, 24), (groups, width))]
    assert 4 * len(ops._batches(LENGTHS)[1]) <= len(LENGTHS)  # batched
    weight = torch.randn(tokens, heads, width)
    found = []
    for dtype in (torch.float32, torch.float64):  # FP64: the reference
        ours = [x.to(dtype, copy=True).requires_grad_() for x in made]
        out = ops.attention(*ours, LENGTHS, LENGTHS, 0.2)
        (out * weight.to(dtype)).sum().backward()
        found.append([out.detach(), *(x.grad for x in ours)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)


def test_similar_lengths_share_a_batch_and_long_ones_do_not() -> None:
    ops._batches.cache_clear()
    with torch.inference_mode():
        slot_T, batches = ops._batches(LENGTHS)
    assert batches == [(13, 7), (1, 1), (1, 70), (1, 64), (3, 63)]
    assert slot_T.numel() == sum(LENGTHS) == slot_T.unique().numel()
    assert not slot_T.is_inference()  # or training could not use what sampling has planned
