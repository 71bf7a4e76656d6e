"""A model's output taken apart as it streams: reasoning, content, tool calls.

Whether the output begins inside the reasoning is known from the prompt (`Template.starts_in_reasoning`) and
told to the parser; nothing is guessed from the output. Tool calls come in two forms:

    v3    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
          ```json
          ARGUMENTS
          ```<｜tool▁call▁end｜> (a line feed, further calls) <｜tool▁calls▁end｜>
    v3.1  <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜> …
    <｜tool▁calls▁end｜>

A call that is not well-formed (no name, arguments that are not a JSON object, cut off) is given back as
content: what a model wrote is never lost. All results are the same however the text is split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from hadal.text.templates import TEMPLATES, Template

_OPEN: Final = "<think>"
_CLOSE: Final = "</think>"
_CALLS_BEGIN: Final = "<｜tool▁calls▁begin｜>"
_CALLS_END: Final = "<｜tool▁calls▁end｜>"
_CALL_BEGIN: Final = "<｜tool▁call▁begin｜>"
_CALL_END: Final = "<｜tool▁call▁end｜>"
_SEPARATOR: Final = "<｜tool▁sep｜>"


@dataclass(frozen=True)
class Piece:
    """A run of text of one kind; never empty."""

    kind: Literal["reasoning", "content"]
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete, well-formed call; `arguments_json` is a JSON object, as the model wrote it."""

    name: str
    arguments_json: str


# --- reasoning ---


class ReasoningParser:
    """Reasoning apart from content. Line feeds on either side of the tags belong to neither.

    starts_inside: the prompt ended inside the reasoning. may_open: the prompt left it to the model to open
    it, so that a `<think>` which is the very first thing in the output does
    (`Template.may_open_reasoning`). Otherwise all is content, tags included.
    """

    def __init__(self, starts_inside: bool, *, may_open: bool = False) -> None:
        self._state = "inside" if starts_inside else "start" if may_open else "outside"
        self._buffer = ""
        self._trims = starts_inside

    @property
    def inside(self) -> bool:
        """Whether the text so far ends inside the reasoning."""
        return self._state == "inside"

    def push(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._open()
        if self._state == "inside":
            self._add(pieces, "reasoning", self._take_reasoning())
        if self._state == "outside":
            text, self._buffer = self._buffer, ""
            self._add(pieces, "content", text)
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back. An unfinished reasoning stays reasoning."""
        pieces: list[Piece] = []
        text, self._buffer = self._buffer, ""
        self._add(pieces, "reasoning" if self._state == "inside" else "content", text)
        return pieces

    def _open(self) -> None:
        begun = self._buffer.lstrip()
        if begun.startswith(_OPEN):
            self._state, self._buffer, self._trims = "inside", begun[len(_OPEN) :], True
        elif not _OPEN.startswith(begun):
            self._state = "outside"

    def _take_reasoning(self) -> str:
        """The reasoning that is certain: without line feeds that may stand before the closing tag."""
        end = self._buffer.find(_CLOSE)
        closed = end >= 0
        if not closed:
            end = len(self._buffer) - _held(self._buffer, [_CLOSE])
        text = self._buffer[:end].rstrip("\n")
        self._buffer = self._buffer[end + len(_CLOSE) :] if closed else self._buffer[len(text) :]
        if closed:
            self._state = "outside"
            text = text.lstrip("\n") if self._trims else text
            self._trims = True
        return text

    def _add(self, pieces: list[Piece], kind: Literal["reasoning", "content"], text: str) -> None:
        if kind == "content" or self._state == "inside":
            text = text.lstrip("\n") if self._trims else text
            self._trims = self._trims and not text
        if text:
            pieces.append(Piece(kind, text))


def split_reasoning(text: str, starts_inside: bool, *, may_open: bool = False) -> tuple[str | None, str]:
    """(reasoning, content) of a whole output; reasoning is None if there was none to begin with."""
    parser = ReasoningParser(starts_inside, may_open=may_open)
    pieces = parser.push(text) + parser.finish()
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    opened = starts_inside or (may_open and text.lstrip().startswith(_OPEN))
    return (reasoning if opened else None), content


def _held(text: str, markers: Sequence[str]) -> int:
    """How many last characters of the text may be the beginning of a marker."""
    longest = max(map(len, markers))
    tail = text[1 - longest :]
    if not any(marker[0] in tail for marker in markers):
        return 0
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


# --- tool calls ---


def _read_v3(body: str) -> ToolCall | None:
    kind, _, rest = body.partition(_SEPARATOR)
    name, fence, arguments = rest.partition("```")
    arguments = arguments.removeprefix("json").rstrip()
    if kind.strip() != "function" or not fence or not arguments.endswith("```"):
        return None
    return _checked_call(name, arguments.removesuffix("```"))


def _read_v31(body: str) -> ToolCall | None:
    name, separator, arguments = body.partition(_SEPARATOR)
    return _checked_call(name, arguments) if separator else None


def _checked_call(name: str, arguments: str) -> ToolCall | None:
    name, arguments = name.strip(), arguments.strip()
    if not name or "\n" in name or "<" in name or not _is_json_object(arguments):
        return None
    return ToolCall(name, arguments)


_READERS: Final[Mapping[str, Callable[[str], ToolCall | None]]] = {"v3": _read_v3, "v3.1": _read_v31}


class ToolParser:
    """Content and tool calls of the form that a template's model writes; feed it content, not reasoning.

    template: a name in TEMPLATES, or a form ("v3", "v3.1"). Without a form of tool calls all is content.

    A block is `<｜tool▁calls▁begin｜>`, calls with white space between them, `<｜tool▁calls▁end｜>`;
    anything else ends it. Its two markers are dropped if its first call is well-formed, and are content
    otherwise.
    """

    def __init__(self, template: str) -> None:
        form = template if template in _READERS else TEMPLATES[template].tool_format
        self._read = None if form is None else _READERS[form]
        self._buffer = ""
        self._state: Callable[[list[Piece | ToolCall], bool], bool] = self._outside
        self._opening = ""  # text of the block that is neither given out nor dropped yet
        self._drops = False  # whether the block's markers are dropped

    def push(self, text: str) -> list[Piece | ToolCall]:
        return self._run(text, final=False)

    def finish(self) -> list[Piece | ToolCall]:
        """What was held back: the beginning of a marker, or an unfinished call, as content."""
        return self._run("", final=True)

    def _run(self, text: str, final: bool) -> list[Piece | ToolCall]:
        found: list[Piece | ToolCall] = []
        if self._read is None:
            _append(found, text)
            return found
        self._buffer += text
        while self._state(found, final):
            pass
        return found

    # Each state eats the beginning of the buffer, and tells whether the next state can go on with the rest.

    def _outside(self, found: list[Piece | ToolCall], final: bool) -> bool:
        before, marker, after = self._buffer.partition(_CALLS_BEGIN)
        if marker:
            _append(found, before)
            self._opening, self._drops, self._buffer, self._state = marker, False, after, self._between
            return True
        safe = len(self._buffer) - (0 if final else _held(self._buffer, [_CALLS_BEGIN]))
        _append(found, self._buffer[:safe])
        self._buffer = self._buffer[safe:]
        return False

    def _between(self, found: list[Piece | ToolCall], final: bool) -> bool:
        """In a block, before a call or the block's end."""
        rest = self._buffer.lstrip()
        space = self._buffer[: len(self._buffer) - len(rest)]
        if rest.startswith(_CALL_BEGIN):
            self._opening += "" if self._drops else space
            self._buffer, self._state = rest, self._call
            return True
        if rest.startswith(_CALLS_END):
            _append(found, "" if self._drops else self._opening + space + _CALLS_END)
            self._opening, self._buffer, self._state = "", rest[len(_CALLS_END) :], self._outside
            return True
        if not final and (_CALL_BEGIN.startswith(rest) or _CALLS_END.startswith(rest)):
            return False
        _append(found, self._opening + space)
        self._opening, self._buffer, self._state = "", rest, self._outside
        return True

    def _call(self, found: list[Piece | ToolCall], final: bool) -> bool:
        """At the beginning of a call, in full or in part."""
        ends = [place for marker in (_CALL_END, _CALLS_END) if (place := self._buffer.find(marker)) >= 0]
        if not ends and not final:
            return False
        end = min(ends, default=len(self._buffer))
        call = None
        if self._read is not None and self._buffer.startswith(_CALL_END, end):
            call = self._read(self._buffer[len(_CALL_BEGIN) : end])
            end += len(_CALL_END)
        raw, self._buffer = self._buffer[:end], self._buffer[end:]
        if call is None:
            _append(found, self._opening + raw)
        else:
            self._drops = self._drops or bool(self._opening)
            found.append(call)
        self._opening, self._state = "", self._between
        return True


class OutputParser:
    """Reasoning, then content and tool calls: what a chat server makes of one answer.

    tools: whether the request offered tools; without, calls stay content.
    """

    def __init__(
        self,
        template: Template,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        tools: bool = False,
    ) -> None:
        starts_inside = template.starts_in_reasoning(thinking, messages)
        may_open = thinking is not False and template.may_open_reasoning(messages)
        self._reasoning = ReasoningParser(starts_inside, may_open=may_open)
        self._tools = ToolParser(template.name) if tools else None

    @property
    def inside(self) -> bool:
        """Whether the text so far ends inside the reasoning."""
        return self._reasoning.inside

    def push(self, text: str) -> list[Piece | ToolCall]:
        return self._sort(self._reasoning.push(text))

    def finish(self) -> list[Piece | ToolCall]:
        found = self._sort(self._reasoning.finish())
        return found + (self._tools.finish() if self._tools else [])

    def _sort(self, pieces: list[Piece]) -> list[Piece | ToolCall]:
        found: list[Piece | ToolCall] = []
        for piece in pieces:
            found.extend(self._tools.push(piece.text) if self._tools and piece.kind == "content" else [piece])
        return found


def _append(found: list[Piece | ToolCall], text: str) -> None:
    if text:
        found.append(Piece("content", text))


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_constant=_refuse_constant), dict)
    except (ValueError, RecursionError):
        return False


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
