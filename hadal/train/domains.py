"""Which domain a held-out document belongs to, and which rows are read so that each domain is heard.

A domain is the mixture source that `hadal data prepare` took the document from (held-out shards are named
`heldout-SOURCE-00000`), or, of puzzles, the task. Rows are shared out evenly among the sources, so that a
small one is measured as well as a large one; of puzzles, whose tasks are mixed in every row, they are the
first ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hadal.data.puzzles import conversation
from hadal.data.stream import PackedRows, Rows
from hadal.text.tokenizer import Tokenizer
from hadal.train.batches import Ints

_SOURCE = re.compile(r"heldout-(.+)-\d{5}")


@dataclass(frozen=True)
class Domains:
    """`stretches`: the rows to read, as [first, end). `number_N`: the domain of each document, counted in
    file order, an index into `names`; both are empty where nothing tells domains apart."""

    names: tuple[str, ...]
    stretches: tuple[tuple[int, int], ...]
    number_N: Ints

    def of(self, first_document: int, rows: Rows) -> Ints:
        """The domain of each entry of `rows.lengths`; −1 for padding. `first_document` begins the rows."""
        real = ~np.asarray(rows.padding, dtype=bool)
        found = np.full(len(real), -1, dtype=np.int64)
        found[real] = self.number_N[first_document : first_document + int(real.sum())]
        return found


def find_domains(source: PackedRows, rows: int) -> Domains:
    """The domains of held-out rows in file order, and at most `rows` of them to read."""
    manifest = source.manifest
    rows = min(rows, source.rows_per_epoch)
    if manifest.made_by.get("generator") == "hadal.data.puzzles":
        return _tasks(source, rows)
    found = [_SOURCE.fullmatch(shard.name) for shard in manifest.shards]
    labels = [match[1] for match in found if match]
    if len(labels) < len(found):
        return Domains((), ((0, rows),), np.empty(0, dtype=np.int64))
    names = tuple(dict.fromkeys(labels))
    numbers = [names.index(label) for label in labels]
    number_N = np.repeat(np.array(numbers, dtype=np.int64), [s.documents for s in manifest.shards])
    ranges = source.rows_of_shards()
    firsts = [min(r.start for r, n in zip(ranges, numbers, strict=True) if n == i) for i in range(len(names))]
    sizes = [sum(len(r) for r, n in zip(ranges, numbers, strict=True) if n == i) for i in range(len(names))]
    taken = share_out(rows, sizes)
    return Domains(names, tuple((f, f + t) for f, t in zip(firsts, taken, strict=True) if t), number_N)


def _tasks(source: PackedRows, rows: int) -> Domains:
    """Puzzles: the task of each document's last question, drawn again from its seed."""
    made = source.manifest.made_by
    last = rows - 1
    end = source.first_document(last) + sum(not padding for padding in source.rows(last, 1).padding)
    tasks = [conversation(i, made["seed"], made["split"]).last.task for i in range(end)]
    names = tuple(sorted(set(tasks)))
    number_N = np.array([names.index(task) for task in tasks], dtype=np.int64)
    return Domains(names, ((0, rows),), number_N)


def share_out(rows: int, sizes: Sequence[int]) -> list[int]:
    """`rows` shared evenly among parts of `sizes` rows; what a small part cannot give, the others do. Every
    part gives at least one."""
    taken = [0] * len(sizes)
    left = max(rows, len(sizes))
    for rank, part in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        taken[part] = min(sizes[part], left // (len(sizes) - rank))
        left -= taken[part]
    return taken


def token_bytes(tokenizer: Tokenizer, size: int) -> Ints:
    """Bytes of text that each of `size` token ids stands for; 0 for control tokens and unused ids."""
    bytes_V = np.zeros(size, dtype=np.int64)
    control = set(tokenizer.special.values())
    for index in range(min(size, tokenizer.vocab_size)):
        if index not in control:
            bytes_V[index] = len(tokenizer.id_to_bytes(index))
    return bytes_V
