"""The network: one definition for training, prefill, decode and scoring, on a flat stream of tokens."""

from hadal.model.context import Cache, Context
from hadal.model.transformer import Transformer

__all__ = ["Cache", "Context", "Transformer"]
