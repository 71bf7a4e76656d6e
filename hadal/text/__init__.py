"""Text: tokenizer, chat templates as plain functions, incremental parsers of reasoning and tool calls,
grammars.

Knows nothing of tensors, engines or HTTP. Control tokens are a type (`Control`), so that user text cannot
become one.
"""

from hadal.text.detokenizer import Detokenizer
from hadal.text.tokenizer import Control, Tokenizer, TokenizerError

__all__ = ["Control", "Detokenizer", "Tokenizer", "TokenizerError"]
