"""Recorded passes on a CPU, where what replays a pass is the pass itself, reading buffers that stay where
they are: lengths on the device, knobs as tensors, first and later passes, kinds of steps, failures.

Real graphs: tests/gpu/test_training_graphs.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hadal.config import Gqa
from hadal.ops.attention import Spans, attention, self_attention, value_width
from hadal.ops.heads import keys_and_values, narrow
from hadal.train.batches import batches, build
from hadal.train.graphs import WARM, GraphError, PassGraphs, kind_of, unfit
from hadal.train.losses import Objective, losses
from hadal.train.nonfinite import NonFiniteError
from hadal.train.schedules import LearningRate, Schedule
from tests.train import tiny

DENSE = {"attention": Gqa(2, 8, qkv_bias=True), "model_type": "qwen2", "moe": None, "mtp": 0}


def again(run):
    """Replays by running, as a graph would whose buffers hold."""
    return run


def graphed(trainer, **options):
    trainer.graphs = PassGraphs(trainer.model, trainer.optimizer, **({"record": again} | options))
    return trainer


def alike(one, other, exact=True):
    for name, tensor in one.tensors().items():
        if exact:
            assert torch.equal(tensor, other.tensors()[name]), name
        elif tensor.is_floating_point():
            torch.testing.assert_close(tensor, other.tensors()[name], rtol=1e-4, atol=1e-5)


# --- lengths on the device ---
def test_empty_sequences_at_the_end_change_nothing():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(11, 2, 8, generator=generator, requires_grad=True) for _ in range(3))
    spans = Spans(torch.tensor([0, 3, 4, 11, 11, 11], dtype=torch.int32), 8)
    assert spans.lengths() == [3, 1, 7]
    found = []
    for out in (self_attention(q, k, v, spans, 0.3), attention(q, k, v, [3, 1, 7], [3, 1, 7], 0.3)):
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("changes", [{}, DENSE], ids=["v3", "qwen"])
def test_a_context_without_lengths_on_the_host(changes):
    network = tiny.model(**changes)
    micro = build(tiny.RandomRows().rows(0, 4), depths=len(network.mtp), mask_documents=True)
    assert micro.start_S.tolist() == micro.cu_seqlens
    filled = torch.cat([micro.start_S, torch.full((5,), micro.tokens, dtype=torch.int32)])
    static = replace(micro, cu_seqlens=[], spans=Spans(filled, tiny.CONTEXT))
    values = []
    for one in (micro, static):
        network.zero_grad()
        rows = 4 if one is micro else torch.tensor(4.0)
        out = losses(network, one, micro.weight_KT.sum(1), rows, Objective(sequence_alpha=0.01))
        out.total(0.3 if one is micro else torch.tensor(0.3), 0.01).backward()
        values.append([out.parts(), *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_whole_rows_have_no_documents():
    masked = build(tiny.RandomRows().rows(0, 4), depths=0, mask_documents=True)
    assert masked.documents == len(masked.cu_seqlens) - 1 > 4
    assert build(tiny.RandomRows().rows(0, 4), depths=0, mask_documents=False).documents == 0
    assert build(tiny.RandomRows(plain=True).rows(0, 4), depths=0, mask_documents=True).documents == 0


# --- steps ---
@pytest.mark.parametrize(
    ("changes", "micro_rows", "fp8"),
    [({}, 1, False), ({}, 4, False), ({}, 2, True), (DENSE, 2, False), (DENSE, 4, True)],
)
def test_steps_are_the_same(changes, micro_rows, fp8):
    plain, recorded = (tiny.trainer(tiny.model(**changes), micro_rows=micro_rows) for _ in range(2))
    graphed(recorded)
    for trainer in (plain, recorded):
        trainer.objective = replace(trainer.objective, fp8=fp8, recompute=("norm", "up", "swiglu"))
    for _ in range(WARM + 3):
        (one,), (other,) = plain.step(), recorded.step()
        assert one == other
    assert recorded.graphs.recorded == (1 if micro_rows == 4 else 2)
    assert plain.take_load() == recorded.take_load()
    alike(plain, recorded)


def test_knobs_move_under_a_graph():
    """λ falls to another value, then to 0; γ and the rate move with every step."""
    plain, recorded = tiny.trainer(), graphed(tiny.trainer())
    tokens = 4 * tiny.CONTEXT
    rate = LearningRate(3e-3, 1e-4, 2 * tokens, 3 * tokens, 20 * tokens)
    for switch, late in ((5, 0.1), (9, 0.0)):
        for trainer in (plain, recorded):
            trainer.schedule = Schedule(rate, 0.001, 4 * tokens, 0.3, late, switch * tokens)
        while plain.progress.step < switch + 4:
            plain.step()
            recorded.step()
            alike(plain, recorded)
    assert not recorded.graphs._kind.mtp


def test_a_growing_batch_is_recorded_where_it_rests():
    """Each size of micro-batch is a kind; what lasts no longer than the warm-up runs without."""
    seen = []

    def counted(run):
        seen.append(run)
        return run

    def rows(position):
        return 2 if position < 4 else 3 if position < 10 else 4

    trainers = []
    for record in (None, counted):
        trainer = tiny.trainer()
        trainer.batches = batches(
            tiny.RandomRows(), position=0, rows=rows, micro_rows=0, depths=1, mask_documents=True
        )
        trainers.append(graphed(trainer, record=record) if record else trainer)
    for _ in range(5 + WARM):
        assert trainers[0].step() == trainers[1].step()
    assert len(seen) == 1
    assert trainers[1].graphs._kind.rows == 4
    alike(*trainers)


def test_more_documents_than_there_is_room_for():
    class Growing(tiny.RandomRows):
        def rows(self, start, count):
            rows = super().rows(start, count)
            if start >= 8 * (WARM + 2):  # every token a document of its own
                rows = replace(rows, lengths=[1] * (count * tiny.CONTEXT), padding=[False] * (count * 16))
            return rows

    trainers = [tiny.trainer(), graphed(tiny.trainer())]
    for trainer in trainers:
        trainer.batches = batches(Growing(), position=0, rows=8, micro_rows=8, depths=1, mask_documents=True)
    capacities = []
    for _ in range(WARM + 4):
        assert trainers[0].step() == trainers[1].step()
        capacities.append(trainers[1].graphs._inputs.capacity)
    assert capacities[0] == 64
    assert capacities[-1] == 192
    alike(*trainers)


def test_weights_that_moved_are_recorded_anew():
    recorded = []

    def counted(run):
        recorded.append(run)
        return run

    trainer = graphed(tiny.trainer(micro_rows=4), record=counted)
    for _ in range(WARM + 2):
        trainer.step()
    assert len(recorded) == 1
    parameter = trainer.optimizer.parameters[3]
    parameter.data = parameter.data.clone()
    trainer.step()
    trainer.model.set_rope(trainer.model.config)  # another table of rotations
    trainer.step()
    trainer.step()
    assert len(recorded) == 3
    trainer.graphs.release()
    trainer.step()
    assert len(recorded) == 4


def test_a_run_goes_on_from_a_checkpoint():
    whole, first = graphed(tiny.trainer(micro_rows=1)), graphed(tiny.trainer(micro_rows=1))
    for _ in range(8):
        whole.step()
    for _ in range(5):
        first.step()
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    second = graphed(tiny.trainer(tiny.model(seed=9), position=first.progress.position, micro_rows=1))
    second.restore(saved, first.progress)
    first.restore(saved, first.progress)  # over live graphs, too
    for _ in range(3):
        assert second.step() == first.step()
    alike(whole, second)
    alike(whole, first)


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = graphed(tiny.trainer(micro_rows=1))
    for _ in range(WARM + 1):
        trainer.step()
    with torch.no_grad():
        trainer.model.layers[1].mlp.experts.down_proj[:, 0, 0] = float("nan")
    trainer.optimizer.from_model()
    before = trainer.optimizer.exp_avg_N.clone()
    with pytest.raises(NonFiniteError, match=f"step {WARM + 2} .*layers.1.mlp.experts.down_proj"):
        trainer.step()
    assert torch.equal(trainer.optimizer.exp_avg_N, before)
    assert not trainer.graphs.recorded


# --- where it cannot be ---
@pytest.mark.parametrize("later", [False, True], ids=["first pass", "later pass"])
def test_a_failure_costs_nothing_but_time(later, caplog):
    plain, recorded = (tiny.trainer(micro_rows=1) for _ in range(2))
    asked = []

    def refuse(run):
        asked.append(run)
        if len(asked) == 1 + later:
            for parameter in recorded.optimizer.parameters[:4]:  # broken off in the middle of a pass
                parameter.grad = torch.full_like(parameter, 7.0)
            recorded.optimizer._taken.add(5)
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return run

    graphed(recorded, record=refuse)
    for _ in range(WARM + 3):
        assert plain.step() == recorded.step()
    assert recorded.graphs.broken.endswith("when stream is capturing")
    assert len([r for r in caplog.records if "graphs of training steps are off" in r.message]) == 1
    assert len(asked) == 1 + later
    alike(plain, recorded)


def test_a_failure_is_an_error_where_graphs_are_wanted():
    def refuse(run):
        raise RuntimeError("no")

    trainer = graphed(tiny.trainer(), record=refuse, required=True)
    for _ in range(WARM):
        trainer.step()
    with pytest.raises(GraphError, match=r"RuntimeError: no\. Set train.graph"):
        trainer.step()


def test_micro_batches_of_several_sizes_have_no_kind():
    batch = next(tiny.trainer().batches)
    assert kind_of(batch, 0.3, Objective()).masked
    batch.micros[1] = build(tiny.RandomRows().rows(0, 1), depths=1, mask_documents=True)
    assert kind_of(batch, 0.3, Objective()) is None
    trainer = graphed(tiny.trainer(), required=True)
    trainer.batches = iter([batch])
    assert np.isfinite(trainer.step()[0].loss)
    assert not trainer.graphs.recorded


def test_a_cpu_has_no_graphs():
    assert "the model is on cpu" in unfit(tiny.model(), masked=True, compiled=False)


def test_values_as_wide_as_keys():
    """Zero columns behind values, as the kernel for several lengths wants them, change nothing in front."""
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(9, 3, 12 + 8, generator=generator, requires_grad=True)
    rope = torch.randn(9, 4, generator=generator)
    q = torch.randn(9, 3, 16, generator=generator)
    found = []
    for wide in (None, 16):
        k, v = keys_and_values(kv, rope, 12, wide)
        out = narrow(self_attention(q, k, v, [2, 7], 0.3), 8)
        found.append((out, *torch.autograd.grad(out.square().sum(), kv)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    assert value_width(q, [2, 7], 8) == 8  # where attention takes them as they are
