"""Flat AdamW against torch.optim.AdamW, and its own promises: dead steps, accumulation, state."""

import copy

import pytest
import torch
from torch import nn

from hadal.train import optimizer as optimizer_module
from hadal.train.optimizer import AdamW

ALIVE, DEAD = torch.tensor(1.0), torch.tensor(0.0)


def _model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 12), nn.LayerNorm(12), nn.SiLU(), nn.Linear(12, 3)).to(dtype)


def _backward(model, seed, scale=1.0):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    (model(x).square().sum() * scale).backward()


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("slab", [2**26, 50])
def test_equals_torch_adamw_in_fp32(clip, slab, monkeypatch):
    monkeypatch.setattr(optimizer_module, "SLAB", slab)
    ours, theirs = _model(), _model()
    adamw = AdamW(ours.named_parameters(), clip=clip, weight_decay=0.1, moment_dtype=torch.float32)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    oracle = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(30):
        rate = 1e-2 / (step + 1)
        _backward(ours, step, 10.0)
        adamw.accumulate()
        norm = adamw.grad_norm()
        adamw.step(rate, norm, ALIVE)
        _backward(theirs, step, 10.0)
        if clip:
            want = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
            torch.testing.assert_close(norm, want)
        for group in oracle.param_groups:
            group["lr"] = rate
        oracle.step()
        oracle.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_cpu_updates_by_cached_parts_with_the_same_bits(clip, monkeypatch):
    """Whatever their length: a run may go on with other threads."""
    states = []
    for cached in (2**26, 48, 16):
        monkeypatch.setattr(optimizer_module, "CACHED", cached)
        model = _model()
        adamw = AdamW(model.named_parameters(), clip=clip)
        for step in range(5):
            _backward(model, step, 10.0)
            adamw.accumulate()
            adamw.step(1e-2, adamw.grad_norm(), ALIVE)
        states.append(adamw.state() | dict(model.state_dict()))
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


def test_decay_acts_on_matrices_only():
    model = _model()
    adamw = AdamW(model.named_parameters(), weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw.accumulate()
    adamw.step(0.1, adamw.grad_norm(), ALIVE)
    for name, after in model.state_dict().items():
        factor = 0.95 if after.ndim >= 2 else 1.0
        torch.testing.assert_close(after, before[name] * factor)


def test_bf16_model_keeps_small_updates_in_its_masters():
    """Updates far below a BF16 ulp add up in the masters, where a BF16 weight would stand still."""
    model = nn.Linear(4, 4, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    adamw = AdamW(model.named_parameters(), weight_decay=0.0, clip=0.0)
    assert adamw.exp_avg_N.dtype == torch.bfloat16
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        adamw.accumulate()
        adamw.step(1e-4, adamw.grad_norm(), ALIVE)
    assert adamw.master_N.mean().item() == pytest.approx(0.99, abs=1e-4)
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.mean().item() == pytest.approx(0.99, abs=4e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30, 3.0])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_dead_step_changes_no_bit(poison, moments):
    model = _model(torch.bfloat16)
    adamw = AdamW(model.named_parameters(), moment_dtype=moments)
    _backward(model, 0)
    adamw.accumulate()
    adamw.step(1e-2, adamw.grad_norm(), ALIVE)
    before = {k: v.clone() for k, v in {**adamw.state(), **model.state_dict()}.items()}
    _backward(model, 1)
    next(model.parameters()).grad[0, 0] = poison
    adamw.accumulate()
    adamw.step(1e-2, adamw.grad_norm(), DEAD)
    after = {**adamw.state(), **model.state_dict()}
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_accumulated_gradients_add_up_in_fp32():
    model = nn.Linear(3, 2, bias=False).bfloat16()
    adamw = AdamW(model.named_parameters())
    for value in (256.0, 1.0):  # 257 is no BF16 number
        model.weight.grad = torch.full_like(model.weight, value)
        adamw.accumulate()
        assert model.weight.grad is None
    assert adamw.grad_N.tolist() == [257.0] * 6
    assert adamw.grad_norm().item() == pytest.approx(257 * 6**0.5)


def test_a_new_step_forgets_the_last_gradient_even_of_parameters_without_one():
    first, second = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    adamw = AdamW([("first", first), ("second", second)])
    first.grad, second.grad = torch.ones(2, 2), torch.ones(2, 2)
    adamw.accumulate()
    adamw.step(0.1, adamw.grad_norm(), ALIVE)
    first.grad = torch.full((2, 2), 2.0)
    adamw.accumulate()
    assert adamw.grad_N.tolist() == [2.0] * 4 + [0.0] * 4


def test_step_without_a_gradient_is_refused():
    adamw = AdamW(_model().named_parameters())
    with pytest.raises(RuntimeError, match="accumulate"):
        adamw.step(0.1, torch.tensor(1.0), ALIVE)


def test_nothing_to_optimise_is_refused():
    with pytest.raises(ValueError, match="nothing to optimise"):
        AdamW(_model().requires_grad_(False).named_parameters())


def test_state_restores_bit_for_bit():
    def run(model, adamw, steps):
        for step in steps:
            _backward(model, step)
            adamw.accumulate()
            adamw.step(1e-2, adamw.grad_norm(), ALIVE)

    whole = _model(torch.bfloat16)
    whole_adamw = AdamW(whole.named_parameters())
    run(whole, whole_adamw, range(6))
    half = _model(torch.bfloat16)
    half_adamw = AdamW(half.named_parameters())
    run(half, half_adamw, range(3))
    saved = {name: tensor.clone() for name, tensor in half_adamw.state().items()}
    rest = _model(torch.bfloat16)
    rest_adamw = AdamW(rest.named_parameters())
    rest_adamw.load_state(saved, steps=3)
    run(rest, rest_adamw, range(3, 6))
    for name, tensor in whole_adamw.state().items():
        assert torch.equal(tensor, rest_adamw.state()[name]), name
    for a, b in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype"])
def test_state_of_another_model_is_refused(change):
    adamw = AdamW(_model().named_parameters())
    state = dict(adamw.state())
    name = "exp_avg.0.weight"
    if change == "missing":
        del state[name]
    elif change == "unknown":
        state["exp_avg.9.weight"] = state[name]
    elif change == "shape":
        state[name] = state[name][:2]
    else:
        state[name] = state[name].float()
    with pytest.raises(ValueError, match="optimizer state"):
        adamw.load_state(state, steps=1)
