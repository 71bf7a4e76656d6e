"""The table of tasks, and samples as a pure function of (seed, split, index).

Each sample has its own random stream, seeded by a hash of its coordinates, so any worker can make any
sample. `train` and `held-out` share every task and every wording; they differ in the problems: a problem
whose canonical key hashes to 0 modulo 20 is held out, all others are for training (`task.is_held_out`).
"""

from __future__ import annotations

import difflib
import random
from dataclasses import dataclass
from itertools import accumulate

from hadal.data.puzzles.arithmetic import (
    ask_binary,
    draw_addition,
    draw_division,
    draw_multiplication,
    draw_subtraction,
    solve_binary,
)
from hadal.data.puzzles.chains import (
    ask_chain,
    ask_modular,
    draw_chain,
    draw_modular,
    solve_chain,
    solve_modular,
)
from hadal.data.puzzles.chat import ask_chat, chat_language, check_chat, draw_chat, solve_chat
from hadal.data.puzzles.compare import (
    ask_comparison,
    ask_extreme,
    ask_sorting,
    draw_comparison,
    draw_extreme,
    draw_sorting,
    solve_comparison,
    solve_extreme,
    solve_sorting,
)
from hadal.data.puzzles.countdown import ask_countdown, check_countdown, draw_countdown, solve_countdown
from hadal.data.puzzles.digits import (
    ask_digits,
    ask_divisibility,
    draw_digits,
    draw_divisibility,
    solve_digits,
    solve_divisibility,
)
from hadal.data.puzzles.equations import ask_equation, draw_equation, solve_equation
from hadal.data.puzzles.language import is_recognisable
from hadal.data.puzzles.phrases.common import BEFORE
from hadal.data.puzzles.sequences import ask_sequence, draw_sequence, solve_sequence
from hadal.data.puzzles.task import (
    LANGUAGES,
    Problem,
    Sample,
    Task,
    check_numbers,
    check_words,
    final_text,
    is_held_out,
)
from hadal.data.puzzles.wording import phrase

SPLITS = ("train", "held-out")


def _check_comparison(problem: Problem, language: str, answer: str) -> bool:
    return (check_words if problem.kind == "is" else check_numbers)(problem, language, answer)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("addition", 0.09, draw_addition, ask_binary, solve_binary, check_numbers),
        Task("subtraction", 0.09, draw_subtraction, ask_binary, solve_binary, check_numbers),
        Task("multiplication", 0.12, draw_multiplication, ask_binary, solve_binary, check_numbers),
        Task("division", 0.10, draw_division, ask_binary, solve_binary, check_numbers),
        Task("chain", 0.08, draw_chain, ask_chain, solve_chain, check_numbers),
        Task("modular", 0.05, draw_modular, ask_modular, solve_modular, check_numbers),
        Task("comparison", 0.05, draw_comparison, ask_comparison, solve_comparison, _check_comparison),
        Task("extreme", 0.04, draw_extreme, ask_extreme, solve_extreme, check_numbers),
        Task("sorting", 0.06, draw_sorting, ask_sorting, solve_sorting, check_numbers),
        Task("sequence", 0.07, draw_sequence, ask_sequence, solve_sequence, check_numbers),
        Task("equation", 0.06, draw_equation, ask_equation, solve_equation, check_numbers),
        Task("countdown", 0.08, draw_countdown, ask_countdown, solve_countdown, check_countdown),
        Task("digits", 0.02, draw_digits, ask_digits, solve_digits, check_numbers),
        Task("divisibility", 0.03, draw_divisibility, ask_divisibility, solve_divisibility, check_words),
        Task("chat", 0.06, draw_chat, ask_chat, solve_chat, check_chat),
    )
}
EMPHASIS: dict[str, float] = {"countdown/4": 0.03, "chat/off-topic": 0.03}
"""Kinds of a task that a training set holds more of than the task draws, as shares of its documents: those
that the first hadal-mini was weak in. What is examined is drawn by the tasks alone."""
_NAMES = tuple(TASKS)
_CUMULATIVE = tuple(accumulate(task.weight for task in TASKS.values()))


def task(name: str) -> Task:
    """The task of that name. Raises ValueError with a suggestion."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, _NAMES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; tasks: {', '.join(_NAMES)}"
        raise ValueError(f"unknown task {name!r}{hint}")
    return TASKS[name]


def check_name(name: str) -> None:
    """Refuse what is neither a task nor `task/kind`. Raises ValueError."""
    task(name.partition("/")[0])


def _stream(*coordinates: object) -> random.Random:
    """A random stream of its own for these coordinates (seeded by their SHA-512)."""
    return random.Random("/".join(map(str, coordinates)))


def _check_split(split: str) -> bool:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
    return split == "held-out"


def _one(
    rng: random.Random, name: str, held_out: bool, language: str | None, otherwise: str = "en"
) -> Sample:
    """Draw until the problem belongs to the split, then word it and solve it.

    `name`: a task, or one kind of its problems, `countdown/4`. With a `language`, until the wording gives
    that language away; without one, a wording in no language of its own is answered in `otherwise`.
    """
    name, _, kind = name.partition("/")
    chosen = TASKS[name]
    while True:
        problem = chosen.draw(rng)
        if is_held_out(problem.key) != held_out or (kind and problem.kind != kind):
            continue
        asked_in = chat_language(problem) if name == "chat" else language or LANGUAGES[int(rng.random() * 3)]
        if language and asked_in != language:
            continue
        prompt = chosen.ask(problem, asked_in, rng)
        if not is_recognisable(prompt, asked_in):
            if language and language != otherwise:
                continue
            asked_in = otherwise
        solution = chosen.solve(problem, asked_in)
        return Sample(problem, asked_in, prompt, solution.think, solution.answer)


def sample(
    index: int, seed: int = 0, split: str = "train", *, name: str | None = None, language: str | None = None
) -> Sample:
    """Sample number `index` of a split; of one task (or `task/kind`) and one language, if these are named."""
    held_out = _check_split(split)
    rng = _stream(seed, split, index, name or "", language or "")
    if name is not None:
        check_name(name)
    if language is not None and language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; languages: {', '.join(LANGUAGES)}")
    return _one(rng, name or _draw_name(rng), held_out, language)


def _draw_name(rng: random.Random) -> str:
    at = rng.random() * _CUMULATIVE[-1]
    return next(
        name
        for name, bound in zip(_NAMES, _CUMULATIVE, strict=True)
        if at < bound or bound == _CUMULATIVE[-1]
    )


def verify(sample_or_problem: Sample | Problem, completion: str, language: str | None = None) -> bool:
    """Whether a completion answers the problem rightly. Only what follows `</think>` is read."""
    if isinstance(sample_or_problem, Sample):
        problem, language = sample_or_problem.problem, sample_or_problem.language
    else:
        problem = sample_or_problem
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; languages: {', '.join(LANGUAGES)}")
    return TASKS[problem.task].check(problem, language, final_text(completion))


# ---- conversations ----------------------------------------------------------------------------------

MULTI_TURN = 0.12  # of all documents
SYSTEM_PROMPT = 0.06
_SYSTEM: dict[str, tuple[str, ...]] = {
    "en": (
        "You are a helpful assistant.",
        "You are hadal-mini, a small model for number puzzles.",
        "Be brief.",
        "Think step by step.",
        "You are a friendly maths teacher.",
        "Answer in English.",
    ),
    "fr": (
        "Tu es un assistant utile.",
        "Tu es hadal-mini, un petit modèle pour les énigmes de nombres.",
        "Sois bref.",
        "Réfléchis pas à pas.",
        "Vous êtes un professeur de mathématiques.",
        "Réponds en français.",
    ),
    "pt": (
        "Você é um assistente útil.",
        "Você é o hadal-mini, um pequeno modelo para problemas de números.",
        "Seja breve.",
        "Pense passo a passo.",
        "És um professor de matemática.",
        "Responda em português.",
    ),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training document: 1–3 turns. The last is reasoned, earlier ones keep their answers only."""

    turns: tuple[Sample, ...]
    system: str | None

    @property
    def last(self) -> Sample:
        return self.turns[-1]

    def messages(self) -> list[dict[str, str]]:
        """As a chat API takes them; the last assistant message has its `reasoning_content`."""
        listed = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            listed.append({"role": "user", "content": turn.prompt})
            listed.append({"role": "assistant", "content": turn.answer})
        listed[-1]["reasoning_content"] = self.last.think
        return listed


def conversation(index: int, seed: int = 0, split: str = "train", name: str = "") -> Conversation:
    """Document number `index` of a split: one question, at times two or three, at times a system text.

    `name`: the task of its first question, or `task/kind`; empty: by the tasks' weights.
    """
    held_out = _check_split(split)
    rng = _stream(seed, split, index, name) if name else _stream(seed, split, index)
    first = _one(rng, name or _draw_name(rng), held_out, None)
    turns = [first]
    if rng.random() < MULTI_TURN:
        for _ in range(1 if rng.random() < 0.6 else 2):
            turns.append(_follow_up(rng, turns, held_out))
    system = rng.choice(_SYSTEM[first.language]) if rng.random() < SYSTEM_PROMPT else None
    return Conversation(tuple(turns), system)


def _follow_up(rng: random.Random, turns: list[Sample], held_out: bool) -> Sample:
    """Another question, mostly in the same language and often of the same task, at times with `And now, `."""
    language = turns[-1].language if rng.random() < 0.85 else None
    name = turns[-1].task if rng.random() < 0.35 else _draw_name(rng)
    made = _one(rng, name, held_out, language, turns[-1].language)
    if made.task == "chat" or rng.random() > 0.15:
        return made
    prompt = phrase(rng, BEFORE[made.language][2:3]) + made.prompt
    return Sample(made.problem, made.language, prompt, made.think, made.answer)
