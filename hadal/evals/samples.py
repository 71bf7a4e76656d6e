"""DeepSeek's protocol for sets that a program can judge: k samples of each problem, pass@1, cons@k.

R1 was measured with temperature 0.6, top-p 0.95 and up to 64 samples: pass@1 is the mean over all samples,
cons@64 the share of problems whose most frequent answer is right (report, arXiv 2501.12948, §3).

    with Judge(kinds, Judging()) as judge, Journal(path) as journal:
        sample(engine, problems, protocol, journal)
        results = judged(problems, protocol, journal, judge)
    table = rows(problems, results, judge)

A sample's seed follows from the run's seed, the problem and the sample's number, so that a run that was
interrupted goes on where it stopped: the journal holds each completion as soon as it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hadal.engine.request import Completion as Answer
from hadal.engine.request import RequestError, SamplingParams, Update
from hadal.evals.judges import Judge, Judging, Progress, Verdict
from hadal.evals.sets import Problem
from hadal.evals.statistics import interval, pass_at_k, powers_up_to
from hadal.post.rewards import Completion
from hadal.post.vote import vote

if TYPE_CHECKING:
    from hadal.engine import Engine

TEMPERATURE, TOP_P = 0.6, 0.95  # DeepSeek-R1's
MAX_TOKENS = 32_768  # R1's; what the context leaves, where that is less
_AHEAD = 2  # times the seats: requests that the engine holds at once


class EvaluationError(RuntimeError):
    """An evaluation that cannot be made, or cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Protocol:
    """How samples are drawn. chat: in the model's template; else the problem's text is continued. thinking:
    None, the model's own way."""

    samples: int = 1
    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    max_tokens: int = MAX_TOKENS
    seed: int = 0
    chat: bool = True
    thinking: bool | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise EvaluationError(f"{self.samples} samples of each problem; at least 1 is wanted")
        if self.samples > 1 and self.temperature == 0:
            raise EvaluationError(
                f"{self.samples} greedy samples would all be the same; take 1, or a temperature"
            )

    def params(self, problem: Problem, sample: int, room: int) -> SamplingParams:
        """Of one sample; `room` tokens are left of the context."""
        text = f"{self.seed}/{problem.number}/{problem.name}/{sample}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
        return SamplingParams(
            max_tokens=min(self.max_tokens, room),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )


@dataclass(frozen=True)
class Sampled:
    """One completion. opened: the prompt ended inside the reasoning."""

    number: int
    sample: int
    text: str
    tokens: int
    finish_reason: str
    opened: bool


class Journal:
    """Completions by (problem, sample); with a path each is written as soon as it is known."""

    def __init__(self, path: Path | None = None) -> None:
        """What the file holds is taken up; a last line that was cut off is dropped. Raises
        EvaluationError."""
        self.path, self.entries = path, dict[tuple[int, int], Sampled]()
        self._file: IO[str] | None = None
        if path is None:
            return
        if path.exists():
            self._take_up(path)
        self._file = path.open("a", encoding="utf-8")

    def _take_up(self, path: Path) -> None:
        names = list(Sampled.__dataclass_fields__)
        sound = 0
        data = path.read_bytes()
        for line in data.splitlines(keepends=True):
            try:
                entry = json.loads(line)
                found = Sampled(**{name: entry[name] for name in names})
            except (ValueError, KeyError, TypeError):
                if sound + len(line) < len(data):
                    raise EvaluationError(
                        f"{path} is damaged at byte {sound}; take another folder, or delete what follows"
                    ) from None
                break
            if not line.endswith(b"\n"):
                break
            sound += len(line)
            self.entries[found.number, found.sample] = found
        if sound < len(data):
            os.truncate(path, sound)

    def add(self, one: Sampled) -> None:
        """Keep a completion."""
        self.entries[one.number, one.sample] = one
        if self._file is not None:
            self._file.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def sample(
    engine: Engine,
    problems: Sequence[Problem],
    protocol: Protocol,
    journal: Journal,
    progress: Progress | None = None,
) -> None:
    """Draw what the journal lacks. Raises EvaluationError for a problem that does not fit, or a completion
    that failed."""
    wanted = [
        (problem, number)
        for problem in problems
        for number in range(protocol.samples)
        if (problem.number, number) not in journal.entries
    ]
    total = len(problems) * protocol.samples
    for problem, number, answer, opened in _stream(engine, wanted, protocol):
        if answer.finish_reason in ("error", "abort"):
            raise EvaluationError(f"sample {number} of problem {problem.name} failed: {answer.error}")
        tokens, reason = len(answer.token_ids), answer.finish_reason
        journal.add(Sampled(problem.number, number, answer.text, tokens, reason, opened))
        if progress is not None:
            progress(len(journal.entries), total)


def _stream(
    engine: Engine, wanted: Sequence[tuple[Problem, int]], protocol: Protocol
) -> Iterator[tuple[Problem, int, Answer, bool]]:
    """Completions as they end, the engine kept full. Leaving the loop takes its requests away."""
    waiting = iter(wanted)
    running: dict[str, tuple[Problem, int, bool, list[Update]]] = {}
    encoded: tuple[int, list[int], bool] | None = None
    exhausted = False
    try:
        while running or not exhausted:
            while not exhausted and len(running) < _AHEAD * engine.max_num_seqs:
                following = next(waiting, None)
                if following is None:
                    exhausted = True
                    break
                problem, number = following
                if encoded is None or encoded[0] != problem.number:
                    encoded = (problem.number, *encode(engine, problem, protocol))
                updates: list[Update] = []
                name = _enqueue(engine, problem, number, encoded[1], protocol, updates)
                running[name] = (problem, number, encoded[2], updates)
            if running:
                for name in {name for name, update in engine.step() if update.finish_reason is not None}:
                    if name in running:
                        problem, number, opened, updates = running.pop(name)
                        yield problem, number, Answer.from_updates(updates), opened
    finally:
        for name in running:
            engine.abort(name)


def encode(engine: Engine, problem: Problem, protocol: Protocol) -> tuple[list[int], bool]:
    """A problem's prompt as token ids, and whether it ends inside the reasoning."""
    if not protocol.chat:
        return engine.encode(problem.text), False
    template, messages = engine.template, list(problem.messages)
    if template is None:
        raise EvaluationError("the model has no chat template; --plain continues the problem's text")
    ids = engine.encode_chat(messages, thinking=protocol.thinking)
    return ids, template.starts_in_reasoning(protocol.thinking, messages)


def _enqueue(
    engine: Engine, problem: Problem, number: int, ids: list[int], protocol: Protocol, updates: list[Update]
) -> str:
    room = engine.max_model_len - len(ids)
    if room < 1:
        raise EvaluationError(
            f"problem {problem.name} is {len(ids)} tokens long; the context has {engine.max_model_len}"
        )
    try:
        return engine.add(ids, protocol.params(problem, number, room), on_update=updates.append)
    except RequestError as error:
        raise EvaluationError(f"problem {problem.name} cannot be asked: {error}") from None


def judged(
    problems: Sequence[Problem], protocol: Protocol, journal: Journal, judge: Judge,
    progress: Progress | None = None,
) -> list[list[tuple[Sampled, Verdict]]]:  # fmt: skip
    """For each problem, its samples with their verdicts."""
    asked = [problem for problem in problems for _ in range(protocol.samples)]
    drawn = [
        journal.entries[problem.number, number] for problem in problems for number in range(protocol.samples)
    ]
    completions = [
        Completion(problem.record, one.text, one.tokens, one.finish_reason, one.opened)
        for problem, one in zip(asked, drawn, strict=True)
    ]
    verdicts = judge.judge(asked, completions, progress)
    pairs = list(zip(drawn, verdicts, strict=True))
    return [pairs[first : first + protocol.samples] for first in range(0, len(pairs), protocol.samples)]


Results = Sequence[Sequence[tuple[Sampled, Verdict]]]


def rows(problems: Sequence[Problem], results: Results, judge: Judge) -> list[dict[str, Any]]:
    """One row a group, and one of all where there are several.

    problems, samples; pass@1 with low, high and the interval's kind; pass@k by k; cons@k, k being samples,
    with its own (None for code, and with one sample); length, mean tokens; length_right, of right ones (None
    where none is); truncated and unanswered, shares of the samples (None for code); failures of the verifier,
    counted."""
    numbers: dict[int, list[int | None]] = {}
    for kind in dict.fromkeys(problem.kind for problem in problems):
        mine = [index for index, problem in enumerate(problems) if problem.kind == kind]
        answers = [[verdict.answer for _, verdict in results[index]] for index in mine]
        if kind != "code" and len(results[mine[0]]) > 1:
            numbers.update(zip(mine, judge.groups(kind, answers), strict=True))
    groups = list(dict.fromkeys(problem.group for problem in problems))
    found = []
    for group in groups:
        mine = [index for index, problem in enumerate(problems) if problem.group == group]
        found.append(_row(group, mine, problems, results, numbers))
    if len(groups) > 1:
        found.append(_row("all", list(range(len(problems))), problems, results, numbers))
    return found


def _row(
    group: str, mine: Sequence[int], problems: Sequence[Problem], results: Results,
    numbers: Mapping[int, list[int | None]],
) -> dict[str, Any]:  # fmt: skip
    right = [[verdict.right for _, verdict in results[index]] for index in mine]
    samples, drawn = len(right[0]), [one for index in mine for one, _ in results[index]]
    verdicts = [verdict for index in mine for _, verdict in results[index]]
    rates = [sum(one) / samples for one in right]
    low, high, kind = interval(rates)
    lengths = [one.tokens for one, verdict in zip(drawn, verdicts, strict=True) if verdict.right]
    code = any(problems[index].kind == "code" for index in mine)
    row = {
        "task": group,
        "problems": len(mine),
        "samples": samples,
        "pass@1": math.fsum(rates) / len(mine),
        "low": low,
        "high": high,
        "interval": kind,
        "pass@k": {
            str(k): math.fsum(pass_at_k(samples, sum(one), k) for one in right) / len(mine)
            for k in powers_up_to(samples)
        },
        "cons@k": None,
        "length": sum(one.tokens for one in drawn) / len(drawn),
        "length_right": sum(lengths) / len(lengths) if lengths else None,
        "truncated": sum(one.finish_reason == "length" for one in drawn) / len(drawn),
        "unanswered": None if code else sum(one.answer is None for one in verdicts) / len(drawn),
        "failures": sum("failed" in verdict.details for verdict in verdicts),
    }
    if all(index in numbers for index in mine):
        voted = [vote(numbers[index], one) for index, one in zip(mine, right, strict=True)]
        low, high, kind = interval(voted)
        row["cons@k"] = {"value": math.fsum(voted) / len(voted), "low": low, "high": high, "interval": kind}
    return row


def sample_lines(
    problems: Sequence[Problem], protocol: Protocol, results: Results
) -> Iterator[dict[str, Any]]:
    """All samples as JSON: what was asked, written, found in it and judged; with what a journal needs to take
    them up again."""
    for problem, mine in zip(problems, results, strict=True):
        for one, verdict in mine:
            asked: Any = list(problem.messages) if protocol.chat else problem.text
            yield {
                "name": problem.name,
                "task": problem.group,
                "kind": problem.kind,
                "prompt": asked,
                **asdict(one),
                "gold": problem.record.get("answer"),
                "answer": verdict.answer,
                "right": verdict.right,
                "verdict": dict(verdict.details),
            }


def own_solutions(
    problems: Sequence[Problem],
    judging: Judging,
    progress: Progress | None = None,
    judge: Judge | None = None,
) -> list[Verdict]:
    """The set's own answers, judged as a model's would be: all should be right. Without a `judge` one is
    started. Raises EvaluationError where the set has none."""
    lacking = next((problem.name for problem in problems if problem.solution is None), None)
    if lacking is not None:
        raise EvaluationError(f"problem {lacking} has no solution of its own to check")
    asked = [Completion(problem.record, str(problem.solution), 0) for problem in problems]
    kinds = [problem.kind for problem in problems]
    with contextlib.ExitStack() as stack:
        if judge is None:  # HumanEval's own continue the prompt
            judge = stack.enter_context(Judge(kinds, replace(judging, code="raw")))
        judge.check(problems, golds=False)  # what cannot be read is judged wrong, each by its name
        return judge.judge(problems, asked, progress)
