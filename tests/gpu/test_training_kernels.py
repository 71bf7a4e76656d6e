"""Training's own kernels on a CUDA device: whole models against their references, and each beside torch.

The kernels by themselves: tests/ops/test_triton_train.py, which runs on the device too."""

from __future__ import annotations

import copy

import pytest
import torch

from hadal.config import Mla
from hadal.ops import dispatch
from hadal.ops.attention import _cudnn_trains, attention, attention_reference
from hadal.ops.cross_entropy import weighted_cross_entropy
from hadal.train.batches import build
from hadal.train.losses import Objective, losses
from hadal.train.optimizer import AdamW
from tests.gpu.test_training import DENSE, WIDE
from tests.train import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = "cuda"
V2 = WIDE | {"attention": Mla(None, 128, 128, 64, 128)}


@pytest.fixture
def reference(monkeypatch):
    """Calls inside run the torch references."""

    def run(f):
        monkeypatch.setenv("HADAL_OPS", "reference")
        dispatch.forced_reference.cache_clear()
        try:
            return f()
        finally:
            monkeypatch.delenv("HADAL_OPS")
            dispatch.forced_reference.cache_clear()

    return run


def _distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("plain", [True, False], ids=["whole rows", "documents"])
@pytest.mark.parametrize("changes", [WIDE, V2, DENSE], ids=["v3", "v2", "qwen"])
def test_gradients_of_a_model_are_as_good_as_the_references(changes, plain, reference):
    """Against FP32, the kernels in BF16 are no further off than the references in BF16."""
    exact = tiny.model(**changes).bfloat16().float().to(DEVICE)
    half = copy.deepcopy(exact).bfloat16()
    rows = tiny.RandomRows(plain=plain).rows(0, 64)
    micro = build(rows, depths=len(exact.mtp), mask_documents=True).to(exact.device)

    def gradients(network):
        network.zero_grad()
        out = losses(network, micro, micro.weight_KT.sum(1), 64, Objective(sequence_alpha=0.01))
        out.total(0.3, 0.01).backward()
        named = {n: p.grad.float() for n, p in network.named_parameters() if p.grad is not None}
        return out.main.item(), named

    loss, want = reference(lambda: gradients(exact))
    slow_loss, slow = reference(lambda: gradients(half))
    fast_loss, fast = gradients(half)
    assert abs(fast_loss - loss) <= 2 * abs(slow_loss - loss) + 1e-3 * loss
    assert fast.keys() == want.keys()
    all_of = [torch.cat([g.flatten() for g in named.values()]) for named in (want, slow, fast)]
    assert _distance(all_of[2], all_of[0]) <= 1.25 * _distance(all_of[1], all_of[0])
    for name, gradient in want.items():  # routing flips a token now and then: experts may differ more
        assert _distance(fast[name], gradient) <= 2 * _distance(slow[name], gradient) + 0.02, name


def _exact_step(adamw, rate, norm):
    """(masters, first, second moments) of the step to come, in FP64 from the state as it is."""
    g, w, m, v = (x.double() for x in (adamw.grad_N, adamw.master_N, adamw.exp_avg_N, adamw.exp_avg_sq_N))
    (beta1, beta2), t = adamw.betas, adamw.steps + 1
    g *= min(adamw.clip / (norm.item() + 1e-6), 1.0)
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    w[: adamw.decayed] *= 1 - rate * adamw.weight_decay
    w -= rate / (1 - beta1**t) * m / ((v / (1 - beta2**t)).sqrt() + adamw.eps)
    return w, m, v


def test_one_kernel_updates_as_the_reference_does(reference):
    """Each step from its own state against FP64: a moment that falls to the other side of a BF16 rounding,
    as a few in a million do, may move later steps by 2^-8 of themselves, but not its own."""

    def run(exact):
        network = tiny.model(dtype=torch.bfloat16, **WIDE).to(DEVICE)
        adamw = AdamW(network.named_parameters(), clip=0.5)
        generator = torch.Generator(DEVICE).manual_seed(1)
        for step in range(5):
            for p in network.parameters():
                p.grad = torch.randn(p.shape, generator=generator, device=DEVICE).bfloat16()
            adamw.accumulate()
            norm, rate = adamw.grad_norm(), 1e-2 / (step + 1)
            wanted = _exact_step(adamw, rate, norm) if exact else ()
            adamw.step(rate, norm, torch.ones((), device=DEVICE))
            for got, want in zip((adamw.master_N, adamw.exp_avg_N, adamw.exp_avg_sq_N), wanted, strict=False):
                if got.dtype == torch.float32:
                    torch.testing.assert_close(got.double(), want, rtol=3e-7, atol=1e-7)
                else:
                    torch.testing.assert_close(
                        got.double(), want, rtol=2.0**-8, atol=2.0**-20 * want.abs().max().item()
                    )
                    assert (got != want.to(got.dtype)).double().mean() < 1e-3
        return network, adamw

    (network, fast), (slow_network, slow) = run(True), reference(lambda: run(False))
    assert fast._lies_flat()
    moved = 1e-2 * sum(1 / (step + 1) for step in range(5))
    torch.testing.assert_close(fast.master_N, slow.master_N, rtol=1e-5, atol=2.0**-7 * moved)
    assert _distance(fast.master_N, slow.master_N) < 1e-5
    assert _distance(fast.exp_avg_N, slow.exp_avg_N) < 1e-3
    for a, b in zip(network.parameters(), slow_network.parameters(), strict=True):
        assert _distance(a, b) < 4e-3
    for p, master in zip(fast.parameters, fast._masters, strict=True):
        assert torch.equal(p, master.bfloat16())


def test_a_dead_step_and_a_model_that_moved():
    network = tiny.model(dtype=torch.bfloat16, **WIDE).to(DEVICE)
    adamw = AdamW(network.named_parameters())

    def step(value, alive):
        for p in network.parameters():
            p.grad = torch.full_like(p, value)
        adamw.accumulate()
        adamw.step(1e-2, adamw.grad_norm(), torch.full((), alive, device=DEVICE))

    step(1.0, 1.0)
    before = {name: x.clone() for name, x in {**adamw.state(), **network.state_dict()}.items()}
    step(float("nan"), 0.0)
    for name, x in {**adamw.state(), **network.state_dict()}.items():
        assert torch.equal(x, before[name]), name
    network.float()
    assert not adamw._lies_flat()
    step(1.0, 1.0)
    for p, master in zip(adamw.parameters, adamw._masters, strict=True):
        assert torch.equal(p, master)


def test_gradients_taken_as_they_are_made_are_the_same():
    network = tiny.model(dtype=torch.bfloat16, **WIDE).to(DEVICE)
    adamw = AdamW(network.named_parameters())
    micro = build(tiny.RandomRows().rows(0, 64), depths=1, mask_documents=True).to(network.device)
    sums = []
    for collect in (False, True):
        for _ in range(2):
            out = losses(network, micro, micro.weight_KT.sum(1), 64, Objective())
            if collect:
                with adamw.collecting():
                    out.total(0.3, 0.0).backward()
                waiting = sum(p.grad.numel() for p in network.parameters() if p.grad is not None)
                assert waiting < 0.5 * adamw.grad_N.numel()
            else:
                out.total(0.3, 0.0).backward()
            adamw.accumulate()
        sums.append(adamw.grad_N.clone())
        adamw._has_grad = False
    assert _distance(sums[1], sums[0]) < 1e-3


@pytest.mark.parametrize(
    ("heads", "groups", "width", "value"), [(16, 16, 192, 128), (12, 2, 128, 128), (8, 8, 64, 32)]
)
@pytest.mark.parametrize("lengths", [[512, 512], [100, 700, 224]], ids=["rows", "documents"])
def test_attention_forward_and_backward(heads, groups, width, value, lengths):
    torch.manual_seed(0)
    shapes = (heads, width), (groups, width), (groups, value)
    q, k, v = (torch.randn(1024, n, w, device=DEVICE).bfloat16().requires_grad_() for n, w in shapes)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    got = attention(q, k, v, lengths, lengths, width**-0.5)
    want = attention_reference(*wide, lengths, lengths, width**-0.5)
    assert _distance(got, want) < 6e-3
    grad = torch.randn_like(want).bfloat16()
    got.backward(grad)
    want.backward(grad.float())
    for ours, theirs in zip((q, k, v), wide, strict=True):
        assert _distance(ours.grad, theirs.grad) < 1e-2
    if torch.cuda.get_device_capability()[0] == 9 and not _cudnn_trains(
        q.device, q.dtype, 512, heads, groups, width, value
    ):
        pytest.skip("correct, but cuDNN refuses these heads: torch's own kernel ran")


def test_the_loss_of_a_large_vocabulary():
    torch.manual_seed(0)
    hidden = (torch.randn(3000, 256, device=DEVICE)).bfloat16().requires_grad_()
    head = (torch.randn(102_400, 256, device=DEVICE) * 0.1).bfloat16().requires_grad_()
    target, share = torch.randint(102_400, (3000,), device=DEVICE), torch.rand(3000, device=DEVICE) / 3000
    loss = weighted_cross_entropy(hidden, head, target, share)  # three chunks, the last not whole
    wide = [x.detach().float().requires_grad_() for x in (hidden, head)]
    each = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, target, reduction="none")
    want = (each * share).sum()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    loss.backward()
    want.backward()
    for ours, theirs in zip((hidden, head), wide, strict=True):
        assert _distance(ours.grad, theirs.grad) < 6e-3
