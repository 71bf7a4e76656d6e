"""What a user of the trainer sees, on CUDA: accuracy in the loop, memory left alone, the FP8 report."""

from __future__ import annotations

import pytest
import torch

from hadal import weights
from hadal.data.puzzles import TASKS
from hadal.evals.in_training import examine
from hadal.text.tokenizer import Tokenizer
from hadal.train.fp8_report import measure
from hadal.train.sources import ON_BOARD, Sources
from tests.gpu.test_training import WIDE
from tests.train import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_accuracy_in_bf16_from_weights_that_train():
    """The mini on board, with gradients wanted: it answers, its tensors stay where and what they are, and so
    do random states and memory."""
    model = weights.load(ON_BOARD, dtype=torch.bfloat16, device="cuda").requires_grad_(True)
    sources = Sources(None, None, Tokenizer.load(ON_BOARD), ON_BOARD)
    examine(model, sources, 1, 4)  # what is made once: kernels, the table of rotations
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    state, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    found = examine(model, sources, 3, 512)
    assert torch.cuda.memory_allocated() == allocated
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert addresses == [p.data_ptr() for p in model.parameters()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert found.problems == 3 * len(TASKS)
    assert found.accuracy > 0.6  # it is published with more


def test_training_goes_on_after_an_examination():
    """Steps of a BF16 model with an examination between them: the same losses as without."""
    sources = Sources(None, None, Tokenizer.load(ON_BOARD), ON_BOARD)
    losses = []
    for examined in (False, True):
        network = tiny.model(dtype=torch.bfloat16, **(WIDE | {"max_position_embeddings": 512})).cuda()
        trainer = tiny.trainer(network, rows=64, micro_rows=64, plain=True)
        trainer.batches = (batch.to(network.device) for batch in trainer.batches)
        stats = []
        for _ in range(3):
            stats += trainer.step()
            stats += trainer.arrived(wait=True)
            if examined:
                assert examine(network, sources, 1, 8).problems == 3 * len(TASKS)
        losses.append([s.loss for s in stats])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)  # sums of a GPU vary in their order


def test_the_fp8_report_in_bf16():
    network = tiny.model(dtype=torch.bfloat16, **WIDE).cuda()
    trainer = tiny.trainer(network, rows=64, micro_rows=64, plain=True)
    report = measure(trainer, next(trainer.batches).to(network.device))
    kinds = {layer["name"].rpartition(".")[2] for layer in report.layers}
    assert {"q_a_proj", "kv_b_proj", "o_proj", "gate_up_proj", "down_proj"} <= kinds
    for layer in report.layers:
        for product in layer["products"].values():
            assert 0.0 < product["plain"] < 0.01 < product["error"] < 0.1
        assert all(operand["saturated"] == 0.0 for operand in layer["operands"].values())
