"""What `hadal data prepare` makes, the trainer reads: a stream without masks, whole documents with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hadal.data.prepare import prepare
from hadal.data.reading import sha256_of
from hadal.data.recipe import load
from hadal.data.report import read_report
from hadal.data.shards import Manifest, ShardError, write_manifest, write_shard
from hadal.data.stream import PackedRows, StreamRows
from hadal.train import recipe as training
from hadal.train.batches import build
from hadal.train.sources import ON_BOARD, Sources, open_sources
from tests.data.conftest import Corpus

MODEL = {"model_type": "deepseek_v3"}


@pytest.fixture(scope="module")
def folder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = prepare(load(corpus.recipe), tmp_path_factory.mktemp("read") / "set", base=corpus.folder)
    return made.folder


def sources(folder: Path, mask: bool) -> Sources:
    data = {
        "source": "shards",
        "path": str(folder),
        "heldout_path": str(folder / "heldout"),
        "mask_documents": mask,
    }
    recipe = training.from_dict(
        {"run": {"name": "r", "seed": 2}, "data": data, "model": MODEL, "learning_rate": {"peak": 1e-3},
         "train": {"tokens": 4096, "context": 128, "batch_tokens": 1024}}
    )  # fmt: skip
    return open_sources(recipe, folder, lambda line: None)


def test_without_masks_rows_are_the_stream(folder: Path) -> None:
    opened = sources(folder, mask=False)
    assert isinstance(opened.train, StreamRows) and isinstance(opened.heldout, PackedRows)
    assert opened.train.rows_per_epoch == opened.train.manifest.tokens // 128
    batch = build(opened.train.rows(0, 4), depths=1, mask_documents=False)
    assert batch.cu_seqlens == [0, 128, 256, 384, 512]
    assert int((batch.weight_KT[0] > 0).sum()) == 4 * 127, "all but each row's last token predict the next"


def test_with_masks_rows_are_whole_documents(folder: Path) -> None:
    opened = sources(folder, mask=True)
    assert isinstance(opened.train, PackedRows)
    rows = opened.train.rows(0, 8)
    assert build(rows, depths=1, mask_documents=True).cu_seqlens == rows.cu_seqlens
    firsts = rows.token_RC.reshape(-1)[rows.cu_seqlens[:-1]]
    assert {int(t) for t, pad in zip(firsts, rows.padding, strict=True) if not pad} == {0}, (
        "each begins with BOS"
    )


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "heldout"):
        made = write_shard(place, "s", [[0, *range(4000, 4300), 1]])
        write_manifest(place, Manifest((made,), {}))
    for mask in (True, False):
        with pytest.raises(ShardError, match="the shards were written with another"):
            sources(tmp_path, mask)


def test_the_same_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    """Which fit the vocabulary, and mean other text; the model on board keeps its ids whatever its file."""

    def made_by(name: str, digest: str) -> None:
        for place in (tmp_path, tmp_path / "heldout"):
            made = write_shard(place, "s", [[0, *range(300), 1]])
            facts = {"recipe": {"tokens": {"tokenizer": name}}, "tokenizer_sha256": digest}
            write_manifest(place, Manifest((made,), facts))

    made_by("tokenizers/mine", "0" * 64)
    for mask in (True, False):
        with pytest.raises(training.RecipeError, match=r"data.tokenizer is 'hadal-mini'.*'tokenizers/mine'"):
            sources(tmp_path, mask)
    for name, digest in (("copy", sha256_of(ON_BOARD / "tokenizer.json")), ("hadal-mini", "0" * 64)):
        made_by(name, digest)
        assert sources(tmp_path, mask=True).train.manifest.tokens == 302


def test_held_out_shards_that_are_not_there_are_told_as_such(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest((write_shard(tmp_path, "s", [[0, *range(300), 1]]),), {}))
    with pytest.raises(training.RecipeError, match=r"data\.heldout_path: .*heldout holds no finished shards"):
        sources(tmp_path, mask=True)


def test_puzzles_of_a_run_come_with_the_report_of_the_pipeline(tmp_path: Path) -> None:
    recipe = training.from_dict(
        {"run": {"name": "r", "seed": 2}, "data": {"source": "puzzles", "examined": 3, "workers": 1},
         "model": MODEL, "learning_rate": {"peak": 1e-3},
         "train": {"tokens": 20_480, "context": 512, "batch_tokens": 1024}, "log": {"heldout_tokens": 2048}}
    )  # fmt: skip
    said: list[str] = []
    first, again = (open_sources(recipe, tmp_path, said.append) for _ in range(2))
    report = read_report(tmp_path / "train")
    assert report["evaluations"]["texts"] == 45 and report["evaluations"]["remaining"] == 0
    assert set(report["sources"]) >= {"addition", "countdown-4", "chat"}
    assert first.train.manifest == again.train.manifest, "what lies there is kept"
    assert any("the examination of 45 questions" in line for line in said)
    assert first.heldout is not None and first.heldout.manifest.made_by["split"] == "held-out"
    assert isinstance(first.train, PackedRows) and first.train.rows(0, 2).padding.count(False) > 3
