"""What a stage's model can do: held-out problems by DeepSeek's protocol, k samples each (R1 report §3).

    pass@1   share of right samples, mean over problems
    cons@k   share of problems whose most frequent answer is right (hadal/post/vote.py)
    length   tokens of a completion     form   share with reasoning that ends and an answer behind it
    language share of the words of the reasoning that are of the prompt's language, mean over completions with
             words (DeepSeek-R1 §2.3.2); `no_words` counts those without

Problems depend on the recipe's `[measure]` alone, so that all stages answer the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hadal.data.puzzles import verify
from hadal.data.puzzles.task import bold_value
from hadal.post.r1_recipe import MeasureRecipe
from hadal.post.rewards.language import count
from hadal.post.rewards.protocol import Completion
from hadal.post.rewards.text import split
from hadal.post.vote import vote
from hadal.post.worked import Worked, WorkedTask, draw, prompt_record

KEYS = ("pass@1", "cons", "length", "language", "form", "cut")


@dataclass(frozen=True)
class Judged:
    """One sample."""

    right: bool
    value: str  # what is voted on: the value in the answer, else the whole answer
    tokens: int
    share: float | None  # of the words, the prompt's language; None: no words
    formed: bool
    cut: bool


def judged(worked: Worked, completion: Completion) -> Judged:
    """A sample against its problem."""
    parts, made = split(completion), worked.sample
    found = count(parts.reasoning, made.language)
    text = f"<think>\n{completion.text}" if completion.opened else completion.text
    return Judged(
        verify(made, text), bold_value(parts.answer) or parts.answer, completion.tokens,
        found[made.language] / found.total() if found.total() else None,
        bool(parts.closed and parts.reasoning and parts.answer), completion.cut,
    )  # fmt: skip


def summary(groups: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    """The figures of problems with their samples."""
    every = [one for group in groups for one in group]
    shares = [one.share for one in every if one.share is not None]
    n = max(1, len(every))
    return {
        "problems": len(groups), "samples": len(every),
        "pass@1": sum(one.right for one in every) / n,
        "cons": sum(map(_voted, groups)) / max(1, len(groups)),
        "length": sum(one.tokens for one in every) / n,
        "language": sum(shares) / len(shares) if shares else None,
        "no_words": 1 - len(shares) / n,
        "form": sum(one.formed for one in every) / n,
        "cut": sum(one.cut for one in every) / n,
    }  # fmt: skip


def _voted(group: Sequence[Judged]) -> float:
    return vote([one.value if one.formed else None for one in group], [one.right for one in group])


def problems(recipe: MeasureRecipe, task: WorkedTask) -> list[Worked]:
    """The held-out problems of a task, each prompt once."""
    found: dict[str, Worked] = {}
    for number in range(50 * recipe.count):
        worked = draw(task, number, recipe.seed, "held-out")
        found.setdefault(worked.sample.prompt, worked)
        if len(found) == recipe.count:
            break
    return list(found.values())


def measure(engine: Any, recipe: MeasureRecipe) -> dict[str, Any]:
    """Ask an engine. Returns the figures over all problems, by task and by language, and the settings."""
    begun = time.perf_counter()
    asked = [(task.label, n, one) for task in recipe.tasks for n, one in enumerate(problems(recipe, task))]
    groups = answered(engine, recipe, [(n, one) for _, n, one in asked])
    tasks: dict[str, list[list[Judged]]] = {}
    languages: dict[str, list[list[Judged]]] = {}
    for (label, _, worked), group in zip(asked, groups, strict=True):
        tasks.setdefault(label, []).append(group)
        languages.setdefault(worked.sample.language, []).append(group)
    return {
        "all": summary(groups), "tasks": {name: summary(some) for name, some in tasks.items()},
        "languages": {name: summary(groups) for name, groups in sorted(languages.items())},
        "settings": {"samples": recipe.samples, "temperature": recipe.temperature, "top_p": recipe.top_p,
                     "max_tokens": recipe.max_tokens, "seed": recipe.seed, "split": "held-out"},
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def answered(engine: Any, recipe: MeasureRecipe, asked: Sequence[tuple[int, Worked]]) -> list[list[Judged]]:
    """The samples of (number in its task, problem), all tasks in one batch: its end, where few are left, is
    what a GPU loses time on."""
    from hadal.engine import SamplingParams

    chats = [[{"role": "user", "content": one.sample.prompt}] for _, one in asked]
    ids = [engine.encode_chat(chat) for chat in chats]
    params = [
        SamplingParams(
            max_tokens=recipe.max_tokens, temperature=recipe.temperature, top_p=recipe.top_p,
            seed=recipe.seed + 1000 * n + i,
        )
        for n, _ in asked for i in range(recipe.samples)
    ]  # fmt: skip
    answers = engine.generate([one for one in ids for _ in range(recipe.samples)], params)
    groups: list[list[Judged]] = [[] for _ in asked]
    for number, answer in enumerate(answers):
        at = number // recipe.samples
        opened, worked = engine.template.starts_in_reasoning(None, chats[at]), asked[at][1]
        said = Completion(
            prompt_record(worked), answer.text, len(answer.token_ids), answer.finish_reason, opened
        )
        groups[at].append(judged(worked, said))
    return groups


def shown(key: str, value: float | None) -> str:
    """A figure as tables have it."""
    if value is None:
        return "–"
    return f"{value:.0f}" if key == "length" else f"{100 * value:.1f}%"


def table(found: dict[str, Any]) -> str:
    """The figures of one model as Markdown."""
    k = found["settings"]["samples"]
    lines = [
        f"| task | problems | pass@1 | cons@{k} | mean length (tokens) | language consistency | form | cut |",
        "|---|---|---|---|---|---|---|---|",
    ]
    named = [*found["tasks"].items(), *((f"in {n}", row) for n, row in found["languages"].items())]
    for name, row in [*named, ("**all**", found["all"])]:
        cells = " | ".join(shown(key, row[key]) for key in KEYS)
        lines.append(f"| {name} | {row['problems']} | {cells} |")
    s = found["settings"]
    lines += [
        "",
        f"{k} samples a problem at temperature {s['temperature']:g}, top-p {s['top_p']:g}, at most "
        f"{s['max_tokens']} tokens; problems that no training of this recipe draws (held out by a hash of "
        "the problem). Language consistency: share of the reasoning's words that are of the prompt's "
        "language.",
    ]
    return "\n".join(lines)
