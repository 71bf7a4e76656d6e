"""Conversations as packed rows: shards of tokens with a mask beside them, and a report of what was left out.

    FOLDER/NAME.bin, NAME.len, manifest.json   as all shards (hadal/data/shards.py)
    FOLDER/NAME.mask                           a byte a token: 1 where it is trained on
    FOLDER/report.json                         counts, tokens, what was dropped and why

A row holds whole documents; one that is longer than a row is dropped, never cut: an answer without its end
teaches not to end. Documents are put in an order in which rows fill best (best-fit among WINDOW of them; rows
are drawn in a random order afterwards). A folder that was made from the same files, template, tokenizer and
settings is taken as it is.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hadal.data.shards import (
    Manifest,
    ShardError,
    ShardFile,
    Tokens,
    read_manifest,
    write_manifest,
    write_shard,
)
from hadal.data.stream import Floats, Ints, PackedRows
from hadal.post.conversations import Conversation, Document, Turns, documents, read
from hadal.text.messages import TemplateError
from hadal.text.templates import Template
from hadal.text.tokenizer import Tokenizer

WINDOW = 4096
"""Documents among which a row's are chosen."""
SHARD_TOKENS = 32 << 20
NO_ANSWER = "no answer of the assistant"
EMPTY = "an empty answer"
TOO_LONG = "longer than a row"
NO_FORM = "the template has no form for it"


@dataclass
class Report:
    """What became of some files. Documents are what rows hold; a conversation may give several."""

    files: list[str] = field(default_factory=list)
    conversations: int = 0
    held_out: int = 0  # conversations set aside
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: dict[str, int] = field(
        default_factory=dict
    )  # by reason: conversations, of the too long documents
    examples: dict[str, str] = field(default_factory=dict)  # by reason: where the first of them stands
    longest: int = 0  # tokens of the longest document that was kept
    longest_dropped: int = 0

    def drop(self, reason: str, place: str) -> None:
        """Count one that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples.setdefault(reason, place)

    def lines(self) -> list[str]:
        """For people."""
        share = self.trained_tokens / max(1, self.tokens)
        told = [
            f"{self.conversations:,} conversations, {self.documents:,} documents of {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} of them trained on ({share:.0%}); the longest has {self.longest:,}"
        ]
        if self.held_out:
            told.append(f"{self.held_out:,} conversations are held out")
        for reason, count in sorted(self.dropped.items(), key=lambda pair: -pair[1]):
            more = f", up to {self.longest_dropped:,} tokens" if reason == TOO_LONG else ""
            told.append(f"dropped {count:,}: {reason}{more} (first: {self.examples[reason]})")
        return told


class ChatRows(PackedRows):
    """`PackedRows` whose weights are the shards' masks."""

    def __init__(
        self, folder: Path, context: int, *, pad_id: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        super().__init__(folder, context, think_id=-1, pad_id=pad_id, seed=seed, shuffle=shuffle)
        self._masks = []
        for shard in self.manifest.shards:
            path = folder / f"{shard.name}.mask"
            if not path.is_file() or path.stat().st_size != shard.tokens:
                raise ShardError(f"{path} is missing or of another size; delete {folder} to write it anew")
            self._masks.append(np.memmap(path, dtype=np.uint8, mode="r"))

    def _weights(self, shard: int, begin: int, tokens: Tokens, lengths: Ints) -> Floats:
        return np.asarray(self._masks[shard][begin : begin + len(tokens)], dtype=np.float32)


@dataclass(frozen=True)
class Wanted:
    """How conversations become rows. `keep(conversation)`: False sets it aside."""

    files: Sequence[Path]
    template: Template
    tokenizer: Tokenizer
    context: int
    turns: Turns = "all"
    keep: Callable[[Conversation], bool] = lambda conversation: True
    marks: Sequence[tuple[str, Any]] = ()  # what else the result depends on

    def made_by(self) -> dict[str, Any]:
        """What identifies the result."""
        tokens = json.dumps(sorted(self.tokenizer.special.items())) + str(self.tokenizer.vocab_size)
        return {
            "generator": "hadal.post.chat_rows",
            "files": {file.name: _sha256(file) for file in self.files},
            "template": self.template.name,
            "tokenizer": hashlib.sha256(tokens.encode()).hexdigest()[:16],
            "context": self.context,
            "turns": self.turns,
            **dict(self.marks),
        }


def write_rows(folder: Path, wanted: Wanted, name: str = "chat") -> Report:
    """Write the shards of `wanted`, named NAME-STEM after each file, or take those that lie there.

    Raises ShardError where the folder holds others, DataError on a line that is none, and where nothing is
    left to train on.
    """
    made_by = wanted.made_by()
    if (folder / "manifest.json").is_file():
        if read_manifest(folder).made_by != made_by:
            raise ShardError(
                f"{folder} holds other data, or other settings made it; delete it, or choose another --out"
            )
        return Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    report, shards = Report(files=[file.name for file in wanted.files]), []
    for file in wanted.files:
        stem = file.name.split(".")[0]
        for number, batch in enumerate(_batches(_documents(file, wanted, report))):
            order = fill_order([len(document.ids) for document in batch], wanted.context)
            ordered = [batch[i] for i in order]
            shards.append(_write(folder, f"{name}-{stem}-{number:05d}", ordered, wanted.tokenizer.vocab_size))
    if not report.documents:
        told = "; ".join(report.lines()[1:]) or "the files are empty"
        raise ShardError(f"nothing is left to train on of {', '.join(report.files)}: {told}")
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    write_manifest(folder, Manifest(tuple(shards), made_by))
    return report


def _documents(file: Path, wanted: Wanted, report: Report) -> Iterator[Document]:
    """The documents of a file that fit a row; the others are counted."""
    for conversation in read(file):
        report.conversations += 1
        if not conversation.answers:
            report.drop(NO_ANSWER, conversation.place)
            continue
        if conversation.has_empty_answer:
            report.drop(EMPTY, conversation.place)
            continue
        if not wanted.keep(conversation):
            report.held_out += 1
            continue
        try:
            found = documents(conversation, wanted.template, wanted.tokenizer, wanted.turns)
        except TemplateError as error:
            report.drop(NO_FORM, f"{conversation.place}: {error}")
            continue
        for document in found:
            size = len(document.ids)
            if size > wanted.context:
                report.drop(TOO_LONG, conversation.place)
                report.longest_dropped = max(report.longest_dropped, size)
                continue
            report.documents += 1
            report.tokens += size
            report.trained_tokens += document.trained
            report.longest = max(report.longest, size)
            yield document


def _batches(found: Iterator[Document]) -> Iterator[list[Document]]:
    """A shard's worth of documents at a time."""
    batch: list[Document] = []
    tokens = 0
    for document in found:
        batch.append(document)
        tokens += len(document.ids)
        if tokens >= SHARD_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def fill_order(lengths: Sequence[int], context: int) -> list[int]:
    """Numbers of documents in an order in which rows that take them one after the other are full: best-fit,
    longest first, among WINDOW at a time."""
    order: list[int] = []
    for start in range(0, len(lengths), WINDOW):
        window = range(start, min(start + WINDOW, len(lengths)))
        bins: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (room, bin), ascending
        for number in sorted(window, key=lambda i: (-lengths[i], i)):
            at = bisect.bisect_left(room, (lengths[number], -1))
            if at < len(room):
                left, chosen = room.pop(at)
            else:
                left, chosen = context, len(bins)
                bins.append([])
            bins[chosen].append(number)
            bisect.insort(room, (left - lengths[number], chosen))
        order += [number for one in bins for number in one]
    return order


def _write(folder: Path, name: str, batch: list[Document], vocab_size: int) -> ShardFile:
    lengths = np.array([len(document.ids) for document in batch], dtype=np.uint32)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    tokens = np.concatenate([np.array(document.ids, dtype=dtype) for document in batch])
    mask = np.concatenate([np.array(document.mask, dtype=np.uint8) for document in batch])
    temporary = folder / f".{name}.mask.tmp"
    temporary.write_bytes(mask.tobytes())
    os.replace(temporary, folder / f"{name}.mask")
    return write_shard(folder, name, (tokens, lengths))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
