"""Balance: hand-worked updates, the literal formula, and a gate that starts collapsed."""

import pytest
import torch

from hadal.train.balance import (
    expert_counts,
    max_violation,
    sequence_loss,
    sequence_loss_reference,
    update_biases,
)


def test_counts_by_hand():
    expert_TK = torch.tensor([[0, 2], [2, 1], [2, 0]])
    assert expert_counts(expert_TK, 4).tolist() == [2, 1, 3, 0]
    assert expert_counts(expert_TK, 4, torch.tensor([True, True, False])).tolist() == [1, 1, 2, 0]


def test_bias_update_by_hand():
    """Loads 6, 2, 4, 4 have mean 4: the first expert is pushed down, the second up, the others stay."""
    bias_E = torch.tensor([0.5, 0.0, -0.25, 0.0])
    update_biases([bias_E], torch.tensor([[6, 2, 4, 4]]), 0.001)
    assert bias_E.tolist() == pytest.approx([0.499, 0.001, -0.25, 0.0])


def test_each_gate_is_updated_from_its_own_row():
    first, second = torch.zeros(2), torch.zeros(2)
    update_biases([first, second], torch.tensor([[3, 1], [0, 5]]), 0.5)
    assert (first.tolist(), second.tolist()) == ([-0.5, 0.5], [0.5, -0.5])


def test_a_speed_of_zero_on_the_device_changes_no_bit():
    bias_E = torch.tensor([0.1, -0.3])
    update_biases([bias_E], torch.tensor([[3, 1]]), 0.001 * torch.tensor(0.0))
    assert torch.equal(bias_E, torch.tensor([0.1, -0.3]))


def test_counts_beyond_fp32_keep_their_sign():
    bias_E = torch.zeros(2)
    update_biases([bias_E], torch.tensor([[2**25 + 1, 2**25]]), 1.0)
    assert bias_E.tolist() == [-1.0, 1.0]


def test_a_bias_in_low_precision_is_refused():
    with pytest.raises(TypeError, match="FP32"):
        update_biases([torch.zeros(2, dtype=torch.bfloat16)], torch.tensor([[1, 2]]), 0.001)


def test_max_violation_by_hand():
    count_GE = torch.tensor([[4, 4, 4, 4], [8, 4, 2, 2], [16, 0, 0, 0], [0, 0, 0, 0]])
    assert max_violation(count_GE).tolist() == [0.0, 1.0, 3.0, 0.0]


def test_sequence_loss_by_hand():
    """Two tokens, two experts, one each. s = (.6, .2) and (.3, .1): both choose expert 0, s' = (.75, .25)
    twice. f = 2/(1·2)·(2, 0) = (2, 0), P = (.75, .25), so Σ f P = 1.5."""
    score_TE = torch.tensor([[0.6, 0.2], [0.3, 0.1]])
    assert sequence_loss(score_TE, 1, rows=1).item() == pytest.approx(1.5)
    assert sequence_loss_reference(score_TE, 1).item() == pytest.approx(1.5)


def test_an_even_sequence_costs_one():
    assert sequence_loss(torch.eye(4) * 0.8 + 0.1, 1, rows=1).item() == pytest.approx(1.0)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_sequence_loss_and_its_gradient_equal_the_literal_formula(top_k):
    score_TE = torch.rand(3 * 10, 8, generator=torch.Generator().manual_seed(top_k), dtype=torch.float64)
    score_TE.requires_grad_()
    want = sum(sequence_loss_reference(row, top_k) for row in score_TE.view(3, 10, 8))
    got = sequence_loss(score_TE, top_k, rows=3)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, score_TE), torch.autograd.grad(want, score_TE))


def test_padding_is_left_out_of_the_sequence_loss():
    score_TE = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    counted_T = torch.ones(20, dtype=torch.bool)
    counted_T[7:10] = False  # the first row's tail
    counted_T[10:] = False  # the whole second row
    want = sequence_loss_reference(score_TE[:7], 2)
    torch.testing.assert_close(sequence_loss(score_TE, 2, rows=2, counted_T=counted_T), want)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        sequence_loss(torch.rand(7, 4), 2, rows=2)


def test_a_collapsed_gate_becomes_balanced():
    """Scores favour two of eight experts for every token; the bias alone brings MaxVio below 0.2."""
    generator = torch.Generator().manual_seed(0)
    score_TE = torch.rand(4096, 8, generator=generator) * 0.3
    score_TE[:, :2] += 0.5
    bias_E = torch.zeros(8)

    def load():
        return expert_counts((score_TE + bias_E).topk(2).indices, 8)[None]

    assert max_violation(load()).item() == pytest.approx(3.0)  # E/K − 1: two experts take everything
    for _ in range(600):
        update_biases([bias_E], load(), 0.001)
    assert max_violation(load()).item() < 0.2
