"""Targets, MTP inputs and weights by hand; micro-batches; the prefetching thread."""

import threading
import time

import numpy as np
import pytest
import torch

from hadal.train.batches import Prefetcher, Rows, batches, build


def _rows():
    """Two rows of six: documents of 4 and 2 tokens; 3 tokens and 3 of padding. The first token of each
    document is a prompt that is only read."""
    return Rows(
        token_RC=np.array([[10, 11, 12, 13, 20, 21], [30, 31, 32, 0, 0, 0]]),
        weight_RC=np.array([[0, 1, 1, 1, 0, 1], [0, 0.5, 0.5, 0, 0, 0]], dtype=np.float32),
        lengths=[4, 2, 3, 3],
        padding=[False, False, False, True],
    )


def test_masked_documents_by_hand():
    micro = build(_rows(), depths=1, mask_documents=True)
    assert micro.cu_seqlens == [0, 4, 6, 9, 12]
    assert micro.position_T.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2]
    # main: i predicts i+1 inside its document
    assert micro.target_KT[0].tolist() == [11, 12, 13, 0, 21, 0, 31, 32, 0, 0, 0, 0]
    assert micro.weight_KT[0].tolist() == [1, 1, 1, 0, 1, 0, 0.5, 0.5, 0, 0, 0, 0]
    # depth 1: position i embeds i+1 and predicts i+2
    assert micro.token_KT[1].tolist() == [11, 12, 13, 0, 21, 0, 31, 32, 0, 0, 0, 0]
    assert micro.target_KT[1].tolist() == [12, 13, 0, 0, 0, 0, 32, 0, 0, 0, 0, 0]
    assert micro.weight_KT[1].tolist() == [1, 1, 0, 0, 0, 0, 0.5, 0, 0, 0, 0, 0]
    assert micro.counted_KT[0].tolist() == [True] * 9 + [False] * 3
    assert micro.counted_KT[1].tolist() == [True, True, True, False, True, False, True, True, *[False] * 4]


def test_crossing_documents_by_hand():
    """Without document masks a row is one stretch, as in V3's pre-training; padding still counts for
    nothing."""
    micro = build(_rows(), depths=1, mask_documents=False)
    assert micro.cu_seqlens == [0, 6, 12]
    assert micro.position_T.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert micro.target_KT[0].tolist() == [11, 12, 13, 20, 21, 0, 31, 32, 0, 0, 0, 0]
    assert micro.weight_KT[0].tolist() == [1, 1, 1, 0, 1, 0, 0.5, 0.5, 0, 0, 0, 0]
    assert micro.target_KT[1].tolist() == [12, 13, 20, 21, 0, 0, 32, 0, 0, 0, 0, 0]
    assert micro.weight_KT[1].tolist() == [1, 1, 0, 1, 0, 0, 0.5, 0, 0, 0, 0, 0]


def test_two_mtp_depths_chain():
    rows = Rows(np.arange(1, 6)[None], np.ones((1, 5), np.float32), [5], [False])
    micro = build(rows, depths=2, mask_documents=True)
    assert micro.token_KT.tolist() == [[1, 2, 3, 4, 5], [2, 3, 4, 5, 0], [3, 4, 5, 0, 0]]
    assert micro.target_KT.tolist() == [[2, 3, 4, 5, 0], [3, 4, 5, 0, 0], [4, 5, 0, 0, 0]]
    assert micro.weight_KT.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert micro.counted_KT.sum(1).tolist() == [5, 4, 3]


def test_without_mtp_only_the_main_model_is_prepared():
    micro = build(_rows(), depths=0, mask_documents=True)
    assert micro.token_KT.shape == micro.target_KT.shape == micro.weight_KT.shape == (1, 12)


def test_lengths_that_do_not_cover_the_rows_are_refused():
    rows = Rows(np.zeros((1, 5), np.int64), np.ones((1, 5), np.float32), [4], [False])
    with pytest.raises(ValueError, match="sum to 4"):
        build(rows, depths=0, mask_documents=True)


class Counting:
    """Row r holds the token r everywhere."""

    def rows(self, start, count):
        token = np.repeat(np.arange(start, start + count)[:, None], 4, axis=1)
        return Rows(token, np.ones((count, 4), np.float32), [4] * count, [False] * count)


def _batches(position=0, rows=4, micro_rows=2):
    return batches(
        Counting(), position=position, rows=rows, micro_rows=micro_rows, depths=1, mask_documents=True
    )


def test_batches_walk_through_the_rows_and_sum_their_weights():
    stream = _batches()
    first, second = next(stream), next(stream)
    assert [m.token_KT[0, ::4].tolist() for m in first.micros] == [[0, 1], [2, 3]]
    assert [m.token_KT[0, ::4].tolist() for m in second.micros] == [[4, 5], [6, 7]]
    assert (first.position, second.position) == (4, 8)
    assert first.weight_K.tolist() == [4 * 3, 4 * 2]
    assert (first.tokens, first.attended_pairs) == (16, 4 * 16)


def test_a_resumed_stream_gives_what_the_whole_one_gave():
    whole = _batches()
    next(whole)
    resumed = _batches(position=4)
    for _ in range(3):
        a, b = next(whole), next(resumed)
        assert all(torch.equal(x.token_KT, y.token_KT) for x, y in zip(a.micros, b.micros, strict=True))


def test_prefetcher_gives_every_batch_in_order():
    prefetcher = Prefetcher(_batches(), torch.device("cpu"), depth=2)
    assert [next(prefetcher).position for _ in range(6)] == [4, 8, 12, 16, 20, 24]
    prefetcher.close()


def test_prefetcher_stays_its_depth_ahead():
    taken = []

    def slow():
        for batch in _batches():
            taken.append(batch.position)
            yield batch

    prefetcher = Prefetcher(slow(), torch.device("cpu"), depth=2)
    time.sleep(0.5)
    assert len(taken) <= 4  # two queued, one waiting to be queued, one more in hand
    prefetcher.close()
    assert "hadal-batches" not in {t.name for t in threading.enumerate() if t.is_alive()}


def test_an_error_in_the_thread_reaches_the_trainer_every_time():
    def broken():
        yield next(_batches())
        raise OSError("the shard is gone")

    prefetcher = Prefetcher(broken(), torch.device("cpu"))
    next(prefetcher)
    for _ in range(2):
        with pytest.raises(OSError, match="shard is gone"):
            next(prefetcher)
    prefetcher.close()


def test_the_end_of_a_finite_source_is_the_end():
    prefetcher = Prefetcher(iter([next(_batches())]), torch.device("cpu"))
    assert [batch.position for batch in prefetcher] == [4]
    prefetcher.close()
