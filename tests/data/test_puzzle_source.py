"""Puzzles through `hadal data prepare`: what is planted goes, what stays is what the generators wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hadal.data import puzzle_source
from hadal.data.documents import Encoder, render
from hadal.data.prepare import ON_BOARD, prepare
from hadal.data.puzzle_source import examination, leaks, load_exam, puzzle_recipe, save_exam
from hadal.data.puzzles import Conversation, conversation
from hadal.data.puzzles.examination import asked, problems
from hadal.data.recipe import DataRecipe, Decontaminate, Duplicates, Source, Tokens
from hadal.data.report import markdown
from hadal.data.shards import open_shard, verify_shards
from hadal.data.strict import RecipeError
from hadal.data.tasks import Local

EXACT = Duplicates(near=False)


def documents(folder: Path) -> list[list[int]]:
    found = []
    for shard in verify_shards(folder).shards:
        tokens, lengths = open_shard(folder, shard)
        found += [piece.tolist() for piece in np.split(tokens, np.cumsum(lengths)[:-1])]
    return found


def test_the_set_holds_what_the_generators_wrote_once(tmp_path: Path) -> None:
    names = {"addition": 60, "countdown/4": 40, "chat": 300}
    sources = tuple(Source(n.replace("/", "-"), puzzles=n, documents=c) for n, c in names.items())
    recipe = DataRecipe("p", sources, seed=5, duplicates=EXACT, tokens=Tokens(per_shard=9000))
    made = prepare(recipe, tmp_path / "set")
    encoder = Encoder(ON_BOARD)
    texts = [render(conversation(i, 5, "train", n)) for n, c in names.items() for i in range(c)]
    same = {" ".join(text.lower().split()): text for text in reversed(texts)}
    assert sorted(documents(tmp_path / "set")) == sorted(encoder.encode(text) for text in same.values())
    gone = {name: row["dropped"]["exact"] for name, row in made.report["sources"].items()}
    assert gone["chat"] > 0 and sum(gone.values()) == len(texts) - len(same)
    assert len(made.manifest.shards) > 2 and "chat/" in markdown(made.report)


def test_the_examination_that_is_planted_is_dropped(tmp_path: Path) -> None:
    sources = (
        Source("train", puzzles="chain", documents=80),
        Source("planted", puzzles="chain", documents=30, split="held-out"),
    )
    recipe = DataRecipe("p", sources, duplicates=EXACT, decontaminate=Decontaminate(puzzles=3))
    made = prepare(recipe, tmp_path / "set")
    rows = made.report["sources"]
    assert rows["planted"]["dropped"]["contamination"] == 30 and rows["planted"]["kept"] == 0
    assert rows["train"]["dropped"]["contamination"] == 0 and rows["train"]["kept"] == 80
    assert made.report["evaluations"]["texts"] == 45 and made.report["evaluations"]["remaining"] == 0
    (entry,) = (e for e in made.report["dropped"] if e["stage"] == "contamination")
    assert entry["samples"] and all("held-out problem" in sample["why"] for sample in entry["samples"])


def test_a_question_in_the_same_words_is_found_whatever_its_problem(tmp_path: Path) -> None:
    """ "Paris" is a question in three languages, three problems: one of them may be examined."""
    exam = [one for _, one in examination(3)]
    save_exam(tmp_path, exam, 10, 99)
    found = load_exam(str(tmp_path))
    assert found is not None and load_exam("") is None
    ordinary = conversation(0, 7, "train", "addition")
    assert found.find(ordinary) == -1
    one = exam[5]
    other = Conversation((ordinary.last, _with_words(ordinary, f"  {one.prompt.upper()}!")), None)
    assert found.find(other) == 15, "by its words"
    assert found.find(Conversation((one,), None)) == 15
    held = next(
        talk for i in range(99) if (talk := conversation(i, 7, "held-out", "chain")).turns[0] not in exam
    )
    assert found.find(held) == 99, "by its key"
    assert asked("Combien fait  12 + 3 ?") == asked("COMBIEN FAIT 12+3") != asked("combien fait 12 - 3")


def _with_words(talk: Conversation, prompt: str):  # type: ignore[no-untyped-def]
    one = talk.last
    return type(one)(one.problem, one.language, prompt, one.think, one.answer)


def test_what_is_left_in_written_tokens_is_counted(tmp_path: Path) -> None:
    exam, encoder = [one for _, one in examination(3)], Encoder(ON_BOARD)
    save_exam(tmp_path, exam, 0, 45)
    found = load_exam(str(tmp_path))
    assert found is not None
    clean = [encoder.encode(render(conversation(i, 7))) for i in range(50)]
    planted = [encoder.encode(render(Conversation((exam[i],), "Be brief."))) for i in (0, 20)]
    talk = conversation(0, 7)
    middle = encoder.encode(render(Conversation((exam[3], talk.last), None)))
    count = lambda texts: leaks(np.concatenate(texts).astype(np.uint16), found, encoder)  # noqa: E731
    assert count(clean) == 0 and count(clean + planted) == 2 and count([middle, *clean]) == 1


def test_other_texts_are_compared_with_the_examination_too(tmp_path: Path) -> None:
    longest = max(problems(3), key=lambda one: len(one.prompt.split()))
    lines = [
        f"Homework. {longest.prompt} I could not do it.",
        "The sea was calm, and nobody spoke of numbers.",
    ]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    recipe = DataRecipe("w", (Source("web", paths=("web.jsonl",)),), decontaminate=Decontaminate(puzzles=3))
    made = prepare(recipe, tmp_path / "set", base=tmp_path)
    assert made.report["sources"]["web"]["dropped"]["contamination"] == 1
    assert made.manifest.documents == 1


def test_a_training_set_by_the_tasks_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puzzle_source, "SHARD_TOKENS", 20_000)
    recipe = puzzle_recipe(60_000, 3, "hadal-mini", ON_BOARD, 3)
    made = prepare(recipe, tmp_path / "one")
    many = prepare(recipe, tmp_path / "two", executor=Local(2))
    assert 0.8 < made.manifest.tokens / 60_000 < 1.2 and made.manifest == many.manifest
    read = {name: row["read"] for name, row in made.report["sources"].items()}
    assert len(read) == 17 and read["multiplication"] > read["countdown-4"] > 0
    assert made.report["evaluations"]["remaining"] == 0
    assert not prepare(recipe, tmp_path / "one").fresh
    other = puzzle_recipe(60_000, 4, "hadal-mini", ON_BOARD, 3)
    with pytest.raises(ValueError, match="holds another set"):
        prepare(other, tmp_path / "one")


@pytest.mark.parametrize(
    "source, message",
    [
        ({"puzzles": "countdwn/4", "documents": 5}, "did you mean 'countdown'"),
        ({"puzzles": "countdown"}, "documents of source"),
        ({"paths": ("x",), "documents": 5}, "documents of source"),
        ({"paths": ("x",), "puzzles": "chat", "documents": 5}, "or puzzles"),
        ({"puzzles": "chat", "documents": 5, "split": "test"}, "source.split"),
    ],
)
def test_what_does_not_fit_is_refused(source: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Source("s", **source)


def test_near_copies_of_templates_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"duplicates\.near .*one template"):
        DataRecipe("p", (Source("s", puzzles="chat", documents=5),))
