"""Model configurations (no torch): parts, counts, the published `config.json`, presets."""

from hadal.config.model import (
    ConfigError,
    Dsa,
    Fp8,
    Gqa,
    IntGroups,
    Mla,
    ModelConfig,
    Moe,
    ParameterCount,
    Rope,
)
from hadal.config.presets import PRESETS, Preset, preset
from hadal.config.published import suggest

__all__ = [
    "PRESETS",
    "ConfigError",
    "Dsa",
    "Fp8",
    "Gqa",
    "IntGroups",
    "Mla",
    "ModelConfig",
    "Moe",
    "ParameterCount",
    "Preset",
    "Rope",
    "preset",
    "suggest",
]
