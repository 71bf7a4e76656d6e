"""Rows for pre-training: the stream of all documents, cut; the same for any number of readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hadal.data.shards import (
    Manifest,
    ShardError,
    ShardFile,
    open_shard,
    verify_shards,
    write_manifest,
    write_shard,
)
from hadal.data.stream import StreamRows, share

LENGTHS = [[5, 1, 30], [7, 8, 9], [2], [64]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards whose tokens count up, past what fits 16 bits."""
    place = tmp_path_factory.mktemp("stream")
    made, at = [], 70_000
    for number, lengths in enumerate(LENGTHS):
        tokens = np.arange(at, at + sum(lengths), dtype=np.uint32)
        made.append(write_shard(place, f"s{number}", (tokens, np.array(lengths, dtype=np.uint32))))
        at += sum(lengths)
    write_manifest(place, Manifest(tuple(made), {}))
    return place


def test_large_vocabularies_take_32_bits(folder: Path) -> None:
    manifest = verify_shards(folder)
    assert [s.dtype for s in manifest.shards] == ["uint32"] * 4 and manifest.shards[0].bytes == 4 * 36
    tokens, lengths = open_shard(folder, manifest.shards[1])
    assert isinstance(tokens, np.memmap) and tokens[0] == 70_036 and lengths.tolist() == [7, 8, 9]
    with pytest.raises(ShardError, match="ids of type 'int8'"):
        ShardFile("x", 1, 1, "", "", "int8")


@pytest.mark.parametrize("context", [2, 7, 16, 50, 126])
def test_rows_are_the_stream(folder: Path, context: int) -> None:
    source = StreamRows(folder, context, shuffle=False)
    count = source.rows_per_epoch
    assert count == 126 // context and source.filled == 1.0 and source.cut == 0
    rows = source.rows(0, count)
    assert rows.token_RC.reshape(-1).tolist() == list(range(70_000, 70_000 + count * context))
    assert (rows.weight_RC == 1).all() and not any(rows.padding)
    borders = np.cumsum([0, *(length for shard in LENGTHS for length in shard)])
    wanted = sorted({*borders[borders <= count * context].tolist(), *range(0, count * context + 1, context)})
    assert rows.cu_seqlens == wanted, "documents begin where they do, torn at the rows' ends"


def test_an_epoch_holds_every_row_once_in_its_own_order(folder: Path) -> None:
    source = StreamRows(folder, 6, seed=4)
    count = source.rows_per_epoch
    epochs = [source.rows(e * count, count).token_RC for e in range(3)]
    firsts = [epoch[:, 0].tolist() for epoch in epochs]
    assert firsts[0] != firsts[1] != firsts[2] and sorted(firsts[0]) == sorted(firsts[1]) == sorted(firsts[2])
    across = StreamRows(folder, 6, seed=4).rows(count - 2, 4).token_RC
    assert (across == np.concatenate([epochs[0][-2:], epochs[1][:2]])).all(), "resumable anywhere"
    assert StreamRows(folder, 6, seed=5).rows(0, count).token_RC[:, 0].tolist() != firsts[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_number_of_readers_changes_nothing(folder: Path, ranks: int) -> None:
    whole = StreamRows(folder, 5, seed=2).rows(11, 20).token_RC
    parts = []
    for rank in range(ranks):
        parts.append(StreamRows(folder, 5, seed=2).rows(*share(11, 20, rank, ranks)).token_RC)
    assert (np.concatenate(parts) == whole).all()


def test_what_makes_no_sense_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds 126 tokens, less than a row of 127"):
        StreamRows(folder, 127)
    with pytest.raises(ValueError, match="context 1"):
        StreamRows(folder, 1)
    with pytest.raises(ValueError, match="first is at least 0"):
        StreamRows(folder, 4).rows(-1, 1)
    for rank, ranks, count in ((2, 2, 4), (0, 5, 4), (-1, 2, 4)):
        with pytest.raises(ValueError, match="rank < ranks"):
            share(0, count, rank, ranks)
