"""Chunked cross-entropy against the whole-logits reference, its gradients included."""

import math

import pytest
import torch

from hadal.ops.cross_entropy import (
    cross_entropy_reference,
    linear_cross_entropy,
    weighted_cross_entropy,
)
from hadal.ops.gate import WideProduct


def _inputs(tokens, hidden, vocab, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weight_VD = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype)
    target_T = torch.randint(vocab, (tokens,), generator=generator)
    scale_T = torch.rand(tokens, generator=generator)
    return hidden_TD.requires_grad_(), weight_VD.requires_grad_(), target_T, scale_T


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 37, 1000, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_loss_and_gradients_equal_the_reference(chunk_tokens, z_loss):
    hidden_TD, weight_VD, target_T, scale_T = _inputs(37, 12, 50)
    want_T = cross_entropy_reference(hidden_TD, weight_VD, target_T, z_loss)
    want_grads = torch.autograd.grad((want_T * scale_T).sum(), (hidden_TD, weight_VD))
    got_T = linear_cross_entropy(hidden_TD, weight_VD, target_T, z_loss=z_loss, chunk_tokens=chunk_tokens)
    got_grads = torch.autograd.grad((got_T * scale_T).sum(), (hidden_TD, weight_VD))
    torch.testing.assert_close(got_T, want_T, rtol=1e-12, atol=1e-12)
    for got, want in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 37, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_the_weighted_sum_equals_the_reference(chunk_tokens, z_loss, factor):
    hidden_TD, weight_VD, target_T, share_T = _inputs(37, 12, 50)
    want = factor * (cross_entropy_reference(hidden_TD, weight_VD, target_T, z_loss) * share_T).sum()
    want_grads = torch.autograd.grad(want, (hidden_TD, weight_VD))
    got = factor * weighted_cross_entropy(
        hidden_TD, weight_VD, target_T, share_T, z_loss=z_loss, chunk_tokens=chunk_tokens
    )
    got_grads = torch.autograd.grad(got, (hidden_TD, weight_VD))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_weighted_sum_in_bf16_and_what_it_refuses():
    hidden_TD, weight_VD, target_T, share_T = _inputs(64, 32, 100, torch.bfloat16)
    loss = weighted_cross_entropy(hidden_TD, weight_VD, target_T, share_T, chunk_tokens=10)
    exact = (cross_entropy_reference(hidden_TD.double(), weight_VD.double(), target_T) * share_T).sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    want = torch.autograd.grad(exact, (hidden_TD, weight_VD))
    got = torch.autograd.grad(loss, (hidden_TD, weight_VD), retain_graph=True)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs.double()).norm() / theirs.double().norm() < 6e-3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # the gradients were scaled in place
    with torch.no_grad():
        torch.testing.assert_close(
            weighted_cross_entropy(hidden_TD, weight_VD, target_T, share_T), loss.detach()
        )
    hidden_TD.grad = None
    weighted_cross_entropy(hidden_TD, weight_VD.detach(), target_T, share_T).backward()
    assert hidden_TD.grad is not None


def test_the_reference_equals_torch():
    hidden_TD, weight_VD, target_T, _ = _inputs(9, 5, 11)
    want_T = torch.nn.functional.cross_entropy(hidden_TD @ weight_VD.T, target_T, reduction="none")
    torch.testing.assert_close(cross_entropy_reference(hidden_TD, weight_VD, target_T), want_T)


def test_bf16_inputs_give_fp32_losses_close_to_exact():
    hidden_TD, weight_VD, target_T, scale_T = _inputs(64, 32, 100, torch.bfloat16)
    loss_T = linear_cross_entropy(hidden_TD, weight_VD, target_T, chunk_tokens=10)
    assert loss_T.dtype == torch.float32
    exact_T = cross_entropy_reference(hidden_TD.double(), weight_VD.double(), target_T)
    torch.testing.assert_close(loss_T.double(), exact_T, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad((loss_T * scale_T).sum(), (hidden_TD, weight_VD))
    exact = torch.autograd.grad((exact_T * scale_T).sum(), (hidden_TD, weight_VD))
    for got, want in zip(grads, exact, strict=True):
        assert got.dtype == torch.bfloat16
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < 6e-3  # BF16 rounding of the logits' gradient and of the result


def test_huge_logits_do_not_overflow():
    hidden_TD = torch.full((2, 4), 1e4, requires_grad=True)
    weight_VD = torch.tensor([[1.0] * 4, [-1.0] * 4], requires_grad=True)
    loss_T = linear_cross_entropy(hidden_TD, weight_VD, torch.tensor([0, 1]))
    assert loss_T.tolist() == [0.0, 8e4]
    loss_T.sum().backward()
    assert torch.isfinite(hidden_TD.grad).all()
    assert torch.isfinite(weight_VD.grad).all()


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    loss_T = linear_cross_entropy(torch.zeros(3, 4), torch.randn(10, 4), torch.tensor([0, 5, 9]))
    assert loss_T.tolist() == pytest.approx([math.log(10)] * 3)


def test_a_token_of_weight_zero_leaves_no_gradient():
    hidden_TD, weight_VD, target_T, _ = _inputs(6, 4, 9, torch.float32)
    scale_T = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    (linear_cross_entropy(hidden_TD, weight_VD, target_T, chunk_tokens=4) * scale_T).sum().backward()
    assert (hidden_TD.grad.abs().sum(1) > 0).tolist() == [True, False, True, True, False, True]


def test_only_the_wanted_gradients_are_computed():
    hidden_TD, weight_VD, target_T, _ = _inputs(6, 4, 9, torch.float32)
    loss = linear_cross_entropy(hidden_TD.detach(), weight_VD, target_T).sum()
    loss.backward()
    assert hidden_TD.grad is None
    assert weight_VD.grad is not None


def test_no_tensor_of_all_the_logits_is_made():
    """The largest tensor that the operation touches is a chunk's logits, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return out

    hidden_TD, weight_VD, target_T, _ = _inputs(128, 8, 64, torch.float32)
    with Watch():
        linear_cross_entropy(hidden_TD, weight_VD, target_T, chunk_tokens=16).sum().backward()
    assert largest == max(16 * 64, 128 * 8)


@pytest.mark.parametrize(
    ("hidden", "weight", "target", "match"),
    [((3, 4), (9, 5), (3,), "hidden"), ((3, 4), (9, 4), (2,), "3 tokens"), ((3,), (9, 4), (3,), "hidden")],
)
def test_shapes_that_do_not_fit_are_refused(hidden, weight, target, match):
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(target, dtype=torch.int64))


def test_a_chunk_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="chunk_tokens"):
        linear_cross_entropy(
            torch.zeros(2, 2), torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), chunk_tokens=0
        )


def test_a_wide_product_keeps_what_bf16_gradients_would_lose():
    """The gate's: result and gradients as FP32 copies have them, up to 2⁻¹⁷ and the rounding to BF16."""
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 40).bfloat16().requires_grad_() for n in (33, 6))
    got, grad = WideProduct.apply(x, weight), torch.randn(33, 6)
    want = torch.autograd.grad(x.float() @ weight.float().T, (x, weight), grad)
    torch.testing.assert_close(got, x.float() @ weight.float().T)
    for ours, theirs in zip(torch.autograd.grad(got, (x, weight), grad), want, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-12)
        assert (ours == theirs).float().mean() > 0.97
