"""Training with FP8 products: near the run without, and the same run with recomputation."""

from contextlib import nullcontext

import pytest
import torch

from hadal.ops import fp8_tiles
from hadal.ops.fp8_training import is_fp8_training
from hadal.train.batches import build
from hadal.train.losses import Objective, losses
from hadal.train.optimizer import AdamW
from tests.train import tiny


def _gradients(network, objective):
    micro = build(tiny.RandomRows().rows(0, 8), depths=1, mask_documents=True)
    network.zero_grad()
    out = losses(network, micro, micro.weight_KT.sum(1), 8, objective)
    assert not is_fp8_training()
    out.total(0.3, 0.01).backward()  # outside: the backward pass knows by itself
    return out.parts(), {name: p.grad.clone() for name, p in network.named_parameters()}


def test_losses_and_gradients_are_near_and_not_the_same():
    """Without experts, as a token that rounding sends to another one has another gradient."""
    network = tiny.model(moe=None)
    (want, exact), (got, rounded) = (_gradients(network, Objective(fp8=on)) for on in (False, True))
    assert torch.allclose(got[:2], want[:2], rtol=5e-3) and not torch.equal(got, want)
    for name, gradient in exact.items():
        near = torch.nn.functional.cosine_similarity(rounded[name].flatten(), gradient.flatten(), 0)
        assert near > 0.97 or gradient.norm() < 1e-6, (name, float(near))


@pytest.mark.parametrize("large", [1, 2**18])
def test_gradients_of_experts_go_to_their_sums_as_they_are_made(large, monkeypatch):
    """In FP32, over two passes, and the same as through autograd; whoever else uses the weight adds to it."""
    monkeypatch.setattr("hadal.train.optimizer.LARGE", large)
    network, objective = tiny.model(dtype=torch.bfloat16), Objective(fp8=True)
    _, want = _gradients(network, objective)
    network.zero_grad()
    optimizer = AdamW(network.named_parameters())
    name, weight = next((n, p) for n, p in network.named_parameters() if n.endswith("gate_up_proj"))
    micro = build(tiny.RandomRows().rows(0, 8), depths=1, mask_documents=True)
    for number in (1, 2):
        with optimizer.collecting():
            out = losses(network, micro, micro.weight_KT.sum(1), 8, objective)
            (out.total(0.3, 0.01) + 2.0 * weight.float().sum()).backward()
            assert weight.grad is None or (weight.grad == 2.0).all()  # not through autograd
        optimizer.accumulate()
        sums = dict(zip((slot.name for slot in optimizer.slots), optimizer._grads, strict=True))
        for each, gradient in want.items():
            further = 2.0 if each == name else 0.0
            got = sums[each] / number - further
            assert (got - gradient.float()).norm() < 2**-6 * gradient.float().norm() + 1e-3 * further, each
    assert not torch.equal(sums[name], sums[name].bfloat16().float())


def test_a_run_with_experts_learns_alike():
    """The loss after some steps, against FP32: V3 reports 0.25% over a real run."""
    ends = []
    for fp8 in (False, True):
        trainer = tiny.trainer(alpha=0.01)
        trainer.objective = Objective(sequence_alpha=0.01, fp8=fp8)
        stats = [one for _ in range(24) for one in trainer.step()]
        ends.append(sum(one.loss for one in stats[-6:]) / 6)
    assert ends[0] < 4.4 and abs(ends[1] - ends[0]) < 0.02 * ends[0] and ends[0] != ends[1], ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_products_are_in_fp8_too(dtype):
    network = tiny.model(dtype=dtype)
    plain, again = (
        _gradients(network, Objective(recompute=kinds, fp8=True)) for kinds in ((), ("norm", "up", "swiglu"))
    )
    assert torch.equal(plain[0], again[0])
    for name, gradient in plain[1].items():
        assert torch.equal(again[1][name], gradient), name


@pytest.mark.parametrize("scales", ["power_of_two", "float32"])
def test_micro_batches_share_a_steps_weights(scales, monkeypatch):
    """Quantised once a step, anew after the update; and the sum of their gradients is as without sharing."""
    seen, ends = [], []
    quantise = fp8_tiles.quantise_weight
    monkeypatch.setattr(fp8_tiles, "quantise_weight", lambda w, p: seen.append(p) or quantise(w, p))
    for share in (True, False):
        trainer = tiny.trainer(tiny.model(), rows=8, micro_rows=2)
        trainer.objective = Objective(fp8=True, fp8_scales=scales, recompute=("up",))
        if not share:
            monkeypatch.setattr("hadal.train.passes.constant_weights", lambda on: nullcontext())
        seen.clear()
        for _ in range(2):
            trainer.step()
        ends.append((trainer.optimizer.master_N.clone(), len(seen)))
    assert torch.equal(ends[0][0], ends[1][0]) and set(seen) == {scales == "power_of_two"}
    assert ends[1][1] > 4 * ends[0][1] > 0
