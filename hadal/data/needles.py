"""Needles in haystacks: long documents with facts planted in them, and questions that only those answer.

    haystack      lines of seeded puzzles, or of given texts
    needle        "The magic number of Lisbon is 48213.", a line of its own at a chosen depth
    question      "What is the magic number of Lisbon?"
    answer        the needle's sentence again; right if its number is the planted one

Towns and numbers are split by a hash: what is asked in an evaluation is never planted in training, and an
evaluation asks for real cities alone. Nearly all towns in training are spliced from two cities ("Lisdam"), so
that a name can only be copied, not known. An evaluation plants one needle (DeepSeek-V3 report, Figure 8; the
test is Kamradt's, 2023), which is little to learn from: one number in a row. Training documents come in two
forms, and held-out ones in a third:

    needles   several needles, some of them asked for, in the evaluation's words
    list      as many brief facts ("Lisbon is 48213.") as fit, all of them asked for in another order: a third
              of what counts in the loss are then digits that can be copied, and nothing else helps
    one       one needle: what `hadal needle` asks (held-out documents alone)

A document is, in the template of hadal-mini (R1's),

    <bos><｜User｜>haystack\\nquestion<｜Assistant｜><think>\\n</think>\\n\\nanswers<eos>

and of an exact number of tokens: a row of C tokens holds 2^k documents of C/2^k tokens, k from 0 to 3, so
that short distances stay in the mixture and nothing is padded.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hadal.data.documents import Encoder, generator_digest, render, wait_for
from hadal.data.puzzles import SPLITS, conversation
from hadal.data.shards import Manifest, ShardError, ShardFile, read_manifest, write_manifest, write_shard

Ids = NDArray[np.uint16]

CITIES = (
    "Aarhus Abidjan Accra Adelaide Algiers Amman Amsterdam Ankara Antwerp Asmara Athens Atlanta Auckland "
    "Austin Avignon Baghdad Baku Bamako Bandung Bangkok Barcelona Basel Beirut Belfast Belgrade Bergen "
    "Berlin Bern Bilbao Bogota Bologna Bonn Bordeaux Boston Braga Brasilia Bremen Brest Brisbane Bristol "
    "Bruges Brussels Bucharest Budapest Busan Cadiz Cairo Calgary Canberra Caracas Cardiff Cartagena "
    "Chennai Chicago Coimbra Cologne Colombo Copenhagen Cordoba Cork Cusco Dakar Dallas Damascus Darwin "
    "Delhi Denver Detroit Dhaka Dijon Doha Dortmund Dresden Dubai Dublin Durban Edinburgh Essen Evora "
    "Faro Fez Florence Frankfurt Fukuoka Gaborone Geneva Genoa Ghent Glasgow Granada Graz Grenoble "
    "Hamburg Hanoi Harare Havana Helsinki Hobart Honolulu Houston Innsbruck Istanbul Izmir Jakarta "
    "Karachi Kigali Kingston Kobe Krakow Kyoto Lagos Lausanne Leeds Leiden Leipzig Liege Lille Lima "
    "Limerick Linz Lisbon Liverpool Ljubljana London Luanda Lusaka Lyon Macau Madrid Malaga Malmo Manaus "
    "Manchester Manila Maputo Marrakesh Marseille Melbourne Memphis Merida Miami Milan Minsk Montreal "
    "Mumbai Munich Muscat Nagoya Nairobi Nantes Naples Nice Nicosia Odense Oporto Oran Osaka Oslo Ottawa "
    "Oxford Padua Palermo Panama Paris Parma Perth Phoenix Pisa Plovdiv Porto Potsdam Prague Pretoria "
    "Quebec Quito Rabat Recife Reims Rennes Reykjavik Riga Rome Rotterdam Rouen Salvador Salzburg "
    "Santiago Sapporo Seattle Seoul Seville Shanghai Siena Singapore Skopje Sofia Split Stavanger "
    "Stockholm Stuttgart Sydney Taipei Tallinn Tampa Tampere Tangier Tirana Tokyo Toledo Toronto Toulouse "
    "Trieste Tripoli Tromso Tunis Turin Turku Utrecht Valencia Valletta Vancouver Venice Verona Vienna "
    "Vilnius Warsaw Wellington Windhoek York Zagreb Zaragoza Zurich"
).split()
SHARD_TOKENS = 2_000_000
BANK_TOKENS = 200_000  # of haystack, from which the documents of a shard take their spans
NEEDLE_ROOM = 60  # tokens of a document for each needle, its question and its answer
BRIEF_ROOM = 30  # the same of a brief fact
MAX_NEEDLES = 32
FORMS = ("needles", "list", "one")
SHORTEST = 96  # tokens of a document of needles; shorter ones, down to 64, are lists

_NUMBER = re.compile(r"\d(?:[\d,  ]*\d)?")


@dataclass(frozen=True)
class Fact:
    """A town and its magic number, five digits."""

    town: str
    number: str

    @property
    def sentence(self) -> str:
        return f"The magic number of {self.town} is {self.number}."

    @property
    def brief(self) -> str:
        return f"{self.town} is {self.number}."


def is_held_out(text: str) -> bool:
    """Whether a town or a number belongs to the evaluation: a fifth of them do, by hash."""
    return int.from_bytes(hashlib.sha256(f"needle:{text}".encode()).digest()[:4], "big") % 5 == 0


HELD_OUT_CITIES = [city for city in CITIES if is_held_out(city)]


def draw_facts(rng: random.Random, split: str, count: int) -> list[Fact]:
    """`count` facts of different towns. Held-out ones are of real cities alone.

    Raises ValueError on an unknown split, or more facts than there are held-out cities."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
    if split == "held-out":
        if not 0 <= count <= len(HELD_OUT_CITIES):
            raise ValueError(f"{count} facts: there are {len(HELD_OUT_CITIES)} held-out cities")
        towns = rng.sample(HELD_OUT_CITIES, count)
    else:
        chosen: dict[str, None] = {}
        while len(chosen) < count:
            chosen[_training_town(rng)] = None
        towns = list(chosen)
    return [Fact(town, _number(rng, split)) for town in towns]


def _training_town(rng: random.Random) -> str:
    """The beginning of one city and the end of another; now and then a city as it is."""
    while True:
        one, other = rng.choice(CITIES), rng.choice(CITIES)
        name = one if rng.random() < 0.1 else one[: rng.randint(1, 4)] + other[-rng.randint(2, 5) :].lower()
        if 3 <= len(name) <= 9 and not is_held_out(name):
            return name


def _number(rng: random.Random, split: str) -> str:
    while True:
        number = str(rng.randrange(10_000, 100_000))
        if is_held_out(number) == (split == "held-out"):
            return number


def question(facts: Sequence[Fact], *, brief: bool = False) -> str:
    """The question for one number or several."""
    towns = ", ".join(fact.town for fact in facts)
    if brief:
        return f"{towns}?"
    what = "What is the magic number" if len(facts) == 1 else "What are the magic numbers"
    return f"{what} of {towns}?"


def answer(facts: Sequence[Fact], *, brief: bool = False) -> str:
    """The answer that training documents give: the needles' sentences, in the question's order."""
    return "\n".join(fact.brief if brief else fact.sentence for fact in facts)


def is_right(completion: str, fact: Fact) -> bool:
    """Whether the first number after the reasoning is the fact's (`48,213` and `48 213` are 48213)."""
    said = _NUMBER.search(completion.rpartition("</think>")[2])
    return said is not None and re.sub(r"\D", "", said[0]) == fact.number


# --- haystacks ---
def puzzle_lines(seed: int, split: str) -> Iterator[str]:
    """Lines of puzzles and their solutions, for ever; none is empty, each ends with a line break."""
    number = 0
    while True:
        for turn in conversation(number, seed, split).turns:
            text = f"{turn.prompt}\n{turn.completion.replace('</think>', '')}"
            yield from (line.strip() + "\n" for line in text.splitlines() if line.strip())
        number += 1


_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+")


def text_lines(paths: Sequence[Path]) -> Iterator[str]:
    """Lines of text files, round and round; lines beyond 300 characters are cut where sentences end.

    Raises OSError, and ValueError where the files hold no text."""
    lines = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            parts = _SENTENCE.split(line) if len(line) > 300 else [line]
            lines += [part.strip() + "\n" for part in parts if part.strip()]
    if not lines:
        raise ValueError(f"no text in {', '.join(map(str, paths)) or 'no files'}: give text as haystack")
    while True:
        yield from lines


@dataclass(frozen=True)
class Bank:
    """Encoded haystack: tokens, and where lines begin."""

    tokens: Ids
    starts: NDArray[np.int64]


def fill_bank(lines: Iterator[str], encoder: Encoder, tokens: int) -> Bank:
    """The first lines that hold `tokens` tokens."""
    flat: list[int] = []
    starts = []
    while len(flat) < tokens:
        starts.append(len(flat))
        flat += encoder.encode(next(lines))
    return Bank(np.array(flat, dtype=np.uint16), np.array(starts, dtype=np.int64))


# --- training documents ---
def document(
    rng: random.Random, bank: Bank, encoder: Encoder, length: int, split: str, form: str = "needles"
) -> Ids:
    """One document of exactly `length` tokens. Raises ValueError where no needle fits, or on an unknown
    form."""
    head = encoder.encode("<｜begin▁of▁sentence｜><｜User｜>")
    brief, room = form == "list", -1
    count = _how_many(rng, length, form) + 1
    while room < 0:  # long names may need more room than there is: one needle less
        count -= 1
        if not count:
            raise ValueError(f"a document of {length} tokens is too short for a needle")
        planted = draw_facts(rng, split, count)
        asked = rng.sample(planted, count if brief or rng.random() < 0.5 else rng.randint(1, count))
        asks, answers = question(asked, brief=brief), answer(asked, brief=brief)
        tail = encoder.encode(f"{asks}<｜Assistant｜><think>\n</think>\n\n{answers}<｜end▁of▁sentence｜>")
        needles = [encoder.encode((fact.brief if brief else fact.sentence) + "\n") for fact in planted]
        room = length - len(head) - len(tail) - sum(map(len, needles))
    last = int(np.searchsorted(bank.starts, len(bank.tokens) - room, side="right"))
    if len(bank.tokens) < room or last < 1:
        raise ValueError(f"a bank of {len(bank.tokens)} tokens is too short for a haystack of {room}")
    end = int(bank.starts[rng.randrange(last)]) + room  # the span ends where a line does
    end = min(len(bank.tokens), int(next(iter(bank.starts[bank.starts >= end]), len(bank.tokens))))
    first = end - room
    places = sorted(_place(rng, bank, first, end) for _ in needles)
    parts: list[Sequence[int] | Ids] = [head]
    for place, needle in zip(places, needles, strict=True):
        parts += [bank.tokens[first:place], needle]
        first = place
    parts += [bank.tokens[first:end], tail]
    return np.concatenate([np.asarray(part, dtype=np.uint16) for part in parts])


def _how_many(rng: random.Random, length: int, form: str) -> int:
    """Needles of a document: one, any number, or as many as half of it to all of it holds."""
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; forms: {', '.join(FORMS)}")
    if form == "one":
        return 1
    if form == "needles":
        return rng.randint(1, max(1, min(MAX_NEEDLES, length // NEEDLE_ROOM)))
    return max(1, min(MAX_NEEDLES, int(length * rng.uniform(0.5, 1.0)) // BRIEF_ROOM))


def _place(rng: random.Random, bank: Bank, first: int, end: int) -> int:
    """Where a needle goes: the line start nearest to a depth drawn evenly."""
    wanted = first + rng.random() * (end - first)
    at = int(np.searchsorted(bank.starts, wanted))
    near = [int(start) for start in bank.starts[max(0, at - 1) : at + 1]] + [end]
    return min((place for place in near if first <= place <= end), key=lambda place: abs(place - wanted))


def row(
    rng: random.Random, bank: Bank, encoder: Encoder, context: int, split: str, lists: float = 0.0,
    short: float = 0.0,
) -> list[Ids]:  # fmt: skip
    """Documents that fill a row: 2^k of C/2^k tokens, k drawn from 0 to 3, or, in `short` of the rows, so
    that they have 64 to 255 tokens. `lists` of them are lists. None is shorter than 128 tokens, or 64 where
    there are lists (and what is too short for needles is one)."""
    halvings = rng.randint(0, 3)
    if short and rng.random() < short:
        halvings = max(0, (context // 64).bit_length() - 1 - rng.randint(0, 1))
    while halvings and context >> halvings < (64 if lists else 128):
        halvings -= 1
    count = 2**halvings
    sizes = [context * (i + 1) // count - context * i // count for i in range(count)]
    forms = ["list" if size < SHORTEST or rng.random() < lists else "needles" for size in sizes]
    return [document(rng, bank, encoder, size, split, form) for size, form in zip(sizes, forms, strict=True)]


def puzzle_row(rng: random.Random, encoder: Encoder, context: int, seed: int, split: str) -> list[Ids]:
    """Ordinary puzzles that fill a row, the last one cut."""
    documents: list[Ids] = []
    left = context
    while left > 0:
        text = render(conversation(rng.randrange(2**40), seed, split))
        documents.append(np.array(encoder.encode(text)[:left], dtype=np.uint16))
        left -= len(documents[-1])
    return documents


def write_needles(
    folder: Path | str,
    tokenizer: Path | str,
    *,
    tokens: int,
    context: int,
    seed: int = 0,
    split: str = "train",
    share: float = 0.5,
    lists: float = 0.0,
    short: float = 0.0,
    haystack: Sequence[Path] = (),
    workers: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """`tokens` tokens, filled up to whole rows of `context`, as shards in `folder`. In training, `share` of
    the rows hold needles, the others puzzles; `lists` of the documents with needles are lists, and `short`
    of their rows hold short ones (see `row`). Held-out rows are a document each, as many of every form.
    `haystack`: text files; none: puzzles. `workers`: processes (0: one a core).

    A folder that already holds just these is left as it is. Raises ShardError if it holds something else or a
    process fails, OSError and ValueError on texts that cannot be read.
    """
    folder, tokenizer = Path(folder), Path(tokenizer)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
    if context < SHORTEST or tokens < 1 or not all(0 <= s <= 1 for s in (share, lists, short)):
        given = f"context {context}, tokens {tokens}, share {share}, lists {lists}, short {short}"
        raise ValueError(f"{given}: at least {SHORTEST}, at least 1, and all shares in 0..1")
    rows = -(-tokens // context)
    made_by = {
        "generator": "hadal.data.needles",
        "generator_sha256": hashlib.sha256(
            generator_digest().encode() + Path(__file__).read_bytes()
        ).hexdigest(),
        "context": context,
        "rows": rows,
        "rows_per_shard": max(1, shard_tokens // context),
        "seed": seed,
        "split": split,
        "share": share,
        "lists": lists,
        "short": short,
        "haystack": [hashlib.sha256(path.read_bytes()).hexdigest() for path in haystack],
        "tokenizer_sha256": hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest(),
    }
    if (folder / "manifest.json").is_file():
        found = read_manifest(folder)
        if dict(found.made_by) == made_by:
            return found
        differs = sorted(k for k in made_by if found.made_by.get(k) != made_by[k])
        raise ShardError(f"{folder} holds other shards (they differ in {', '.join(differs)}); choose another")
    job = Job(
        str(folder), str(tokenizer.resolve()), context, rows, max(1, shard_tokens // context), seed, split,
        share, lists, short, [str(path) for path in haystack],
    )  # fmt: skip
    count = len(job.parts)
    _run(job, count, min(workers or os.cpu_count() or 1, count), progress or (lambda done, of: None))
    shards = []
    for part in job.parts:
        entry = folder / f"{part.name}.shard.json"
        shards.append(ShardFile(**json.loads(entry.read_text(encoding="utf-8"))))
        entry.unlink()
    manifest = Manifest(tuple(shards), made_by)
    write_manifest(folder, manifest)
    return manifest


@dataclass(frozen=True)
class Part:
    """One shard: its name, its rows, and the form of its documents (empty: rows as training reads them)."""

    name: str
    rows: int
    form: str = ""


@dataclass(frozen=True)
class Job:
    """What the shards of a folder are made of; plain values, passed to processes as JSON."""

    folder: str
    tokenizer: str
    context: int
    rows: int
    per_shard: int
    seed: int
    split: str
    share: float
    lists: float
    short: float
    haystack: Sequence[str]

    @property
    def parts(self) -> list[Part]:
        """Training: shards of `per_shard` rows. Held out: a shard a form, which makes it a domain of the
        held-out loss (hadal/train/domains.py)."""
        if self.split == "train":
            starts = range(0, self.rows, self.per_shard)
            sizes = [min(self.per_shard, self.rows - start) for start in starts]
            return [Part(f"needles-train-{i:05d}", size) for i, size in enumerate(sizes)]
        forms = [form for form in ("one", "needles", "list") if form != "list" or self.lists]
        each = -(-self.rows // len(forms))
        return [Part(f"heldout-{form}-00000", each, form) for form in forms]


def _run(job: Job, count: int, workers: int, progress: Callable[[int, int], None]) -> None:
    """Write all shards of a job, each of several processes its part of them."""
    if workers == 1:
        for number in write_shards(job, range(count)):
            progress(number + 1, count)
        return
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.strip(os.pathsep), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "hadal.data.needles", json.dumps(asdict(job))]
    processes = [
        subprocess.Popen(
            [*command, f"{worker}:{count}:{workers}"], env=environment, stderr=subprocess.PIPE, text=True
        )
        for worker in range(workers)
    ]
    try:
        wait_for(processes, lambda: progress(len(list(folder.glob("*.shard.json"))), count))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


def write_shards(job: Job, numbers: Iterable[int]) -> Iterator[int]:
    """Write shards of a job, and beside each what the manifest will say of it; yields each number."""
    encoder, folder = Encoder(Path(job.tokenizer)), Path(job.folder)
    for number in numbers:
        documents = _documents(job, number, encoder)
        lengths = np.array([len(one) for one in documents], dtype=np.uint32)
        made = write_shard(folder, job.parts[number].name, (np.concatenate(documents), lengths))
        entry = folder / f"{made.name}.shard.json"
        partial = entry.with_name(entry.name + ".partial")
        partial.write_text(json.dumps(asdict(made)), encoding="utf-8")
        os.replace(partial, entry)
        yield number


def _documents(job: Job, number: int, encoder: Encoder) -> list[Ids]:
    """The documents of shard `number`: a pure function of the job and the number."""
    rng = random.Random(f"needles:{job.seed}:{job.split}:{job.context}:{number}")
    texts = [Path(path) for path in job.haystack]
    lines = text_lines(texts) if texts else puzzle_lines(rng.randrange(2**31), job.split)
    for _ in range(rng.randrange(10_000) if texts else 0):  # every shard begins elsewhere in the texts
        next(lines)
    rows, form = job.parts[number].rows, job.parts[number].form
    bank = fill_bank(lines, encoder, max(4 * job.context, min(BANK_TOKENS, rows * job.context)))
    documents: list[Ids] = []
    for _ in range(rows):
        if form:
            documents.append(document(rng, bank, encoder, job.context, job.split, form))
        elif rng.random() < job.share:
            documents += row(rng, bank, encoder, job.context, job.split, job.lists, job.short)
        else:
            documents += puzzle_row(rng, encoder, job.context, job.seed, job.split)
    return documents


if __name__ == "__main__":
    _fields, _part = json.loads(sys.argv[1]), [int(n) for n in sys.argv[2].split(":")]
    for _ in write_shards(Job(**_fields), range(_part[0], _part[1], _part[2])):
        pass
