"""Every released DeepSeek model that Hadal knows, by name: configuration, origin, and what it truly is.

Figures: arXiv 2401.06066 (DeepSeekMoE), 2405.04434 (V2), 2412.19437 (V3), 2501.12948 (R1 and its distills),
the V3.2-Exp report, and the published `config.json` files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hadal.config.model import ConfigError, Dsa, Fp8, Gqa, Mla, ModelConfig, Moe, Rope
from hadal.config.published import suggest


@dataclass(frozen=True)
class Preset:
    """A released model. `repo_id` None: shipped in the package. `context`: the length its authors state."""

    name: str
    config: ModelConfig
    repo_id: str | None
    title: str
    context: int
    template: str
    base: str | None = None
    is_distill: bool = False


_V3_YARN = Rope(10000.0, "yarn", 40.0, 4096, 32.0, 1.0, 1.0, 1.0)
_LITE_YARN = replace(_V3_YARN, mscale=0.707, mscale_all_dim=0.707)

V3 = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    num_attention_heads=128,
    attention=Mla(1536, 512, 128, 64, 128),
    rope=_V3_YARN,
    moe=Moe(256, 1, 8, 2048, 3, 1, "sigmoid", "noaux_tc", 8, 4, True, 2.5),
    num_nextn_predict_layers=1,
    fp8=Fp8(),
    max_position_embeddings=163840,
    bos_token_id=0,
    eos_token_id=(1,),
)
V31 = replace(V3, fp8=Fp8(scale_fmt="ue8m0"))
V32 = replace(V31, model_type="deepseek_v32", dsa=Dsa(64, 128, 2048))
V2 = ModelConfig(
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=5120,
    intermediate_size=12288,
    num_hidden_layers=60,
    num_attention_heads=128,
    attention=Mla(1536, 512, 128, 64, 128),
    rope=_V3_YARN,
    moe=Moe(160, 2, 6, 1536, 1, 1, "softmax", "group_limited_greedy", 8, 3, False, 16.0),
    max_position_embeddings=163840,
    bos_token_id=100000,
    eos_token_id=(100001,),
)
V2_LITE = replace(
    V2,
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=27,
    num_attention_heads=16,
    attention=Mla(None, 512, 128, 64, 128),
    rope=_LITE_YARN,
    moe=Moe(64, 2, 6, 1408, 1, 1, "softmax", "greedy", 1, 1, False, 1.0),
)
MOE_16B = ModelConfig(
    model_type="deepseek",
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=28,
    num_attention_heads=16,
    attention=Gqa(16, 128),
    moe=Moe(64, 2, 6, 1408, 1, 1, "softmax", "greedy", 1, 1, False, 1.0),
    bos_token_id=100000,
    eos_token_id=(100001,),
)


def _qwen(
    hidden: int, layers: int, heads: int, kv: int, inter: int, theta: float, eps: float, vocab: int
) -> ModelConfig:
    return ModelConfig(
        model_type="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        attention=Gqa(kv, 128, qkv_bias=True),
        rope=Rope(theta),
        rms_norm_eps=eps,
        max_position_embeddings=131072,
        bos_token_id=151646,
        eos_token_id=(151643,),
    )


def _llama(hidden: int, layers: int, heads: int, inter: int) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        attention=Gqa(8, 128),
        rope=Rope(5e5, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_id=(128001,),
    )


MINI = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=8,
    attention=Mla(128, 128, 32, 32, 32),
    moe=Moe(16, 1, 4, 96, 1, 1, "sigmoid", "noaux_tc", 1, 1, True, 2.0),
    num_nextn_predict_layers=1,
    fp8=Fp8(),
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=(1,),
)

MINI_DENSE = ModelConfig(
    model_type="qwen2",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=8,
    attention=Gqa(4, 32, qkv_bias=True),
    tie_word_embeddings=True,
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=(1,),
)

PRESETS: dict[str, Preset] = {}


def _add(
    name: str,
    config: ModelConfig,
    org_repo: str | None,
    title: str,
    template: str,
    context: int = 131072,
    base: str | None = None,
    kind: Literal["model", "distill"] = "model",
) -> None:
    PRESETS[name] = Preset(name, config, org_repo, title, context, template, base, kind == "distill")


def _distill(suffix: str, config: ModelConfig, base: str, template: str) -> None:
    name = f"DeepSeek-R1-Distill-{suffix}"
    title = f"{name}: {base} fine-tuned on R1's answers; a dense {config.model_type} model, not R1"
    _add(name.lower(), config, f"deepseek-ai/{name}", title, template, base=base, kind="distill")


_MINI_TEXT = "hadal-mini: the V3 architecture in small, trained on puzzles"
_add("hadal-mini", MINI, None, _MINI_TEXT, "hadal-mini", 2048)
_DENSE_TEXT = "hadal-mini-dense: a dense qwen2 model in small, taught by hadal-mini"
_add("hadal-mini-dense", MINI_DENSE, None, _DENSE_TEXT, "hadal-mini", 2048)
_V3_TEXT = "671B parameters, 37B active; MLA + DeepSeekMoE + MTP"
for _name, _config, _text, _template in [
    ("DeepSeek-V3-Base", V3, f"base model, {_V3_TEXT}", "plain"),
    ("DeepSeek-V3", V3, f"chat model, {_V3_TEXT}", "deepseek-v3"),
    ("DeepSeek-V3-0324", V3, f"chat model, {_V3_TEXT}", "deepseek-v3"),
    ("DeepSeek-R1", V3, f"reasoning model on V3-Base, {_V3_TEXT}", "deepseek-r1"),
    ("DeepSeek-R1-Zero", V3, f"reinforcement learning alone on V3-Base, {_V3_TEXT}", "deepseek-r1"),
    ("DeepSeek-R1-0528", V3, f"reasoning model, {_V3_TEXT}", "deepseek-r1-0528"),
    ("DeepSeek-V3.1-Base", V31, f"base model, {_V3_TEXT}", "plain"),
    ("DeepSeek-V3.1", V31, f"thinking and non-thinking in one, {_V3_TEXT}", "deepseek-v3.1"),
    ("DeepSeek-V3.1-Terminus", V31, f"V3.1 revised, {_V3_TEXT}", "deepseek-v3.1-terminus"),
    ("DeepSeek-V3.2-Exp", V32, f"V3.1-Terminus with sparse attention, {_V3_TEXT}", "deepseek-v3.1-terminus"),
]:
    _add(_name.lower(), _config, f"deepseek-ai/{_name}", f"{_name}: {_text}", _template)
for _name, _config, _text, _template, _context in [
    ("DeepSeek-V2", V2, "base model, 236B parameters, 21B active; MLA + DeepSeekMoE", "plain", 131072),
    ("DeepSeek-V2-Chat", V2, "chat model, 236B parameters, 21B active", "deepseek-v2", 131072),
    ("DeepSeek-V2-Lite", V2_LITE, "base model, 15.7B parameters, 2.4B active", "plain", 32768),
    ("DeepSeek-V2-Lite-Chat", V2_LITE, "chat model, 15.7B parameters, 2.4B active", "deepseek-v2", 32768),
    (
        "deepseek-moe-16b-base",
        MOE_16B,
        "base model, 16.4B parameters, 2.8B active; plain attention",
        "plain",
        4096,
    ),
    ("deepseek-moe-16b-chat", MOE_16B, "chat model, 16.4B parameters, 2.8B active", "deepseek-v2", 4096),
]:
    _add(_name.lower(), _config, f"deepseek-ai/{_name}", f"{_name}: {_text}", _template, _context)
_distill("Qwen-1.5B", _qwen(1536, 28, 12, 2, 8960, 1e4, 1e-6, 151936), "Qwen2.5-Math-1.5B", "r1-distill-qwen")
_distill("Qwen-7B", _qwen(3584, 28, 28, 4, 18944, 1e4, 1e-6, 152064), "Qwen2.5-Math-7B", "r1-distill-qwen")
_distill("Qwen-14B", _qwen(5120, 48, 40, 8, 13824, 1e6, 1e-5, 152064), "Qwen2.5-14B", "r1-distill-qwen")
_distill("Qwen-32B", _qwen(5120, 64, 40, 8, 27648, 1e6, 1e-5, 152064), "Qwen2.5-32B", "r1-distill-qwen")
_distill("Llama-8B", _llama(4096, 32, 32, 14336), "Llama-3.1-8B", "r1-distill-llama")
_distill("Llama-70B", _llama(8192, 80, 64, 28672), "Llama-3.3-70B-Instruct", "r1-distill-llama")


def preset(name: str) -> Preset:
    """The preset of that name (case does not matter; `deepseek-ai/` may stand before it)."""
    key = name.lower().removeprefix("deepseek-ai/")
    if key not in PRESETS:
        raise ConfigError(f"unknown model {name!r}.{suggest(key, PRESETS)} `hadal show` lists the known ones")
    return PRESETS[key]
