"""Worked puzzles as conversations and as prompts: the data that the R1 recipe begins with.

    {"messages": [question, {"role": "assistant", "reasoning_content": …, "content": …}],
     "task": …, "language": "en", "reasoning_language": "en" | "mixed" | "none", "key": …, "puzzle": …}

A problem is one of `hadal.data.puzzles` by its name (`extreme`, `countdown/3`), or of the small task here,
`steps/N`: a sum of N numbers of one digit, one addition a line, which a model of half a million parameters
learns in a minute. Its problems are those of the puzzles' chains, so that the same verifier judges them.

Three things can be wrong with a worked answer on purpose, each at a rate: no work at all (`direct`), work in
a hurry (`hurried`: two additions a line; of other puzzles the first and the last line only), and lines in
languages drawn anew (`mixed`: R1-Zero's reasoning mixed languages). Everything is a function of the tables,
the seed and the number of the row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hadal.data.puzzles import LANGUAGES, TASKS, Problem, Sample, is_held_out, sample
from hadal.data.puzzles.examination import asked, problems
from hadal.data.puzzles.mixture import check_name
from hadal.data.strict import RecipeError, require
from hadal.post.rewards.rules import as_record

STEPS = "steps"
MOST_STEPS = 9
_FIRST = {"en": "I go from left to right.", "fr": "Je vais de gauche à droite.",
          "pt": "Vou da esquerda para a direita."}  # fmt: skip
_ASK = {
    "en": ("What is {e}?", "Add up {e}.", "Please compute {e}"),
    "fr": ("Combien font {e} ?", "Additionne {e}.", "Calcule {e} s'il te plaît"),
    "pt": ("Quanto é {e}?", "Some {e}.", "Calcule {e} por favor"),
}
_THEN = {"en": "then", "fr": "puis", "pt": "depois"}
_DIRECT = {"en": "I try.", "fr": "J'essaie.", "pt": "Experimento."}


@dataclass(frozen=True)
class WorkedTask:
    """A kind of problem, and its share against the others."""

    name: str
    weight: float = 1.0
    task: str = ""  # what rewards and tables call it; empty: its name

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "above 0")
        head, _, count = self.name.partition("/")
        if head == STEPS:
            fits = count.isdecimal() and 2 <= int(count) <= MOST_STEPS
            require(fits, "name", self.name, f"steps/N with N from 2 to {MOST_STEPS}")
            return
        try:
            check_name(self.name)
        except ValueError as error:
            raise RecipeError(f"{error}; or steps/N") from None

    @property
    def label(self) -> str:
        return self.task or self.name


@dataclass(frozen=True)
class Worked:
    """A problem with its work: `lines[language]` are the same steps in each language, `hurried` fewer."""

    sample: Sample
    task: str
    lines: Mapping[str, Sequence[str]]
    hurried: Mapping[str, Sequence[str]]


def draw(task: WorkedTask, number: int, seed: int, split: str = "train") -> Worked:
    """Problem `number` of a task, never one of the other split's."""
    if task.name.startswith(f"{STEPS}/"):
        return _steps(task, number, seed, split)
    made = sample(number, seed, split, name=task.name)
    solve = TASKS[made.task].solve
    lines = {language: solve(made.problem, language).think.splitlines() for language in LANGUAGES}
    hurried = {one: list(dict.fromkeys([work[0], work[-1]])) for one, work in lines.items()}
    return Worked(made, task.label, lines, hurried)


def _steps(task: WorkedTask, number: int, seed: int, split: str) -> Worked:
    rng = random.Random(f"{task.name}/{seed}/{split}/{number}")
    count, language = int(task.name.partition("/")[2]), rng.choice(LANGUAGES)
    while True:
        digits = [rng.randint(1, 9) for _ in range(count)]
        text = "+".join(map(str, digits))
        problem = Problem("chain", "sum", tuple(text), text, 0, (str(sum(digits)),))
        if is_held_out(text) == (split == "held-out"):
            break
    prompt = rng.choice(_ASK[language]).format(e=text)
    lines, hurried = (
        {one: [_FIRST[one], *_additions(digits, _THEN[one], at_once)] for one in LANGUAGES}
        for at_once in (1, 2)
    )
    answer = f"**{problem.gold[0]}**"
    made = Sample(problem, language, prompt, "\n".join(lines[language]), answer)
    return Worked(made, task.label, lines, hurried)


def _additions(digits: Sequence[int], then: str, at_once: int) -> Iterator[str]:
    """Running totals, `at_once` digits added in a line."""
    total = digits[0]
    for place in range(1, len(digits), at_once):
        some = digits[place : place + at_once]
        yield f"{then} " * (place > 1) + f"{total}+{'+'.join(map(str, some))}={total + sum(some)}"
        total += sum(some)


def prompt_record(worked: Worked) -> dict[str, Any]:
    """What reinforcement learning and rejection sampling ask: prompt, language, the verifier's problem."""
    made = worked.sample
    record = {"prompt": made.prompt, "task": worked.task, "language": made.language,
              "puzzle": as_record(made), "answer": ", ".join(made.gold), "key": made.problem.key}  # fmt: skip
    if made.task == "countdown":
        numbers, target = made.problem.args
        record |= {"numbers": list(numbers), "target": target}
    return record


@dataclass(frozen=True)
class Faults:
    """Rates: of answers without work; of the others, of work in a hurry; of work whose lines are each in a
    language of their own."""

    direct: float = 0.0
    hurried: float = 0.0
    mixed: float = 0.0

    def __post_init__(self) -> None:
        for key in ("direct", "hurried", "mixed"):
            require(0 <= getattr(self, key) <= 1, key, getattr(self, key), "in 0..1")


def conversation(worked: Worked, faults: Faults, rng: random.Random) -> dict[str, Any]:
    """A row of an SFT set."""
    made, asked_in = worked.sample, worked.sample.language
    talk = made.task == "chat"
    direct, mixed, hurried = (rng.random() < r for r in (faults.direct, faults.mixed, faults.hurried))
    lines = worked.hurried if hurried and not talk else worked.lines
    if direct and not talk:
        work, told_in = _DIRECT[asked_in], "none"
    elif mixed and not talk:
        count = min(map(len, lines.values()))
        work = "\n".join(lines[rng.choice(LANGUAGES)][place] for place in range(count))
        told_in = "mixed"
    else:
        work, told_in = "\n".join(lines[asked_in]), asked_in
    record = prompt_record(worked)
    messages = [{"role": "user", "content": record.pop("prompt")},
                {"role": "assistant", "reasoning_content": work, "content": made.answer}]  # fmt: skip
    return {"messages": messages, **record, "reasoning_language": told_in}


@lru_cache(maxsize=1)
def examination(samples: int) -> frozenset[str]:
    """The questions of `hadal eval --limit SAMPLES`, as they are compared. Another problem may be asked in
    the same words: "Paris?" is one question in three languages."""
    return frozenset(asked(one.prompt) for one in problems(samples)) if samples else frozenset()


def rows(
    tasks: Sequence[WorkedTask], count: int, seed: int, split: str = "train", examined: int = 0
) -> Iterator[tuple[int, Worked]]:
    """(number, problem) of `count` rows, tasks drawn by weight; fewer if the examination asks some."""
    rng, left_out = random.Random(f"tasks/{seed}/{split}"), examination(examined)
    names = rng.choices(range(len(tasks)), [task.weight for task in tasks], k=count)
    for number, place in enumerate(names):
        worked = draw(tasks[place], number, seed, split)
        if asked(worked.sample.prompt) not in left_out:
            yield number, worked


def write_conversations(
    path: Path, tasks: Sequence[WorkedTask], count: int, seed: int, faults: Faults, examined: int = 0
) -> dict[str, int]:
    """Write an SFT set. Returns how many rows each task has."""
    found: dict[str, int] = {}
    with path.open("w", encoding="utf-8") as file:
        for number, worked in rows(tasks, count, seed, examined=examined):
            row = conversation(worked, faults, random.Random(f"faults/{seed}/{number}"))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            found[worked.task] = found.get(worked.task, 0) + 1
    return found


def write_prompts(
    path: Path, tasks: Sequence[WorkedTask], count: int, seed: int, split: str = "train", examined: int = 0
) -> dict[str, int]:
    """Write prompts, each once: what has been drawn before is passed over. Returns rows a task."""
    found: dict[str, int] = {}
    seen: set[str] = set()
    with path.open("w", encoding="utf-8") as file:
        for _, worked in rows(tasks, count, seed, split, examined):
            record = prompt_record(worked)
            if record["prompt"] not in seen:
                seen.add(record["prompt"])
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                found[worked.task] = found.get(worked.task, 0) + 1
    return found
