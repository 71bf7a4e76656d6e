"""Recomputation against none: the same bits, and fewer bytes kept for the backward pass."""

import threading
from dataclasses import replace

import pytest
import torch

from hadal.config import Gqa
from hadal.ops.exact import exact, is_exact
from hadal.ops.fp8_training import fp8_training, is_fp8_training
from hadal.ops.recompute import KINDS, recompute, recomputed
from hadal.train.batches import build
from hadal.train.losses import Objective, losses, weighted_losses
from tests.train import tiny

V3 = ("norm", "up", "swiglu")


def _micro(rows=8):
    return build(tiny.RandomRows().rows(0, rows), depths=1, mask_documents=True)


def _gradients(network, kinds):
    micro = _micro()
    network.zero_grad()
    out = losses(network, micro, micro.weight_KT.sum(1), 8, Objective(sequence_alpha=0.01, recompute=kinds))
    out.total(0.3, 0.01).backward()
    return out.parts(), {name: p.grad.clone() for name, p in network.named_parameters()}


def kept_bytes(network, micro, kinds):
    """Bytes of all tensors that the graph of a forward pass keeps, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def hear(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()

    with recompute(kinds, hear):
        mean_K = weighted_losses(network, micro, micro.context(), micro.weight_KT / micro.tokens)
    del mean_K
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), V3, KINDS], ids="+".join)
def test_recomputation_changes_no_bit(dtype, kinds):
    network = tiny.model(dtype=dtype)
    (want, gradients), (got, again) = _gradients(network, ()), _gradients(network, kinds)
    assert torch.equal(got, want)
    for name, gradient in gradients.items():
        assert torch.equal(again[name], gradient), name


@pytest.mark.parametrize("changes", [{"moe": None, "mtp": 0}, {"attention": Gqa(2, 8, qkv_bias=True)}])
def test_other_architectures_keep_their_bits_too(changes):
    if "attention" in changes:
        changes = changes | {"model_type": "qwen2", "moe": None, "mtp": 0}
    network = tiny.model(**changes)
    micro = build(tiny.RandomRows().rows(0, 4), depths=0, mask_documents=True)
    gradients = []
    for kinds in ((), KINDS):
        network.zero_grad()
        out = losses(network, micro, micro.weight_KT.sum(1), 4, Objective(recompute=kinds))
        out.main.backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_query_without_a_latent_keeps_its_bits():
    attention = replace(tiny.config().attention, q_lora_rank=None)
    network = tiny.model(attention=attention)
    (_, want), (_, got) = _gradients(network, ()), _gradients(network, KINDS)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_each_kind_keeps_less_and_all_of_v3s_about_half():
    network, micro = tiny.model(dtype=torch.bfloat16), _micro()
    plain = kept_bytes(network, micro, ())
    for kind in KINDS:
        assert kept_bytes(network, micro, (kind,)) < 0.97 * plain, kind
    # short documents share calls on a CPU, and what pads them is kept too: 0.54 here, less for long rows
    assert kept_bytes(network, micro, V3) < 0.56 * plain


def test_training_with_recomputation_is_the_same_training():
    plain, lean = (
        tiny.trainer(tiny.model(dtype=torch.bfloat16)),
        tiny.trainer(tiny.model(dtype=torch.bfloat16)),
    )
    lean.objective = replace(lean.objective, recompute=V3)
    for _ in range(3):
        plain.step()
        lean.step()
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, lean.tensors()[name]), name


# --- the mechanism by itself ---
def test_views_chains_and_a_reused_address():
    """Notes chain through two operations, serve views, and freed storages are never taken for others."""
    x = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(8, 8, requires_grad=True)

    def network():
        first = recomputed("norm", torch.sin, x)
        second = recomputed("up", lambda a, w: (a @ w).split(4, 1)[0].clone(), first, weight)
        for _ in range(20):  # storages that come and go at the same addresses
            noise = recomputed("swiglu", torch.exp, x * 0.01)
            noise = noise * noise
        return (second.view(32, 8).t() * first[:32].t()).sum() + noise.sum()

    network().backward()
    want = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    with recompute(KINDS):
        loss = network()
    loss.backward()
    assert torch.equal(x.grad, want[0])
    assert torch.equal(weight.grad, want[1])


def test_the_second_run_is_in_the_modes_of_the_first():
    """In FP8, or exact: the backward pass lies outside the block, perhaps in a thread of its own."""
    x, seen = torch.randn(4, requires_grad=True), []

    def f(a):
        seen.append((is_fp8_training(), is_exact()))
        return a.exp()

    with recompute(["up"]), fp8_training(), exact():
        loss = recomputed("up", f, x).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert seen == [(True, True)] * 2
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).exp())


@pytest.mark.parametrize("kinds", [V3, KINDS], ids=["v3", "all"])
def test_fp8_keeps_its_bits_too(kinds):
    gradients = []
    for chosen in ((), kinds):
        network, micro = tiny.model(dtype=torch.bfloat16), _micro()
        objective = Objective(sequence_alpha=0.01, recompute=chosen, fp8=True)
        out = losses(network, micro, micro.weight_KT.sum(1), 8, objective)
        out.total(0.3, 0.01).backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_output_that_nobody_differentiates_is_left_out():
    x = torch.randn(4, requires_grad=True)
    with recompute(["up"]):
        first, _ = recomputed("up", lambda a: (a * 2, a * 3), x)
        loss = (first * first).sum()
    loss.backward()
    torch.testing.assert_close(x.grad, 8 * x.detach())


def test_a_second_backward_pass_is_refused():
    x = torch.randn(4, requires_grad=True)
    with recompute(["up"]):
        loss = recomputed("up", torch.exp, x).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run once"):
        loss.backward()


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"'norms'.*there are norm"), recompute(["norms"]):
        pass
