"""The examination: which held-out problems `hadal eval` asks, and how a question is compared with them."""

from __future__ import annotations

from collections.abc import Iterable

from hadal.data.puzzles.mixture import TASKS, sample, task
from hadal.data.puzzles.task import LANGUAGES, Sample, is_held_out
from hadal.data.puzzles.wording import without_accents


def problems(samples: int, seed: int = 0, tasks: Iterable[str] = TASKS) -> list[Sample]:
    """`samples` held-out problems a task, no problem twice, as many in each language as can be.

    Raises ValueError if a task has too few problems.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; at least 1")
    share, over = divmod(samples, len(LANGUAGES))
    chosen: list[Sample] = []
    for name in tasks:
        task(name)
        seen: set[str] = set()
        for number, language in enumerate(LANGUAGES):
            each, found = share + (number < over), 0
            for index in range(50 * each + 1000):
                if found == each:
                    break
                made = sample(index, seed, "held-out", name=name, language=language)
                if made.problem.key not in seen:
                    assert is_held_out(made.problem.key)
                    seen.add(made.problem.key)
                    chosen.append(made)
                    found += 1
            if found < each:
                raise ValueError(f"task {name} has only {found} unseen problems in {language}; lower samples")
    return chosen


def asked(prompt: str) -> str:
    """A question as it is compared: case, accents, white space and marks at its end count for nothing."""
    return "".join(without_accents(prompt).lower().split()).rstrip("?.!…=:,")
