"""Models by name: presets, and some that are known by their shape alone."""

from __future__ import annotations

from hadal.config import PRESETS, ConfigError, Gqa, ModelConfig, Rope, preset, suggest
from hadal.plan.figures import PlanError, data


def config_of(name: str) -> tuple[str, ModelConfig, int]:
    """(name, shape, stated context) of a preset or of a model that is known by its shape alone. PlanError,
    with a suggestion, for one that is neither."""
    rows = {row["name"]: row for row in data("models").values()}
    row = rows.get(name.lower())
    if row is None:
        try:
            known = preset(name)
        except ConfigError:
            raise PlanError(f"unknown model {name!r}.{suggest(name.lower(), [*PRESETS, *rows])}") from None
        return known.name, known.config, known.context
    config = ModelConfig(
        row["model_type"],
        row["vocab_size"],
        row["hidden_size"],
        row["intermediate_size"],
        row["num_hidden_layers"],
        row["num_attention_heads"],
        Gqa(row["num_key_value_heads"], row["head_dim"], row.get("qkv_bias", False)),
        Rope(),
        max_position_embeddings=row["max_position_embeddings"],
        tie_word_embeddings=row.get("tie_word_embeddings", False),
    )
    return row["name"], config, row["max_position_embeddings"]
