"""The pipeline from files to shards: what is planted is found, the same input gives the same bytes, nothing
half-made is taken for whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hadal.data import reading, tasks
from hadal.data.cleaning import normalise
from hadal.data.prepare import ON_BOARD, Prepared, prepare
from hadal.data.recipe import DataRecipe, load
from hadal.data.report import markdown, read_report
from hadal.data.shards import ShardError, open_shard, verify_shards
from hadal.data.strict import RecipeError, build
from hadal.data.tasks import Task, TaskError
from hadal.text import Tokenizer
from tests.data.conftest import Corpus, write_corpus

ROOT = Path(__file__).resolve().parents[2]


def make(corpus: Corpus, out: Path, *changes: str, **options: Any) -> Prepared:
    return prepare(load(corpus.recipe, changes), out, base=corpus.folder, **options)


@pytest.fixture(scope="module")
def made(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return make(corpus, tmp_path_factory.mktemp("made") / "set")


def texts_of(folder: Path) -> list[str]:
    """Every document of a set as text, control tokens shown."""
    tokenizer = Tokenizer.load(ON_BOARD)
    found = []
    for shard in verify_shards(folder).shards:
        tokens, lengths = open_shard(folder, shard)
        pieces = np.split(np.asarray(tokens), np.cumsum(lengths)[:-1])
        found += [tokenizer.decode(piece.tolist(), skip_control=False) for piece in pieces]
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """What a set consists of, the report's timings apart."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith("report")
    }


def test_what_is_planted_is_found_and_nothing_else(corpus: Corpus, made: Prepared) -> None:
    for name, source in made.report["sources"].items():
        wanted = {stage: len(names) for (s, stage), names in corpus.planted.items() if s == name}
        wanted["read"] = wanted.get("read", 0) + (name == "english")  # the line that is no JSON
        assert source["dropped"] == dict.fromkeys(source["dropped"], 0) | wanted, name
        assert source["kept"] == source["read"] - sum(wanted.values())
    shown: dict[tuple[str, str], set[str]] = {}
    for entry in made.report["dropped"]:
        names = {sample["name"] for sample in entry["samples"]}
        shown.setdefault((entry["source"], entry["stage"]), set()).update(names)
    for key, names in corpus.planted.items():
        assert names <= shown[key], key


def test_the_report_says_why(made: Prepared) -> None:
    why = {s["name"]: s["why"] for entry in made.report["dropped"] for s in entry["samples"]}
    assert why["exact"] == "100% like english/en-001"
    assert why["near"].endswith("% like english/en-003") and why["near"] != "100% like english/en-003"
    assert why["leaked"].startswith("q4 (question) has “the ")
    assert why["leaked-short"] == "q20 (question) has “why is blue”"
    assert why["short"] == "10 characters; at least 20" and why["french"] == "language fr"
    assert why["none"] == "no text in 'text'; fields: id, body"
    page = markdown(read_report(made.folder))
    assert page == (made.folder / "report.md").read_text("utf-8")
    for told in ("| english | 130 |", "near copies, near copy (1)", "`leaked-short`", "en 125", "zh 121"):
        assert told in page, told


def test_nothing_that_was_dropped_is_in_the_shards(corpus: Corpus, made: Prepared) -> None:
    texts = texts_of(made.folder) + texts_of(made.folder / "heldout")
    whole = "\n".join(texts)
    for gone in ("And so it ended", "WHY IS", "why IS", "Le chat", "Too short", "again and again"):
        assert gone not in whole, gone
    assert all(t.startswith("<｜begin▁of▁sentence｜>") and t.endswith("<｜end▁of▁sentence｜>") for t in texts)


def test_the_mixture_has_the_wanted_shares(made: Prepared) -> None:
    mixture = made.report["mixture"]
    tokens = {name: m["tokens"] for name, m in mixture.items()}
    assert sum(tokens.values()) == made.manifest.tokens == pytest.approx(24_000, rel=0.07)
    for name, share in {"english": 0.5, "poems": 0.25}.items():
        assert tokens[name] / 24_000 == pytest.approx(share, abs=0.02), name
    assert mixture["notes"]["documents"] > 1, "the one note is seen in more than one epoch"
    assert len(made.manifest.shards) == -(-made.manifest.tokens // 8000) or len(made.manifest.shards) == 3
    assert all(s.dtype == "uint16" for s in made.manifest.shards)


def test_fill_in_the_middle_gives_the_document_back(corpus: Corpus, made: Prepared) -> None:
    originals = {
        normalise(record.text)
        for source in load(corpus.recipe).source
        for file in reading.input_files(source, corpus.folder)
        for record in reading.records(reading.Piece(file), source.text, source.id)
        if record.text is not None
    }
    texts = texts_of(made.folder)
    begin, hole, end, eos = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<｜end▁of▁sentence｜>"
    rearranged = [t for t in texts if begin in t]
    assert 0.15 < len(rearranged) / len(texts) < 0.5
    for text in rearranged:
        bos, rest = text.split(begin)
        prefix, rest = rest.split(hole)
        suffix, middle = rest.split(end)
        assert bos == "<｜begin▁of▁sentence｜>"
        assert prefix + middle.removesuffix(eos) + suffix in originals
    heldout = texts_of(made.folder / "heldout")
    assert heldout and not any(begin in t for t in heldout), "held-out text stays as it is"
    assert not set(heldout) & set(texts)


def test_any_number_of_workers_gives_the_same_bytes(corpus: Corpus, made: Prepared, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    other = make(corpus, tmp_path / "set", workers=2, progress=lambda *tick: seen.append(tick))
    assert files_of(other.folder) == files_of(made.folder)
    assert {title for title, *_ in seen} >= {"reading and filtering", "tokenising", "writing shards"}
    assert all(0 <= done <= total for _, done, total in seen)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"], "nothing is left beside the set"
    again = make(corpus, tmp_path / "set")
    assert not again.fresh and again.manifest == other.manifest


def test_pieces_of_a_file_hold_each_line_once(
    corpus: Corpus, made: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = reading.input_files(load(corpus.recipe).source[0], corpus.folder)[0]
    whole = list(reading.records(reading.Piece(file), "text", "id"))
    for size in (97, 5000):
        monkeypatch.setattr(reading, "PIECE_BYTES", size)
        pieces = reading.pieces_of(file)
        assert len(pieces) == -(-file.bytes // size)
        assert [r for p in pieces for r in reading.records(p, "text", "id")] == whole
    out = make(corpus, tmp_path / "set")
    assert out.report["sources"]["english"]["read"] == len(whole)
    assert files_of(out.folder).keys() == files_of(made.folder).keys()
    assert files_of(out.folder)["manifest.json"] == files_of(made.folder)["manifest.json"], (
        "nor do pieces matter"
    )


def test_a_stopped_run_goes_on_and_ends_the_same(
    corpus: Corpus, made: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after every replacement of a file or folder: no set, or a whole one; at last the same."""
    real: Callable[..., None] = tasks.os.replace
    budget = 0

    def dying(source: Path, target: Path) -> None:
        nonlocal budget
        if budget == 0:
            raise KeyboardInterrupt
        budget -= 1
        real(source, target)

    monkeypatch.setattr(tasks.os, "replace", dying)
    out = tmp_path / "set"
    stops = 0
    while stops < 100:
        budget = stops
        try:
            make(corpus, out)
            break
        except KeyboardInterrupt:
            stops += 1
            assert not out.exists() or verify_shards(out)
    monkeypatch.undo()
    assert 5 < stops < 100
    final = make(corpus, out)
    assert files_of(final.folder) == files_of(made.folder)


def test_a_changed_recipe_repeats_only_what_it_touches(
    corpus: Corpus, made: Prepared, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    make(corpus, tmp_path / "a", work=work)
    first = {p.name for p in work.iterdir()}
    changed = make(corpus, tmp_path / "b", "fim.rate=0.0", work=work)
    added = {p.name.split("-")[0] for p in work.iterdir() if p.name not in first}
    assert added == {"tokens", "mix", "shards"}
    assert changed.report["output"]["fim_documents"] == 0
    fresh = make(corpus, tmp_path / "c", "fim.rate=0.0")
    assert files_of(changed.folder) == files_of(fresh.folder)


def test_another_set_in_its_place_is_refused(corpus: Corpus, made: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds another set \(it differs in recipe\); choose another --out"):
        make(corpus, made.folder, "seed=6")
    mine = write_corpus(tmp_path / "c", documents=121)
    with pytest.raises(ShardError, match="differs in inputs"):
        make(mine, made.folder)


def test_what_cannot_be_mixed_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"source 'notes' allows [\d,]+ within max_epochs 1;"):
        make(corpus, tmp_path / "a", "mixture.max_epochs=1")
    with pytest.raises(RecipeError, match="has a weight, but no document of it is left"):
        make(corpus, tmp_path / "b", 'language.keep=["en"]')
    with pytest.raises(RecipeError, match="leads to no file"):
        bare = tmp_path / "bare"
        bare.mkdir()
        shutil.copy(corpus.recipe, bare / "recipe.toml")
        make(Corpus(bare, {}), tmp_path / "c")
    assert not any((tmp_path / name).exists() for name in "abc")


def test_stages_can_be_left_out(corpus: Corpus, tmp_path: Path) -> None:
    bare = ("duplicates.near=false", "duplicates.exact=false", "decontaminate.paths=[]", "heldout.share=0",
            "language.keep=[]", "fim.rate=0", "tokens.split_rate=0", "tokens.bos=false")  # fmt: skip
    made = make(corpus, tmp_path / "bare", *bare)
    assert {entry["stage"] for entry in made.report["dropped"]} == {"read", "quality"}
    assert not (made.folder / "heldout").exists() and made.report["heldout"] == {}
    assert not any("<｜" in text.removesuffix("<｜end▁of▁sentence｜>") for text in texts_of(made.folder))
    unweighted = json.loads(json.dumps(load(corpus.recipe).to_dict()))
    for source in unweighted["source"]:
        source["weight"] = 0
    unweighted["quality"]["min_characters"] = 10**6
    unweighted["mixture"]["tokens"] = 0
    with pytest.raises(ShardError, match=r"no document is left to train on \(\d+ read, .*dropped"):
        prepare(build(DataRecipe, unweighted), tmp_path / "none", base=corpus.folder)
    assert not (tmp_path / "none").exists()


def test_a_failing_worker_says_what_failed(tmp_path: Path) -> None:
    wrong = [
        Task("hadal.data.steps:pack", str(tmp_path / f"t{i}"), {"plan": str(tmp_path)}) for i in range(2)
    ]
    with pytest.raises(TaskError, match=r"a worker failed at t\d: .*(Error|plan)"):
        tasks.Local(2)(wrong, lambda amount: None)
    assert not any(task.done for task in wrong)


def test_parquet_and_jsonl_give_the_same_records(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"id": f"d{i}", "text": f"Document number {i}, which says something of its own."} for i in range(50)
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=20)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name in ("a.parquet", "b.jsonl"):
        source = load_source(paths=(name,))
        (file,) = reading.input_files(source, tmp_path)
        pieces = reading.pieces_of(file)
        found.append([r for p in pieces for r in reading.records(p, "text", "id")])
    assert found[0] == found[1] and len(found[0]) == 50


def load_source(**fields: Any) -> Any:
    from hadal.data.recipe import Source

    return Source("s", **fields)


def test_a_hub_data_set_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "README.md").write_text("# a card, no text")
    (snapshot / "data" / "train.jsonl").write_text('{"text": "one document of the hub"}\n')
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(snapshot))
    (file,) = reading.input_files(load_source(hub="org/set"), tmp_path)
    assert file.label == "hub:org/set/data/train.jsonl"
    assert [r.text for r in reading.records(reading.Piece(file), "text", "id")] == ["one document of the hub"]


def test_damaged_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00broken")
    (file,) = reading.input_files(load_source(paths=("x.jsonl.gz",)), tmp_path)
    with pytest.raises(reading.DataError, match=r"x\.jsonl\.gz is damaged"):
        list(reading.records(reading.Piece(file), "text", "id"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fim.raet=0.1", "unknown key 'fim.raet' in the recipe. Did you mean 'rate'"),
        ("fimm.rate=0.1", "unknown key 'fimm' in the recipe. Did you mean 'fim'"),
        ("fim.rate=2", r"fim.rate is 2.0; it must be in 0..1"),
        ("tokens.bos=3", "tokens.bos is 3; bool is wanted"),
        ("seed=0.5", "seed is 0.5; int is wanted"),
        ("a.b.c=1", "not of the form"),
        ("duplicates.threshold=0", "above 0, at most 1"),
    ],
)
def test_recipes_are_strict(corpus: Corpus, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(corpus.recipe, [change])
