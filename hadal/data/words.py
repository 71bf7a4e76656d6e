"""Words and word n-grams as 64-bit numbers: what near-duplicates and contamination are found by.

A word is a run of letters and digits, lower case; in Chinese and Japanese each character is one. Signs and
white space count for nothing, so that a changed layout hides no copy.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
MAX_REMEMBERED = 500_000


def hash64(data: bytes) -> int:
    """64 bits that depend on the bytes alone."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Words(dict[str, int]):
    """Hashes of words, remembered."""

    def __missing__(self, word: str) -> int:
        if len(self) > MAX_REMEMBERED:
            self.clear()
        found = self[word] = hash64(word.encode())
        return found

    def of(self, text: str) -> Hashes:
        """The hash of each word of a text, in order."""
        return np.array([self[word] for word in split(text)], dtype=np.uint64)


def split(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text.lower())


def mixed(x: Hashes) -> Hashes:
    """Every bit of the result depends on every bit of the input (MurmurHash3's finaliser)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def ngrams(words: Hashes, n: int) -> Hashes:
    """A hash for each n words in a row; empty where there are fewer."""
    count = len(words) - n + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    sums = np.zeros(count, dtype=np.uint64)
    for k in range(n):
        sums = sums * _FACTOR + words[k : k + count]
    return mixed(sums)
