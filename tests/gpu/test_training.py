"""Training on a CUDA device: recomputation, the average beside the steps, a checkpoint's copy, memory."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from hadal.config import Gqa, Mla, Moe
from hadal.plan.training import TrainingShape, activations, training_memory
from hadal.train import state
from hadal.train.batches import build
from hadal.train.ema import Ema
from hadal.train.losses import Objective, losses
from hadal.train.saver import Saver
from tests.train import tiny
from tests.train.test_recompute import KINDS, V3, kept_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
ROWS = 512
MOE = Moe(16, 1, 4, 256, first_k_dense_replace=1)
WIDE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "vocab_size": 4096, "attention": Mla(256, 128, 64, 32, 64), "moe": MOE,
}  # fmt: skip
DENSE = WIDE | {"attention": Gqa(2, 64, qkv_bias=True), "model_type": "qwen2", "moe": None, "mtp": 0}


def _trainer(kinds=(), rows=ROWS, **changes):
    network = tiny.model(dtype=torch.bfloat16, **changes).cuda()
    trainer = tiny.trainer(network, rows=rows, micro_rows=rows, plain=True)
    trainer.batches = (batch.to(network.device) for batch in trainer.batches)
    trainer.objective = replace(trainer.objective, recompute=kinds)
    return trainer


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), V3, KINDS], ids="+".join)
@pytest.mark.parametrize("changes", [WIDE, DENSE], ids=["v3", "qwen"])
def test_recomputation_changes_no_gradient(changes, kinds):
    """Up to sums whose order varies on a GPU: a repetition without recomputation is the measure."""
    network = tiny.model(dtype=torch.bfloat16, **changes).cuda()
    micro = build(tiny.RandomRows().rows(0, 64), depths=len(network.mtp), mask_documents=True).to(
        network.device
    )

    def gradients(recompute):
        network.zero_grad()
        objective = Objective(sequence_alpha=0.01, recompute=recompute)
        out = losses(network, micro, micro.weight_KT.sum(1), 64, objective)
        out.total(0.3, 0.01).backward()
        return out.main.item(), torch.cat([p.grad.flatten().float() for p in network.parameters()])

    (want, plain), (_, again), (loss, lean) = gradients(()), gradients(()), gradients(kinds)
    assert loss == pytest.approx(want, rel=1e-6)
    noise = (again - plain).norm() / plain.norm()
    assert (lean - plain).norm() / plain.norm() <= 2 * noise + 1e-6


@pytest.mark.parametrize("changes", [WIDE, DENSE], ids=["v3", "qwen"])
@pytest.mark.parametrize("kinds", [(), V3, KINDS], ids=["nothing", "v3", "all"])
def test_activations_are_predicted(changes, kinds):
    network = tiny.model(dtype=torch.bfloat16, **changes).cuda()
    rows = tiny.RandomRows(plain=True).rows(0, ROWS)
    micro = build(rows, depths=len(network.mtp), mask_documents=True).to(network.device)
    predicted = activations(network.config, TrainingShape(micro.tokens, recompute=kinds))
    assert predicted == pytest.approx(kept_bytes(network, micro, kinds), rel=0.1)


@pytest.mark.parametrize("changes", [WIDE, DENSE], ids=["v3", "qwen"])
@pytest.mark.parametrize("kinds", [(), V3, KINDS], ids=["nothing", "v3", "all"])
def test_the_peak_is_predicted_within_ten_percent(changes, kinds):
    gc.collect()
    others = torch.cuda.memory_allocated()  # of tests before this one
    trainer = _trainer(kinds, **changes)
    trainer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    trainer.step()
    torch.cuda.synchronize()
    predicted = training_memory(
        trainer.model.config, TrainingShape(ROWS * tiny.CONTEXT, recompute=kinds)
    ).peak
    measured = torch.cuda.max_memory_allocated() - others
    print(f"predicted {predicted:,}, measured {measured:,}: {predicted / measured - 1:+.1%}")
    assert predicted == pytest.approx(measured, rel=0.1)


def test_the_average_follows_its_formula_beside_the_steps():
    trainer = _trainer(rows=8)
    trainer.ema = Ema(trainer.optimizer, 0.9)
    want = trainer.optimizer.master_N.double().cpu()
    for step in range(1, 8):
        trainer.step()
        kept = min(0.9, (1 + step) / (10 + step))
        want = kept * want + (1 - kept) * trainer.optimizer.master_N.double().cpu()
    trainer.ema.wait()
    torch.testing.assert_close(trainer.ema.average_N.double(), want, rtol=1e-5, atol=1e-7)
    trainer.ema.close()


def test_a_checkpoint_is_of_its_moment(tmp_path):
    trainer, saver = _trainer(rows=8), Saver(tmp_path)
    trainer.step()
    want = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    saver.start(1, trainer.tensors(), {})
    for _ in range(5):
        trainer.step()
    saver.wait()
    saver.close()
    saved, _ = state.load(state.latest(tmp_path))
    assert saved.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(saved[name], tensor.cpu()), name
