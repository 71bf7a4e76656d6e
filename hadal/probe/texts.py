"""Texts to embed, out of files: a line each, or JSONL with named fields.

A target is written as `[begin, end]` in characters, as a list of such pairs, or as the word itself, which
must then stand in the text exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hadal.data.strict import half_character
from hadal.probe.backends import Item
from hadal.probe.extract import ProbeError
from hadal.probe.pooling import Spans, find_span


def from_lines(lines: Iterable[str]) -> list[Item]:
    """One text a line, numbered from 0; empty lines are left out."""
    texts = [line.strip("\r\n") for line in lines]
    return [Item(str(i), text) for i, text in enumerate(t for t in texts if t.strip())]


def read_items(
    path: Path, *, text_field: str = "text", id_field: str = "id", span_field: str | None = None
) -> tuple[list[Item], list[dict[str, Any]]]:
    """(texts, the rows that they came from). `.jsonl`: an object a line; anything else: a text a line. Rows
    without `id_field` are numbered. Raises ProbeError with the line."""
    if not path.is_file():
        raise ProbeError(f"{path} " + ("is no file" if path.exists() else "does not exist"))
    try:
        content = path.read_text("utf-8-sig")  # a byte order mark is no part of the first text
    except UnicodeDecodeError as error:
        raise ProbeError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    if path.suffix not in (".jsonl", ".ndjson"):
        if span_field is not None:
            raise ProbeError(f"{path.name} has no fields: spans need a .jsonl")
        items = from_lines(content.split("\n"))
        return items, [{} for _ in items]
    items, rows = [], []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                if half := half_character(row):
                    raise ProbeError(f"it holds {half}")
                items.append(_item(row, len(items), text_field, id_field, span_field))
            except (ProbeError, ValueError, RecursionError) as error:
                raise ProbeError(f"{path.name}, line {number}: {error}") from None
            rows.append(row)
    return items, rows


def _item(row: Any, number: int, text_field: str, id_field: str, span_field: str | None) -> Item:
    if not isinstance(row, dict):
        raise ProbeError(f"no text under {text_field!r}: the row is no object")
    for what, field in (("text", text_field), ("target", span_field)):
        if field is not None and field not in row:
            raise ProbeError(
                f"no {what} under {field!r}; the row has {', '.join(map(repr, row)) or 'nothing'}"
            )
    text = row[text_field]
    if not isinstance(text, str):
        raise ProbeError(f"{text_field!r} is {text!r}; it must be a text")
    spans = () if span_field is None else read_spans(text, row[span_field])
    return Item(str(row.get(id_field, number)), text, spans)


def read_spans(text: str, value: Any) -> Spans:
    """The target as characters. Raises ProbeError."""
    if isinstance(value, str):
        span = find_span(text, value)
        try:
            find_span(text, value, 1)
        except ProbeError:
            return (span,)
        raise ProbeError(f"{value!r} stands in the text more than once: give its characters, [begin, end]")
    pairs = [value] if isinstance(value, list) and value and isinstance(value[0], int) else value
    if not isinstance(pairs, list) or not pairs or not all(map(_is_pair, pairs)):
        raise ProbeError(f"a span is [begin, end], a list of such, or a word of the text, not {value!r}")
    for begin, end in pairs:
        if not 0 <= begin < end <= len(text):
            raise ProbeError(f"span {begin}:{end} is not inside the {len(text)} characters of {text[:60]!r}")
    return tuple((int(begin), int(end)) for begin, end in pairs)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(x) is int for x in value)
