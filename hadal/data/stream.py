"""Rows of a fixed number of tokens from shards: of whole documents, or cut from the stream; in any order.

Row r of epoch e is a pure function of (shards, context, seed, r, e), so a loader's whole state is one
integer: the number of rows consumed. Who reads which rows is the caller's affair: any number of ranks or
threads that share them out read the same rows (`share`).

`PackedRows`, for fine-tuning: a row is filled with whole documents, and what is left at its end is padding
(6% at 1024 tokens, 3% at 2048). Each document is a stretch of its own, so attention can be kept inside it.
`StreamRows`, for pre-training without masks between documents, as V3 packs: all documents end to end, cut
into rows wherever a row is full. Nothing is padded, nothing is lost but the last, incomplete row.

Weights say how much a token counts when it is *predicted*: 1 for what the model is to write (after the last
`<think>` and its line break), `prompt_weight` for the rest of the document, 0 for its first token and for
padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hadal.data.shards import Manifest, ShardError, Tokens, open_shard, read_manifest, verify_shards

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """`count` packed rows of C tokens.

    token_RC    token ids, int64; padding holds the pad id
    weight_RC   float32, see the top of this file
    lengths     lengths of the documents in stream order, paddings among them; Σ = R·C, none crosses a row
    padding     for each entry of `lengths`, whether it is padding
    """

    token_RC: Ints
    weight_RC: Floats
    lengths: Sequence[int]
    padding: Sequence[bool]

    @property
    def cu_seqlens(self) -> list[int]:
        """Offsets of the documents in the flattened rows: 0, …, R·C."""
        return [0, *np.cumsum(np.asarray(self.lengths, dtype=np.int64)).tolist()]


def assistant_weights(tokens: Tokens, lengths: Ints, think_id: int, prompt_weight: float) -> Floats:
    """Weights of whole documents laid end to end. A document without `<think>` counts in full."""
    starts = np.cumsum(lengths) - lengths
    document = np.repeat(np.arange(len(lengths)), lengths)
    at = np.arange(len(tokens)) - np.repeat(starts, lengths)
    opened = np.full(len(lengths), -1, dtype=np.int64)  # position of the last <think> in each document
    places = np.flatnonzero(tokens == think_id)
    opened[document[places]] = at[places]
    written = (at > opened[document] + 1) | (opened[document] < 0)
    weights = np.where(written, 1.0, prompt_weight).astype(np.float32)
    weights[starts] = 0.0
    return weights


class PackedRows:
    """Rows from a folder of shards. `rows(start, count)` gives the same rows for the same numbers, always.

    Rows are numbered through all epochs: row n is row n mod `rows_per_epoch` of epoch n ÷ `rows_per_epoch`,
    each epoch in an order of its own (`shuffle`). A document longer than a row keeps its first C tokens;
    `cut` counts such documents.
    """

    def __init__(
        self,
        folder: Path | str,
        context: int,
        *,
        think_id: int,
        pad_id: int,
        prompt_weight: float = 0.0,
        seed: int = 0,
        shuffle: bool = True,
        check: bool = False,
    ) -> None:
        """`check` reads all shards once and compares their hashes. Raises ShardError."""
        if context < 2 or not 0.0 <= prompt_weight <= 1.0:
            raise ValueError(f"context {context} and prompt_weight {prompt_weight}: at least 2, and in 0..1")
        self.folder, self.context = Path(folder), context
        self.think_id, self.pad_id, self.prompt_weight = think_id, pad_id, prompt_weight
        self.manifest: Manifest = verify_shards(self.folder) if check else read_manifest(self.folder)
        opened = [open_shard(self.folder, shard) for shard in self.manifest.shards]
        self._tokens = [tokens for tokens, _ in opened]
        self._lengths = [lengths.astype(np.int64) for _, lengths in opened]
        self._starts = [np.cumsum(lengths) - lengths for lengths in self._lengths]
        tables = [_fill(lengths, context) for lengths in self._lengths]
        self._first = (
            np.concatenate([table[0] for table in tables]) if tables else np.empty(0, dtype=np.int64)
        )
        self._last = np.concatenate([table[1] for table in tables]) if tables else np.empty(0, dtype=np.int64)
        self._shard = np.repeat(np.arange(len(tables)), [len(table[0]) for table in tables])
        self.cut = sum(int((lengths > context).sum()) for lengths in self._lengths)
        if not len(self._first):
            raise ShardError(f"{self.folder} holds no documents; write more")
        self._order = _Orders(len(self._first), seed, shuffle)

    @property
    def rows_per_epoch(self) -> int:
        return len(self._first)

    @cached_property
    def filled(self) -> float:
        """Share of an epoch's positions that hold documents, not padding."""
        kept = sum(int(np.minimum(lengths, self.context).sum()) for lengths in self._lengths)
        return kept / (self.rows_per_epoch * self.context)

    def rows_of_shards(self) -> list[range]:
        """The rows of each shard, in file order: those of an epoch that is not shuffled."""
        ends = np.cumsum(np.bincount(self._shard, minlength=len(self._lengths))).tolist()
        return [range(a, b) for a, b in itertools.pairwise([0, *ends])]

    def first_document(self, row: int) -> int:
        """The number of the first document of a row, both counted in file order."""
        before = sum(len(lengths) for lengths in self._lengths[: int(self._shard[row])])
        return before + int(self._first[row])

    def rows(self, start: int, count: int) -> Rows:
        """Rows number `start` and on."""
        if start < 0 or count < 1:
            raise ValueError(f"rows({start}, {count}): the first is at least 0, the second at least 1")
        shape = (count, self.context)
        token_RC = np.full(shape, self.pad_id, dtype=np.int64)
        weight_RC = np.zeros(shape, dtype=np.float32)
        lengths: list[int] = []
        padding: list[bool] = []
        for r in range(count):
            tokens, weights, inside = self._row(start + r)
            token_RC[r, : len(tokens)] = tokens
            weight_RC[r, : len(tokens)] = weights
            lengths += inside
            padding += [False] * len(inside)
            if len(tokens) < self.context:
                lengths.append(self.context - len(tokens))
                padding.append(True)
        return Rows(token_RC, weight_RC, lengths, padding)

    def _row(self, number: int) -> tuple[Tokens, Floats, list[int]]:
        """Tokens, weights and document lengths of one row, without its padding."""
        epoch, at = divmod(number, self.rows_per_epoch)
        row = int(self._order.of(epoch)[at])
        shard, first, last = int(self._shard[row]), int(self._first[row]), int(self._last[row])
        begin = int(self._starts[shard][first])
        lengths = self._lengths[shard][first:last]
        end = begin + int(lengths.sum())
        tokens: Tokens = np.asarray(self._tokens[shard][begin:end])
        weights = self._weights(shard, begin, tokens, lengths)
        if end - begin > self.context:  # one document, longer than a row
            return tokens[: self.context], weights[: self.context], [self.context]
        return tokens, weights, lengths.tolist()

    def _weights(self, shard: int, begin: int, tokens: Tokens, lengths: Ints) -> Floats:
        """Weights of whole documents: `tokens`, which begin at token `begin` of a shard."""
        return assistant_weights(tokens, lengths, self.think_id, self.prompt_weight)


class _Orders:
    """The order of the rows in each epoch; the last two are remembered."""

    def __init__(self, count: int, seed: int, shuffle: bool) -> None:
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self._known: dict[int, Ints] = {}

    def of(self, epoch: int) -> Ints:
        if epoch not in self._known:
            order = np.arange(self.count)
            if self.shuffle:
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            self._known = {**dict(list(self._known.items())[-1:]), epoch: order}
        return self._known[epoch]


class StreamRows:
    """Rows cut from the stream of all documents: row r of an epoch in file order is tokens r·C to (r+1)·C.

    The same interface as `PackedRows`. Every token counts in full when it is predicted. `lengths` of the rows
    say where documents begin, torn at the rows' ends, for a trainer that masks all the same.
    """

    cut = 0
    filled = 1.0

    def __init__(
        self, folder: Path | str, context: int, *, seed: int = 0, shuffle: bool = True, check: bool = False
    ) -> None:
        """`check` reads all shards once and compares their hashes. Raises ShardError."""
        if context < 2:
            raise ValueError(f"context {context}: at least 2")
        self.folder, self.context = Path(folder), context
        self.manifest: Manifest = verify_shards(self.folder) if check else read_manifest(self.folder)
        opened = [open_shard(self.folder, shard) for shard in self.manifest.shards]
        self._tokens = [tokens for tokens, _ in opened]
        self._ends = [np.cumsum(lengths, dtype=np.int64) for _, lengths in opened]
        self._first = np.cumsum([0, *(len(tokens) for tokens in self._tokens)])
        self.rows_per_epoch = int(self._first[-1]) // context
        if not self.rows_per_epoch:
            raise ShardError(
                f"{self.folder} holds {int(self._first[-1])} tokens, less than a row of {context}; write more"
            )
        self._order = _Orders(self.rows_per_epoch, seed, shuffle)

    def rows(self, start: int, count: int) -> Rows:
        """Rows number `start` and on."""
        if start < 0 or count < 1:
            raise ValueError(f"rows({start}, {count}): the first is at least 0, the second at least 1")
        token_RC = np.empty((count, self.context), dtype=np.int64)
        lengths: list[int] = []
        for r in range(count):
            epoch, at = divmod(start + r, self.rows_per_epoch)
            lengths += self._read(int(self._order.of(epoch)[at]) * self.context, token_RC[r])
        weight_RC = np.ones((count, self.context), dtype=np.float32)
        return Rows(token_RC, weight_RC, lengths, [False] * len(lengths))

    def _read(self, begin: int, row_C: Ints) -> list[int]:
        """Fill a row with the tokens from `begin` on; the lengths of the documents' parts in it."""
        filled, lengths = 0, []
        shard = int(np.searchsorted(self._first, begin, side="right")) - 1
        while filled < self.context:
            at = begin + filled - int(self._first[shard])
            piece = self._tokens[shard][at : at + self.context - filled]
            row_C[filled : filled + len(piece)] = piece
            ends = self._ends[shard]
            inside = ends[np.searchsorted(ends, at, side="right") : np.searchsorted(ends, at + len(piece))]
            borders = [at, *inside.tolist(), at + len(piece)]
            lengths += [b - a for a, b in itertools.pairwise(borders) if b > a]
            filled += len(piece)
            shard += 1
        return lengths


def share(start: int, count: int, rank: int, ranks: int) -> tuple[int, int]:
    """(first row, number of rows) of one rank's part of rows `start` to `start + count`.

    The parts of all ranks in their order are the whole, so a step's rows, and the position after it, are the
    same for any number of ranks.
    """
    if not 0 <= rank < ranks or count < ranks:
        raise ValueError(f"share(count={count}, rank={rank}, ranks={ranks}): 0 ≤ rank < ranks ≤ count")
    first, last = count * rank // ranks, count * (rank + 1) // ranks
    return start + first, last - first


def _fill(lengths: Ints, context: int) -> tuple[Ints, Ints]:
    """Rows as [first, last) document numbers: as many whole documents as fit, at least one."""
    ends = np.cumsum(lengths)
    first: list[int] = []
    last: list[int] = []
    at = 0
    while at < len(lengths):
        limit = context + (ends[at - 1] if at else 0)
        after = max(at + 1, int(np.searchsorted(ends, limit, side="right")))
        first.append(at)
        last.append(after)
        at = after
    return np.array(first, dtype=np.int64), np.array(last, dtype=np.int64)


def packed_rows(
    folder: Path | str, context: int, special: Mapping[str, int], **options: object
) -> PackedRows:
    """`PackedRows` with the ids of `<think>` and padding from a tokenizer's table of special tokens."""
    try:
        think_id, pad_id = special["<think>"], special["<｜▁pad▁｜>"]
    except KeyError as error:
        raise ShardError(f"the tokenizer has no token {error}; shards of puzzles need hadal-mini's") from None
    return PackedRows(folder, context, think_id=think_id, pad_id=pad_id, **options)  # type: ignore[arg-type]
