"""Puzzles as training documents: rendered in the template of hadal-mini (R1's), encoded, written as shards.

A document is `<bos>system<｜User｜>question<｜Assistant｜><think>\\nreasoning\\n</think>\\n\\nanswer<eos>`;
earlier turns stand before it with their answers only, as R1's template drops their reasoning. Shard number k
holds documents k·SHARD_DOCUMENTS and on, so what is written does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from hadal.data.puzzles import SPLITS, Conversation, conversation
from hadal.data.shards import (
    Manifest,
    ShardError,
    ShardFile,
    Tokens,
    read_manifest,
    write_manifest,
    write_shard,
)

SHARD_DOCUMENTS = 20_000  # about 2M tokens
MAX_REMEMBERED = 300_000
_DIGIT = re.compile("([0-9])")
_PROBE = 400  # documents whose mean length stands for all
_BOS, _EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_USER, _ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


def render(talk: Conversation) -> str:
    """The document as text with its control tokens. Puzzles hold none of their own: this text is trusted."""
    *earlier, last = talk.turns
    parts = [_BOS, talk.system or ""]
    for turn in earlier:
        parts += [_USER, turn.prompt, _ASSISTANT, turn.answer, _EOS]
    parts += [_USER, last.prompt, _ASSISTANT, "<think>\n", last.completion, _EOS]
    return "".join(parts)


class Encoder:
    """The tokenizer, made quick for puzzles.

    Where each digit is a token of its own, what stands between two digits is encoded alone; and the same few
    pieces (` → `, `+`, ` = **`) come again and again, so they are remembered. A tokenizer with tokens that
    join a digit to anything else gets whole texts.
    """

    def __init__(self, tokenizer: Path) -> None:
        self.backend = Backend.from_file(str(tokenizer / "tokenizer.json"))
        self._known: dict[str, list[int]] = {}
        special = {t.content for t in self.backend.get_added_tokens_decoder().values()}
        vocabulary = set(self.backend.get_vocab()) - special
        self._by_digit = not any(len(token) > 1 and _DIGIT.search(token) for token in vocabulary)

    def encode(self, text: str) -> list[int]:
        """Ids of trusted text: control tokens are recognised."""
        if not self._by_digit:
            return list(self.backend.encode(text, add_special_tokens=False).ids)
        known = self._known
        if len(known) > MAX_REMEMBERED:
            known.clear()
        ids: list[int] = []
        for piece in _DIGIT.split(text):
            found = known.get(piece)
            if found is None:
                found = known[piece] = self.backend.encode(piece, add_special_tokens=False).ids
            ids += found
        return ids

    def documents(self, texts: Iterable[str]) -> tuple[Tokens, NDArray[np.uint32]]:
        """(all tokens, length of each document)."""
        flat, lengths = array("H"), array("I")
        for text in texts:
            ids = self.encode(text)
            flat.extend(ids)
            lengths.append(len(ids))
        return np.asarray(flat, dtype=np.uint16), np.asarray(lengths, dtype=np.uint32)


@dataclass(frozen=True)
class Job:
    """Shards of one worker process; plain values, passed as JSON."""

    folder: str
    tokenizer: str
    split: str
    seed: int
    documents: int  # of the whole set
    per_shard: int
    shards: tuple[int, ...]


def shard_name(split: str, number: int) -> str:
    return f"puzzles-{split}-{number:05d}"


def write_puzzle_shard(job: Job, number: int) -> ShardFile:
    """Write shard `number` of a job."""
    first = number * job.per_shard
    last = min(job.documents, first + job.per_shard)
    texts = (render(conversation(i, job.seed, job.split)) for i in range(first, last))
    return write_shard(
        Path(job.folder), shard_name(job.split, number), Encoder(Path(job.tokenizer)).documents(texts)
    )


def documents_for(tokens: int, tokenizer: Path, seed: int, split: str = "train") -> int:
    """How many documents hold about that many tokens (by the mean length of the first 400)."""
    _, lengths = Encoder(tokenizer).documents(render(conversation(i, seed, split)) for i in range(_PROBE))
    return max(1, round(tokens / float(lengths.mean())))


def write_puzzles(
    folder: Path | str,
    tokenizer: Path | str,
    *,
    tokens: int,
    seed: int = 0,
    split: str = "train",
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """About `tokens` tokens of puzzles as shards in `folder`, by `workers` processes (0: one per core).

    A folder that already holds just these is left as it is. `progress(shards done, shards)` is called now
    and then. Raises ShardError if a worker fails or the folder holds something else.
    """
    folder, tokenizer = Path(folder), Path(tokenizer)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
    if tokens < 1 or workers < 0:
        raise ValueError(f"tokens {tokens} and workers {workers}: at least 1 and 0")
    digest = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    made_by = {
        "generator": "hadal.data.puzzles",
        "generator_sha256": generator_digest(),
        "seed": seed,
        "split": split,
        "documents": documents_for(tokens, tokenizer, seed, split),
        "tokenizer_sha256": digest,
    }
    if (folder / "manifest.json").is_file():
        found = read_manifest(folder)
        if dict(found.made_by) == made_by:
            return found
        differs = sorted(k for k in made_by if found.made_by.get(k) != made_by[k])
        raise ShardError(f"{folder} holds other shards (they differ in {', '.join(differs)}); choose another")
    documents = int(str(made_by["documents"]))
    count = -(-documents // SHARD_DOCUMENTS)
    workers = min(workers or os.cpu_count() or 1, count)
    base = Job(str(folder), str(tokenizer.resolve()), split, seed, documents, SHARD_DOCUMENTS, ())
    jobs = [Job(**{**asdict(base), "shards": tuple(range(w, count, workers))}) for w in range(workers)]
    shards = _run(jobs, progress or (lambda done, of: None), count)
    manifest = Manifest(tuple(shards[number] for number in range(count)), made_by)
    write_manifest(folder, manifest)
    return manifest


def generator_digest() -> str:
    """SHA-256 over the sources of the generators and of this file: another version writes other text."""
    digest = hashlib.sha256()
    here = Path(__file__)
    for path in (*sorted((here.parent / "puzzles").rglob("*.py")), here):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _run(jobs: list[Job], progress: Callable[[int, int], None], count: int) -> dict[int, ShardFile]:
    """Run the jobs, each in a process of its own (in this one if there is only one job)."""
    if len(jobs) == 1:
        made: dict[int, ShardFile] = {}
        for number in jobs[0].shards:
            made[number] = write_puzzle_shard(jobs[0], number)
            progress(len(made), count)
        return made
    folder = Path(jobs[0].folder)
    folder.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "hadal.data.documents"]
    processes = [
        subprocess.Popen(
            [*command, json.dumps(asdict(job))], env=environment, stderr=subprocess.PIPE, text=True
        )
        for job in jobs
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
    made = {}
    for number in range(count):
        entry = folder / f"{shard_name(jobs[0].split, number)}.shard.json"
        made[number] = ShardFile(**json.loads(entry.read_text(encoding="utf-8")))
        entry.unlink()
    return made


def wait_for(processes: list[subprocess.Popen[str]], tick: Callable[[], None]) -> None:
    """Until all have ended; the first failure is raised with the last line of its error."""
    while True:
        codes = [process.poll() for process in processes]
        for process, code in zip(processes, codes, strict=True):
            if code:
                said = process.stderr.read().strip().splitlines() if process.stderr else []
                raise ShardError(f"a worker that writes puzzles ended with status {code}: {said[-1:]}")
        tick()
        if all(code == 0 for code in codes):
            return
        time.sleep(0.05)


def _worker(text: str) -> None:
    """One process: write the shards of a job, and beside each what the manifest will say of it."""
    fields = json.loads(text)
    job = Job(**{**fields, "shards": tuple(fields["shards"])})
    for number in job.shards:
        made = write_puzzle_shard(job, number)
        entry = Path(job.folder) / f"{made.name}.shard.json"
        partial = entry.with_name(entry.name + ".partial")
        partial.write_text(json.dumps(asdict(made)), encoding="utf-8")
        os.replace(partial, entry)


if __name__ == "__main__":
    _worker(sys.argv[1])
