"""A document as tokens: fill-in-the-middle at a rate, the tokenizer, the splitting of joined tokens.

FIM in PSM order (V3 §4.1; Bavarian et al. 2207.14255): the text is cut at two random characters, and becomes

    <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle <eos>

Tokens that join signs and line breaks (".\\n\\n") are split into the two at a rate, so that a model also sees
a sign that ends a prompt, and the line breaks alone (V3 §4.1: against token-boundary bias).

What is drawn depends on the recipe's seed and the document's name and text alone. Control tokens come from
here only: a corpus that spells one gets its letters (hadal/text/tokenizer.py).
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
from numpy.typing import NDArray

from hadal.data.strict import RecipeError
from hadal.text.tokenizer import Tokenizer

Ids = NDArray[np.uint32]
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
_SHORTEST_FIM = 16  # characters
_JOINED = re.compile(r"( ?[^\w\s]+)([\r\n]+)")


def draws(seed: int, name: str, count: int) -> list[float]:
    """`count` (up to 8) uniform numbers in [0, 1) that depend on the seed and the name alone."""
    digest = hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8 * count).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") / 2**64 for i in range(count)]


def joined_tokens(tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    """For each token of signs and then line breaks: the ids of its signs and of its line breaks."""
    found = {}
    controls = set(tokenizer.special.values())
    for index in range(tokenizer.vocab_size):
        if index in controls:
            continue
        match = _JOINED.fullmatch(tokenizer.id_to_bytes(index).decode("utf-8", "replace"))
        if match and "\ufffd" not in match[0]:
            found[index] = (*tokenizer.encode(match[1]), *tokenizer.encode(match[2]))
    return found


class DocumentEncoder:
    """Documents to ids. Raises RecipeError where the tokenizer lacks a token that the recipe needs."""

    def __init__(
        self, tokenizer: Tokenizer, *, seed: int = 0, bos: bool = True, fim_rate: float = 0.0,
        split_rate: float = 0.0,
    ) -> None:  # fmt: skip
        self.tokenizer, self.seed = tokenizer, seed
        self.fim_rate, self.split_rate = fim_rate, split_rate
        if bos and tokenizer.bos_id is None:
            raise RecipeError("the tokenizer has no BOS token; tokens.bos = false does without")
        if not tokenizer.eos_ids:
            raise RecipeError("the tokenizer names no EOS token; its tokenizer_config.json must")
        missing = [t for t in (FIM_BEGIN, FIM_HOLE, FIM_END) if fim_rate and t not in tokenizer.special]
        if missing:
            raise RecipeError(f"fim.rate is {fim_rate}, but the tokenizer has no {missing[0]}; set it to 0")
        self._first = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
        self._eos = tokenizer.eos_ids[0]
        self._fim = [tokenizer.special.get(t, -1) for t in (FIM_BEGIN, FIM_HOLE, FIM_END)]
        self._split = joined_tokens(tokenizer) if split_rate else {}
        self._is_joined = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_joined[list(self._split)] = True

    def encode(self, text: str, name: str) -> tuple[Ids, bool]:
        """(ids of a whole document, whether it was rearranged). `name` tells documents apart."""
        chance, first, second = draws(self.seed, f"fim|{name}", 3)
        if chance < self.fim_rate and len(text) >= _SHORTEST_FIM:
            low, high = sorted((int(first * (len(text) + 1)), int(second * (len(text) + 1))))
            begin, hole, end = self._fim
            parts: list[int | str] = [begin, text[:low], hole, text[high:], end, text[low:high]]
        else:
            parts = [text]
        ids = list(self._first)
        for number, part in enumerate(parts):
            ids += [part] if isinstance(part, int) else self._plain(part, f"{number}|{name}")
        ids.append(self._eos)
        return np.array(ids, dtype=np.uint32), len(parts) > 1

    def _plain(self, text: str, name: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if not self.split_rate:
            return ids
        places = np.flatnonzero(self._is_joined[ids]) if ids else np.empty(0, dtype=np.int64)
        if not len(places):
            return ids
        (start,) = draws(self.seed, f"split|{name}", 1)
        chosen = places[np.random.default_rng(int(start * 2**53)).random(len(places)) < self.split_rate]
        result: list[int] = []
        after = 0
        for place in chosen.tolist():
            result += ids[after:place]
            result += self._split[ids[place]]
            after = place + 1
        return result + ids[after:]
