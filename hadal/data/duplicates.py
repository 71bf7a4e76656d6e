"""Copies: exact ones by a hash of the words, near ones by MinHash with banding (Broder 1997; LSH).

A signature holds P = bands·rows minima, h_p = min over the word n-grams s of (a_p·s + b_p) mod 2⁶⁴,
upper half. Two documents agree in one minimum with probability J, the Jaccard similarity of their n-gram
sets; in all `rows` of at least one of `bands` bands with 1 − (1 − J^rows)^bands, which makes them candidates
(J = 0.8: 92% by default). Documents are judged in their order: one goes only if an earlier one that *stays*
agrees with it in `threshold` of all minima. So there are no chains of ever less similar documents, and the
report can name the one that stayed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hadal.data.recipe import Duplicates
from hadal.data.words import Hashes, mixed, ngrams

Signatures = NDArray[np.uint32]
KEEP, EXACT, NEAR = 0, 1, 2
_CHUNK = 4096  # n-grams at a time: 4 MB of products
_MOST = 64  # documents of one bucket that a candidate is compared with


def exact_key(text: str) -> tuple[int, int]:
    """128 bits of the text, white space and case apart."""
    digest = hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class MinHash:
    """Signatures by the parameters of a recipe; the same on every machine."""

    def __init__(self, settings: Duplicates) -> None:
        self.ngram, self.count = settings.ngram, settings.hashes
        numbers = mixed(np.arange(1, 2 * self.count + 1, dtype=np.uint64))
        self._a, self._b = numbers[: self.count] | np.uint64(1), numbers[self.count :]

    def signature(self, words: Hashes) -> Signatures:
        """uint32 [P]; of a text without words all ones."""
        shingles = np.unique(ngrams(words, min(self.ngram, max(1, len(words)))))
        least = np.full(self.count, 0xFFFFFFFF, dtype=np.uint32)
        for begin in range(0, len(shingles), _CHUNK):
            products = shingles[begin : begin + _CHUNK, None] * self._a
            products += self._b
            products >>= np.uint64(32)
            least = np.minimum(least, products.min(axis=0).astype(np.uint32))
        return least


@dataclass(frozen=True)
class Copies:
    """By document, in their order. decision: KEEP, EXACT or NEAR; original: the document that stays, or −1;
    similarity: share of minima that agree (1 for exact copies and what stays)."""

    decision: NDArray[np.int8]
    original: NDArray[np.int64]
    similarity: NDArray[np.float32]


def find_copies(
    keys_N2: Hashes, signatures_NP: Signatures, settings: Duplicates,
    tick: Callable[[int], None] = lambda done: None,
) -> Copies:  # fmt: skip
    """Which of N documents are copies of earlier ones. `tick(n)` is called as documents are judged."""
    count = len(keys_N2)
    found = Copies(
        np.zeros(count, dtype=np.int8), np.full(count, -1, dtype=np.int64), np.ones(count, dtype=np.float32)
    )
    if settings.exact and count:
        _exact(keys_N2, found)
    if settings.near and count:
        _near(signatures_NP, found, settings, tick)
    return found


def _exact(keys_N2: Hashes, found: Copies) -> None:
    _, first, group = np.unique(keys_N2, axis=0, return_index=True, return_inverse=True)
    original = first[group.reshape(-1)]
    copies = original != np.arange(len(original))
    found.decision[copies] = EXACT
    found.original[copies] = original[copies]


def _near(
    signatures_NP: Signatures, found: Copies, settings: Duplicates, tick: Callable[[int], None]
) -> None:
    buckets_of = _shared_buckets(signatures_NP, found.decision == KEEP, settings)
    kept: dict[int, list[int]] = {}
    wanted = settings.threshold
    for done, (document, buckets) in enumerate(sorted(buckets_of.items())):
        if done % 1024 == 0:
            tick(1024)
        others = np.array(sorted({d for bucket in buckets for d in kept.get(bucket, ())}), dtype=np.int64)
        if len(others):
            agree = (signatures_NP[others] == signatures_NP[document]).mean(axis=1)
            best = int(agree.argmax())
            if agree[best] >= wanted:
                found.decision[document] = NEAR
                found.original[document] = others[best]
                found.similarity[document] = agree[best]
                continue
        for bucket in buckets:
            members = kept.setdefault(bucket, [])
            if len(members) < _MOST:
                members.append(document)


def _shared_buckets(
    signatures_NP: Signatures, judged: NDArray[np.bool_], settings: Duplicates
) -> dict[int, list[int]]:
    """For each document that shares a band's value with another: numbers of these buckets."""
    judged = judged & (signatures_NP != 0xFFFFFFFF).any(axis=1)
    documents = np.flatnonzero(judged)
    shared: dict[int, list[int]] = {}
    number = 0
    for band in range(settings.bands):
        rows = signatures_NP[documents, band * settings.rows : (band + 1) * settings.rows].astype(np.uint64)
        key = np.zeros(len(documents), dtype=np.uint64)
        for column in rows.T:
            key = mixed(key + column + np.uint64(1))
        _, group, size = np.unique(key, return_inverse=True, return_counts=True)
        for at in np.flatnonzero(size[group] > 1):
            shared.setdefault(int(documents[at]), []).append(number + int(group[at]))
        number += len(size)
    return shared
