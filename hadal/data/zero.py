"""Texts of R1-Zero in minutes (docs/r1-zero.md): two tasks, each answered at once or after some writing.

    3 7 5 → 50            countdown: reach 50 with + − ×, every number once (all different)
    7+8+5+9 mod 10        chain: the last digit of a sum

A *long* answer works it out. Of a chain it lists the last digits of the running totals, two tokens a number
like the question, so that each lies as far behind its number as every other: `7,5,0,9`. In Countdown every
line is a try as on a pocket calculator, held against the target, and ends in a verdict: too small, too large,
or right.

    3+7=10 -5=5?50 <
    3+7=10 ×5=50?50 ✓
    </think>

    **(3+7)×5**

A *short* one closes the reasoning at once and gives the answer. Which one a prompt gets is drawn, so that a
base model knows both; `patience` is how often a writer of tries goes on after a failure, else the last try is
the answer, wrong as it is. `read` judges what a model has written: each total is computed again.

Problems are split by a hash of numbers and target (hadal.data.puzzles.task.is_held_out): what is asked in an
examination is in no training text and in no prompt of reinforcement learning.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers, trainers

from hadal.data.bpe import SPECIAL_TOKENS, added_token, save_tokenizer
from hadal.data.puzzles import SPLITS, Problem
from hadal.data.puzzles.task import is_held_out
from hadal.data.shards import Manifest, ShardError, ShardFile, read_manifest, write_manifest, write_shard
from hadal.data.vocabulary import new_tokenizer

TASKS = ("countdown", "chain")
LIMIT = 99  # no total beyond it: every number is one token
VOCABULARY = (
    20 + 256 + 90 + 34
)  # at most: control tokens, bytes, two-digit numbers, signs that stand together
SHARD_DOCUMENTS = 5000
YES, LESS, MORE = "✓", "<", ">"
_TRY = re.compile(rf"(\d+)((?: ?[+\-×]\d+=\d+)+)(?:\?(\d+) ([{YES}{LESS}{MORE}]))?")
_TOTALS = re.compile(r"\d(?:,\d)+")
_STEP = re.compile(r" ?([+\-×])(\d+)=(\d+)")

Step = tuple[str, int]  # an operation and its right operand


@dataclass(frozen=True)
class Attempt:
    """A first number, and what is done with it one after another: (3, (("+", 7), ("×", 5))) is (3+7)×5."""

    first: int
    steps: tuple[Step, ...]

    def totals(self) -> list[int]:
        """The running total after each step."""
        total, found = self.first, []
        for operation, number in self.steps:
            total = apply(operation, total, number)
            found.append(total)
        return found

    @cached_property
    def value(self) -> int:
        return self.totals()[-1]

    @property
    def numbers(self) -> tuple[int, ...]:
        return (self.first, *(number for _, number in self.steps))

    @cached_property
    def line(self) -> str:
        """`3+7=10 ×5=50`."""
        pairs = zip(self.steps, self.totals(), strict=True)
        return str(self.first) + " ".join(f"{op}{number}={total}" for (op, number), total in pairs)

    @cached_property
    def expression(self) -> str:
        """`(3+7)×5`."""
        text = str(self.first)
        for place, (operation, number) in enumerate(self.steps):
            text = f"({text}){operation}{number}" if place else f"{text}{operation}{number}"
        return text


def apply(operation: str, a: int, b: int) -> int:
    return a + b if operation == "+" else a - b if operation == "-" else a * b


@dataclass(frozen=True)
class Question:
    """target: of Countdown, what is to be reached; of a chain, the sum's last digit."""

    task: str
    numbers: tuple[int, ...]
    target: int

    @property
    def key(self) -> str:
        """The same for every order of the numbers."""
        return f"zero:{self.task}:{','.join(map(str, sorted(self.numbers)))}:{self.target}"

    @property
    def prompt(self) -> str:
        if self.task == "chain":
            return f"{'+'.join(map(str, self.numbers))} mod 10"
        return f"{' '.join(map(str, self.numbers))} → {self.target}"

    @property
    def record(self) -> dict[str, Any]:
        """What `hadal grpo` asks and its rewards need (docs/rewards.md): of a chain, `puzzle`."""
        found = {
            "prompt": self.prompt,
            "task": self.task,
            "numbers": list(self.numbers),
            "target": self.target,
        }
        if self.task == "chain":
            gold = (str(self.target),)
            found["puzzle"] = asdict(Problem("modular", "+", self.numbers, self.key, 0, gold)) | {
                "language": "en"
            }
        return found


@dataclass(frozen=True)
class Mixture:
    """What is written. shares: of the tasks; countdown, chain: how many numbers, from … to; top: the largest
    one of Countdown; long: the share of answers that work it out; patience: see above; within: so many
    tries hold the right one, at a place drawn evenly."""

    shares: tuple[tuple[str, float], ...] = (("countdown", 1.0),)
    countdown: tuple[int, int] = (3, 3)
    chain: tuple[int, int] = (5, 7)
    top: int = 14
    long: float = 0.95
    patience: float = 1.0
    within: int = 8


# --- questions ---
@lru_cache(maxsize=50_000)
def attempts(numbers: tuple[int, ...]) -> tuple[Attempt, ...]:
    """Everything that can be tried with sorted numbers, each once: two of them, the larger first, then the
    others in any order; totals in 1..LIMIT. Multiplying by one is none: it is a way to leave a number out."""
    found: dict[Attempt, None] = {}

    def extend(attempt: Attempt | None, total: int, left: tuple[int, ...]) -> None:
        if not left:
            assert attempt is not None
            found[attempt] = None
        for place, number in enumerate(left):
            rest = left[:place] + left[place + 1 :]
            for operation in "+-×":
                value = apply(operation, total, number)
                if not 0 < value <= LIMIT or (operation == "×" and 1 in (total, number)):
                    continue
                before = (attempt.first, attempt.steps) if attempt else (total, ())
                if attempt is None and number > total:
                    continue
                extend(Attempt(before[0], (*before[1], (operation, number))), value, rest)

    for place, number in enumerate(numbers):
        extend(None, number, numbers[:place] + numbers[place + 1 :])
    return tuple(found)


def draw(rng: random.Random, mixture: Mixture, split: str) -> Question:
    """A question of the split. Raises ValueError on an unknown one."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
    names, shares = zip(*mixture.shares, strict=True)
    task = rng.choices(names, shares)[0]
    while True:
        if task == "chain":
            numbers = tuple(rng.randint(0, 9) for _ in range(rng.randint(*mixture.chain)))
            question = Question(task, numbers, sum(numbers) % 10)
        else:
            numbers = tuple(rng.sample(range(1, mixture.top + 1), rng.randint(*mixture.countdown)))
            possible = attempts(tuple(sorted(numbers)))
            if not possible:
                continue
            question = Question(task, numbers, rng.choice(possible).value)
        if is_held_out(question.key) == (split == "held-out"):
            return question


def solutions(question: Question) -> list[Attempt]:
    """The tries that reach the target of a Countdown."""
    return [a for a in attempts(tuple(sorted(question.numbers))) if a.value == question.target]


def last_digits(numbers: Sequence[int]) -> list[int]:
    """Of the running totals."""
    return [total % 10 for total in accumulate(numbers)]


# --- answers ---
def completion(think: str, answer: str) -> str:
    """What is written after a prompt that ends in `<think>\\n`."""
    return f"{think}</think>\n\n**{answer}**"


def short(question: Question, rng: random.Random) -> str:
    """The right answer at once."""
    if question.task == "chain":
        return completion("", str(question.target))
    return completion("", rng.choice(solutions(question)).expression)


def long(question: Question, rng: random.Random, patience: float, within: int) -> str:
    """Running totals; of Countdown one try after another, none twice, until one reaches the target or
    patience ends."""
    if question.task == "chain":
        return completion(f"{','.join(map(str, last_digits(question.numbers)))}\n", str(question.target))
    tried = list(attempts(tuple(sorted(question.numbers))))
    rng.shuffle(tried)
    wrong = [one for one in tried if one.value != question.target]
    right = next(one for one in tried if one.value == question.target)
    wrong = wrong[: rng.randrange(within)]
    lines = []
    for one in [*wrong, right]:
        sign = YES if one is right else LESS if one.value < question.target else MORE
        lines.append(f"{one.line}?{question.target} {sign}\n")
        if rng.random() >= patience:
            break
    return completion("".join(lines), one.expression)


def text(index: int, seed: int, mixture: Mixture, split: str = "train") -> tuple[Question, str]:
    """Question number `index` and its answer; a function of the arguments alone."""
    rng = random.Random(f"zero/{split}/{seed}/{index}")
    question = draw(rng, mixture, split)
    if rng.random() < mixture.long:
        return question, long(question, rng, mixture.patience, mixture.within)
    return question, short(question, rng)


# --- reading what a model has written ---
@dataclass(frozen=True)
class Try:
    """A line of a trace. sound: every total is right, and the target is the one asked for; numbers: exactly
    those given, each once; reaches: sound, with these numbers, and the target; verdict: YES, LESS, MORE or
    empty, as of a chain, whose totals are right up to the last or not sound."""

    line: str
    sound: bool
    numbers: bool
    reaches: bool
    verdict: str


@dataclass(frozen=True)
class Trace:
    """What `read` found. strange: lines that are no running total."""

    tries: tuple[Try, ...]
    strange: int

    @property
    def claims(self) -> int:
        """Tries that are called right."""
        return sum(t.verdict == YES for t in self.tries)

    @property
    def true_claims(self) -> int:
        return sum(t.verdict == YES and t.reaches for t in self.tries)

    @property
    def missed(self) -> int:
        """Tries that reach the target and are called wrong."""
        return sum(t.verdict in (LESS, MORE) and t.reaches for t in self.tries)


def read(text: str, numbers: Sequence[int], target: int) -> Trace:
    """The reasoning of a completion, line by line. A line that is cut off is strange."""
    found, strange = [], 0
    for line in text.split("</think>")[0].splitlines():
        if not line.strip():
            continue
        if _TOTALS.fullmatch(line):
            totals, right = [int(total) for total in line.split(",")], last_digits(numbers)
            sound = totals == right[: len(totals)]
            found.append(Try(line, sound, len(totals) == len(right), totals == right, ""))
            continue
        match = _TRY.fullmatch(line)
        if match is None:
            strange += 1
            continue
        steps = _STEP.findall(match[2])
        attempt = Attempt(int(match[1]), tuple((op, int(number)) for op, number, _ in steps))
        sound = attempt.totals() == [int(total) for *_, total in steps]
        sound = sound and match[3] in (None, str(target))
        given = Counter(attempt.numbers) == Counter(numbers)
        reaches = sound and given and attempt.value == target
        found.append(Try(line, sound, given, reaches, match[4] or ""))
    return Trace(tuple(found), strange)


# --- files ---
def write_tokenizer(folder: Path, seed: int = 0) -> Path:
    """A byte-level BPE of up to VOCABULARY entries, numbers below 100 a token each, in R1's template."""
    both = Mixture((("countdown", 0.6), ("chain", 0.4)), top=49, long=0.7, patience=0.7)
    texts = [part for i in range(8000) for q, a in [text(i, seed, both)]
             for part in (q.prompt, *a.replace("</think>", "<>").split("<>"))]  # fmt: skip
    texts += [f"{a} {b}" for a in range(100) for b in range(100)]
    tokenizer = new_tokenizer(digits=2)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[added_token(content) for content in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(iter(texts), trainer)
    save_tokenizer(tokenizer, folder)
    return folder


def document(question: Question, answer: str) -> str:
    """A training document in R1's template."""
    asked = f"<｜begin▁of▁sentence｜><｜User｜>{question.prompt}<｜Assistant｜><think>\n"
    return f"{asked}{answer}<｜end▁of▁sentence｜>"


def write_set(
    folder: Path,
    tokenizer: Path,
    *,
    count: int,
    seed: int,
    mixture: Mixture,
    split: str = "train",
    workers: int = 1,
) -> Manifest:
    """`count` documents as shards, by so many processes. What is there already and alike is kept. Raises
    ShardError."""
    sources = Path(__file__).read_bytes() + (tokenizer / "tokenizer.json").read_bytes()
    made_by = {
        "generator": "hadal.data.zero", "sha256": hashlib.sha256(sources).hexdigest(),
        "seed": seed, "split": split, "documents": count, "mixture": json.loads(json.dumps(asdict(mixture))),
    }  # fmt: skip
    if (folder / "manifest.json").is_file():
        found = read_manifest(folder)
        if dict(found.made_by) == made_by:
            return found
        raise ShardError(f"{folder} holds other texts; remove it, or choose another folder")
    edges = [*range(0, count, SHARD_DOCUMENTS), count]
    jobs = [(folder, tokenizer, a, b, seed, mixture, split) for a, b in pairwise(edges)]
    if min(workers, len(jobs)) > 1:
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
            shards = list(pool.map(write_part, *zip(*jobs, strict=True)))
    else:
        shards = [write_part(*job) for job in jobs]
    manifest = Manifest(tuple(shards), made_by)
    write_manifest(folder, manifest)
    return manifest


def write_part(
    folder: Path, tokenizer: Path, first: int, last: int, seed: int, mixture: Mixture, split: str
) -> ShardFile:
    """Documents `first` to `last` − 1 as a shard. They are encoded whole: hadal.data.documents.Encoder takes
    numbers apart, a digit a token."""
    backend = Backend.from_file(str(tokenizer / "tokenizer.json"))
    texts = [document(*text(index, seed, mixture, split)) for index in range(first, last)]
    encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
    return write_shard(folder, f"zero-{first // SHARD_DOCUMENTS:05d}", [one.ids for one in encoded])


def write_prompts(path: Path, *, count: int, seed: int, mixture: Mixture, split: str) -> None:
    """Different questions as records of `hadal grpo`, one a line."""
    found: dict[str, Question] = {}
    index = 0
    while len(found) < count and index < 50 * count:
        question = draw(random.Random(f"prompts/{split}/{seed}/{index}"), mixture, split)
        found.setdefault(question.key, question)
        index += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(question.record, ensure_ascii=False) for question in found.values()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
