"""Steps as CUDA graphs against steps without, on the same weights and batches: losses, counts and gradients
within what a repetition without graphs differs by; then runs that grow, resume, stop and fail.

The same on a CPU, where nothing is recorded: tests/train/test_graphs.py."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from hadal.config import Mla
from hadal.data.stream import Rows
from hadal.ops.attention import Spans, attention_reference, self_attention
from hadal.plan.training import TrainingShape, training_memory
from hadal.train.batches import batches
from hadal.train.graphs import WARM, PassGraphs, unfit
from hadal.train.main import train
from hadal.train.nonfinite import NonFiniteError
from tests.gpu.test_training import DENSE, ROWS, WIDE
from tests.train import tiny
from tests.train.test_recompute import KINDS, V3

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
LONG = 256
V2 = WIDE | {"attention": Mla(None, 128, 128, 64, 128), "max_position_embeddings": LONG}
SMOKE = Path(__file__).resolve().parents[2] / "recipes" / "mini-smoke.toml"


class LongRows:
    """Rows of 256 random tokens: whole, or in documents whose number and lengths differ."""

    def __init__(self, plain):
        self.plain = plain

    def rows(self, start, count):
        token, lengths = [], []
        for number in range(start, start + count):
            random = np.random.default_rng(number)
            token.append(random.integers(tiny.VOCAB, size=LONG))
            cuts = [] if self.plain else random.choice(LONG - 1, random.integers(1, 9), replace=False) + 1
            lengths += np.diff([0, *sorted(cuts), LONG]).tolist()
        return Rows(np.stack(token), np.ones((count, LONG), np.float32), lengths, [False] * len(lengths))


def stream(network, source, rows, micro_rows, position=0):
    found = batches(
        source, position=position, rows=rows, micro_rows=micro_rows, depths=len(network.mtp),
        mask_documents=True,
    )  # fmt: skip
    return (batch.to(network.device) for batch in found)


def trainers(count, changes, source, rows, micro_rows, rate=3e-3, **objective):
    """Trainers of the same weights and batches; the last one has graphs."""
    network, found = tiny.model(dtype=torch.bfloat16, **changes).cuda(), []
    for _ in range(count):
        own = copy.deepcopy(network)
        trainer = tiny.trainer(own, rows=rows, micro_rows=micro_rows, rate=rate, speed=0.001 if rate else 0.0)
        trainer.batches = stream(own, source, rows, micro_rows)
        trainer.objective = replace(trainer.objective, **objective)
        found.append(trainer)
    found[-1].graphs = PassGraphs(found[-1].model, found[-1].optimizer, required=True)
    return found


def watched(trainer):
    """The gradient of every step, before it is used."""
    found, norm = [], trainer.optimizer.grad_norm

    def watch():
        found.append(trainer.optimizer.grad_N.clone())
        return norm()

    trainer.optimizer.grad_norm = watch
    return found


CASES = {
    "v3, documents, accumulation": (WIDE, tiny.RandomRows(), 64, 16, {}),
    "v3, documents, one pass": (WIDE, tiny.RandomRows(), 64, 64, {}),
    "v3, recomputation of V3": (WIDE, tiny.RandomRows(), 64, 32, {"recompute": V3}),
    "v3, all recomputation": (WIDE, tiny.RandomRows(), 64, 32, {"recompute": KINDS}),
    "v3, fp8": (WIDE, tiny.RandomRows(), 64, 64, {"fp8": True}),
    "v3, fp8, accumulation": (WIDE, tiny.RandomRows(), 64, 16, {"fp8": True}),
    "v3, fp8, recomputation": (WIDE, tiny.RandomRows(), 64, 32, {"fp8": True, "recompute": V3}),
    "v2, whole rows (cuDNN)": (V2, LongRows(True), 8, 4, {"recompute": V3}),
    "v2, documents, values padded": (V2, LongRows(False), 8, 4, {}),
    "qwen, documents": (DENSE, tiny.RandomRows(), 64, 32, {}),
    "qwen, fp8": (DENSE, tiny.RandomRows(), 64, 32, {"fp8": True}),
    "qwen, long documents": (DENSE | {"max_position_embeddings": LONG}, LongRows(False), 8, 8, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_replayed_passes(case):
    """At a rate of 0 the weights hold still, and every step's gradient can be compared."""
    changes, source, rows, micro_rows, objective = CASES[case]
    three = trainers(3, changes, source, rows, micro_rows, rate=0.0, **objective)
    gradients = [watched(trainer) for trainer in three]
    stats = [[], [], []]
    for _ in range(WARM + 3):
        for trainer, own in zip(three, stats, strict=True):
            own += trainer.step()
    for trainer, own in zip(three, stats, strict=True):
        own += trainer.arrived(wait=True)
    assert three[2].graphs.recorded == (1 if rows == micro_rows else 2)
    for step, (plain, again, graph) in enumerate(zip(*gradients, strict=True)):
        noise = ((again - plain).norm() / plain.norm()).item()
        error = ((graph - plain).norm() / plain.norm()).item()
        # with lengths on the device attention is told the longest that there may be, and shares its work out
        # otherwise: other sums, rounded to BF16 (seen: 0.0018 where an eager repetition has 4e-8)
        assert error <= 3 * noise + 4e-3, (step, error, noise)
    for one, other in zip(stats[0], stats[2], strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.mtp_loss == pytest.approx(one.mtp_loss, rel=1e-4)
        assert other.balance_loss == pytest.approx(one.balance_loss, rel=1e-4)
    assert sum(map(sum, three[0].take_load())) == sum(map(sum, three[2].take_load()))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_training_learns_the_same(fp8):
    three = trainers(3, WIDE, tiny.RandomRows(), 64, 32, fp8=fp8)
    start = three[0].optimizer.master_N.clone()
    losses = []
    for trainer in three:
        stats = [s for _ in range(40) for s in trainer.step()] + trainer.arrived(wait=True)
        losses.append([s.loss for s in stats])
    plain, again, graph = (trainer.optimizer.master_N - start for trainer in three)
    noise = ((again - plain).norm() / plain.norm()).item()
    assert ((graph - plain).norm() / plain.norm()).item() <= 2 * noise + 0.02
    assert losses[2][-1] < losses[2][0] - 0.3
    np.testing.assert_allclose(losses[2], losses[0], rtol=0.02)


def test_sequences_of_length_0_in_the_kernel():
    """Padding of offsets: forward and backward are those of the sequences that there are."""
    random = torch.Generator("cuda").manual_seed(0)
    shapes = ((300, 4, 64), (300, 4, 64), (300, 4, 64))
    q, k, v = (
        torch.randn(s, generator=random, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for s in shapes
    )
    dout = torch.randn(300, 4, 64, generator=random, device="cuda", dtype=torch.bfloat16)
    start = torch.tensor([0, 1, 130, 299, 300, *[300] * 200], dtype=torch.int32, device="cuda")
    out = self_attention(q, k, v, Spans(start, 256), 0.125)
    got = (out, *torch.autograd.grad(out, (q, k, v), dout))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = attention_reference(*wide, [1, 129, 169, 1], [1, 129, 169, 1], 0.125)
    want = (out, *torch.autograd.grad(out, wide, dout.double()))
    for a, b in zip(got, want, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-2


def test_a_growing_batch_and_one_with_more_documents():
    """Kinds follow one another; tokens become documents of their own."""

    class Growing(tiny.RandomRows):
        def rows(self, start, count):
            rows = super().rows(start, count)
            if start < 32 * 4 * WARM:
                return rows
            return replace(rows, lengths=[1] * (count * tiny.CONTEXT), padding=[False] * count * tiny.CONTEXT)

    def rows(position):
        return 16 if position < 32 else 24 if position < 32 + 24 * (WARM + 2) else 64

    plain, graphed = trainers(2, WIDE, Growing(), rows, 0)
    stats, kinds = [[], []], []
    for _ in range(3 * WARM + 6):
        for trainer, own in zip((plain, graphed), stats, strict=True):
            own += trainer.step()
        kinds.append((graphed.graphs._kind.rows, graphed.graphs.recorded, graphed.graphs._inputs.capacity))
    for trainer, own in zip((plain, graphed), stats, strict=True):
        own += trainer.arrived(wait=True)
    np.testing.assert_allclose([s.loss for s in stats[1]], [s.loss for s in stats[0]], rtol=0.02)
    assert {16, 24, 64} == {kind[0] for kind in kinds}
    assert (24, 1) in {kind[:2] for kind in kinds}
    assert kinds[-1][1] == 1
    assert kinds[-1][2] >= 64 * tiny.CONTEXT


def test_a_run_goes_on_from_a_checkpoint():
    whole, first = (trainers(1, WIDE, tiny.RandomRows(), 64, 32)[0] for _ in range(2))
    for _ in range(10):
        whole.step()
    for _ in range(5):
        first.step()
    first.arrived(wait=True)
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    (second,) = trainers(1, WIDE | {"mtp": 1}, tiny.RandomRows(), 64, 32)
    second.batches = stream(second.model, tiny.RandomRows(), 64, 32, first.progress.position)
    first.batches = stream(first.model, tiny.RandomRows(), 64, 32, first.progress.position)
    progress = first.progress
    for _ in range(3):
        first.step()  # and back again, over live graphs
    first.restore(saved, progress)
    first.batches = stream(first.model, tiny.RandomRows(), 64, 32, progress.position)
    second.restore(saved, progress)
    losses = [
        [s.loss for s in [s for _ in range(5) for s in run.step()] + run.arrived(wait=True)][-5:]
        for run in (second, first)
    ]
    want = [s.loss for s in whole.arrived(wait=True)][-1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=5e-3)
    assert losses[0][-1] == pytest.approx(want, rel=5e-3)


def test_a_loss_that_is_not_finite_stops_the_run():
    (trainer,) = trainers(1, WIDE, tiny.RandomRows(), 64, 32)
    for _ in range(WARM + 2):
        trainer.step()
    trainer.arrived(wait=True)
    with torch.no_grad():
        trainer.model.layers[1].mlp.experts.down_proj[:, 0, 0] = float("nan")
    trainer.optimizer.from_model()
    before = trainer.optimizer.exp_avg_N.clone()
    for _ in range(3):
        try:
            trainer.step()
        except NonFiniteError as error:
            assert "layers.1.mlp.experts.down_proj" in error.where
            break
    else:
        with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.experts\.down_proj"):
            trainer.arrived(wait=True)
    assert torch.equal(trainer.optimizer.exp_avg_N, before)
    assert not trainer.graphs.recorded


@pytest.mark.parametrize("kinds", [(), V3], ids=["nothing", "v3"])
def test_the_peak_is_predicted_and_given_back(kinds):
    gc.collect()
    torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated()
    (trainer,) = trainers(1, WIDE, tiny.RandomRows(plain=True), ROWS, ROWS, recompute=kinds)
    trainer.step()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM + 2):
        trainer.step()
    torch.cuda.synchronize()
    shape = TrainingShape(ROWS * tiny.CONTEXT, recompute=kinds)
    predicted = training_memory(trainer.model.config, shape).peak
    measured = torch.cuda.max_memory_allocated() - others
    print(f"predicted {predicted:,}, measured {measured:,}: {predicted / measured - 1:+.1%}")
    assert predicted == pytest.approx(measured, rel=0.1)
    reserved, own = torch.cuda.memory_reserved(), trainer.graphs.bytes
    assert own > 0
    trainer.graphs.release()
    assert torch.cuda.memory_reserved() <= reserved - 0.9 * own
    trainer.step()
    assert trainer.graphs.recorded == 1


def test_a_pass_that_asks_the_host_is_not_recorded():
    """Experts in FP32 do: steps go on without graphs, and CUDA goes on working."""
    network = tiny.model(**WIDE).cuda()
    assert "experts in torch.float32" in unfit(network, masked=True, compiled=False)
    plain, asking = (tiny.trainer(copy.deepcopy(network), rows=64, micro_rows=32) for _ in range(2))
    for trainer in (plain, asking):
        trainer.batches = stream(trainer.model, tiny.RandomRows(plain=True), 64, 32)
    asking.graphs = PassGraphs(asking.model, asking.optimizer)
    own, others = [], []
    for _ in range(WARM + 2):
        own += plain.step()
        others += asking.step()
    assert asking.graphs.broken
    print(asking.graphs.broken)
    torch.cuda.empty_cache()  # the allocator and the random generator know that nothing is recorded
    torch.randn(8, device="cuda")
    one, other = (own + plain.arrived(wait=True))[-1], (others + asking.arrived(wait=True))[-1]
    assert other.loss == pytest.approx(one.loss, rel=1e-3)


@pytest.mark.parametrize("fp8", ["true", "false"])
def test_a_whole_run_with_everything_beside_it(tmp_path, fp8):
    """Evaluation, average, checkpoints and export between replays."""
    options = [
        "train.graph=true", f"train.fp8={fp8}", "train.tokens=40960", "log.heldout_every_steps=7",
        "ema.rate=0.9", "checkpoint.every_steps=5", "export.every_steps=9", f"data.path={tmp_path / 'data'}",
    ]  # fmt: skip
    quiet = Console(quiet=True)
    done = train(SMOKE, out=tmp_path / "a", device="cuda", overrides=options, console=quiet)
    assert done.finished
    plain = [o.replace("graph=true", "graph=false") for o in options]
    without = train(SMOKE, out=tmp_path / "b", device="cuda", overrides=plain, console=quiet)
    assert done.loss == pytest.approx(without.loss, rel=0.03)
