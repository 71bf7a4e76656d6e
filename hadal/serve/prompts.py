"""Text to token ids for the server: refused at once when hopelessly long, encoded off the event loop
otherwise.

A token stands for at most N bytes, so a text of more than context × N bytes cannot fit; that costs nothing to
see. For long texts N is taken over the tokens that consist only of bytes that occur in the text, which
settles ten megabytes of one character in milliseconds. What remains is encoded in a thread: `encode_batch`
releases the GIL, so streams keep their pace.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from hadal.engine.request import RequestError, check_token_ids
from hadal.serve.errors import ApiError, bad
from hadal.serve.fields import Fields, shown
from hadal.serve.messages import template_refusal
from hadal.text.messages import TemplateError
from hadal.text.tokenizer import Control, TokenizerError

T = TypeVar("T")
INLINE_BYTES = 4096  # shorter texts are encoded on the spot: handing them to a thread would take longer
REFINE_BYTES = 1 << 18

_POOL = ThreadPoolExecutor(max_workers=2, thread_name_prefix="hadal-encode")


async def in_thread(work: Callable[[], T]) -> T:
    """Run `work` in the encoders' own small pool (bounded: a flood of long prompts takes two cores, not
    all)."""
    return await asyncio.get_running_loop().run_in_executor(_POOL, work)


class Encoder:
    """Prompts of one model, as token ids that fit its context."""

    def __init__(self, engine: Any) -> None:
        self.tokenizer = engine.tokenizer
        self.template = engine.template
        self.limit = int(engine.max_model_len)
        self.vocab_size = int(engine.vocab_size)

    async def text(self, text: str, param: str, *, bos: bool, limited: bool = True) -> list[int]:
        """Ids of a plain text, with the model's BOS in front if it has one and `bos`. `limited`: refuse at
        once what certainly does not fit."""
        ids = await self._encode(
            len(text), [text] if limited else [], lambda: self.tokenizer.encode(text), param
        )
        if bos and self.tokenizer.bos_id is not None:
            return [self.tokenizer.bos_id, *ids]
        return list(ids)

    async def parts(self, parts: Sequence[Any], param: str) -> list[int]:
        """Ids of a rendered prompt."""
        texts = [part for part in parts if isinstance(part, str)]
        size = sum(map(len, texts))
        return list(await self._encode(size, texts, lambda: self.tokenizer.encode_parts(parts), param))

    def beginning(self, text: str) -> str:
        """A beginning of the text that certainly fills the context, without the endless rest."""
        return text[: self.limit * int(self.tokenizer.max_token_bytes)]

    async def _encode(
        self, size: int, texts: list[str], work: Callable[[], list[int]], param: str
    ) -> list[int]:
        try:
            if size <= INLINE_BYTES:
                return work()
            # In a thread from some size on: it is many short calls, between which others get their turn.
            least = (
                self.minimum(texts) if size < REFINE_BYTES else await in_thread(lambda: self.minimum(texts))
            )
            if least >= self.limit:
                raise too_long(least, self.limit, param, at_least=True)
            return await in_thread(work)
        except TokenizerError as error:
            raise bad(f"{param}: {error}", param) from None

    def minimum(self, texts: Sequence[str]) -> int:
        """A lower bound of the number of tokens of all `texts` together."""
        total = 0
        for text in texts:
            count = self.tokenizer.minimum_tokens(text)
            if count < self.limit and len(text) >= REFINE_BYTES and self._refinable(text):
                count = max(count, self._refined(text.encode()))
            total += count
        return total

    def _refinable(self, text: str) -> bool:
        """Whether the tokenizer sees the text's own bytes: a normalizer changes no ASCII."""
        return text.isascii() or self.tokenizer.normalize("e\u0301") == "e\u0301"

    def _refined(self, data: bytes) -> int:
        absent = bytes(byte for byte in range(256) if bytes([byte]) not in data)
        present = sum(1 << byte for byte in range(256) if byte not in absent)
        longest = next((size for size, mask in self._masks if mask & ~present == 0), 1)
        return -(-len(data) // longest)

    @cached_property
    def _masks(self) -> list[tuple[int, int]]:
        """(length, set of its bytes as a 256-bit number) of each ordinary token, longest first."""
        controls = set(self.tokenizer.special.values())
        tokens = {
            self.tokenizer.id_to_bytes(i) for i in range(self.tokenizer.vocab_size) if i not in controls
        }
        masks = [(len(token), sum(1 << byte for byte in set(token))) for token in tokens if token]
        return sorted(masks, reverse=True)

    def ids(self, value: Any, param: str) -> list[int]:
        """Token ids that a client sent. Raises ApiError 400."""
        try:
            return check_token_ids(value, self.vocab_size, param)
        except RequestError as error:
            raise bad(error.message, param, error.code) from None

    def check_fit(self, count: int, max_tokens: int | None, param: str) -> None:
        """Refuse a prompt that leaves no room for what is asked, with the counts (OpenAI's sentence)."""
        if count + 1 > self.limit:
            raise too_long(count, self.limit, param)
        if max_tokens is not None and count + max_tokens > self.limit:
            raise bad(
                f"This model's maximum context length is {self.limit} tokens. However, you requested "
                f"{count + max_tokens} tokens ({count} in the prompt, {max_tokens} in the completion). "
                f"Please reduce the prompt, or max_tokens to at most {self.limit - count}.",
                "max_tokens",
                "context_length_exceeded",
            )

    def render(self, messages: list[dict[str, Any]], **options: Any) -> list[Control | str]:
        """The template's prompt; what it refuses becomes a 400."""
        try:
            return list(self.template.render(messages, **options))
        except TemplateError as error:
            raise template_refusal(error) from None


def too_long(count: int, limit: int, param: str, *, at_least: bool = False) -> ApiError:
    """The 400 for a prompt over the context, with code context_length_exceeded."""
    number = f"at least {count}" if at_least else f"{count}"
    return bad(
        f"This model's maximum context length is {limit} tokens. However, your prompt has {number} tokens, "
        "and at least 1 must be left for the completion. Please reduce the length of the prompt.",
        param,
        "context_length_exceeded",
    )


def input_list(fields: Fields, most: int) -> list[str | list[Any]]:
    """`input` of /embeddings and /probe: up to `most` texts or lists of ids. Raises ApiError."""
    value = fields.take("input")
    if value is None:
        raise bad("input is missing; send a string, strings, token ids, or arrays of token ids", "input")
    return prompt_list(value, most, "input")


def prompt_list(value: Any, most: int, param: str) -> list[str | list[Any]]:
    """OpenAI's four forms of a prompt (string, strings, ids, lists of ids) as a list of strings or id
    lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise bad(
            f"{param} must be a string, an array of strings, or an array of token ids, not {shown(value)}",
            param,
        )
    if not value:
        raise bad(f"{param} is empty", param)
    if all(type(item) is int for item in value):
        return [value]
    if len(value) > most:
        raise bad(f"{param} has {len(value)} items; at most {most} are allowed", param)
    if all(isinstance(item, str) for item in value) or all(isinstance(item, list) for item in value):
        return value
    raise bad(f"{param} must hold only strings, only token ids, or only arrays of token ids", param)
