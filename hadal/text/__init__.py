"""Text: tokenizer, chat templates as plain functions, incremental parsers of reasoning and tool calls.

Knows nothing of tensors, engines or HTTP. Control tokens are a type (`Control`), so that user text cannot
become one. Grammars for structured output are in `hadal.text.grammar`, which loads numpy and llguidance.
"""

from hadal.text.detokenizer import Detokenizer
from hadal.text.messages import TemplateError
from hadal.text.parsers import OutputParser, Piece, ReasoningParser, ToolCall, ToolParser, split_reasoning
from hadal.text.templates import TEMPLATES, Template, template_for
from hadal.text.tokenizer import Control, Tokenizer, TokenizerError

__all__ = [
    "TEMPLATES",
    "Control",
    "Detokenizer",
    "OutputParser",
    "Piece",
    "ReasoningParser",
    "Template",
    "TemplateError",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "ToolParser",
    "split_reasoning",
    "template_for",
]
