"""Small corpora with what a pipeline has to find planted in them."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

NOUNS = "river harbour engine garden letter teacher window mountain market bridge story winter cable".split()
VERBS = "crosses builds watches carries repairs follows paints measures opens guards finds sells".split()
ADJECTIVES = "old quiet green broken heavy early distant yellow careful narrow bright hidden".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"  # of words that no other sentence has
HAN = "山水花月春秋風雨江天雲樹鳥人心夜寒明遠歸舟酒詩書玉金石白青黃"


def prose(rng: random.Random, sentences: int) -> str:
    """English-looking sentences."""
    lines = []
    for _ in range(sentences):
        a, b = rng.sample(NOUNS, 2)
        lines.append(
            f"The {rng.choice(ADJECTIVES)} {a} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {b}"
            f" and {rng.choice(VERBS)} it {''.join(rng.choices(LETTERS, k=6))} for the {rng.choice(NOUNS)}."
        )
    return "\n".join(lines)


def poem(rng: random.Random) -> str:
    """Lines of Chinese characters."""
    return "\n".join("".join(rng.choices(HAN, k=7)) + "。" for _ in range(6))


@dataclass(frozen=True)
class Corpus:
    """A folder with a recipe, and the names of what is planted in it, by source and stage."""

    folder: Path
    planted: dict[tuple[str, str], set[str]]

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"


def write_corpus(folder: Path, documents: int = 120) -> Corpus:
    """English prose (JSONL), Chinese poems (gzipped), one text file, and an evaluation set."""
    rng = random.Random(7)
    english = {f"en-{i:03d}": prose(rng, 12) for i in range(documents)}
    poems = {f"zh-{i:03d}": poem(rng) for i in range(documents)}
    questions = [prose(rng, 3) for _ in range(20)] + ["Why is blue?"]
    near = english["en-003"].replace("river", "stream", 1) + "\nAnd so it ended."
    english |= {
        "exact": "  " + english["en-001"].replace("\n", "\r\n") + "  \n",
        "near": near,
        "leaked": prose(rng, 6) + "\n" + questions[4].split("\n")[1].upper() + "\n" + prose(rng, 6),
        "leaked-short": prose(rng, 3) + "\nwhy IS, blue\n" + prose(rng, 3),
        "short": "Too short.",
        "repeats": "\n".join(["The same line of the page, again and again."] * 9),
        "signs": "=+*#!" * 40,
        "french": "Le chat de la voisine est dans le jardin et il ne veut pas rentrer pour la nuit. " * 3,
    }
    poems["copy"] = poems["zh-010"]
    (folder / "text").mkdir(parents=True)
    rows = [{"id": name, "text": text} for name, text in english.items()] + [{"id": "none", "body": "x"}]
    (folder / "english.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + "not json\n", "utf-8"
    )
    with gzip.open(folder / "poems.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"title": n, "lines": t}, ensure_ascii=False) + "\n" for n, t in poems.items()
        )
    (folder / "text" / "one.txt").write_text("A note on the harbour.\n" + prose(rng, 40), "utf-8")
    (folder / "text" / "picture.png").write_bytes(b"\x89PNG")
    evaluation = "".join(json.dumps({"id": f"q{i}", "question": q}) + "\n" for i, q in enumerate(questions))
    (folder / "evaluation.jsonl").write_text(evaluation, "utf-8")
    (folder / "recipe.toml").write_text(RECIPE, "utf-8")
    return Corpus(
        folder,
        {
            ("english", "exact"): {"exact"}, ("english", "near"): {"near"},
            ("english", "contamination"): {"leaked", "leaked-short"},
            ("english", "quality"): {"short", "repeats", "signs"}, ("english", "language"): {"french"},
            ("english", "read"): {"none"}, ("poems", "near"): {"copy"},
        },
    )  # fmt: skip


RECIPE = """
name = "planted"
seed = 5

[[source]]
name = "english"
paths = ["english.jsonl"]
weight = 2

[[source]]
name = "poems"
paths = ["*.jsonl.gz"]
text = "{title}\\n{lines}"
id = "title"
weight = 1

[[source]]
name = "notes"
paths = ["text"]
weight = 1

[language]
keep = ["en", "zh", "und"]

[decontaminate]
paths = ["evaluation.jsonl"]

[mixture]
tokens = 24000
max_epochs = 6

[fim]
rate = 0.3

[tokens]
per_shard = 8000
split_rate = 0.5

[heldout]
share = 0.1
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Written once; nobody changes it."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c")
