"""The training step against transformers + torch.optim.AdamW, and its own invariances."""

import math

import pytest
import torch

from hadal.model.context import Context
from hadal.ops.cross_entropy import cross_entropy_reference
from hadal.train.balance import max_violation, sequence_loss_reference
from hadal.train.batches import build
from hadal.train.losses import Objective, correction_biases, losses
from hadal.train.nonfinite import NonFiniteError
from hadal.train.trainer import Progress
from tests.train import tiny


# --- against transformers ---
def _peer(network):
    """The same tiny model in transformers, and pairs (its parameter, how to read ours) by its names."""
    transformers = pytest.importorskip("transformers")
    hf = {k: v for k, v in network.config.to_hf().items() if k not in ("architectures", "model_type")}
    hf["num_nextn_predict_layers"] = 0
    peer = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**hf, attn_implementation="eager")
    )
    own = dict(network.named_parameters()) | dict(network.named_buffers())

    def ours(name, pick):
        """Our tensor (a value or a gradient, by `pick`) under their name; gate and up are rows of one
        matrix."""
        name = name.removeprefix("model.")
        for part, half in (("gate_proj", 0), ("up_proj", 1)):
            if name.endswith(f".{part}.weight"):
                return pick(own[name.replace(part, "gate_up_proj")]).chunk(2)[half]
        return pick(own[name])

    named = dict(peer.named_parameters())
    named |= {n: b for n, b in peer.named_buffers() if n.endswith("e_score_correction_bias")}
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(ours(name, lambda t: t))
    return peer, ours


def test_one_step_equals_transformers_and_torch_adamw():
    network = tiny.model(mtp=0)
    peer, ours = _peer(network)
    trainer = tiny.trainer(network, plain=True, alpha=0.0, speed=0.0, moment_dtype=torch.float32)
    batch = next(trainer.batches)

    # Theirs: rows as a batch, loss as a mean over all predicted tokens, clipping, AdamW with decay on
    # matrices.
    token_RC = torch.cat([micro.token_KT[0].view(-1, tiny.CONTEXT) for micro in batch.micros])
    loss = peer(input_ids=token_RC, labels=token_RC, use_cache=False).loss
    loss.backward()

    # Ours: loss and gradients first, then the step itself.
    for micro in batch.micros:
        out = losses(network, micro, batch.weight_K, 4, trainer.objective)
        out.main.backward()
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(
            ours(name, lambda p: p.grad),
            parameter.grad,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    network.zero_grad()

    matrices = [p for p in peer.parameters() if p.ndim >= 2]
    vectors = [p for p in peer.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.95),
    )  # fmt: skip
    norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
    adamw.step()

    trainer.batches = iter([batch])
    (stats,) = trainer.step()
    assert stats.loss == pytest.approx(loss.item(), abs=1e-5)
    assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in peer.named_parameters():
        # Adam's first step divides a gradient by its own size: where it is ~1e-8 (ε), rounding shows
        torch.testing.assert_close(
            ours(name, lambda p: p.detach()),
            parameter.detach(),
            rtol=0,
            atol=2e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# --- the objective, literally ---
def test_losses_equal_a_literal_computation():
    """Document by document: main loss, MTP loss, balance loss and counts, on whole logits."""
    network, rows = tiny.model(), tiny.RandomRows().rows(0, 3)
    micro = build(rows, depths=1, mask_documents=True)
    weight_K = micro.weight_KT.sum(1)
    out = losses(network, micro, weight_K, 3, Objective(sequence_alpha=1.0))

    token_T, weight_T = torch.from_numpy(rows.token_RC).flatten(), torch.from_numpy(rows.weight_RC).flatten()
    main = mtp = start = 0
    counts, scores = {}, {layer: [] for layer in (1, 2, 3)}
    for length, padding in zip(rows.lengths, rows.padding, strict=True):
        token, weight = token_T[start : start + length], weight_T[start : start + length]
        start += length
        context = Context.packed([length])
        context.record_routing = True
        hidden = network(token, context)
        following = torch.cat([token[1:], token[:1] * 0])
        deeper = network.mtp_forward(hidden, following, context)
        for record in context.routing:
            kept = 0 if padding else length - (record.layer == 3)  # the MTP module lacks its last input
            for chosen in record.expert_TK[:kept].flatten().tolist():
                counts[record.layer, chosen] = counts.get((record.layer, chosen), 0) + 1
            scores[record.layer].append((record.score_TE, kept))
        if padding:
            continue
        for i in range(length - 1):
            main = main + weight[i + 1] * network.logits(hidden)[i].log_softmax(-1)[token[i + 1]].neg()
        for i in range(length - 2):
            mtp = mtp + weight[i + 2] * network.mtp_logits(deeper)[i].log_softmax(-1)[token[i + 2]].neg()
    torch.testing.assert_close(out.main, main / weight_K[0])
    torch.testing.assert_close(out.mtp, mtp / weight_K[1])
    for gate, layer in enumerate((1, 2, 3)):
        assert out.count_GE[gate].tolist() == [counts.get((layer, e), 0) for e in range(8)]
    balance, ends = 0.0, [tiny.CONTEXT, 2 * tiny.CONTEXT, 3 * tiny.CONTEXT]
    for layer in (1, 2, 3):
        position, row = 0, []
        for score_TE, kept in scores[layer]:
            row.append(score_TE[:kept])
            position += score_TE.shape[0]
            if position in ends:
                balance += sequence_loss_reference(torch.cat(row), 3) / 3
                row = []
    torch.testing.assert_close(out.balance, balance)


def test_the_mtp_loss_reaches_the_main_model_and_the_padding_does_not():
    network = tiny.model()
    micro = build(tiny.RandomRows().rows(0, 2), depths=1, mask_documents=True)
    out = losses(network, micro, micro.weight_KT.sum(1), 2, Objective())
    out.mtp.backward()
    assert network.layers[0].self_attn.o_proj.weight.grad.abs().sum() > 0
    assert network.mtp[0].eh_proj.weight.grad.abs().sum() > 0
    changed = build(tiny.RandomRows().rows(0, 2), depths=1, mask_documents=True)
    padding_T = ~changed.counted_KT[0]
    assert padding_T.any()
    changed.token_KT[0, padding_T] = 5
    again = losses(network, changed, changed.weight_KT.sum(1), 2, Objective(sequence_alpha=1.0))
    before = losses(network, micro, micro.weight_KT.sum(1), 2, Objective(sequence_alpha=1.0))
    assert torch.equal(again.parts(), before.parts())
    assert torch.equal(again.count_GE, before.count_GE)


def test_mtp_after_or_before_the_final_norm_is_honoured():
    from dataclasses import replace

    network = tiny.model()
    with torch.no_grad():
        network.norm.weight.mul_(torch.linspace(0.5, 2, 32))
    micro = build(tiny.RandomRows().rows(0, 2), depths=1, mask_documents=True)
    values = []
    for after in (True, False):
        network.config = replace(network.config, mtp_after_norm=after)
        values.append(losses(network, micro, micro.weight_KT.sum(1), 2, Objective()).mtp.item())
    assert values[0] != values[1]


# --- invariances ---
def _parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("micro_rows", [1, 2])
def test_accumulation_equals_the_large_batch(micro_rows):
    whole, parts = tiny.trainer(micro_rows=4), tiny.trainer(micro_rows=micro_rows)
    for _ in range(3):
        (a,), (b,) = whole.step(), parts.step()
        assert b.loss == pytest.approx(a.loss, abs=1e-5)
        assert b.mtp_loss == pytest.approx(a.mtp_loss, abs=1e-5)
        assert b.balance_loss == pytest.approx(a.balance_loss, abs=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
        assert b.max_violation == a.max_violation
    for a, b in zip(whole.biases, parts.biases, strict=True):
        assert torch.equal(a, b)
    for name, tensor in _parameters(whole).items():
        torch.testing.assert_close(_parameters(parts)[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_gradients_of_accumulation_equal_those_of_the_large_batch():
    whole, parts = tiny.trainer(micro_rows=4), tiny.trainer(micro_rows=1)
    for trainer in (whole, parts):
        batch = next(trainer.batches)
        for micro in batch.micros:
            out = losses(trainer.model, micro, batch.weight_K, 4, trainer.objective)
            out.total(0.3, 0.01).backward()
            trainer.optimizer.accumulate()
    torch.testing.assert_close(whole.optimizer.grad_N, parts.optimizer.grad_N, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_equals_never_having_stopped(dtype):
    whole = tiny.trainer(tiny.model(dtype=dtype))
    for _ in range(6):
        whole.step()
    first = tiny.trainer(tiny.model(dtype=dtype))
    for _ in range(3):
        first.step()
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    rest = tiny.trainer(tiny.model(seed=9, dtype=dtype), position=first.progress.position)
    rest.restore(saved, first.progress)
    for _ in range(3):
        rest.step()
    assert rest.progress == whole.progress == Progress(6, 6 * 4 * tiny.CONTEXT, 24)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, rest.tensors()[name]), name
    for name, tensor in _parameters(whole).items():
        assert torch.equal(tensor, _parameters(rest)[name]), name


def test_a_checkpoint_of_a_model_with_other_gates_is_refused():
    trainer = tiny.trainer()
    other = tiny.trainer(tiny.model(mtp=0))
    with pytest.raises(ValueError, match="another model"):
        trainer.restore(other.tensors(), Progress())


def test_the_loss_falls_and_statistics_are_those_of_each_step():
    trainer = tiny.trainer(rate=1e-2, plain=True)
    stats = [s for _ in range(40) for s in trainer.step()]
    assert [s.step for s in stats] == list(range(1, 41))
    assert stats[-1].tokens == 40 * 4 * tiny.CONTEXT
    assert stats[0].loss == pytest.approx(math.log(tiny.VOCAB), abs=0.3)
    assert sum(s.loss for s in stats[-5:]) / 5 < 3.0 < stats[0].loss
    assert sum(s.mtp_loss for s in stats[-5:]) / 5 < stats[0].mtp_loss - 1
    load = torch.tensor(trainer.take_load())
    assert load.shape == (3, 8)
    assert trainer.take_load() == []


def test_biases_move_once_a_step_by_gamma_from_all_micro_batches():
    trainer = tiny.trainer(micro_rows=1)
    before = [b.clone() for b in trainer.biases]
    assert len(before) == 3  # two layers and the MTP module
    trainer.step()
    counts = torch.tensor(trainer.take_load(), dtype=torch.float64)
    for gate, (old, new) in enumerate(zip(before, trainer.biases, strict=True)):
        want = 0.001 * torch.sign(counts[gate].mean() - counts[gate]).float()
        torch.testing.assert_close(new - old, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("speed", [0.02, 0.0])
def test_the_bias_alone_balances_a_collapsed_model(speed):
    """A run that starts collapsed: three of eight experts take every token, MaxVio is 8/3 − 1 at each gate.
    Without a balance loss the bias brings every gate below 0.2, over ten steps; without the bias it stays."""
    network = tiny.model()
    for bias in correction_biases(network):
        bias.zero_()
        bias[:3] = 0.5
    trainer = tiny.trainer(network, rows=16, micro_rows=16, plain=True, alpha=0.0, rate=1e-4, speed=speed)
    first = trainer.step()[0]
    for _ in range(45):
        trainer.step()
    trainer.take_load()
    for _ in range(10):
        trainer.step()
    assert first.max_violation == first.max_violation_worst == pytest.approx(8 / 3 - 1)
    violation_G = max_violation(torch.tensor(trainer.take_load()))
    assert len(violation_G) == 3  # two layers and the MTP module
    assert violation_G.max() < 0.2 if speed else violation_G.min() > 1.6


def test_a_dense_model_trains():
    network = tiny.model(mtp=0, moe=None)
    trainer = tiny.trainer(network, rate=1e-2)
    stats = [s for _ in range(20) for s in trainer.step()]
    assert stats[-1].loss < stats[0].loss
    assert (stats[-1].mtp_loss, stats[-1].balance_loss, stats[-1].max_violation) == (0.0, 0.0, 0.0)


# --- what is not finite ---
@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda n: n.layers[1].mlp.shared_experts.register_forward_hook(lambda m, a, o: o * float("nan")),
         r"step 3 .*loss is nan.*first value that is not finite leaves layers.1.mlp.shared_experts"),
        (lambda n: n.layers[2].self_attn.o_proj.weight.register_hook(lambda g: g * float("inf")),
         r"step 3 .*gradient norm is (inf|nan).*gradients of layers.2.self_attn.o_proj.weight are not"),
    ],
)  # fmt: skip
def test_what_is_not_finite_stops_before_the_update_and_is_named(break_it, match):
    trainer = tiny.trainer()
    trainer.step()
    trainer.step()
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    break_it(trainer.model)
    with pytest.raises(NonFiniteError, match=match) as caught:
        trainer.step()
    assert caught.value.step == 3
    for name, tensor in trainer.tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_once_dead_a_trainer_stays_as_it_was():
    """On an accelerator the host learns late: steps made meanwhile must change nothing either."""
    trainer = tiny.trainer()
    trainer.step()
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    trainer.alive = trainer.alive * 0
    with pytest.raises(NonFiniteError):
        trainer.step()
    for name, tensor in trainer.tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_cross_entropy_of_the_step_is_that_of_the_reference():
    network = tiny.model(mtp=0)
    micro = build(tiny.RandomRows(plain=True).rows(0, 2), depths=0, mask_documents=True)
    out = losses(network, micro, micro.weight_KT.sum(1), 2, Objective(z_loss=0.01))
    hidden = network.norm(network(micro.token_KT[0], micro.context()))
    nll_T = cross_entropy_reference(hidden, network.lm_head.weight, micro.target_KT[0], 0.01)
    torch.testing.assert_close(out.main, (nll_T * micro.weight_KT[0]).sum() / micro.weight_KT.sum())
