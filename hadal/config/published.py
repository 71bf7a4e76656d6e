"""The published `config.json`: strict reading (unknown keys are refused by name) and writing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, cast

from hadal.config.model import ConfigError, Dsa, Fp8, Gqa, IntGroups, Json, Mla, ModelConfig, Moe, Rope

_HARMLESS = frozenset(
    "_name_or_path architectures attention_dropout auto_map aux_loss_alpha seq_aux chunk_size_feed_forward "
    "dtype ep_size head_dim id2label initializer_range is_decoder is_encoder_decoder label2id "
    "max_window_layers num_mtp_layers output_attentions output_hidden_states pad_token_id pretraining_tp "
    "problem_type qk_head_dim return_dict rope_interleave torch_dtype transformers_version use_cache "
    "use_mrope layer_types mlp_layer_types output_router_logits hadal".split()
)
_FIXED: dict[str, tuple[Any, ...]] = {  # keys whose other values this code does not implement
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}
_COMMON = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads rms_norm_eps max_position_embeddings tie_word_embeddings bos_token_id eos_token_id "
    "rope_theta rope_scaling rope_parameters sliding_window quantization_config num_nextn_predict_layers"
).split()
_MLA_KEYS = "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim".split()
_MOE_KEYS = (
    "n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size first_k_dense_replace "
    "moe_layer_freq scoring_func topk_method n_group topk_group norm_topk_prob routed_scaling_factor"
).split()
_DSA_KEYS = "index_n_heads index_head_dim index_topk".split()
_INTEGERS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings bos_token_id num_nextn_predict_layers n_routed_experts "
    "n_shared_experts num_experts_per_tok moe_intermediate_size first_k_dense_replace moe_layer_freq n_group "
    "topk_group".split()
    + _MLA_KEYS
    + _DSA_KEYS
)
_NUMBERS = frozenset("rms_norm_eps rope_theta initializer_range routed_scaling_factor".split())
_TABLES = frozenset("rope_scaling rope_parameters quantization_config hadal".split())
_TYPES: dict[str, list[str]] = {
    "deepseek_v3": _MLA_KEYS + _MOE_KEYS,
    "deepseek_v32": _MLA_KEYS + _MOE_KEYS + _DSA_KEYS,
    "deepseek_v2": _MLA_KEYS + _MOE_KEYS,
    "deepseek": list(_MOE_KEYS),
    "qwen2": [],
    "llama": [],
}
_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def suggest(key: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest known key, or nothing."""
    near = difflib.get_close_matches(key, list(known), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def from_hf(hf: Json) -> ModelConfig:
    """A `config.json` as settings. Keys that are null are as if they were absent. Raises ConfigError."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ConfigError(
            f"model_type is {kind!r}; supported: {', '.join(_TYPES)}.{suggest(str(kind), _TYPES)}"
        )
    known = set(_COMMON) | set(_TYPES[kind]) | _HARMLESS | set(_FIXED)
    for key in hf:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in config.json of a {kind} model.{suggest(key, known)}")
    for key, allowed in _FIXED.items():
        if key in hf and hf[key] not in allowed:
            raise ConfigError(f"{key} is {hf[key]!r}; this implementation supports {allowed[0]!r} only")
    hf = {key: value for key, value in hf.items() if value is not None or key == "pad_token_id"}
    for key, value in hf.items():
        _check_kind(key, value)
    eos = hf.get("eos_token_id")
    heads = _need(hf, "num_attention_heads", int)
    return ModelConfig(
        model_type=cast(Any, kind),
        vocab_size=_need(hf, "vocab_size", int),
        hidden_size=_need(hf, "hidden_size", int),
        intermediate_size=_need(hf, "intermediate_size", int),
        num_hidden_layers=_need(hf, "num_hidden_layers", int),
        num_attention_heads=heads,
        attention=_attention_from_hf(hf, kind, heads),
        rope=_rope_from_hf(hf),
        moe=_moe_from_hf(hf, kind),
        dsa=Dsa(*(_need(hf, k, int) for k in _DSA_KEYS)) if kind == "deepseek_v32" else None,
        num_nextn_predict_layers=int(hf.get("num_nextn_predict_layers") or 0),
        mtp_after_norm=bool((hf.get("hadal") or {}).get("mtp_after_norm", True)),
        fp8=_fp8_from_hf(hf.get("quantization_config")),
        ints=_ints_from_hf(hf.get("quantization_config")),
        rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=int(hf.get("max_position_embeddings", 4096)),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        initializer_range=float(hf.get("initializer_range", 0.02)),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_id=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        extra={k: hf[k] for k in ("pad_token_id",) if k in hf},
    )


def _check_kind(key: str, value: Any) -> None:
    """Raise ConfigError where a value cannot be what its key says."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if key == "eos_token_id":
        several = isinstance(value, list | tuple) and all(type(one) is int for one in value)
        fits, wanted = whole or several, "an integer or a list of them"
    elif key in _INTEGERS:
        fits, wanted = whole and value >= 0, "an integer, 0 or above"
    elif key in _NUMBERS:
        fits, wanted = whole or isinstance(value, float), "a number"
    elif key in _TABLES:
        fits, wanted = isinstance(value, Mapping), "a table"
    else:
        return
    if not fits:
        raise ConfigError(f"{key} is {value!r} in config.json; {wanted} is expected")


def _need(hf: Json, key: str, kind: type) -> Any:
    if key not in hf:
        raise ConfigError(f"config.json lacks {key!r}, which a {hf.get('model_type')} model needs")
    if not isinstance(hf[key], kind) or isinstance(hf[key], bool):
        raise ConfigError(f"{key} is {hf[key]!r}; expected {kind.__name__}")
    return hf[key]


def _attention_from_hf(hf: Json, kind: str, heads: int) -> Mla | Gqa:
    if kind in ("deepseek_v3", "deepseek_v32", "deepseek_v2"):
        rank = hf.get("q_lora_rank")
        return Mla(rank, *(_need(hf, k, int) for k in _MLA_KEYS[1:]))
    kv = int(hf.get("num_key_value_heads") or heads)
    if hf.get("use_sliding_window"):
        raise ConfigError("use_sliding_window is true; sliding-window attention is not implemented")
    dim = int(hf.get("head_dim") or _need(hf, "hidden_size", int) // heads)
    return Gqa(kv, dim, qkv_bias=kind == "qwen2")


def _rope_from_hf(hf: Json) -> Rope:
    """Old style `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`."""
    params = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(params.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    params.pop("type", None)
    if kind == "default":
        return Rope(rope_theta=theta)
    if kind not in ("yarn", "llama3"):
        near = suggest(str(kind), ("yarn", "llama3"))
        raise ConfigError(f"rope type is {kind!r}; supported: default, yarn, llama3.{near}")
    for harmless in ("attention_factor", "truncate", "partial_rotary_factor"):
        if params.get(harmless) not in (None, True, 1.0):
            raise ConfigError(f"rope setting {harmless}={params[harmless]!r} is not implemented")
        params.pop(harmless, None)
    fields = Rope.__dataclass_fields__
    for key in params:
        if key not in fields:
            raise ConfigError(f"unknown rope key {key!r}.{suggest(key, fields)}")
    params.setdefault("original_max_position_embeddings", int(hf.get("max_position_embeddings", 0)))
    settings = {k: v for k, v in params.items() if v is not None}
    for key, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"rope setting {key} is {value!r}; a number is expected")
    return Rope(rope_theta=theta, type="yarn" if kind == "yarn" else "llama3", **settings)


def _moe_from_hf(hf: Json, kind: str) -> Moe | None:
    if "n_routed_experts" not in _TYPES[kind] or hf.get("n_routed_experts") is None:
        return None
    v3 = kind in ("deepseek_v3", "deepseek_v32")
    method = hf.get("topk_method") or ("noaux_tc" if v3 else "greedy")
    score = hf.get("scoring_func") or ("sigmoid" if v3 else "softmax")
    if method not in ("noaux_tc", "group_limited_greedy", "greedy"):
        raise ConfigError(f"topk_method is {method!r}; supported: noaux_tc, group_limited_greedy, greedy")
    if score not in ("sigmoid", "softmax"):
        raise ConfigError(f"scoring_func is {score!r}; supported: sigmoid, softmax")
    return Moe(
        n_routed_experts=_need(hf, "n_routed_experts", int),
        n_shared_experts=int(hf.get("n_shared_experts") or 0),
        num_experts_per_tok=_need(hf, "num_experts_per_tok", int),
        moe_intermediate_size=_need(hf, "moe_intermediate_size", int),
        first_k_dense_replace=int(hf.get("first_k_dense_replace", 0)),
        moe_layer_freq=int(hf.get("moe_layer_freq", 1)),
        scoring_func="sigmoid" if score == "sigmoid" else "softmax",
        topk_method=cast(Any, method),
        n_group=int(hf.get("n_group") or 1),
        topk_group=int(hf.get("topk_group") or 1),
        norm_topk_prob=bool(hf.get("norm_topk_prob", v3)),
        routed_scaling_factor=float(hf.get("routed_scaling_factor", 1.0)),
    )


def _fp8_from_hf(q: Json | None) -> Fp8 | None:
    if not q or q.get("quant_method") == "compressed-tensors":
        return None
    if q.get("quant_method") != "fp8" or q.get("fmt", "e4m3") != "e4m3":
        raise ConfigError(
            f"quantization_config is {q.get('quant_method')!r}/{q.get('fmt')!r}; supported: fp8 in e4m3, and "
            "compressed-tensors in pack-quantized"
        )
    block = q.get("weight_block_size") or (128, 128)
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int for n in block):
        raise ConfigError(f"weight_block_size is {block!r}; two integers are expected, such as [128, 128]")
    return Fp8("e4m3", q.get("activation_scheme", "dynamic"), (block[0], block[1]), q.get("scale_fmt"))


def _ints_from_hf(q: Json | None) -> IntGroups | None:
    """Weight-only integers of compressed-tensors: one group of settings, symmetric, 4 or 8 bits."""
    if not q or q.get("quant_method") != "compressed-tensors":
        return None
    if q.get("format") != "pack-quantized":
        raise ConfigError(
            f"quantization_config.format is {q.get('format')!r}; compressed-tensors' pack-quantized is read"
        )
    groups = list((q.get("config_groups") or {}).values())
    weights = groups[0].get("weights") or {} if len(groups) == 1 else {}
    if not weights or groups[0].get("input_activations"):
        raise ConfigError("quantization_config needs exactly one config_groups entry, with weights alone")
    for key, allowed in {
        "num_bits": (4, 8),
        "type": ("int",),
        "symmetric": (True,),
        "strategy": ("group", "channel"),
        "actorder": (None,),
    }.items():
        if weights.get(key) not in allowed:
            raise ConfigError(
                f"quantization_config weights.{key} is {weights.get(key)!r}; supported: "
                f"{' or '.join(map(repr, allowed))}"
            )
    size = weights.get("group_size") if weights["strategy"] == "group" else None
    if size is not None and (not isinstance(size, int) or size < 32 or size % 32):
        raise ConfigError(f"quantization_config weights.group_size is {size!r}; multiples of 32 are read")
    return IntGroups(weights["num_bits"], size, tuple(map(str, q.get("ignore") or ())))


def _ints_to_hf(ints: IntGroups) -> dict[str, Any]:
    weights = {
        "num_bits": ints.num_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if ints.group_size is None else "group",
        "group_size": ints.group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ints.ignore),
    }


def to_hf(c: ModelConfig) -> dict[str, Any]:
    out: dict[str, Any] = {"architectures": [_ARCHITECTURES[c.model_type]], "model_type": c.model_type}
    for key in [
        *_COMMON[1:6],
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "initializer_range",
    ]:
        out[key] = getattr(c, key)
    out |= {"hidden_act": "silu", "attention_bias": False, "bos_token_id": c.bos_token_id}
    out["eos_token_id"] = c.eos_token_id[0] if len(c.eos_token_id) == 1 else list(c.eos_token_id) or None
    a = c.attention
    if isinstance(a, Mla):
        out |= {k: getattr(a, k) for k in _MLA_KEYS} | {"num_key_value_heads": c.num_attention_heads}
    else:
        out |= {"num_key_value_heads": a.num_key_value_heads, "head_dim": a.head_dim}
        if c.model_type == "qwen2":
            out.pop("attention_bias")
    if c.moe is not None:
        out |= {k: getattr(c.moe, k) for k in _MOE_KEYS}
    if c.dsa is not None:
        out |= {k: getattr(c.dsa, k) for k in _DSA_KEYS}
    if c.num_nextn_predict_layers:
        out["num_nextn_predict_layers"] = c.num_nextn_predict_layers
        if not c.mtp_after_norm:
            out["hadal"] = {"mtp_after_norm": False}
    out["rope_theta"] = c.rope.rope_theta
    out["rope_scaling"] = _rope_to_hf(c.rope)
    if c.fp8 is not None:
        out["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": c.fp8.fmt,
            "activation_scheme": c.fp8.activation_scheme,
            "weight_block_size": list(c.fp8.weight_block_size),
        } | ({"scale_fmt": c.fp8.scale_fmt} if c.fp8.scale_fmt else {})
    if c.ints is not None:
        out["quantization_config"] = _ints_to_hf(c.ints)
    return out | dict(c.extra)


def _rope_to_hf(r: Rope) -> dict[str, Any] | None:
    if r.type == "default":
        return None
    keys = ["factor", "original_max_position_embeddings"]
    keys += ["beta_fast", "beta_slow", "mscale", "mscale_all_dim"] if r.type == "yarn" else []
    keys += ["low_freq_factor", "high_freq_factor"] if r.type == "llama3" else []
    return {"type": r.type, "rope_type": r.type} | {k: getattr(r, k) for k in keys}
