"""Tiny configurations of every architecture, with awkward sizes: partial FP8 blocks, groups, biases, YaRN."""

from __future__ import annotations

from dataclasses import replace

from hadal.config import Fp8, Gqa, Mla, ModelConfig, Moe, Rope

V3 = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=150,
    hidden_size=144,
    intermediate_size=200,
    num_hidden_layers=3,
    num_attention_heads=4,
    attention=Mla(40, 48, 24, 16, 20),
    rope=Rope(10000.0, "yarn", 4.0, 64, 32.0, 1.0, 1.0, 1.0),
    moe=Moe(8, 1, 3, 136, 1, 1, "sigmoid", "noaux_tc", 4, 2, True, 2.5),
    num_nextn_predict_layers=1,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=(1,),
)
V2 = replace(
    V3,
    model_type="deepseek_v2",
    moe=Moe(8, 2, 3, 56, 1, 1, "softmax", "group_limited_greedy", 4, 2, False, 16.0),
    num_nextn_predict_layers=0,
)
V2_LITE = replace(
    V2,
    attention=Mla(None, 48, 24, 16, 20),
    moe=Moe(8, 2, 3, 56, 1, 1, "softmax", "greedy", 1, 1, False, 1.0),
)
MOE_16B = replace(V2_LITE, model_type="deepseek", attention=Gqa(4, 36), rope=Rope())
QWEN2 = ModelConfig(
    model_type="qwen2",
    vocab_size=130,
    hidden_size=96,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=6,
    attention=Gqa(2, 16, qkv_bias=True),
    rope=Rope(1e6),
    max_position_embeddings=512,
    bos_token_id=3,
    eos_token_id=(4,),
)
QWEN2_TIED = replace(QWEN2, tie_word_embeddings=True)
LLAMA = replace(
    QWEN2,
    model_type="llama",
    attention=Gqa(2, 16),
    rope=Rope(5e5, "llama3", 8.0, 128, low_freq_factor=1.0, high_freq_factor=4.0),
    rms_norm_eps=1e-5,
)
V3_TIED = replace(V3, tie_word_embeddings=True)
V3_FP8 = replace(V3, fp8=Fp8())
V31_FP8 = replace(V3, fp8=Fp8(scale_fmt="ue8m0"))
ALL = {
    "v3": V3,
    "v3-tied": V3_TIED,
    "v3-two-mtp": replace(V3, num_nextn_predict_layers=2),
    "v2": V2,
    "v2-lite": V2_LITE,
    "moe-16b": MOE_16B,
    "qwen2": QWEN2,
    "qwen2-tied": QWEN2_TIED,
    "llama": LLAMA,
}
