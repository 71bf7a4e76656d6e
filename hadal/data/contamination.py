"""Evaluation sets that must not be trained on: an index of their word n-grams, and what a text has of it.

N-grams that are mostly numbers are left out: "0 1 2 3 4 5 6 7 8 9" says nothing about where it came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hadal.data.recipe import Decontaminate
from hadal.data.words import Hashes, Words, ngrams, split


@dataclass(frozen=True)
class Index:
    """lengths: how many words an entry of each table has; for each length its sorted n-grams and whose they
    are (an index of `names`)."""

    names: list[str]
    tables: dict[int, tuple[Hashes, NDArray[np.int32]]]

    def find(self, words: Hashes) -> int:
        """The number of an evaluation text that these words hold a part of, or −1."""
        return self._first(words)[0]

    def shared(self, text: str) -> str:
        """The first words of a text that an evaluation text has too; "" if there are none."""
        words = split(text)
        owner, at, length = self._first(Words().of(text))
        return " ".join(words[at : at + length]) if owner >= 0 else ""

    def _first(self, words: Hashes) -> tuple[int, int, int]:
        """(evaluation text, place in the words, length) of the longest, then first match, or −1."""
        for length, (grams, owners) in sorted(self.tables.items(), reverse=True):
            mine = ngrams(words, length)
            if len(mine) and len(grams):
                at = np.searchsorted(grams, mine)
                at[at == len(grams)] = 0
                hits = np.flatnonzero(grams[at] == mine)
                if len(hits):
                    return int(owners[at[hits[0]]]), int(hits[0]), length
        return -1, 0, 0


def build_index(texts: Iterable[tuple[str, str]], settings: Decontaminate) -> Index:
    """From (name, text) of every evaluation text."""
    words = Words()
    names: list[str] = []
    found: dict[int, list[tuple[Hashes, int]]] = {}
    for name, text in texts:
        mine = split(text)
        length = min(settings.ngram, len(mine))
        if length >= settings.shortest:
            wordy = np.array([not word.isnumeric() for word in mine], dtype=np.int64)
            enough = 2 * np.convolve(wordy, np.ones(length, dtype=np.int64), "valid") >= length
            found.setdefault(length, []).append((ngrams(words.of(text), length)[enough], len(names)))
        names.append(name)
    tables = {}
    for length, entries in found.items():
        grams = np.concatenate([grams for grams, _ in entries])
        owners = np.repeat([owner for _, owner in entries], [len(grams) for grams, _ in entries])
        unique, first = np.unique(grams, return_index=True)
        tables[length] = (unique, owners[first].astype(np.int32))
    return Index(names, tables)


def save_index(index: Index, folder: Path) -> None:
    """Write an index into a folder."""
    for length, (grams, owners) in index.tables.items():
        grams.astype("<u8").tofile(folder / f"{length}.grams")
        owners.astype("<i4").tofile(folder / f"{length}.owners")
    (folder / "index.json").write_text(
        json.dumps({"names": index.names, "lengths": sorted(index.tables)}), encoding="utf-8"
    )


def load_index(folder: Path) -> Index:
    """Read it back; the tables are memory-mapped."""
    data = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    tables: dict[int, tuple[Hashes, NDArray[np.int32]]] = {
        length: (
            np.memmap(folder / f"{length}.grams", dtype="<u8", mode="r"),
            np.fromfile(folder / f"{length}.owners", dtype="<i4"),
        )
        for length in data["lengths"]
    }
    return Index(data["names"], tables)
