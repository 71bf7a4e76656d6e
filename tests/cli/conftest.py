"""A tiny reasoning model as a published folder: random weights, a real tokenizer, R1's template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3-shaped model of a few thousand parameters that `hadal run FOLDER` can load."""
    from hadal import weights
    from hadal.config import Mla, ModelConfig, Moe
    from hadal.model.transformer import Transformer
    from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = ModelConfig(
        model_type="deepseek_v3",
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention=Mla(24, 16, 8, 8, 8),
        moe=Moe(8, 1, 2, 24, 1, 1, "sigmoid", "noaux_tc", 4, 2, True, 1.5),
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=(1,),
    )
    weights.save(Transformer(config).init_weights(seed=1), folder)
    make_tiny_tokenizer(folder, 512)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    tokenizer["hadal_template"] = "deepseek-r1"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.95}), "utf-8")
    return folder
