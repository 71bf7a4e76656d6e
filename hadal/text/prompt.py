"""The pieces of a prompt: control tokens by name, texts between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hadal.text.tokenizer import Control

Part = Control | str
Parts = list[Part]

BOS: Final = Control("<｜begin▁of▁sentence｜>")
EOS: Final = Control("<｜end▁of▁sentence｜>")
USER: Final = Control("<｜User｜>")
ASSISTANT: Final = Control("<｜Assistant｜>")
THINK: Final = Control("<think>")
END_THINK: Final = Control("</think>")
CALLS_BEGIN: Final = Control("<｜tool▁calls▁begin｜>")
CALLS_END: Final = Control("<｜tool▁calls▁end｜>")
CALL_BEGIN: Final = Control("<｜tool▁call▁begin｜>")
CALL_END: Final = Control("<｜tool▁call▁end｜>")
SEPARATOR: Final = Control("<｜tool▁sep｜>")
OUTPUTS_BEGIN: Final = Control("<｜tool▁outputs▁begin｜>")
OUTPUTS_END: Final = Control("<｜tool▁outputs▁end｜>")
OUTPUT_BEGIN: Final = Control("<｜tool▁output▁begin｜>")
OUTPUT_END: Final = Control("<｜tool▁output▁end｜>")


def ends_in_reasoning(parts: Sequence[Part]) -> bool:
    """Whether the last control token of a prompt is the one that opens reasoning."""
    return next((part for part in reversed(parts) if isinstance(part, Control)), None) == THINK


def text_of(parts: Sequence[Part]) -> str:
    """The prompt as the published Jinja would render it. For eyes and tests: encode the parts, not this."""
    return "".join(part if isinstance(part, str) else part.content for part in parts)
