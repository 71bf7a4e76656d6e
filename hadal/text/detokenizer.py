"""Token ids to text as they come: never half a character, never what may be the beginning of a stop string.

UTF-8 is decoded incrementally (a character may span tokens). Stop strings are matched by one
Knuth–Morris–Pratt
automaton each, whose state is the length of the longest end of the text that begins the stop string:
exactly the text that must be held back.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from hadal.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental `Tokenizer.decode`, cut at the first stop string.

    The text of all `push`es and the final `finish` is the same however the ids are grouped. Without stop
    strings it is `tokenizer.decode(all ids)`. `stopped` is the stop string that ended the text, or None;
    the stop string itself is left out unless `include_stop`. Of several stop strings the one whose last
    character comes first wins; among those, the longest.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_control: bool = True,
    ) -> None:
        if isinstance(stop, str) or any(not isinstance(text, str) or not text for text in stop):
            raise ValueError(f"stop must be a sequence of non-empty strings, not {stop!r}")
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._skip_control = skip_control
        self._include_stop = include_stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matchers = [_Matcher(text) for text in sorted(set(stop), key=len, reverse=True)]
        self._pending = False  # a part of a character waits in _utf8
        self._held = ""
        self._at_start = tokenizer.strips_first_space
        self._finished = False

    def push(self, ids: Iterable[int]) -> str:
        """The text that became safe to show; "" after a stop string."""
        if self._finished:
            raise RuntimeError("push() after finish(): make a new Detokenizer for a new text")
        bytes_of, skip = self._tokenizer.id_to_bytes, self._skip_control
        data = b"".join([bytes_of(index, skip) for index in ids])
        if data.isascii() and not self._pending:
            text = data.decode("ascii")
        else:
            text = self._utf8.decode(data)
            self._pending = bool(self._utf8.getstate()[0])
        return self._advance(text) if self._matchers or self._at_start else text

    def finish(self) -> str:
        """The rest: text that was held back, U+FFFD if the ids end within a character. Idempotent."""
        if self._finished:
            return ""
        self._finished = True
        text = self._advance(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix(" ")
        if not self._matchers:
            return text
        for place, char in enumerate(text):
            for matcher in self._matchers:
                if matcher.feed(char):
                    return self._stop(matcher.pattern, self._held + text[: place + 1])
        text = self._held + text
        safe = len(text) - max(matcher.state for matcher in self._matchers)
        self._held = text[safe:]
        return text[:safe]

    def _stop(self, pattern: str, text: str) -> str:
        self.stopped = pattern
        self._held = ""
        return text if self._include_stop else text[: len(text) - len(pattern)]


class _Matcher:
    """Knuth–Morris–Pratt: `state` is how many characters of `pattern` the text so far ends with."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.state = 0
        self._fallback = [0] * len(pattern)
        length = 0
        for place in range(1, len(pattern)):
            while length and pattern[place] != pattern[length]:
                length = self._fallback[length - 1]
            length += pattern[place] == pattern[length]
            self._fallback[place] = length

    def feed(self, char: str) -> bool:
        """Whether the pattern is complete with this character."""
        while self.state and self.pattern[self.state] != char:
            self.state = self._fallback[self.state - 1]
        self.state += self.pattern[self.state] == char
        return self.state == len(self.pattern)
