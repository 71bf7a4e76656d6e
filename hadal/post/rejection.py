"""Rejection sampling as a data stage: many answers a prompt from a model, those kept that a verifier accepts.

R1 made 600K of its 805K training samples so, from the checkpoint of its first reinforcement learning, and
left out what mixed languages or ran into long paragraphs (report §2.3.3). Here a row is dropped for the first
of these reasons that holds:

    cut          the completion ended at its limit           form       no reasoning, or no answer behind it
    wrong        a reward of right and wrong gave too little language   its words are not all of the prompt's
    short, long  the reasoning's length in tokens            duplicate  the same prompt and text, kept before
    surplus      more are kept of this prompt than wanted

    FOLDER/NAME.jsonl    kept rows, as `hadal sft` reads them, each with its provenance
    FOLDER/samples.jsonl all samples with their verdicts, and why they were dropped
    FOLDER/report.json, README.md
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hadal.data.strict import RecipeError, require
from hadal.post import rewards
from hadal.post.rewards import Completion, Rewards, Total
from hadal.post.rewards.language import LANGUAGES, count
from hadal.post.rewards.text import split
from hadal.post.tasks import Prompts, Record, TaskRecipe, chat

REASONS = ("cut", "form", "wrong", "language", "short", "long", "duplicate", "surplus")
ROUNDS = 4  # times that the engine's seats are filled, at least, by what is asked at once


@dataclass(frozen=True)
class FilterRecipe:
    """`filter`: what is kept."""

    accuracy: float = 1.0  # of the rewards that judge right and wrong, at least
    language: float = 1.0  # share of the words that are of the prompt's language, at least; 0: not looked at
    min_tokens: int = 0
    max_tokens: int = 0  # of a completion; 0: no limit
    duplicates: bool = False  # whether the same prompt may have the same text twice
    keep: int = 0  # rows of a prompt, at most; 0: all

    def __post_init__(self) -> None:
        for key in ("accuracy", "language"):
            require(0 <= getattr(self, key) <= 1, f"filter.{key}", getattr(self, key), "in 0..1")
        for key in ("min_tokens", "max_tokens", "keep"):
            require(getattr(self, key) >= 0, f"filter.{key}", getattr(self, key), "0 or more")


@dataclass(frozen=True)
class RejectionRecipe:
    """kind = "rejection". `tasks`, `reward`: as of `hadal grpo`."""

    model: str
    tasks: tuple[TaskRecipe, ...]
    reward: tuple[Mapping[str, Any], ...]
    prompts: int  # how many of the tasks' prompts are asked
    samples: int = 4  # of each
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    max_seqs: int = 128
    seed: int = 0
    max_minutes: float = 0.0  # then no further prompts are asked; 0: no limit
    filter: FilterRecipe = field(default_factory=FilterRecipe)

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks", self.tasks, "at least one [[tasks]] table (docs/rewards.md)")
        require(self.max_minutes >= 0, "max_minutes", self.max_minutes, "0 (no limit) or more")
        for key in ("prompts", "samples", "max_tokens", "max_seqs"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "above 0: samples must differ")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        found = rewards.read(self.reward)
        judged = any(one.reward.accuracy for one in found) or not self.filter.accuracy
        require(judged, "filter.accuracy", self.filter.accuracy, "0 where no reward judges right and wrong")


@dataclass(frozen=True)
class Drawn:
    """One sample: which prompt, which draw, what was written, what it was worth."""

    number: int
    index: int
    seed: int
    record: Record
    completion: Completion
    total: Total


def sample_seed(seed: int, number: int, index: int) -> int:
    """The seed of draw `index` of prompt `number`."""
    text = f"rejection/{seed}/{number}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


def prompt_id(record: Mapping[str, Any]) -> str:
    """What names a prompt: a digest of its messages."""
    text = json.dumps(chat(record), sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Sieve:
    """Says of each sample in turn why it is dropped; empty if it is kept. Remembers what it kept."""

    def __init__(self, recipe: FilterRecipe) -> None:
        self.recipe = recipe
        self._texts: set[tuple[str, str]] = set()
        self._kept: Counter[str] = Counter()

    def reason(self, drawn: Drawn) -> str:
        """One of REASONS, or ""."""
        wanted, parts = self.recipe, split(drawn.completion)
        found = ""
        if drawn.completion.cut:
            found = "cut"
        elif not parts.closed or not parts.reasoning or not parts.answer:
            found = "form"
        elif wanted.accuracy and (drawn.total.accuracy is None or drawn.total.accuracy < wanted.accuracy):
            found = "wrong"
        elif language_share(drawn) < wanted.language:
            found = "language"
        elif drawn.completion.tokens < wanted.min_tokens:
            found = "short"
        elif wanted.max_tokens and drawn.completion.tokens > wanted.max_tokens:
            found = "long"
        if found:
            return found
        name = prompt_id(drawn.record)
        text = (name, " ".join(drawn.completion.text.split()))
        if not wanted.duplicates and text in self._texts:
            return "duplicate"
        if wanted.keep and self._kept[name] >= wanted.keep:
            return "surplus"
        self._texts.add(text)
        self._kept[name] += 1
        return ""


def language_share(drawn: Drawn) -> float:
    """Share of the words, reasoning and answer, that are of the prompt's language; 1 where no language is
    asked for, or there are no words."""
    target = drawn.record.get("language")
    if target not in LANGUAGES:
        return 1.0
    parts = split(drawn.completion)
    found = count(f"{parts.reasoning}\n{parts.answer}", str(target))
    return found[str(target)] / found.total() if found.total() else 1.0


def row(drawn: Drawn, model: str) -> dict[str, Any]:
    """A kept sample as a line of an SFT set, with where it comes from."""
    parts = split(drawn.completion)
    said = {"role": "assistant", "reasoning_content": parts.reasoning, "content": parts.answer}
    record = drawn.record
    kept: Record = {key: record[key] for key in ("task", "language", "key") if key in record}
    return {"messages": [*chat(record), said], **kept, "provenance": provenance(drawn, model)}


def provenance(drawn: Drawn, model: str) -> dict[str, Any]:
    """prompt, number, draw and seed of the sample; digest of the model; verdicts and parts of its reward."""
    total = drawn.total.as_json()
    return {"prompt": prompt_id(drawn.record), "number": drawn.number, "sample": drawn.index,
            "seed": drawn.seed, "model": model, "tokens": drawn.completion.tokens,
            "accuracy": total["accuracy"], "reward": total["reward"], "parts": total["parts"]}  # fmt: skip


def draw(
    engine: Any, recipe: RejectionRecipe, prompts: Prompts, judge: Rewards, tell: Callable[[int], None]
) -> Iterator[Drawn]:
    """All samples, prompt by prompt. `tell(n)`: n prompts are done. Raises RecipeError."""
    from hadal.engine import SamplingParams

    begun, block = time.monotonic(), -(-ROUNDS * recipe.max_seqs // recipe.samples)
    for first in range(0, recipe.prompts, block):
        if recipe.max_minutes and time.monotonic() - begun > 60 * recipe.max_minutes:
            break
        numbers = range(first, min(first + block, recipe.prompts))
        records = [prompts.record(number) for number in numbers]
        judge.check(records)
        ids = [engine.encode_chat(chat(record)) for record in records]
        opened = [engine.template.starts_in_reasoning(None, chat(record)) for record in records]
        seeds = [sample_seed(recipe.seed, n, i) for n in numbers for i in range(recipe.samples)]
        params = [
            SamplingParams(
                max_tokens=recipe.max_tokens, temperature=recipe.temperature, top_p=recipe.top_p, seed=seed
            )
            for seed in seeds
        ]
        answers = engine.generate([one for one in ids for _ in range(recipe.samples)], params)
        said = [
            Completion(
                records[at // recipe.samples], answer.text, len(answer.token_ids), answer.finish_reason,
                opened[at // recipe.samples], answer.token_ids,
            )
            for at, answer in enumerate(answers)
        ]  # fmt: skip
        for at, (one, total) in enumerate(zip(said, judge.score(said), strict=True)):
            if one.finish_reason in ("error", "abort"):
                raise RecipeError(f"prompt {numbers[at // recipe.samples]} could not be answered")
            yield Drawn(
                numbers[at // recipe.samples], at % recipe.samples, seeds[at], dict(one.record), one, total
            )
        tell(numbers[-1] + 1)


def write(
    name: str, folder: Path, drawn: Iterator[Drawn], recipe: RejectionRecipe, model: str
) -> dict[str, Any]:
    """Sieve samples into FOLDER/NAME.jsonl and FOLDER/samples.jsonl; returns the report, which lies there."""
    folder.mkdir(parents=True, exist_ok=True)
    sieve, dropped = Sieve(recipe.filter), Counter[str]()
    tasks: dict[str, Counter[str]] = {}
    kept = prompts = tokens = kept_tokens = 0
    asked: set[int] = set()
    answered: set[int] = set()
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as rows, \
            (folder / "samples.jsonl").open("w", encoding="utf-8") as pool:  # fmt: skip
        for one in drawn:
            reason = sieve.reason(one)
            task = tasks.setdefault(str(one.record.get("task", "")), Counter[str]())
            task["sampled"] += 1
            task["kept"] += not reason
            task["right"] += (one.total.accuracy or 0) >= 1
            asked.add(one.number)
            tokens += one.completion.tokens
            line = {"record": one.record, "text": one.completion.text, "opened": one.completion.opened,
                    "dropped": reason, "language_share": language_share(one),
                    "provenance": provenance(one, model)}  # fmt: skip
            pool.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            if reason:
                dropped[reason] += 1
                continue
            kept, kept_tokens = kept + 1, kept_tokens + one.completion.tokens
            answered.add(one.number)
            rows.write(json.dumps(row(one, model), ensure_ascii=False, default=str) + "\n")
    prompts = len(asked)
    report = {
        "name": name, "model": model, "prompts": prompts, "samples": prompts * recipe.samples, "kept": kept,
        "prompts_kept": len(answered), "tokens": tokens, "kept_tokens": kept_tokens,
        "dropped": {reason: dropped[reason] for reason in REASONS if dropped[reason]},
        "tasks": {task: dict(found) for task, found in sorted(tasks.items())},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(report), encoding="utf-8")
    return report


def card(report: Mapping[str, Any]) -> str:
    """The data set's card, as Markdown."""
    share = report["kept"] / max(1, report["samples"])
    tasks = report["tasks"].items()
    lines = [
        f"# {report['name']}", "",
        f"Rejection sampling: {report['samples']:,} samples of {report['prompts']:,} prompts, "
        f"{report['kept']:,} kept ({share:.1%}), for {report['prompts_kept']:,} prompts. "
        f"Model: {report['model'][:16]}….", "",
        "| task | sampled | right | kept |", "|---|---|---|---|",
        *(f"| {task} | {c['sampled']:,} | {c['right']:,} | {c['kept']:,} |" for task, c in tasks),
        "", "| dropped for | samples |", "|---|---|",
        *(f"| {reason} | {n:,} |" for reason, n in report["dropped"].items()), "",
        "A row is dropped for the first reason that holds (hadal/post/rejection.py says what each means). "
        "Its `provenance` names prompt, draw, seed and model, and has the rewards' verdicts.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def sampled(
    name: str, folder: Path, recipe: RejectionRecipe, engine: Any, model: str, tell: Callable[[int], None]
) -> dict[str, Any]:
    """The whole stage, with an engine that is open. `model`: its digest. Returns the report."""
    prompts: Prompts = Prompts(recipe.tasks, recipe.seed)
    with Rewards(rewards.read(recipe.reward)) as judge:
        judge.check_set(prompts.placed())
        return write(name, folder, draw(engine, recipe, prompts, judge, tell), recipe, model)


def rows_of(path: Path) -> Sequence[dict[str, Any]]:
    """The lines of a pool. Raises RecipeError."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as a pool of samples: {error}") from None
