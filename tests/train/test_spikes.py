"""Spikes by hand: what is one, what is not, and that one does not hide the next."""

import random

from hadal.train.spikes import FEWEST, WINDOW, Spikes


def _watch(sigmas=6.0):
    spikes, noise = Spikes(sigmas), random.Random(0)
    for _ in range(40):
        assert spikes.expected(3.0 + noise.gauss(0, 0.1)) is None
    return spikes


def test_a_loss_far_above_the_recent_ones_is_a_spike_and_does_not_hide_the_next():
    spikes = _watch()
    before = list(spikes.recent)
    for _ in range(3):
        usual = spikes.expected(5.0)
        assert usual is not None and abs(usual - 3.0) < 0.1
    assert list(spikes.recent) == before


def test_noise_and_falls_are_none():
    spikes = _watch()
    assert spikes.expected(3.3) is None
    assert spikes.expected(1.0) is None


def test_a_flat_curve_has_a_floor_of_one_percent():
    spikes = Spikes(6.0)
    for _ in range(30):
        spikes.expected(2.0)
    assert spikes.expected(2.11) is None
    assert spikes.expected(2.13) == 2.0


def test_too_few_losses_tell_nothing_and_zero_watches_nothing():
    spikes = Spikes(6.0)
    for _ in range(FEWEST - 1):
        spikes.expected(2.0)
    assert spikes.expected(100.0) is None
    off = Spikes(0.0)
    assert [off.expected(x) for x in [1.0] * 40 + [99.0]] == [None] * 41


def test_a_restored_window_goes_on():
    first, second = _watch(), Spikes(6.0)
    second.restore(list(first.recent))
    assert second.expected(5.0) == first.expected(5.0)
    assert second.recent.maxlen == WINDOW
