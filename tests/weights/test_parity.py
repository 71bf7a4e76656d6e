"""Folders are exchangeable with Hugging Face `transformers`: it loads what we save, we load what it saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from hadal.config import Gqa
from hadal.model.context import Context
from hadal.weights import convert, load, save
from hadal.weights.names import slots
from tests.weights import tiny
from tests.weights.helpers import random_model, same

transformers = pytest.importorskip("transformers")
NAMES = ["v3", "v2", "v2-lite", "qwen2", "qwen2-tied", "llama"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_we_save(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(tiny.ALL[name], dtype=dtype)
    save(model, tmp_path / "m", max_shard_bytes=200_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    leftover = {k for k in info["unexpected_keys"] if not k.startswith("model.layers.3.")}
    assert not leftover, "only the MTP layer, which transformers leaves out"
    theirs.save_pretrained(tmp_path / "hf")
    ours = load(tmp_path / "hf", dtype=dtype, with_mtp=False)
    same(ours, load(tmp_path / "m", dtype=dtype, with_mtp=False))
    assert ours.config.attention == model.config.attention and ours.config.moe == model.config.moe
    assert ours.config.rope == model.config.rope and ours.config.eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize("name", NAMES)
def test_same_logits(name: str, tmp_path: Path) -> None:
    """The strongest form of "the same tensors": both networks say the same of the same folder."""
    model = random_model(tiny.ALL[name], seed=4)
    save(model, tmp_path / "m")
    ours = load(tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.randint(0, model.config.vocab_size, (17,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = ours.logits(ours.forward(tokens, Context.packed([17], torch.device("cpu"))))
        hf = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(mine, hf, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_we_load_a_model_that_transformers_made(name: str, tmp_path: Path) -> None:
    from hadal.config import ModelConfig

    hf_config = tiny.ALL[name].to_hf() | {"num_nextn_predict_layers": 0}
    config_class = transformers.AutoConfig.for_model
    kind = hf_config.pop("model_type")
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config_class(kind, **hf_config))
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="300KB")
    ours = load(tmp_path / "hf")
    assert isinstance(ours.config, ModelConfig)
    state = theirs.state_dict()
    mine = ours.state_dict()
    assert torch.equal(mine["embed_tokens.weight"], state["model.embed_tokens.weight"])
    for published, slot in slots(ours.config).items():
        if published in state and not slot.copy:
            parameter = mine[slot.parameter] if slot.index is None else mine[slot.parameter][slot.index]
            assert torch.equal(parameter[slot.row : slot.row + slot.shape[0]], state[published]), published


@pytest.mark.parametrize("ints", ["int4", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_transformers_loads_our_integers(
    name: str, ints: Literal["int4", "int8"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `convert --int4` and `--int8` write is what compressed-tensors reads."""
    pytest.importorskip("compressed_tensors")
    monkeypatch.setattr("hadal.ops.dispatch._kernels_ready", lambda: False)
    config = replace(
        tiny.ALL[name],
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=8,
        attention=Gqa(2, 16, qkv_bias=name == "qwen2"),
    )
    save(random_model(config), tmp_path / "plain")
    made = convert(tmp_path / "plain", tmp_path / "ints", ints=ints, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    ours, token_T = load(made, quantize="off"), torch.arange(20)
    logits_TV = ours.logits(ours(token_T, Context.packed([20])))
    torch.testing.assert_close(theirs(token_T[None]).logits[0], logits_TV, atol=1e-4, rtol=0)
