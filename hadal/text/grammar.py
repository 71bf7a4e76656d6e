"""Structured output: at every step, the tokens after which the answer can still become valid, as a bit
mask.

The grammars (JSON, JSON Schema, regular expressions, calls of given tools) are compiled and followed by
`llguidance` (an Earley parser over regular-expression derivatives, github.com/guidance-ai/llguidance). Here
stand its bounds, since
the grammar comes from a request: the schema is measured before it is compiled, compiling has a budget of
work and of time, and every failure is a GrammarError in one line.

Control tokens never match a grammar's text; only the end of the answer, the reasoning's closing tag and the
markers of tool calls are allowed, where they belong.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import llguidance
import numpy as np
import numpy.typing as npt

from hadal.text.messages import ToolDefinition
from hadal.text.prompt import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, END_THINK, SEPARATOR
from hadal.text.tokenizer import Control, Tokenizer

Mask = npt.NDArray[np.int32]

# Between two JSON tokens: enough to indent, too little to go on for ever.
_JSON_OPTIONS: Final[Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n\r\t]{0,40}",
    "lenient": False,
}
_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_FREE_TEXT: Final = "THOUGHT: /(.|\\n)*/\nSPACE: /\\n{0,2}/\n"
_SEPARATORS: Final = {"v3": r'"\n"', "v3.1": ""}


class GrammarError(ValueError):
    """A grammar that cannot be used, or a token that breaks it."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a grammar from a request."""

    depth: int = 64
    schema_bytes: int = 256 * 1024
    properties: int = 1000  # of one object; compiling takes time in their square
    values: int = 50_000  # all objects, arrays, texts and numbers of a schema
    regex_bytes: int = 16 * 1024
    seconds: float = 5.0


DEFAULT_LIMITS: Final = Limits()


class Matcher:
    """Follows one answer through its grammar. Not for several threads at once."""

    def __init__(self, matcher: llguidance.LLMatcher, tokenizer: Tokenizer) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer

    def mask(self, out: Mask | None = None) -> Mask:
        """Allowed next tokens: bit `id % 32` of int32 word `id // 32`, [ceil(padded_vocab_size / 32)].

        `out` is filled and given back, if given; it must be contiguous and of that shape.
        Raises GrammarError if the grammar has become too costly to follow.
        """
        words = mask_words(self._tokenizer.padded_vocab_size)
        row = np.empty(words, np.int32) if out is None else out
        if row.shape != (words,) or row.dtype != np.int32 or not row.flags.c_contiguous:
            raise ValueError(
                f"out must be a contiguous int32 array of shape ({words},), not {row.dtype}{row.shape}"
            )
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            raise GrammarError(
                f"the grammar cannot be followed further: {_one_line(self._matcher.get_error())}"
            )
        return row

    def accept(self, index: int) -> None:
        """Go on after this token; GrammarError if the grammar does not allow it here."""
        if not self._matcher.consume_token(index):
            text = self._tokenizer.token_text(index)
            raise GrammarError(f"token {index} ({text!r}) is not allowed by the grammar here")

    def is_done(self) -> bool:
        """Whether the answer is complete, and nothing but the end of the sequence can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def may_end(self) -> bool:
        """Whether the answer is valid as it stands (perhaps it can also be continued)."""
        return bool(self._matcher.is_accepting())


class Grammar:
    """A compiled grammar; `matcher()`, or calling it, gives a fresh Matcher for each answer.

    after_reasoning: the output begins inside the reasoning, which is free until its closing tag; the
    grammar holds from there.
    """

    def __init__(
        self,
        top: str,
        parts: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        after_reasoning: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        if after_reasoning:
            close = _token(tokenizer, END_THINK)
            top = f"start: THOUGHT {close} SPACE answer\n{_FREE_TEXT}answer: {top}"
        else:
            top = f"start: {top}"
        grammar = json.dumps({"grammars": [{"name": "top", "lark_grammar": top}, *parts]})
        self._tokenizer = tokenizer
        self._compiled = _compile(grammar, tokenizer, limits)

    def matcher(self) -> Matcher:
        return Matcher(self._compiled.deep_copy(), self._tokenizer)

    __call__ = matcher

    @classmethod
    def from_schema(cls, schema: Mapping[str, Any], tokenizer: Tokenizer, **options: Any) -> Grammar:
        """JSON that a JSON Schema describes. Keywords that cannot be enforced are refused, not ignored."""
        return cls(
            "@json", [_json_part("json", schema, options.get("limits", DEFAULT_LIMITS))], tokenizer, **options
        )

    @classmethod
    def from_regex(cls, pattern: str, tokenizer: Tokenizer, **options: Any) -> Grammar:
        """Text that a regular expression (Rust's syntax: no back-references, no look-around) matches as a
        whole."""
        limits: Limits = options.get("limits", DEFAULT_LIMITS)
        if not isinstance(pattern, str) or len(pattern.encode("utf-8", "replace")) > limits.regex_bytes:
            raise GrammarError(f"a regex must be text of at most {limits.regex_bytes} bytes")
        if any("\ud800" <= char <= "\udfff" for char in pattern):
            raise GrammarError("a regex must be valid Unicode, and this one has a lone surrogate")
        compiled = json.loads(llguidance.LLMatcher.grammar_from_regex(pattern))
        return cls("@regex", [{**compiled["grammars"][0], "name": "regex"}], tokenizer, **options)

    @classmethod
    def from_response_format(
        cls, response_format: Mapping[str, Any] | None, tokenizer: Tokenizer, **options: Any
    ) -> Grammar | None:
        """OpenAI's `response_format`: text (None), json_object, json_schema; also {"type": "regex",
        "pattern": …}."""
        if response_format is None:
            return None
        if not isinstance(response_format, Mapping):
            raise GrammarError(f"response_format must be an object, not {type(response_format).__name__}")
        kind = response_format.get("type")
        extra = {"json_schema": {"json_schema"}, "regex": {"pattern"}}.get(str(kind), set())
        if unknown := sorted(response_format.keys() - extra - {"type"}):
            raise GrammarError(f"unknown field {unknown[0]!r} in response_format of type {kind!r}")
        if kind == "text":
            return None
        if kind == "json_object":
            return cls.from_schema({"type": "object"}, tokenizer, **options)
        if kind == "json_schema":
            return cls.from_schema(_named_schema(response_format.get("json_schema")), tokenizer, **options)
        if kind == "regex":
            return cls.from_regex(response_format.get("pattern", ""), tokenizer, **options)
        raise GrammarError(
            f"response_format.type must be text, json_object, json_schema or regex, not {kind!r}"
        )

    @classmethod
    def from_tools(
        cls,
        tools: Sequence[ToolDefinition],
        tokenizer: Tokenizer,
        form: str,
        *,
        parallel: bool = True,
        **options: Any,
    ) -> Grammar:
        """One call of one of the tools, or several (`parallel`), in a template's `tool_format`, and nothing
        else.

        For tool_choice "required", or with one tool for a named one.
        """
        if not tools:
            raise GrammarError("a tool call is required, but there are no tools")
        if form not in _SEPARATORS:
            raise GrammarError(f"unknown form of tool calls {form!r}; known: {', '.join(_SEPARATORS)}")
        limits: Limits = options.get("limits", DEFAULT_LIMITS)
        calls, parts = [], []
        for place, tool in enumerate(tools):
            if not _TOOL_NAME.fullmatch(tool.name):
                raise GrammarError(
                    f"tool name {tool.name!r} cannot be called: use letters, digits and _ . : / -"
                )
            calls.append(_call_rule(tool.name, f"@arguments_{place}", form, tokenizer))
            schema = {"type": "object", **json.loads(tool.parameters)}
            parts.append(_json_part(f"arguments_{place}", schema, limits))
        further = f"({_SEPARATORS[form]} call)*" if parallel else ""
        begin, end = _token(tokenizer, CALLS_BEGIN), _token(tokenizer, CALLS_END)
        return cls(f"{begin} call {further} {end}\ncall: " + " | ".join(calls), parts, tokenizer, **options)


def mask_words(vocab_size: int) -> int:
    """int32 words of a packed mask over so many tokens."""
    return -(-vocab_size // 32)


def mask_to_bool(mask: Mask, vocab_size: int) -> npt.NDArray[np.bool_]:
    """A packed mask [..., words] as booleans [..., vocab_size]."""
    bits = np.unpackbits(np.ascontiguousarray(mask, dtype="<i4").view(np.uint8), axis=-1, bitorder="little")
    return bits[..., :vocab_size].astype(np.bool_)


# --- pieces of a grammar ---


def _token(tokenizer: Tokenizer, control: Control) -> str:
    """A control token in llguidance's syntax, by its id."""
    if control.content not in tokenizer.special:
        raise GrammarError(f"this model has no token {control.content!r}, which the grammar needs")
    return f"<[{tokenizer.special[control.content]}]>"


def _call_rule(name: str, arguments: str, form: str, tokenizer: Tokenizer) -> str:
    begin, separator, end = (_token(tokenizer, control) for control in (CALL_BEGIN, SEPARATOR, CALL_END))
    if form == "v3":
        return rf'{begin} "function" {separator} "{name}\n```json\n" {arguments} "\n```" {end}'
    return f'{begin} "{name}" {separator} {arguments} {end}'


def _named_schema(value: Any) -> Mapping[str, Any]:
    """`response_format.json_schema`: {"name", "schema", "strict", "description"}."""
    if not isinstance(value, Mapping) or not isinstance(value.get("schema"), Mapping):
        raise GrammarError("response_format.json_schema needs a schema, which must be an object")
    if unknown := sorted(value.keys() - {"name", "schema", "strict", "description"}):
        raise GrammarError(f"unknown field {unknown[0]!r} in response_format.json_schema")
    schema: Mapping[str, Any] = value["schema"]
    return schema


def _json_part(name: str, schema: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    if not isinstance(schema, Mapping):
        raise GrammarError(f"a schema must be an object, not {type(schema).__name__}")
    _measure(schema, limits)
    try:
        compiled = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)
    except (TypeError, ValueError) as error:
        raise GrammarError(f"the schema is not JSON: {_one_line(str(error))}") from None
    return {**json.loads(compiled)["grammars"][0], "name": name}


def _measure(schema: Any, limits: Limits) -> None:
    """Refuse a schema that is too deep or too large, or that asks for what it should not; without
    recursion."""
    values = size = 0
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        values += 1
        if depth > limits.depth:
            raise GrammarError(f"the schema is nested more than {limits.depth} levels deep")
        if values > limits.values:
            raise GrammarError(f"the schema has more than {limits.values} values")
        if isinstance(value, Mapping):
            if len(value) > limits.properties:
                raise GrammarError(
                    f"an object of the schema has {len(value)} entries; at most {limits.properties}"
                )
            _check_object(value)
            size += sum(len(str(key)) for key in value)
            pending.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend((item, depth + 1) for item in value)
        elif isinstance(value, str):
            size += len(value)
        if size > limits.schema_bytes:
            raise GrammarError(f"the schema has more than {limits.schema_bytes} bytes")


def _check_object(value: Mapping[str, Any]) -> None:
    if "x-guidance" in value:
        raise GrammarError("x-guidance is not supported in a schema: leave it out")
    reference = value.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise GrammarError(
            f"$ref {reference!r} is outside the schema: only references to its own parts ('#/…') work"
        )


# --- compiling ---

_GUIDES: weakref.WeakKeyDictionary[Tokenizer, llguidance.LLTokenizer] = weakref.WeakKeyDictionary()
_GUIDES_LOCK = threading.Lock()
# A compilation that outlives its time goes on in its thread until its budget of work is spent; so few may
# run at once.
_COMPILING = threading.BoundedSemaphore(4)


def _guide(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    """llguidance's table of a tokenizer, made once (a second for 130,000 tokens)."""
    with _GUIDES_LOCK:
        guide = _GUIDES.get(tokenizer)
        if guide is None:
            if not tokenizer.eos_ids:
                raise GrammarError(
                    "structured output needs an end-of-sequence token, and this tokenizer names none"
                )
            guide = llguidance.LLTokenizer(
                tokenizer.backend_json(all_special=True),
                n_vocab=tokenizer.padded_vocab_size,
                eos_token=list(tokenizer.eos_ids),
            )
            _GUIDES[tokenizer] = guide
        return guide


def _compile(grammar: str, tokenizer: Tokenizer, limits: Limits) -> llguidance.LLMatcher:
    guide = _guide(tokenizer)
    if not _COMPILING.acquire(timeout=limits.seconds):
        raise GrammarError("other grammars are being compiled: try again")
    result: list[llguidance.LLMatcher] = []

    def work() -> None:
        try:
            matcher = llguidance.LLMatcher(
                guide, grammar, log_level=0, limits=llguidance.LLParserLimits(verbose_errors=False)
            )
            if not matcher.is_error():
                matcher.deep_copy().compute_bitmask()  # the first mask builds the lexer's tables
            result.append(matcher)
        finally:
            _COMPILING.release()

    thread = threading.Thread(target=work, name="hadal-grammar", daemon=True)
    thread.start()
    thread.join(limits.seconds)
    if thread.is_alive():
        raise GrammarError(f"the grammar takes more than {limits.seconds:g} s to compile: make it simpler")
    if not result:
        raise GrammarError("the grammar could not be compiled")
    if result[0].is_error():
        raise GrammarError(f"the grammar is not valid: {_one_line(result[0].get_error())}")
    probe = result[0].deep_copy()
    if not np.frombuffer(probe.compute_bitmask(), np.int32).any() or probe.is_error():
        raise GrammarError("the grammar matches no text at all, or is too large to follow")
    return result[0]


def _one_line(text: str, longest: int = 300) -> str:
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= longest else line[:longest] + "…"
