"""Verifiable sets as files: problems with an answer that a program can judge, one JSON object a line.

The form of a file is told from its records, and may be mixed:

    GSM8K       question, answer ending in `#### 18`
    HumanEval   task_id, prompt, entry_point, canonical_solution, test
    one's own   prompt, problem, question or messages, and answer; kind ("math" unless it says otherwise),
                task (results are grouped by it; the file's name), id. MATH-500 and AIME come so

kind names the reward that judges (docs/rewards.md): math, code, countdown, equation, puzzle, gym; or "text":
the answer's words equal the gold one's, case and white space apart. `.gz` is read, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hadal.data.puzzles import Sample
from hadal.data.strict import RecipeError
from hadal.post.rewards.rules import as_record
from hadal.post.tasks import Record, chat, gsm8k, humaneval, read_jsonl

KINDS = ("math", "text", "code", "countdown", "equation", "puzzle", "gym")
# What is asked beside the problem in a chat; of mathematics as DeepSeek-R1's model card recommends.
INSTRUCTIONS = {
    "math": "Please reason step by step, and put your final answer within \\boxed{}.",
    "text": "Put your final answer within \\boxed{}.",
    "code": "Complete this Python function. Write the whole function into one block of code.",
}
_QUESTIONS = ("prompt", "problem", "question")
_CODE = ({"test", "entry_point", "prompt"}, {"tests"}, {"io"})


class SetError(RecipeError):
    """A set that cannot be read; the message names file, record and remedy."""


@dataclass(frozen=True)
class Problem:
    """One problem. messages: what is asked, in a chat. text: the same as text to continue. record: for the
    reward. group: the row of the results that it belongs to. solution: the set's own answer as a completion,
    None where it has none. place: where it stands."""

    number: int
    name: str
    kind: str
    group: str
    messages: tuple[Mapping[str, Any], ...]
    text: str
    record: Mapping[str, Any]
    solution: str | None
    place: str = ""


def read_set(path: str | Path, *, instruction: str | None = None, limit: int = 0) -> list[Problem]:
    """The problems of a file, the first `limit` (0: all). instruction: asked beside each problem, "" nothing,
    None what INSTRUCTIONS says of its kind. Raises SetError."""
    path = Path(path)
    try:
        records = read_jsonl(path)[: limit or None]
    except RecipeError as error:
        raise SetError(str(error)) from None
    found = []
    for number, (line, record) in enumerate(records):
        place = f"{path}, line {line}"
        try:
            problem = _problem(number, record, instruction, path.name.partition(".")[0])
        except (RecipeError, KeyError, TypeError, AttributeError) as error:
            raise SetError(f"{place}: {error}") from None
        found.append(replace(problem, place=place))
    return found


def sha256_of(path: Path) -> str:
    """Of a file's bytes, as they lie there."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def puzzle_problems(samples: Sequence[Sample]) -> list[Problem]:
    """Problems of this package's puzzles, in groups by task."""
    return [
        Problem(
            number=number,
            name=f"{one.task}/{number}",
            kind="puzzle",
            group=one.task,
            messages=({"role": "user", "content": one.prompt},),
            text=one.prompt,
            record={"puzzle": as_record(one)},
            solution=one.completion,
            place=f"puzzle {one.task}/{number}",
        )
        for number, one in enumerate(samples)
    ]


def form_of(record: Mapping[str, Any]) -> str:
    """ "gsm8k", "humaneval" or "own"."""
    if {"test", "entry_point", "prompt"} <= record.keys() and "kind" not in record:
        return "humaneval"
    answer = record.get("answer")
    if "question" in record and isinstance(answer, str) and "####" in answer and "kind" not in record:
        return "gsm8k"
    return "own"


def _problem(number: int, record: Record, instruction: str | None, group: str) -> Problem:
    form = form_of(record)
    if form == "humaneval":
        return _humaneval(number, record, instruction)
    if form == "gsm8k":
        answer = str(record["answer"])
        record = {**gsm8k(record), "task": record.get("task", "gsm8k")}
        return _own(number, record, instruction, group, solution=answer)
    return _own(number, record, instruction, group)


def _humaneval(number: int, record: Record, instruction: str | None) -> Problem:
    judged = humaneval(record)
    asked = INSTRUCTIONS["code"] if instruction is None else instruction
    content = "\n\n".join(part for part in (asked, f"```python\n{judged['prompt'].rstrip()}\n```") if part)
    solution = record.get("canonical_solution")
    return Problem(
        number=number,
        name=str(record.get("task_id", number)),
        kind="code",
        group=str(record.get("task", "humaneval")),
        messages=({"role": "user", "content": content},),
        text=judged["prompt"],
        record=judged,
        solution=None if solution is None else str(solution),
    )


def _own(
    number: int, record: Record, instruction: str | None, group: str, solution: str | None = None
) -> Problem:
    kind = str(record.get("kind", "code" if any(keys <= record.keys() for keys in _CODE) else "math"))
    if kind not in KINDS:
        raise SetError(f"kind is {kind!r}; kinds: {', '.join(KINDS)}")
    if "messages" in record:
        messages = [dict(message) for message in chat(record)]
    else:
        key = next((key for key in _QUESTIONS if isinstance(record.get(key), str) and record[key]), None)
        if key is None:
            raise SetError(f"it asks nothing: one of {', '.join(_QUESTIONS)} or messages is wanted")
        messages = [{"role": "user", "content": record[key]}]
    if not messages or messages[-1].get("role") != "user":
        raise SetError("its last message is not the user's")
    if kind in ("math", "text") and not _answers(record):
        raise SetError(f"answer is {record.get('answer')!r}; a text, a number, or a list of them is wanted")
    text = str(messages[-1]["content"])
    asked = INSTRUCTIONS.get(kind, "") if instruction is None else instruction
    if asked:
        messages[-1]["content"] = f"{text}\n\n{asked}"
    if solution is None and kind in ("math", "text"):
        solution = f"\\boxed{{{_answers(record)[0]}}}"
    return Problem(
        number=number,
        name=str(record.get("id", number)),
        kind=kind,
        group=str(record.get("task", group)),
        messages=tuple(messages),
        text=text,
        record={**record, "answer": _answers(record)} if kind in ("math", "text") else dict(record),
        solution=solution,
    )


def _answers(record: Mapping[str, Any]) -> list[str]:
    """The gold answers of a record as texts; empty where they are none."""
    answer = record.get("answer")
    listed = answer if isinstance(answer, list) else [answer]
    sound = listed and all(isinstance(one, str | int | float) and str(one).strip() for one in listed)
    return [str(one) for one in listed] if sound else []
