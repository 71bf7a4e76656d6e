"""The pipeline on real text, where there is some: HADAL_TEST_DATA names a folder with these files.

Copies and evaluation questions are planted among real documents, and must be found; whatever else goes must
go for a reason that can be checked.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hadal.data.prepare import Prepared, prepare
from hadal.data.recipe import DataRecipe
from hadal.data.shards import verify_shards
from hadal.data.strict import build
from hadal.data.words import Words, ngrams
from tests.data.test_prepare import files_of, texts_of

DATA = Path(os.environ.get("HADAL_TEST_DATA", "/nowhere"))
FILES = {"english-peps.jsonl.gz": "text", "english-eips.jsonl.gz": "text", "chinese-poetry.jsonl.gz": "text",
         "gsm8k-train.jsonl": "{question}\n{answer}"}  # fmt: skip
EVALUATIONS = ("gsm8k-test.jsonl", "humaneval.jsonl.gz")
CHARACTERS = int(os.environ.get("HADAL_TEST_DATA_CHARACTERS", "600_000"))  # of each file
PLANTED = 25

pytestmark = pytest.mark.skipif(
    not all((DATA / name).is_file() for name in (*FILES, *EVALUATIONS)),
    reason="HADAL_TEST_DATA names no such files",
)


def rows(name: str) -> Iterator[dict[str, Any]]:
    path = DATA / name
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if name.endswith(".gz")
        else path.open(encoding="utf-8") as file
    ):
        yield from map(json.loads, file)


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of the files, and a source `planted`: exact copies, near copies, leaked questions, fresh text."""
    place, rng = tmp_path_factory.mktemp("real"), random.Random(8)
    long: list[str] = []
    for name, text in FILES.items():
        kept, size = [], 0
        for row in rows(name):
            kept.append(row)
            size += len(row.get(text) or row["question"] + row["answer"])
            if size > CHARACTERS:
                break
        write(place / name.removesuffix(".gz"), kept)
        long += [row["text"] for row in kept if 3000 < len(row.get("text", "")) < 60_000]
    questions = [row["question"] for row in rows(EVALUATIONS[0])][:200]
    originals = rng.sample(long, min(2 * PLANTED, len(long)))
    planted = []
    for i in range(PLANTED):
        planted.append({"id": f"exact-{i}", "text": originals[2 * i % len(originals)] + "\n\n"})
        words = originals[(2 * i + 1) % len(originals)].split(" ")
        for _ in range(max(1, len(words) // 300)):
            words[rng.randrange(len(words))] = "replaced"
        planted.append({"id": f"near-{i}", "text": " ".join(words)})
        host = rng.choice(long).split("\n")
        host = [f"{line} {i}{rng.randrange(99)}" for line in host]
        host.insert(len(host) // 2, rng.choice(questions))
        planted.append({"id": f"leaked-{i}", "text": "\n".join(host)})
    write(place / "planted.jsonl", planted)
    return place


def recipe(folder: Path) -> DataRecipe:
    sources = [{"name": name.split(".")[0], "paths": [name.removesuffix(".gz")], "text": text}
               for name, text in FILES.items()]  # fmt: skip
    made = build(DataRecipe, {
        "name": "real", "seed": 1, "source": [*sources, {"name": "planted", "paths": ["planted.jsonl"]}],
        "decontaminate": {"paths": [str(DATA / name) for name in EVALUATIONS]},
        "fim": {"rate": 0.1}, "heldout": {"share": 0.02},
    })  # fmt: skip
    assert isinstance(made, DataRecipe)
    return made


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(recipe(folder), tmp_path_factory.mktemp("out") / "set", base=folder)


def test_all_that_is_planted_is_found(made: Prepared) -> None:
    planted = made.report["sources"]["planted"]
    assert planted["read"] == 3 * PLANTED
    assert planted["dropped"]["exact"] >= PLANTED * 0.9, (
        "an original that fails a filter leaves its copy alone"
    )
    assert planted["kept"] <= PLANTED * 0.1, planted
    assert planted["dropped"]["contamination"] >= PLANTED * 0.8, (
        "some are near copies of their hosts, and go as such"
    )


def test_real_text_is_mostly_kept_and_what_goes_has_a_reason(made: Prepared) -> None:
    for name, source in made.report["sources"].items():
        if name != "planted":
            assert source["kept"] > 0.85 * source["read"], (name, source["dropped"])
    assert made.report["sources"]["chinese-poetry"]["languages"].keys() == {"zh"}
    english = made.report["sources"]["english-peps"]["languages"]
    assert english["en"] > 0.95 * sum(english.values())
    assert all(sample["why"] for entry in made.report["dropped"] for sample in entry["samples"])
    page = (made.folder / "report.md").read_text("utf-8")
    assert max(map(len, page.splitlines())) < 1000 and "| planted |" in page


def test_no_question_of_an_evaluation_set_is_left(made: Prepared) -> None:
    words = Words()
    questions = {g for row in rows(EVALUATIONS[0]) for g in ngrams(words.of(row["question"]), 10).tolist()}
    for text in texts_of(made.folder):
        if "<｜fim▁begin｜>" not in text:
            text = text.removeprefix("<｜begin▁of▁sentence｜>").removesuffix("<｜end▁of▁sentence｜>")
            hit = questions.intersection(ngrams(words.of(text), 10).tolist())
            assert not hit, text[:200]


def test_the_same_input_gives_the_same_shards(folder: Path, made: Prepared, tmp_path: Path) -> None:
    other = prepare(recipe(folder), tmp_path / "set", base=folder, workers=3)
    assert files_of(other.folder) == files_of(made.folder)
    assert verify_shards(other.folder).tokens == made.manifest.tokens > 500_000
