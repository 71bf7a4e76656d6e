"""Logits against Hugging Face `transformers` on random tiny models with awkward settings, in FP32.

And every form of the forward pass against every other: expanded, absorbed, cached, chunked, batched,
references and fast paths."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hadal.config import Mla, ModelConfig
from hadal.model import Cache, Context, Transformer
from hadal.ops import cpu, dispatch
from hadal.weights import load, save
from tests.weights import tiny
from tests.weights.helpers import random_model

PAGE = 16
LENGTH = 100  # beyond YaRN's original length of 64
NAMES = ["v3", "v2", "v2-lite", "qwen2", "qwen2-tied", "llama"]
PATHS = ["reference", "kernels"] if cpu.available() else ["reference"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Run with the torch references alone, and with the CPU kernels."""
    dispatch.forced_reference.cache_clear()
    dispatch._kernels_ready.cache_clear()
    monkeypatch.setenv("HADAL_OPS", "reference" if request.param == "reference" else "auto")
    yield request.param
    monkeypatch.undo()
    dispatch.forced_reference.cache_clear()
    dispatch._kernels_ready.cache_clear()


def tokens(config: ModelConfig, n: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (n,), generator=torch.Generator().manual_seed(7))


def published(config: ModelConfig, folder: Path) -> tuple[Transformer, torch.nn.Module]:
    """The same random weights in our network and in theirs, through a folder on disk."""
    transformers = pytest.importorskip("transformers")
    save(random_model(config, seed=4), folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return load(folder), theirs.eval()


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_logits_equal_transformers(name, path, tmp_path):
    ours, theirs = published(tiny.ALL[name], tmp_path / "m")
    token = tokens(ours.config)
    mine = ours.logits(ours(token, Context.packed([LENGTH])))
    torch.testing.assert_close(mine, theirs(token[None]).logits[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_partial_fp8_blocks_equal_transformers_on_the_dequantised_weights(tmp_path):
    """An FP8 folder whose matrices are not multiples of 128 computes what its BF16 twin computes."""
    from hadal.weights import convert

    save(random_model(tiny.V3_FP8, seed=4), tmp_path / "fp8", fp8=True)
    convert(tmp_path / "fp8", tmp_path / "wide", dtype=torch.float32)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "wide", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours, token = load(tmp_path / "fp8"), tokens(tiny.V3_FP8)
    mine = ours.logits(ours(token, Context.packed([LENGTH])))
    torch.testing.assert_close(mine, theirs(token[None]).logits[0], rtol=1e-4, atol=1e-4)


class Pages:
    """A cache with sequences on shuffled pages, driven by hand."""

    def __init__(self, model: Transformer, sequences: int, length: int) -> None:
        per = -(-length // PAGE)
        self.model = model
        self.cache = Cache(model.config, sequences * per + 1, PAGE, torch.float32, "cpu")
        for layer in self.cache.layers:
            layer.fill_(float("nan"))  # whatever is read must have been written
        order = torch.randperm(sequences * per, generator=torch.Generator().manual_seed(3)) + 1
        self.table = order.view(sequences, per).int()
        self.cached = [0] * sequences

    def run(self, chunks: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """One forward pass of (sequence, tokens) chunks; single tokens that continue one come first."""
        decodes = 0
        for s, chunk in chunks:
            if len(chunk) != 1 or self.cached[s] == 0:
                break
            decodes += 1
        position, slot, starts, lens, rows = [], [], [0], [], []
        for s, chunk in chunks:
            at = torch.arange(self.cached[s], self.cached[s] + len(chunk))
            position.append(at)
            slot.append(self.table[s, at // PAGE].long() * PAGE + at % PAGE)
            self.cached[s] += len(chunk)
            starts.append(starts[-1] + len(chunk))
            lens.append(self.cached[s])
            rows.append(self.table[s])
        context = Context(
            torch.cat(position), starts, self.cache, torch.cat(slot), torch.stack(rows),
            torch.tensor(lens, dtype=torch.int32), lens, decodes,
        )  # fmt: skip
        return self.model.logits(self.model(torch.cat([c for _, c in chunks]), context))


@pytest.mark.parametrize("name", ["v3", "v2", "v2-lite", "moe-16b", "qwen2", "llama"])
@torch.inference_mode()
def test_cached_chunked_and_decoded_equal_the_full_pass(name, path):
    """Absorbed decode = expanded prefill; chunked = whole; cached = full."""
    model = random_model(tiny.ALL[name], seed=1)
    token = tokens(model.config)
    whole = model.logits(model(token, Context.packed([LENGTH])))
    pages = Pages(model, 1, LENGTH)
    cuts = [0, 1, 30, 47, *range(90, LENGTH + 1)]
    parts = [pages.run([(0, token[a:b])]) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["v3", "v2-lite", "qwen2"])
@torch.inference_mode()
def test_a_mixed_batch_equals_its_singles(name, path):
    """Decodes and prefill chunks of several sequences in one stream, against each alone."""
    model = random_model(tiny.ALL[name], seed=2)
    token = [tokens(model.config, n) for n in (40, 53, 66)]
    alone = [model.logits(model(t, Context.packed([len(t)]))) for t in token]
    pages = Pages(model, 3, 66)
    first = pages.run([(0, token[0][:39]), (1, token[1][:20]), (2, token[2][:50])])
    second = pages.run([(0, token[0][39:]), (2, token[2][50:51]), (1, token[1][20:])])
    third = pages.run([(2, token[2][51:])])
    torch.testing.assert_close(first[:39], alone[0][:39], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[39:59], alone[1][:20], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[59:], alone[2][:50], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second[0], alone[0][39], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second[1], alone[2][50], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second[2:], alone[1][20:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(third, alone[2][51:], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_packed_sequences_do_not_see_each_other(path):
    model = random_model(tiny.V3, seed=2)
    token = tokens(model.config, 60)
    packed = model(token, Context.packed([25, 35]))
    torch.testing.assert_close(packed[25:], model(token[25:], Context.packed([35])), rtol=1e-4, atol=1e-4)
    equal = model(token, Context.packed([30, 30]))
    torch.testing.assert_close(equal[30:], model(token[30:], Context.packed([30])), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_save_load_equal(tmp_path):
    model = random_model(tiny.V3, seed=5)
    save(model, tmp_path / "m", max_shard_bytes=300_000)
    token, again = tokens(model.config), load(tmp_path / "m")
    assert torch.equal(
        model.logits(model(token, Context.packed([LENGTH]))),
        again.logits(again(token, Context.packed([LENGTH]))),
    )


@pytest.mark.parametrize("after_norm", [True, False])
@torch.inference_mode()
def test_mtp_is_the_published_composition(after_norm):
    """eh_proj takes the embedding first; one block; own norm, shared head; the input switch is honoured."""
    model = random_model(replace(tiny.V3, mtp_after_norm=after_norm), seed=6)
    token = tokens(model.config, 20)
    hidden = model(token, Context.packed([20]))
    got = model.mtp_logits(model.mtp_forward(hidden[:-1], token[1:], Context.packed([19])))
    module = model.mtp[0]
    source = model.norm(hidden[:-1]) if after_norm else hidden[:-1]
    pair = torch.cat([module.enorm(model.embed(token[1:])), module.hnorm(source)], -1)
    context = Context.packed([19])
    model.prepare(context)
    want = module.block(pair @ module.eh_proj.weight.T, context)
    torch.testing.assert_close(got, module.norm(want) @ model.lm_head.weight.T, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_reference(path):
    """With gradients on, no kernel without a backward is taken: used parameters get finite gradients."""
    model = random_model(tiny.V3, seed=8)
    token = tokens(model.config, 33)
    hidden = model(token, Context.packed([33]))
    loss = model.logits(hidden).logsumexp(-1).sum()
    loss = (
        loss
        + model.mtp_logits(model.mtp_forward(hidden[:-1], token[1:], Context.packed([32]))).square().mean()
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_captured_layers_and_routing():
    model = random_model(tiny.V3, seed=9)
    token = tokens(model.config, 12)
    context = Context.packed([12])
    context.capture_layers, context.record_routing = frozenset({0, 3}), True
    with torch.inference_mode():
        hidden = model(token, context)
    assert set(context.captured) == {0, 3}
    assert torch.equal(context.captured[0], model.embed(token))
    torch.testing.assert_close(context.captured[3], model.norm(hidden))
    assert [r.layer for r in context.routing] == [1, 2]
    assert all(r.expert_TK.shape == (12, 3) and r.score_TE.shape == (12, 8) for r in context.routing)


def test_v32_is_refused_with_a_reason():
    from hadal.config import ConfigError, preset

    with pytest.raises(ConfigError, match="sparse attention"):
        Transformer(preset("deepseek-v3.2-exp").config, device="meta")


def test_presets_build_on_meta():
    """The network's own parameters add up to the preset table's counts, for every released model."""
    from hadal.config import PRESETS

    for preset in PRESETS.values():
        if preset.config.dsa is not None:
            continue
        model = Transformer(preset.config, device="meta", dtype=torch.bfloat16)
        count, n = preset.config.parameters(), 0
        n = sum(t.numel() for t in model.state_dict().values())
        assert n == count.main + count.mtp_unique, preset.name
        assert isinstance(preset.config.attention, Mla) == (
            "self_attn.kv_b_proj.weight" in str(model.layers[0].state_dict().keys())
            or hasattr(model.layers[0].self_attn, "kv_b_proj")
        )


def test_fast_paths_are_the_ones_tested():
    """Where kernels are available, the default path does use them (a guard against a silent fallback)."""
    if "HADAL_OPS" in os.environ or not cpu.available():
        pytest.skip("references are forced, or there is no compiler")
    with torch.inference_mode():
        assert dispatch.use_cpu_kernels(torch.zeros(2, 2))
    x = torch.zeros(2, 2, requires_grad=True)
    assert not dispatch.use_cpu_kernels(x)
