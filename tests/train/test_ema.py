"""The moving average: its formula, dead steps, resuming, and the model while it holds the average."""

import pytest
import torch

from hadal.train.ema import Ema
from tests.train import tiny


def _trainer(network=None, rate=0.9, every=1, **options):
    trainer = tiny.trainer(network, **options)
    trainer.ema = Ema(trainer.optimizer, rate, every)
    return trainer


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_follows_its_formula(every):
    trainer = _trainer(every=every)
    want = trainer.optimizer.master_N.double()
    for step in range(1, 8):
        trainer.step()
        if step % every == 0:
            update = step // every
            kept = min(0.9**every, (1 + update) / (10 + update))
            want = kept * want + (1 - kept) * trainer.optimizer.master_N.double()
    torch.testing.assert_close(trainer.ema.average_N.double(), want, rtol=1e-5, atol=1e-7)
    assert not torch.equal(trainer.ema.average_N, trainer.optimizer.master_N)


def test_a_dead_step_changes_no_bit_of_the_average():
    trainer = _trainer()
    trainer.step()
    before = trainer.ema.average_N.clone()
    trainer.ema.update(2, torch.tensor(0.0))
    assert torch.equal(trainer.ema.average_N, before)


def test_a_resumed_average_equals_one_that_never_stopped():
    whole = _trainer(every=2)
    for _ in range(6):
        whole.step()
    first = _trainer(every=2)
    for _ in range(3):
        first.step()
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    rest = _trainer(tiny.model(seed=9), every=2, position=first.progress.position)
    rest.restore(saved, first.progress)
    for _ in range(3):
        rest.step()
    assert torch.equal(whole.ema.average_N, rest.ema.average_N)


def test_the_model_holds_the_average_inside_the_block_only():
    trainer = _trainer(tiny.model(dtype=torch.bfloat16))
    for _ in range(3):
        trainer.step()
    before = [p.clone() for p in trainer.model.parameters()]
    average = trainer.ema.state()
    with pytest.raises(KeyError), trainer.ema.in_model():
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, average[f"ema.{name}"].bfloat16()), name
        raise KeyError
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_what_does_not_fit_is_refused():
    trainer = _trainer()
    with pytest.raises(ValueError, match="does not fit"):
        trainer.ema.load_state({})
    with pytest.raises(ValueError, match="rate in"):
        Ema(trainer.optimizer, 1.0)
