"""Documents, shards and packed rows: what the trainer reads is what the engine will be asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

import hadal
from hadal.data import documents
from hadal.data.documents import Encoder, render, write_puzzles
from hadal.data.puzzles import conversation
from hadal.data.shards import (
    Manifest,
    ShardError,
    open_shard,
    read_manifest,
    verify_shards,
    write_manifest,
    write_shard,
)
from hadal.data.stream import PackedRows, assistant_weights, packed_rows
from hadal.data.zero import write_tokenizer
from hadal.text import Control, Tokenizer
from hadal.text.templates import TEMPLATES

ON_BOARD = Path(hadal.__file__).parent / "assets" / "hadal-mini"
BOS, EOS, PAD, THINK, END_THINK = range(5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SHARD_DOCUMENTS", 500)
        write_puzzles(folder, ON_BOARD, tokens=120_000, seed=1, workers=1)
    return folder


def test_documents_are_the_template_of_the_engine() -> None:
    """Prompt ids as the engine makes them, then what the model writes, then eos: exactly the document."""
    tokenizer, encoder = Tokenizer.load(ON_BOARD), Encoder(ON_BOARD)
    template = TEMPLATES["hadal-mini"]
    kinds = set()
    for i in range(400):
        talk = conversation(i, 4)
        kinds.add((len(talk.turns), talk.system is None))
        prompt = template.render(talk.messages()[:-1])
        end = Control("<｜end▁of▁sentence｜>")
        whole = [*prompt, f"{talk.last.think}\n", Control("</think>"), f"\n\n{talk.last.answer}", end]
        assert encoder.encode(render(talk)) == tokenizer.encode_parts(whole)
        assert encoder.encode(render(talk))[: len(tokenizer.encode_parts(prompt))] == tokenizer.encode_parts(
            prompt
        )
    assert {1, 2, 3} == {turns for turns, _ in kinds} and {True, False} == {system for _, system in kinds}


def test_numbers_that_are_one_token_stay_one(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    whole = Backend.from_file(str(folder / "tokenizer.json"))
    text = "12+35=47 +8=55?13 >"
    assert len(whole.encode(text).tokens) < len(text)
    assert Encoder(folder).encode(text) == whole.encode(text, add_special_tokens=False).ids
    assert not Encoder(folder)._by_digit and Encoder(ON_BOARD)._by_digit


def test_the_quick_encoder_equals_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, backend = Encoder(ON_BOARD), Backend.from_file(str(ON_BOARD / "tokenizer.json"))
    monkeypatch.setattr(documents, "MAX_REMEMBERED", 500)
    for i in range(1500):
        text = render(conversation(i, 8))
        assert encoder.encode(text) == backend.encode(text, add_special_tokens=False).ids


def test_workers_write_the_same_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "SHARD_DOCUMENTS", 100)
    monkeypatch.setattr(documents, "documents_for", lambda *_: 110)
    seen: list[tuple[int, int]] = []
    alone = write_puzzles(tmp_path / "a", ON_BOARD, tokens=1, seed=3, workers=1)
    many = write_puzzles(
        tmp_path / "b", ON_BOARD, tokens=1, seed=3, workers=2, progress=lambda d, n: seen.append((d, n))
    )
    assert alone == many and len(many.shards) == 2 and seen[-1] == (2, 2)
    assert sorted(p.suffix for p in (tmp_path / "b").iterdir()) == [".bin", ".bin", ".json", ".len", ".len"]
    assert write_puzzles(tmp_path / "b", ON_BOARD, tokens=1, seed=3) == many, "kept as it is"
    with pytest.raises(ShardError, match="differ in seed"):
        write_puzzles(tmp_path / "b", ON_BOARD, tokens=1, seed=4)


def test_a_failing_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "SHARD_DOCUMENTS", 100)
    monkeypatch.setattr(documents, "documents_for", lambda *_: 200)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{documents.shard_name('train', 0)}.bin.partial").mkdir()
    with pytest.raises(ShardError, match=r"worker .* ended with status 1: .*Error"):
        write_puzzles(tmp_path / "out", ON_BOARD, tokens=1, workers=2)
    with pytest.raises(ShardError, match="holds no finished shards"):
        read_manifest(tmp_path / "out")


def test_shards_hold_the_documents(shards: Path) -> None:
    manifest = verify_shards(shards)
    assert 0.8 < manifest.tokens / 120_000 < 1.2 and len(manifest.shards) > 1
    encoder = Encoder(ON_BOARD)
    index = 0
    for shard in manifest.shards:
        tokens, lengths = open_shard(shards, shard)
        for piece in np.split(tokens, np.cumsum(lengths)[:-1]):
            if index % 37 == 0:
                assert piece.tolist() == encoder.encode(render(conversation(index, 1)))
            assert piece[0] == BOS and piece[-1] == EOS and (piece == THINK).sum() == 1
            index += 1
    assert index == manifest.documents == manifest.made_by["documents"]


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    made = write_shard(tmp_path, "s", [[0, 5, 1], [0, 1]])
    write_manifest(tmp_path, Manifest((made,), {"seed": 1}))
    assert verify_shards(tmp_path).tokens == 5 and read_manifest(tmp_path).made_by == {"seed": 1}
    (tmp_path / "s.bin").write_bytes(bytes(10))
    with pytest.raises(ShardError, match=r"s\.bin has SHA-256"):
        verify_shards(tmp_path)
    (tmp_path / "s.bin").write_bytes(bytes(8))
    with pytest.raises(ShardError, match="has 8 bytes, its manifest says 10"):
        open_shard(tmp_path, made)
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    data = json.loads(text)
    for change, message in (
        ({"format": "x"}, "has format 'x'"),
        ({"tokens": 6}, "says 6 tokens"),
        ({"shards": [{"name": "s"}]}, "not a manifest"),
        ({"shards": [{**data["shards"][0], "name": "../s"}]}, "outside its folder"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps({**data, **change}), encoding="utf-8")
        with pytest.raises(ShardError, match=message):
            read_manifest(tmp_path)
    with pytest.raises(ShardError, match="70000 does not fit"):
        write_shard(tmp_path, "t", [[70000]])


# ---- packed rows -------------------------------------------------------------------------------------


def rows_of(folder: Path, context: int = 256, **options: object) -> PackedRows:
    return packed_rows(folder, context, Tokenizer.load(ON_BOARD).special, **options)


def test_weights_start_after_the_reasoning_opens() -> None:
    tokens = np.array([0, 5, 9, 6, THINK, 30, 40, 41, END_THINK, 42, 1, 0, 7, 8, 1], dtype=np.uint16)
    weights = assistant_weights(tokens, np.array([11, 4]), THINK, 0.25)
    assert weights.tolist() == [0, 0.25, 0.25, 0.25, 0.25, 0.25, 1, 1, 1, 1, 1, 0, 1, 1, 1]


def test_weighted_tokens_are_what_the_model_writes(shards: Path) -> None:
    source, tokenizer = rows_of(shards, 1024, shuffle=False), Tokenizer.load(ON_BOARD)
    rows = source.rows(0, 3)
    flat, weights = rows.token_RC.reshape(-1), rows.weight_RC.reshape(-1)
    talks, at = 0, rows.cu_seqlens
    for begin, end, pad in zip(at, at[1:], rows.padding, strict=False):
        if pad:
            assert not weights[begin:end].any() and (flat[begin:end] == PAD).all()
            continue
        talk = conversation(talks, 1)
        written = flat[begin:end][weights[begin:end] > 0].tolist()
        assert (
            tokenizer.decode(written[:-1], skip_control=False) == talk.last.completion and written[-1] == EOS
        )
        talks += 1
    assert talks > 15


def test_rows_are_whole_documents_in_fixed_places(shards: Path) -> None:
    source = rows_of(shards)
    assert source.cut > 0 and 0.7 < source.filled <= 1
    rows = source.rows(3, 20)
    assert rows.token_RC.shape == rows.weight_RC.shape == (20, 256)
    assert rows.token_RC.dtype == np.int64 and rows.weight_RC.dtype == np.float32
    assert sum(rows.lengths) == 20 * 256 and len(rows.lengths) == len(rows.padding)
    assert set(range(0, 20 * 256 + 1, 256)) <= set(rows.cu_seqlens), "no document crosses the end of a row"
    flat = rows.token_RC.reshape(-1)
    for begin, pad in zip(rows.cu_seqlens, rows.padding, strict=False):
        assert flat[begin] == (PAD if pad else BOS)
    for n in range(20):
        one = source.rows(3 + n, 1)
        assert (one.token_RC[0] == rows.token_RC[n]).all() and (one.weight_RC[0] == rows.weight_RC[n]).all()


def test_an_epoch_holds_every_document_once(shards: Path) -> None:
    source = rows_of(shards, 1024, seed=9)
    count = source.rows_per_epoch
    firsts = []
    for epoch in (0, 1):
        rows = source.rows(epoch * count, count)
        assert sum(not pad for pad in rows.padding) == source.manifest.documents
        lengths = [length for length, pad in zip(rows.lengths, rows.padding, strict=True) if not pad]
        assert sum(lengths) == source.manifest.tokens
        firsts.append(rows.token_RC)
    assert not (firsts[0] == firsts[1]).all(), "each epoch has its own order"
    assert sorted(map(bytes, firsts[0])) == sorted(map(bytes, firsts[1])), "of the same rows"
    assert (rows_of(shards, 1024, seed=9).rows(count + 1, 2).token_RC == firsts[1][1:3]).all(), (
        "resumable anywhere"
    )


def test_bad_arguments_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt_weight 2"):
        rows_of(shards, prompt_weight=2.0)
    with pytest.raises(ValueError, match="first is at least 0"):
        rows_of(shards).rows(-1, 1)
    with pytest.raises(ShardError, match="no token '<think>'"):
        packed_rows(shards, 256, {})
    write_manifest(tmp_path, Manifest((), {}))
    with pytest.raises(ShardError, match="holds no documents"):
        rows_of(tmp_path)
