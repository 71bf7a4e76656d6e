"""Accuracy on number puzzles that were never trained on, by task and language, with 95% Wilson intervals.

Problems are drawn from the held-out split of `hadal.data.puzzles`: distinct, the same number in each
language, the same for the same seed. Decoding is greedy and nothing is retried; an answer counts if the
verifier of its task accepts what follows `</think>`. A reasoning that does not end within `max_tokens` is a
wrong answer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

from hadal.data.puzzles import LANGUAGES, TASKS, Sample, verify
from hadal.data.puzzles.examination import problems as problems
from hadal.evals.statistics import wilson as wilson

SAMPLES = 200  # problems a task; fewer are too few for a figure that is published
MAX_TOKENS = 768
BATCH = 256
KEPT_FAILURES = 5  # wrong answers a task that the report shows

Generate = Callable[[list[str]], list[str]]
Progress = Callable[[int, int], None]


class Row(TypedDict):
    """One line of the table. `length` is the mean length of the completions, in the report's unit."""

    task: str
    language: str  # "all", or one language
    kind: str  # "all", or one kind of the task's problems
    correct: int
    total: int
    accuracy: float
    low: float
    high: float
    length: float
    unfinished: int


class Failure(TypedDict):
    task: str
    language: str
    prompt: str
    expected: list[str]
    completion: str


class Report(TypedDict):
    """Everything that was measured and how. Plain data: ready for JSON."""

    suite: str
    accuracy: float  # mean over the tasks, each counting the same
    tasks: list[Row]
    by_language: list[Row]
    by_kind: list[Row]
    failures: list[Failure]
    settings: dict[str, Any]


class ChatEngine(Protocol):
    """What is used of `hadal.engine.Engine`."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]: ...
    def generate(self, prompts: Any, params: Any = None) -> Any: ...


def engine_generate(engine: ChatEngine, max_tokens: int = MAX_TOKENS) -> Generate:
    """Greedy answers of an engine to single questions, in its own chat template."""
    from hadal.engine.request import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)

    def generate(prompts: list[str]) -> list[str]:
        ids = [engine.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
        return [completion.text for completion in engine.generate(ids, params)]

    return generate


def evaluate(
    model: ChatEngine | Generate,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    tasks: Iterable[str] = TASKS,
    max_tokens: int = MAX_TOKENS,
    count_tokens: Callable[[str], int] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure an engine, or any function from questions to completions (`reasoning</think>answer`).

    `count_tokens` gives lengths in tokens (an engine's tokenizer does; otherwise characters). `settings` is
    added to those in the report: machine, dtype, digest of the weights. `progress(done, total)` is called
    after each batch.
    """
    tasks = list(tasks)
    generate: Generate
    if callable(model):
        generate = model
    else:
        generate = engine_generate(model, max_tokens)
        tokenizer = getattr(model, "tokenizer", None)
        if count_tokens is None and tokenizer is not None:
            count_tokens = lambda text: len(tokenizer.encode(text))  # noqa: E731
    asked = problems(samples, seed, tasks)
    started = time.perf_counter()
    said: list[str] = []
    for first in range(0, len(asked), BATCH):
        block = [one.prompt for one in asked[first : first + BATCH]]
        got = generate(block)
        if len(got) != len(block):
            raise ValueError(f"generate gave {len(got)} completions for {len(block)} prompts")
        said += got
        if progress is not None:
            progress(len(said), len(asked))
    used: dict[str, Any] = {
        "split": "held-out",
        "samples_per_task": samples,
        "seed": seed,
        "sampling": "greedy (temperature 0), one answer a problem",
        "max_tokens": max_tokens,
        "problems": len(asked),
        "length_unit": "tokens" if count_tokens else "characters",
        "seconds": round(time.perf_counter() - started, 3),
        **dict(settings or {}),
    }
    return _report(asked, said, count_tokens or len, used)


def _report(
    asked: list[Sample], said: list[str], length: Callable[[str], int], settings: dict[str, Any]
) -> Report:
    judged = [
        (one, verify(one, text), length(text), "</think>" not in text)
        for one, text in zip(asked, said, strict=True)
    ]
    groups: dict[tuple[str, str, str], list[tuple[bool, int, bool]]] = {}
    for one, right, long, unfinished in judged:
        keys = {
            (one.task, "all", "all"),
            (one.task, one.language, "all"),
            (one.task, "all", one.problem.kind or "all"),
        }
        for key in sorted(keys):
            groups.setdefault(key, []).append((right, long, unfinished))
    rows = [_row(*key, entries) for key, entries in groups.items()]
    tasks = [row for row in rows if row["language"] == row["kind"] == "all"]
    return {
        "suite": "puzzles",
        "accuracy": sum(row["accuracy"] for row in tasks) / len(tasks),
        "tasks": tasks,
        "by_language": [row for row in rows if row["language"] != "all"],
        "by_kind": [row for row in rows if row["kind"] != "all"],
        "failures": _failures(asked, said, [right for _, right, _, _ in judged]),
        "settings": settings,
    }


def _row(task: str, language: str, kind: str, entries: list[tuple[bool, int, bool]]) -> Row:
    correct, total = sum(right for right, _, _ in entries), len(entries)
    low, high = wilson(correct, total)
    return {
        "task": task,
        "language": language,
        "kind": kind,
        "correct": correct,
        "total": total,
        "accuracy": correct / total,
        "low": low,
        "high": high,
        "length": sum(long for _, long, _ in entries) / total,
        "unfinished": sum(unfinished for _, _, unfinished in entries),
    }


def _failures(asked: list[Sample], said: list[str], right: list[bool]) -> list[Failure]:
    """The first few wrong answers of each task, whole."""
    kept: Counter[str] = Counter()
    failures: list[Failure] = []
    for one, text, good in zip(asked, said, right, strict=True):
        if not good and kept[one.task] < KEPT_FAILURES:
            kept[one.task] += 1
            failures.append(
                {
                    "task": one.task,
                    "language": one.language,
                    "prompt": one.prompt,
                    "expected": list(one.gold),
                    "completion": text,
                }
            )
    return failures


# ---- the table, for the model card ---------------------------------------------------------------------

_TITLES = {
    "addition": "Addition (to 6 digits)",
    "subtraction": "Subtraction (to 6 digits, also negative results)",
    "multiplication": "Multiplication (to 4×1 and 3×2 digits)",
    "division": "Division with remainder (to 4 digits, divisors to 25)",
    "chain": "Chains of + − ×, brackets",
    "modular": "Remainders of numbers, sums, products",
    "comparison": "Comparison of two numbers (whole, decimal, negative)",
    "extreme": "Largest or smallest of 3–6",
    "sorting": "Sorting 3–7 numbers (to 3 digits)",
    "sequence": "Next term of a sequence",
    "equation": "Linear equations in one unknown",
    "countdown": "Countdown (3 or 4 numbers)",
    "digits": "Reverse a number, sum of digits",
    "divisibility": "Even or odd, divisible by 2–10",
    "chat": "Declines everything else politely",
}


def _share(row: Row) -> str:
    return f"{100 * row['accuracy']:.1f}%"


def table(report: Report) -> str:
    """The results as a Markdown table: one line a task, one column a language."""
    unit = report["settings"]["length_unit"]
    lines = [
        f"| Task | Correct | Accuracy | 95% interval | en | fr | pt | Mean length ({unit}) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["tasks"]:
        by = {r["language"]: _share(r) for r in report["by_language"] if r["task"] == row["task"]}
        interval = f"{100 * row['low']:.1f}–{100 * row['high']:.1f}%"
        languages = " | ".join(by.get(language, "–") for language in LANGUAGES)
        lines.append(
            f"| {_TITLES.get(row['task'], row['task'])} | {row['correct']}/{row['total']} | {_share(row)}"
            f" | {interval} | {languages} | {row['length']:.0f} |"
        )
    lines.append(f"| **Mean over tasks** | | **{100 * report['accuracy']:.1f}%** | | | | | |")
    return "\n".join(lines)


def accuracy_section(report: Report) -> str:
    """The table, and in words how it was measured."""
    s = report["settings"]
    unfinished = sum(row["unfinished"] for row in report["tasks"])
    known = (
        "split",
        "samples_per_task",
        "seed",
        "sampling",
        "max_tokens",
        "problems",
        "length_unit",
        "seconds",
    )
    more = "".join(f", {name} {value}" for name, value in s.items() if name not in known)
    return "\n".join(
        [
            table(report),
            "",
            f"{s['problems']:,} distinct problems that training never saw (held out by a hash of the problem,"
            f" whatever its wording or language), seed {s['seed']}, {s['sampling']}, at most"
            f" {s['max_tokens']} tokens{more}. {unfinished} answers did not end in time and count as wrong."
            " The wordings come from the same templates as in training: other wordings will do worse.",
        ]
    )
