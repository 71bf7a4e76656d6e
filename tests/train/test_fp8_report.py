"""The numerics report: what it says of planted operands, by hand and against products in FP64; that nothing
is left behind; the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hadal.ops import fp8_training
from hadal.train import state
from hadal.train.fp8_report import Layer, Operand, fp8_report, lines, measure
from hadal.train.main import train
from hadal.train.recipe import RecipeError
from tests.train import tiny

SMOKE = Path(__file__).resolve().parents[2] / "recipes" / "mini-smoke.toml"
SHORT = ["train.tokens=3072", "train.batch_tokens=512", "log.heldout_tokens=512",
         "log.heldout_every_steps=0"]  # fmt: skip


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- one product ---
def test_underflow_is_counted_by_hand():
    """A tile with an outlier of 448 has scale 1: what is below half of E4M3's smallest 2^-9 becomes zero.
    Along tokens the outlier has its column to itself: there only what the kept codes had lost is lost."""
    x_TI = torch.full((128, 128), 2.0**-11)
    x_TI[:, 5] = 448.0
    x_TI[0, :3] = 0.0
    layer = Layer("x")
    layer.add(x_TI, _normal(8, 128), _normal(128, 8, seed=1), True)
    operands = layer.told()["operands"]
    nonzero = 128 * 128 - 3
    assert operands["activation"]["underflow"] == (nonzero - 128) / nonzero
    assert operands["activation by token"]["underflow"] == (nonzero - 128) / nonzero
    assert operands["gradient"]["underflow"] == operands["weight"]["underflow"] == 0.0
    assert operands["activation"]["saturated"] == 0.0
    layer = Layer("dy")
    layer.add(_normal(128, 8), _normal(128, 8, seed=1), x_TI, True)
    operands = layer.told()["operands"]
    assert operands["gradient"]["underflow"] == (nonzero - 128) / nonzero
    assert operands["gradient by token"]["underflow"] == 0.0  # cut from the gradient itself


def test_saturation_and_ratio_by_hand():
    found = Operand()
    x = torch.tensor([[460.0, 470.0, float("inf"), -500.0, 1.0, 0.0]])
    q = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    found.add(x, q.float(), q, torch.tensor([2.0, 2.0**-100, 0.5]))
    told = found.told()
    assert told["saturated"] == pytest.approx(3 / 6)  # 460 rounds to 448 anyway
    assert told["ratio"] == 4.0  # the tile of zeros has no say


def test_errors_are_those_of_the_products():
    """With at most as many rows as are sampled, the errors are those of FP8 training's products."""
    x_TI, weight_OI, dy_TO = _normal(24, 200), _normal(30, 200, seed=1), _normal(24, 30, seed=2) * 1e-6
    layer = Layer("x")
    layer.add(x_TI, weight_OI, dy_TO, True)
    x, w = x_TI.clone().requires_grad_(), weight_OI.clone().requires_grad_()
    with fp8_training.fp8_training():
        y = fp8_training.linear(x, w)
    y.backward(dy_TO)
    wide = x_TI.double(), weight_OI.double(), dy_TO.double()
    exact = {"fprop": wide[0] @ wide[1].T, "dgrad": wide[2] @ wide[1], "wgrad": wide[2].T @ wide[0]}
    got = {"fprop": y.detach(), "dgrad": x.grad, "wgrad": w.grad}
    for name, told in layer.told()["products"].items():
        want = (got[name].double() - exact[name]).norm() / exact[name].norm()
        assert told["error"] == pytest.approx(want.item(), rel=1e-4), name
        assert 0.01 < told["error"] < 0.06
        assert told["plain"] < 1e-6


def test_experts_are_summed_over_their_stack():
    one, two, both = Layer("a"), Layer("b"), Layer("c")
    for number, layer in enumerate((one, two)):
        operands = _normal(50, 40, seed=number), _normal(16, 40, seed=9), _normal(50, 16, seed=5 + number)
        layer.add(*operands, True)
        both.add(*operands, True)
    error2 = sum(x.products["wgrad"].error2 for x in (one, two))
    norm2 = sum(x.products["wgrad"].norm2 for x in (one, two))
    assert both.told()["products"]["wgrad"]["error"] == pytest.approx((error2 / norm2) ** 0.5)
    assert both.operands["activation"].elements == 2 * 50 * 40


# --- a model ---
def _batch(trainer):
    return next(trainer.batches)


@pytest.mark.parametrize("fp8", [False, True])
def test_every_product_that_fp8_takes_is_reported(fp8):
    """The same weights whether the run trains in FP8 or not: those of all blocks but norms, gates and
    embeddings. Weights and gradients stay, and so do the functions that were watched."""
    trainer = tiny.trainer()
    trainer.objective = replace(trainer.objective, fp8=fp8)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    functions = fp8_training.linear, fp8_training.ffn, fp8_training.experts
    report = measure(trainer, _batch(trainer))
    assert functions == (fp8_training.linear, fp8_training.ffn, fp8_training.experts)
    want = {
        name.removesuffix(".weight")
        for name, p in trainer.model.named_parameters()
        if p.dim() > 1 and not any(part in name for part in ("embed", "lm_head", "gate.", "eh_proj", "norm"))
    }
    assert {layer["name"] for layer in report.layers} == want
    errors = [max(p["error"] for p in layer["products"].values()) for layer in report.layers]
    assert errors == sorted(errors, reverse=True)
    assert 0.01 < errors[-1] < errors[0] < 0.2
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert bool((parameter.grad == 2.0).all())
    table = lines(report)
    assert len(table) == 7 + len(want)
    assert report.layers[0]["name"] in table[7]


def test_watched_products_are_those_of_the_model():
    """What the report multiplies is the model: with its operands unrounded, loss and gradients are the
    model's."""
    from hadal.train.fp8_report import _Watch, _watching
    from hadal.train.losses import losses

    trainer = tiny.trainer(network=tiny.model())
    batch = _batch(trainer)
    micro, weight_K = batch.micros[0], batch.weight_K
    results = []
    for watched in (False, True):
        trainer.model.zero_grad()
        objective = replace(trainer.objective, fp8=watched)
        with _watching(_Watch(trainer.model, True)) if watched else torch.enable_grad():
            out = losses(trainer.model, micro, weight_K, batch.rows, objective)
            out.total(0.3, 0.01).backward()
        results.append((out.main.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-6)


# --- the command ---
def test_a_report_of_a_new_run_and_of_its_checkpoint(tmp_path):
    settings = {"overrides": [*SHORT, f"data.path={tmp_path / 'data'}"], "device": "cpu",
                "console": Console(quiet=True)}  # fmt: skip
    out = tmp_path / "run"
    report, path = fp8_report(SMOKE, steps=2, out=out, **settings)
    assert report.step == 2
    saved = json.loads(path.read_text())
    assert (saved["step"], saved["dtype"], saved["tokens"]) == (2, "float32", 512)
    assert saved["layers"] == list(report.layers)
    assert state.latest(out / "checkpoints") is None
    assert not (out / "metrics.jsonl").exists()
    if path.with_suffix(".png").exists():
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    train(SMOKE, out=out, **settings)
    log = (out / "metrics.jsonl").read_text()
    with pytest.raises(RecipeError, match="--resume"):
        fp8_report(SMOKE, out=out, **settings)
    resumed, _ = fp8_report(SMOKE, out=out, resume=True, **settings)
    assert resumed.step == 6
    assert resumed.layers != report.layers
    assert (out / "metrics.jsonl").read_text() == log
    with pytest.raises(RecipeError, match="none after step 7"):
        fp8_report(SMOKE, out=out, resume=True, steps=1, **settings)
