"""Which tokens of a text make its vector, and with what weight.

    mean, last, weighted   of the whole text, as in hadal/engine/pooling.py
    span, span-last        the tokens of the target alone: their mean, or the last of them

A target is given by characters, in one or several pieces (French "ne … pas"). A token belongs to it if it
holds at least one of its characters that is not white space, whole or in part: a word's token with the space
before it does, the token after a target that ends in a space does not, and a token of white space alone
never does. A token that holds letters of a
neighbour too cannot be cut; such a target is `clipped`, which a study should count. Control tokens (BOS)
belong to no target, and to no mean unless asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hadal.engine.pooling import POOLINGS, pooled, weights
from hadal.probe.extract import ProbeError
from hadal.text.tokenizer import Tokenizer

TargetPooling = Literal["mean", "last", "weighted", "span", "span-last"]
TARGET_POOLINGS: tuple[TargetPooling, ...] = get_args(TargetPooling)
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Encoded:
    """A text's token ids, and the characters [begin, end) that each holds; None for control tokens."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int] | None]


def encode(tokenizer: Tokenizer, text: str, *, bos: bool = True) -> Encoded:
    """With BOS in front, where the model has one: its layers never saw a text without."""
    ids, offsets = tokenizer.encode_with_offsets(text)
    front = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    return Encoded(text, front + ids, [None] * len(front) + list(offsets))


def span_tokens(encoded: Encoded, spans: Spans) -> tuple[list[int], bool]:
    """(positions of the target's tokens, whether it is clipped). Raises ProbeError for a target that is
    empty, white space, or outside the text."""
    text = encoded.text
    target: set[int] = set()
    for begin, end in spans:
        if not 0 <= begin < end <= len(text):
            raise ProbeError(f"span {begin}:{end} is not inside the {len(text)} characters of {_shown(text)}")
        target.update(i for i in range(begin, end) if not text[i].isspace())
    if not target:
        raise ProbeError(f"the target of {_shown(text)} holds no character")
    found, clipped = [], False
    for position, place in enumerate(encoded.offsets):
        held = [] if place is None else [i for i in range(*place) if not text[i].isspace()]
        if target.intersection(held):
            found.append(position)
            clipped = clipped or not target.issuperset(held)
    if not found:
        raise ProbeError(f"no token holds the target of {_shown(text)}: the tokenizer drops its characters")
    return found, clipped


def pool_weights(
    encoded: Encoded, spans: Spans, pooling: TargetPooling, *, special: bool = False
) -> NDArray[np.float32]:
    """Weights [tokens] whose sum is one. Raises ProbeError where a span is needed and none is given."""
    if pooling not in TARGET_POOLINGS:
        raise ProbeError(f"pooling must be one of {', '.join(TARGET_POOLINGS)}, not {pooling!r}")
    if pooling in POOLINGS:
        controls = [i for i, place in enumerate(encoded.offsets) if place is None]
        positions = pooled(range(len(encoded.ids)), () if special else frozenset(controls))
        return weights(len(encoded.ids), positions, pooling)
    if not spans:
        raise ProbeError(f"pooling {pooling!r} needs the target's span, which {_shown(encoded.text)} lacks")
    positions, _ = span_tokens(encoded, spans)
    return weights(len(encoded.ids), positions, "last" if pooling == "span-last" else "mean")


def find_span(text: str, target: str, occurrence: int = 0) -> tuple[int, int]:
    """Where `target` stands in `text`, the `occurrence`-th time from 0; as a whole word where its ends are
    letters. Raises ProbeError where it does not."""
    at = -1
    for _ in range(occurrence + 1):
        at = text.find(target, at + 1)
        while at >= 0 and not _whole(text, at, at + len(target)):
            at = text.find(target, at + 1)
        if at < 0 or not target:
            raise ProbeError(f"{target!r} does not stand {occurrence + 1} times in {_shown(text)}")
    return at, at + len(target)


def _whole(text: str, begin: int, end: int) -> bool:
    """Whether no word goes on beyond either end."""
    before = begin > 0 and text[begin - 1].isalnum() and text[begin].isalnum()
    after = end < len(text) and text[end - 1].isalnum() and text[end].isalnum()
    return not before and not after


def joined(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The target as text: its pieces, with an ellipsis between."""
    return " … ".join(text[begin:end] for begin, end in spans)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
