"""Where prompts come from: JSONL files, reasoning-gym, this package's puzzles; a mixture of them.

    [[tasks]]
    source = "jsonl"          # a file of records; "gsm8k", "humaneval": a file in that data set's own form;
    path = "prompts.jsonl"    #   "puzzles", "gym": procedural, without a file
    name = "countdown/4"      # of puzzles: a task, `task/kind`, or empty for all; of gym: its data set
    task = ""                 # what the records' `task` becomes; default: the source's name
    weight = 1.0              # share of the prompts, against those of the other tables
    language = ""             # of puzzles: one language; else all of them
    split = "train"           # of puzzles: "train" or "held-out"
    size = 0                  # procedural: this many different prompts; files: the first so many. 0: no limit
                              #   (10,000 of gym)
    seed = 0
    instruction = ""          # put after the prompt's last message
    config = {}               # of gym: settings of the data set

A record is JSON: `prompt` or `messages`, `task`, and what rewards need (docs/rewards.md). `Prompts.record(n)`
is a function of the tables and n alone, so that a run resumes at any prompt.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hadal.data.puzzles import LANGUAGES, SPLITS, sample
from hadal.data.puzzles.mixture import check_name
from hadal.data.strict import RecipeError, build, half_character, require
from hadal.post.rewards import gym
from hadal.post.rewards.protocol import RewardError
from hadal.post.rewards.rules import as_record
from hadal.post.rewards.text import after_hashes

Record = dict[str, Any]
SOURCES = ("jsonl", "puzzles", "gym", "gsm8k", "humaneval")
_ENDLESS = 2**31
_GYM_SIZE = 10_000  # some data sets make all of it at once


@dataclass(frozen=True)
class TaskRecipe:
    """One table; the module's docstring says what each key means."""

    source: str
    path: str = ""
    name: str = ""
    task: str = ""
    weight: float = 1.0
    language: str = ""
    split: str = "train"
    size: int = 0
    seed: int = 0
    instruction: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.source in SOURCES, "source", self.source, f"one of {', '.join(SOURCES)}")
        files = self.source not in ("puzzles", "gym")
        require(bool(self.path) == files, "path", self.path, "a file" if files else "left out")
        wanted = bool(self.name) or self.source != "gym"
        require(wanted, "name", self.name, "a data set of reasoning-gym, such as countdown")
        require(not self.name or not files, "name", self.name, "left out for files")
        require(0 < self.weight < math.inf, "weight", self.weight, "above 0")
        require(self.size >= 0, "size", self.size, "0 (no limit) or more")
        require(0 <= self.seed < 2**31, "seed", self.seed, "in 0..2^31−1")
        puzzles = self.source == "puzzles"
        known = self.language in ("", *LANGUAGES) if puzzles else not self.language
        require(known, "language", self.language, f"for puzzles, one of {', '.join(LANGUAGES)}")
        require(self.split in SPLITS, "split", self.split, f"one of {', '.join(SPLITS)}")
        require(not self.config or self.source == "gym", "config", self.config, "left out but for gym")


def read(tables: Sequence[Mapping[str, Any]]) -> tuple[TaskRecipe, ...]:
    """The [[tasks]] tables of a recipe. Raises RecipeError, naming the table."""
    if not tables:
        raise RecipeError('the recipe has no [[tasks]]; [[tasks]] source = "puzzles" is one to start from')
    found = []
    for number, table in enumerate(tables):
        try:
            found.append(build(TaskRecipe, table))
        except RecipeError as error:
            raise RecipeError(f"tasks[{number}]: {error}") from None
    return tuple(found)


class Source(Protocol):
    """A set of records: how many there are, and number i."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...


# --- records ---


def chat(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The record's prompt as messages."""
    return (
        list(record["messages"]) if "messages" in record else [{"role": "user", "content": record["prompt"]}]
    )


def check(record: object, where: str) -> Record:
    """A record that can be asked. Raises RecipeError, naming its place and the fault."""
    if not isinstance(record, dict):
        raise RecipeError(f"{where} is no JSON object")
    if ("prompt" in record) == ("messages" in record):
        raise RecipeError(f"{where} needs either `prompt` or `messages`")
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not record["prompt"]:
            raise RecipeError(f"{where}: prompt is {record['prompt']!r}; a text is wanted")
        return record
    messages = record["messages"]
    sound = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )  # fmt: skip
    if not sound:
        raise RecipeError(f"{where}: messages must be a list of objects with `role` and `content`")
    if messages[-1]["role"] not in ("user", "tool"):
        raise RecipeError(f"{where}: the last message is the {messages[-1]['role']}'s; the user's is wanted")
    return record


def read_jsonl(path: str | Path) -> list[tuple[int, Record]]:
    """The objects of a JSONL file with the numbers of their lines, packed by gzip or not. Raises RecipeError,
    naming file and line."""
    path = Path(path)
    try:  # with the mark that some editors put first
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            lines = list(file)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise RecipeError(f"{path} cannot be read as JSON lines: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                why = f"{error.msg}, at character {error.pos + 1}"
                raise RecipeError(f"{path}, line {number} is not JSON: {why}") from None
            except (ValueError, RecursionError) as error:
                raise RecipeError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise RecipeError(f"{path}, line {number} is no JSON object")
            if half := half_character(record):
                raise RecipeError(f"{path}, line {number} holds {half}")
            found.append((number, record))
    if not found:
        raise RecipeError(f"{path} holds no record")
    return found


def gsm8k(record: Mapping[str, Any]) -> Record:
    """A line of GSM8K (`question`, `answer` ending in `#### 18`) as a record."""
    gold = after_hashes(str(record.get("answer", "")))
    if gold is None or not isinstance(record.get("question"), str):
        raise RecipeError("a record of GSM8K has `question`, and an `answer` with ####")
    return {"prompt": record["question"], "answer": gold}


def humaneval(record: Mapping[str, Any]) -> Record:
    """A line of HumanEval as a record. `prompt` is the function's head, which code and tests are put
    behind; with an `instruction`, what is asked stands in `messages`."""
    lacking = [key for key in ("prompt", "test", "entry_point") if not isinstance(record.get(key), str)]
    if lacking:
        raise RecipeError(f"a record of HumanEval has prompt, test and entry_point; this lacks {lacking[0]}")
    return {key: record[key] for key in ("task_id", "prompt", "test", "entry_point") if key in record}


_FORMS = {"gsm8k": gsm8k, "humaneval": humaneval}


# --- sources ---


class Listed:
    """Records of a file."""

    def __init__(self, recipe: TaskRecipe) -> None:
        raw = read_jsonl(recipe.path)[: recipe.size or None]
        form = _FORMS.get(recipe.source, lambda record: record)
        self.records: list[Record] = []
        self.places = [f"{recipe.path}, line {line}" for line, _ in raw]
        for where, (_, record) in zip(self.places, raw, strict=True):
            try:
                self.records.append(check(form(record), where))
            except RecipeError as error:
                text = str(error)
                raise RecipeError(text if text.startswith(where) else f"{where}: {text}") from None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return dict(self.records[index])


class Puzzles:
    """Number puzzles of this package, for the reward `puzzle`; those of Countdown have what the reward
    `countdown` needs, too."""

    def __init__(self, recipe: TaskRecipe) -> None:
        try:
            if recipe.name:
                check_name(recipe.name)
        except ValueError as error:
            raise RecipeError(str(error)) from None
        self.recipe = recipe

    def __len__(self) -> int:
        return self.recipe.size or _ENDLESS

    def __getitem__(self, index: int) -> Record:
        r = self.recipe
        made = sample(index, r.seed, r.split, name=r.name or None, language=r.language or None)
        record: Record = {"prompt": made.prompt, "language": made.language, "puzzle": as_record(made),
                          "answer": ", ".join(made.gold)}  # fmt: skip
        if made.task == "countdown":
            numbers, target = made.problem.args
            record |= {"numbers": list(numbers), "target": target}
        return record


class Gym:
    """A procedural data set of reasoning-gym, for the reward `gym`."""

    def __init__(self, recipe: TaskRecipe) -> None:
        self.recipe, self.size = recipe, recipe.size or _GYM_SIZE
        self[0]  # a name or a setting that is wrong is told now

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        r = self.recipe
        return gym.as_record(r.name, self.size, r.seed, r.config, index)


def _open(recipe: TaskRecipe) -> Source:
    kinds: dict[str, type[Puzzles] | type[Gym]] = {"puzzles": Puzzles, "gym": Gym}
    return kinds.get(recipe.source, Listed)(recipe)


class Prompts:
    """The mixture of a recipe's tables. Record n comes from a table drawn by weight, and is the next of that
    table's own order: shuffled anew each epoch for files, running on for what is procedural."""

    def __init__(self, recipes: Sequence[TaskRecipe], seed: int = 0) -> None:
        self.recipes, self.seed = tuple(recipes), seed
        self.sources: list[Source] = []
        for number, recipe in enumerate(self.recipes):
            try:
                self.sources.append(_open(recipe))
            except RecipeError as error:
                kind = RewardError if isinstance(error, RewardError) else RecipeError
                raise kind(f"tasks[{number}]: {error}") from None
        total = sum(recipe.weight for recipe in self.recipes)
        self._shares = [recipe.weight / total for recipe in self.recipes]
        self._order: tuple[tuple[int, int], list[int]] = ((-1, -1), [])

    def record(self, number: int) -> Record:
        """Prompt number `number`; a function of the recipe and the number."""
        table, place = self._place(number)
        source = self.sources[table]
        epoch, index = divmod(place, len(source))
        if isinstance(source, Listed):
            index = self._shuffled(table, epoch)[index]
        return self._asked(table, source[index])

    def _asked(self, table: int, record: Record) -> Record:
        """A record of a table with its task and instruction."""
        recipe = self.recipes[table]
        task = recipe.task or record.get("task") or recipe.name or recipe.source
        return _with_instruction({**record, "task": task}, recipe.instruction)

    def placed(self) -> Iterator[tuple[str, Record]]:
        """(where it stands, record) of all records of files; what is procedural is sound by its making."""
        for table, source in enumerate(self.sources):
            if isinstance(source, Listed):
                for place, record in zip(source.places, source.records, strict=True):
                    yield place, self._asked(table, dict(record))

    def records(self, first: int, count: int) -> list[Record]:
        """Prompts `first` to `first + count − 1`."""
        return [self.record(number) for number in range(first, first + count)]

    def _place(self, number: int) -> tuple[int, int]:
        """The table of a prompt, and its number there. In each _BLOCK prompts every table has its share
        exactly, in an order drawn anew."""
        if len(self._shares) == 1:
            return 0, number
        rng = random.Random(f"{self.seed}/{number // _BLOCK}")
        block, inside = divmod(number, _BLOCK)
        order = _block(self._shares)
        rng.shuffle(order)
        table = order[inside]
        return table, block * order.count(table) + order[:inside].count(table)

    def _shuffled(self, table: int, epoch: int) -> list[int]:
        """The order of a file's records in an epoch; the last one asked for is kept."""
        if self._order[0] != (table, epoch):
            order = list(range(len(self.sources[table])))
            random.Random(f"{self.seed}/{table}/{epoch}").shuffle(order)
            self._order = ((table, epoch), order)
        return self._order[1]


_BLOCK = 1000  # prompts in which every table has its exact share


def _block(shares: Sequence[float]) -> list[int]:
    """A table's number for each of _BLOCK prompts: exact shares, largest remainders up, at least 1."""
    exact = [share * _BLOCK for share in shares]
    counts = [max(1, int(one)) for one in exact]
    while sum(counts) < _BLOCK:
        most = max(range(len(counts)), key=lambda i: exact[i] - counts[i])
        counts[most] += 1
    while sum(counts) > _BLOCK:
        counts[max(range(len(counts)), key=lambda i: counts[i])] -= 1
    return [table for table, count in enumerate(counts) for _ in range(count)]


def _with_instruction(record: Record, instruction: str) -> Record:
    if not instruction:
        return record
    if "messages" not in record and "entry_point" not in record:
        return {**record, "prompt": f"{record['prompt']}\n\n{instruction}"}
    messages = [dict(message) for message in chat(record)]
    messages[-1]["content"] += f"\n\n{instruction}"
    return {**record, "messages": messages}
