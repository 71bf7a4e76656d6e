"""Log-probabilities under a linear head against every logit at once, in FP64; chunks, laws, gradients."""

import pytest
import torch

from hadal.ops.log_probs import Law, linear_log_probs, log_probs_reference

T, D, V = 11, 6, 23
LAWS = {
    "plain": Law(),
    "cold": Law(0.7),
    "fewer ids": Law(1.3, 19),
    "banned": Law(0.5, 20, ((3, -100.0), (5, 2.0))),
}


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 19, (T,), generator=generator)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("chunk", [None, 4])
def test_values_entropies_and_gradients(law, chunk):
    hidden, weight, token = inputs()
    found, entropy = linear_log_probs(hidden, weight, token, law, entropy=True, chunk_tokens=chunk)
    want, want_entropy = log_probs_reference(hidden, weight, token, law)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(entropy, want_entropy)
    assert not entropy.requires_grad
    share = torch.linspace(-1, 2, T, dtype=torch.float64)
    got = torch.autograd.grad((found * share).sum(), (hidden, weight))
    for one, other in zip(got, torch.autograd.grad((want * share).sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other)
    if law.vocab_size:
        assert not got[1][law.vocab_size :].any()


def test_gradients_are_taken_only_where_they_are_wanted():
    hidden, weight, token = inputs()
    found, none = linear_log_probs(hidden, weight.detach(), token)
    assert none is None
    found.sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_bf16_is_widened():
    hidden, weight, token = inputs(torch.bfloat16)
    found, _ = linear_log_probs(hidden, weight, token, Law(0.7))
    want, _ = log_probs_reference(hidden.double(), weight.double(), token, Law(0.7))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused():
    hidden, weight, token = inputs()
    with pytest.raises(ValueError, match="temperature is 0"):
        Law(0.0)
    with pytest.raises(ValueError, match="the head has 23 rows"):
        linear_log_probs(hidden, weight, token, Law(vocab_size=24))
    with pytest.raises(ValueError, match="one target per token"):
        linear_log_probs(hidden, weight, token[1:])
