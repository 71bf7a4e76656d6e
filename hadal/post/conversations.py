"""Conversations to training documents: what a model reads as it would at inference, and what it is to write.

A line of a JSONL file is {"messages": [...], "tools": [...]}; what else it holds (where it comes from, what a
verifier said) is left alone. A document is token ids with a mask, 1 for the tokens that the assistant writes,
its end of sentence included; prompts and answers are encoded apart, as they are at inference, where the model
goes on from the prompt's last token.

What is rendered is what is trained. R1's template drops the reasoning of earlier answers, so an answer that
was written with reasoning does not stand in the next prompt as it was written: the conversation then becomes
several documents, one for each answer, each with the history that the model would see. Where a template
leaves answers as they are (V2, V3), the whole conversation is one document in which every answer counts.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hadal.data.reading import DataError
from hadal.data.strict import half_character
from hadal.text.messages import TemplateError
from hadal.text.templates import Part, Parts, Template
from hadal.text.tokenizer import Tokenizer

Turns = Literal["all", "last"]
_OTHER_FORMS = {
    "conversations": '"from"/"value" pairs become "role"/"content" ones in "messages"',
    "prompt": "a prompt and its answer become two messages",
    "text": "finished text is for `hadal train`",
}


@dataclass(frozen=True)
class Conversation:
    """One line. `place`: where it stands, for reports."""

    place: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None

    @property
    def answers(self) -> list[int]:
        """Positions of the assistant's messages."""
        return [
            i for i, m in enumerate(self.messages) if isinstance(m, Mapping) and m.get("role") == "assistant"
        ]

    @property
    def has_empty_answer(self) -> bool:
        """Whether the assistant says nothing somewhere: no text and no call."""
        return any(not _says(self.messages[i]) for i in self.answers)


@dataclass(frozen=True)
class Document:
    """Token ids, and for each 1 where it is trained on."""

    ids: list[int]
    mask: list[int]

    @property
    def trained(self) -> int:
        return sum(self.mask)


def read(file: Path) -> Iterator[Conversation]:
    """The conversations of a .jsonl or .jsonl.gz file. Raises DataError, naming the line."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _conversation(line, f"{file.name}:{number}")


def _conversation(line: bytes, place: str) -> Conversation:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        held = list(row)[:8] if isinstance(row, dict) else type(row).__name__
        hint = next((f"; {h}" for key, h in _OTHER_FORMS.items() if isinstance(row, dict) and key in row), "")
        raise DataError(f'{place} has no list "messages"; it holds {held}{hint}')
    if half := half_character(row):
        raise DataError(f"{place} holds {half}")
    return Conversation(place, row["messages"], row.get("tools"))


def _says(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    text = content if isinstance(content, str) else json.dumps(content) if content else ""
    return bool(text.split("</think>")[-1].strip() or message.get("tool_calls"))


def documents(
    conversation: Conversation, template: Template, tokenizer: Tokenizer, turns: Turns = "all"
) -> list[Document]:
    """The documents of a conversation; none where the assistant says nothing in it. What follows the last
    answer is left out. Raises TemplateError where the template has no form for it."""
    found: list[Document] = []
    before: Parts = []  # of the document at hand, as rendered
    ids: list[int] = []
    mask: list[int] = []
    answers = conversation.answers
    for i in answers if turns == "all" else answers[-1:]:
        if i == 0:
            raise TemplateError(
                "the assistant speaks first: there is no prompt to train it on", "messages[0]"
            )
        prompt, answer = template.split(conversation.messages[: i + 1], tools=conversation.tools)
        new = remainder(prompt, before) if before else None
        if new is None:
            if ids:
                found.append(Document(ids, mask))
            ids, mask, new = [], [], prompt
        for parts, counts in ((new, 0), (answer, 1)):
            some = tokenizer.encode_parts(parts)
            ids += some
            mask += [counts] * len(some)
        before = [*prompt, *answer]
    return [*found, Document(ids, mask)] if ids else found


def remainder(parts: Sequence[Part], beginning: Sequence[Part]) -> Parts | None:
    """What follows `beginning` in `parts`; None where `parts` does not begin so. Neighbouring texts are one
    text."""
    whole, head = _joined(parts), _joined(beginning)
    for place, part in enumerate(head):
        if place >= len(whole):
            return None
        if part == whole[place]:
            continue
        last, here = place == len(head) - 1, whole[place]
        if last and isinstance(part, str) and isinstance(here, str) and here.startswith(part):
            return [here[len(part) :], *whole[place + 1 :]]
        return None
    return whole[len(head) :]


def _joined(parts: Sequence[Part]) -> Parts:
    joined: Parts = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined
