"""Puzzles as a source of `hadal data prepare`: written as they are read, compared with the examination.

A problem is held out by a hash of its key (`hadal.data.puzzles.task.is_held_out`), so a generator never draws
an examined one for training. The pipeline does not take its word for it. A document goes if one of its
questions reads like one of the examination (another problem may be asked in the same words), or if one of its
problems is held out; and of what was written the questions are compared once more, token by token
(`leaks`). Filters of language and quality, and near copies, are for texts that people wrote: these are of
one template each, which is what near copies are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hadal.data.documents import Encoder, documents_for, generator_digest, render
from hadal.data.puzzles import TASKS, Conversation, Sample, conversation
from hadal.data.puzzles.examination import asked, problems
from hadal.data.puzzles.mixture import EMPHASIS
from hadal.data.puzzles.task import is_held_out
from hadal.data.recipe import DataRecipe, Decontaminate, Duplicates, Source, Tokens

__all__ = ["Encoder", "Exam", "generator_digest", "leaks", "puzzle_recipe", "puzzle_texts"]
BYTES = 300  # about, of a document
PIECE_DOCUMENTS = 20_000
SHARD_TOKENS = 4_000_000
HELD_OUT = "a held-out problem, by its key"
_USER, _ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_FILE = "exam.json"


def puzzle_texts(
    name: str, seed: int, split: str, first: int, last: int
) -> Iterator[tuple[Conversation, str]]:
    """Documents number `first` to `last` of a task, and their texts with control tokens."""
    for index in range(first, last):
        talk = conversation(index, seed, split, name)
        yield talk, render(talk)


@dataclass(frozen=True)
class Exam:
    """What must not be trained on. asked, keys: questions (as `asked` writes them) and problems, and the
    number of each among the evaluation texts; other: the number that stands for all other held-out problems;
    prompts: the questions as they are."""

    asked: dict[str, int]
    keys: dict[str, int]
    other: int
    prompts: list[str]

    def find(self, talk: Conversation) -> int:
        """The number of an evaluation text that a document gives away, or −1."""
        for turn in talk.turns:
            found = self.asked.get(asked(turn.prompt), -1)
            if found < 0:
                found = self.keys.get(turn.problem.key, -1)
            if found < 0 and is_held_out(turn.problem.key):
                found = self.other
            if found >= 0:
                return found
        return -1


def examination(samples: int) -> list[tuple[str, Sample]]:
    """(name, problem) of all that `hadal eval --limit N` asks."""
    return [(f"hadal eval, {one.task} {at}", one) for at, one in enumerate(problems(samples))]


def save_exam(folder: Path, exam: Sequence[Sample], first: int, other: int) -> None:
    """Write what `load_exam` reads. The problems are evaluation texts `first` and on."""
    data = {
        "asked": {asked(one.prompt): first + at for at, one in enumerate(exam)},
        "keys": {one.problem.key: first + at for at, one in enumerate(exam)},
        "other": other,
        "prompts": [one.prompt for one in exam],
    }
    (folder / _FILE).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def load_exam(folder: str) -> Exam | None:
    """The examination of an index of evaluation sets, if it has one."""
    path = Path(folder) / _FILE
    return Exam(**json.loads(path.read_text(encoding="utf-8"))) if folder and path.is_file() else None


def leaks(tokens: NDArray[np.uint16 | np.uint32], exam: Exam, encoder: Encoder) -> int:
    """How many questions in written tokens are one of the examination, letter by letter."""
    ((user,), (assistant,)) = encoder.encode(_USER), encoder.encode(_ASSISTANT)
    wanted = {np.array(encoder.encode(prompt), dtype=tokens.dtype).tobytes() for prompt in exam.prompts}
    begins = np.flatnonzero(tokens == user) + 1
    ends = np.flatnonzero(tokens == assistant)
    after = np.searchsorted(ends, begins)  # the first end after each begin; a damaged question has none
    pairs = [(b, ends[e]) for b, e in zip(begins.tolist(), after.tolist(), strict=True) if e < len(ends)]
    return sum(tokens[b:e].tobytes() in wanted for b, e in pairs)


def puzzle_recipe(tokens: int, seed: int, tokenizer: str, folder: Path, examined: int) -> DataRecipe:
    """About `tokens` tokens of training puzzles: a source for each task and each emphasised kind, in their
    shares. tokenizer: as recipes name it; folder: where it lies; examined: problems a task that
    `hadal eval` asks."""
    shares = {name: task.weight for name, task in TASKS.items()} | EMPHASIS
    documents = documents_for(tokens, folder, seed) / sum(shares.values())
    sources = tuple(
        Source(name.replace("/", "-"), puzzles=name, documents=ceil(documents * share))
        for name, share in shares.items()
    )
    return DataRecipe(
        name="puzzles", source=sources, seed=seed, duplicates=Duplicates(near=False),
        decontaminate=Decontaminate(puzzles=examined),
        tokens=Tokens(tokenizer=tokenizer, per_shard=SHARD_TOKENS),
    )  # fmt: skip
