"""A tiny engine of random weights."""

from __future__ import annotations

import pytest
import torch

from hadal.bench.ceilings import Ceilings
from hadal.config import Gqa, Mla, ModelConfig, Moe
from hadal.engine import Engine
from hadal.model.transformer import Transformer

MOE = ModelConfig(
    model_type="deepseek_v3", vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, attention=Mla(24, 16, 8, 8, 8),
    moe=Moe(8, 1, 2, 24, 1, 1, "sigmoid", "noaux_tc", 4, 2, True, 1.5),
    max_position_embeddings=256, initializer_range=0.3, bos_token_id=0, eos_token_id=(1,),
)  # fmt: skip
DENSE = ModelConfig(
    model_type="qwen2", vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, attention=Gqa(2, 8, True), tie_word_embeddings=True,
    max_position_embeddings=256, bos_token_id=0, eos_token_id=(1,),
)  # fmt: skip


def make_engine(config: ModelConfig, dtype: torch.dtype = torch.float32, seats: int = 4) -> Engine:
    network = Transformer(config, dtype=dtype).init_weights(0).eval()
    return Engine(network, max_model_len=128, max_num_seqs=seats, seed=0)


@pytest.fixture(scope="session")
def moe_engine() -> Engine:
    return make_engine(MOE)


@pytest.fixture
def slow_machine() -> Ceilings:
    """A machine so slow that everything beats it: shares become large, and tests see the formula alone."""
    return Ceilings(copy=1e6, triad=2e6, read=1.5e6, matmul={"float32": 1e8, "bfloat16": 5e7, "int8": 4e8})
