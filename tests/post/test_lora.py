"""LoRA against an explicit low-rank forward pass, PEFT's formula by hand, and what trainer and engine see."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from hadal.data.strict import RecipeError
from hadal.engine.engine import Engine
from hadal.engine.request import SamplingParams
from hadal.model.context import Context
from hadal.model.transformer import Transformer
from hadal.post.lora import Adapters, LoraRecipe, choose
from hadal.train.ema import Ema
from hadal.train.optimizer import AdamW
from hadal.weights import load, save
from hadal.weights.names import slots
from tests.train import tiny as train_tiny
from tests.weights import tiny
from tests.weights.helpers import random_model

RECIPE = LoraRecipe(rank=4, alpha=6.0)
TOKEN = torch.tensor([3, 17, 44, 9, 80, 21, 60])


def loss_of(model: Transformer, token: Tensor = TOKEN) -> Tensor:
    return model.logits(model(token, Context.packed([4, 3]))).log_softmax(-1)[:, 5].sum()


def stirred(model: Transformer, recipe: LoraRecipe = RECIPE) -> Adapters:
    """Adapters whose B is no longer 0."""
    adapters = Adapters(model, recipe, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.1, generator=generator)
    adapters.merge()
    return adapters


@pytest.mark.parametrize("kind", ["v3", "v2-lite", "moe-16b", "qwen2", "llama"])
def test_values_and_gradients_are_those_of_an_explicit_low_rank_forward(kind: str) -> None:
    model = random_model(tiny.ALL[kind], seed=1)
    plain = random_model(tiny.ALL[kind], seed=1)
    adapters = stirred(model)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in adapters.named_parameters()}
    weights: dict[str, Tensor] = dict(plain.named_parameters())
    for item in adapters.items:
        short = item.name.removesuffix(".weight")
        low = leaves[f"{short}.lora_B"] @ leaves[f"{short}.lora_A"]
        weights[item.name] = weights[item.name].detach() + 6.0 / 4 * low
        weights[item.name]._is_param = True  # type: ignore[attr-defined]

    def run(token: Tensor) -> Tensor:
        return functional_call(Both(plain), {f"model.{k}": v for k, v in weights.items()}, (token,))

    want, got = run(TOKEN), loss_of(model)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    want.backward()
    got.backward()
    assert len(adapters.items) >= 4
    for name, parameter in adapters.named_parameters():
        if name.startswith("mtp"):
            assert parameter.grad is None  # the loss does not reach it
        else:
            assert parameter.grad is not None and leaves[name].grad is not None, name
            torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())


class Both(torch.nn.Module):
    """Model and loss as one module, for functional_call."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: Tensor) -> Tensor:
        return loss_of(self.model, token)


def test_pefts_formula_by_hand() -> None:
    """h = W₀x + (α/r)·B(Ax): W₀ = [[1, 2], [3, 4]], A = [1, −1], B = [2, 5]ᵀ, α = 3, r = 1, x = [10, 4]."""
    model = random_model(replace(tiny.QWEN2, hidden_size=96), seed=0)
    adapters = Adapters(model, LoraRecipe(rank=1, alpha=3.0, modules=("o_proj",)))
    item = adapters.items[0]
    with torch.no_grad():
        item.base.zero_()
        item.base[:2, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        item.a.zero_()
        item.a[0, :2] = torch.tensor([1.0, -1.0])
        item.b.zero_()
        item.b[:2, 0] = torch.tensor([2.0, 5.0])
    adapters.merge()
    x = torch.zeros(item.weight.shape[1])
    x[:2] = torch.tensor([10.0, 4.0])
    h = item.weight @ x
    assert h[:2].tolist() == [18 + 3 * 2 * 6, 46 + 3 * 5 * 6] and not h[2:].any()
    (h[0] + 2 * h[1]).backward()  # dW = [1, 2]ᵀ·x; dA = 3·(2·1 + 5·2)·x, dB = 3·dW·Aᵀ = 3·6·[1, 2]
    assert item.a.grad is not None and item.b.grad is not None
    assert item.a.grad[0, :2].tolist() == [360, 144] and item.b.grad[:2, 0].tolist() == [18, 36]
    rank_stabilised = LoraRecipe(rank=4, alpha=6.0, rank_stabilised=True)
    assert (RECIPE.scale, rank_stabilised.scale, LoraRecipe(rank=8).scale) == (1.5, 3.0, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_exact_and_never_adds_up(dtype: torch.dtype) -> None:
    model, base = (random_model(tiny.V3, seed=1, dtype=dtype) for _ in range(2))
    adapters = Adapters(model, RECIPE)
    adapters.merge()
    for (name, p), q in zip(model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(p, q), name  # B is 0
    stirred_model = random_model(tiny.V3, seed=1, dtype=dtype)
    adapters = stirred(stirred_model)
    once = {n: p.detach().clone() for n, p in stirred_model.named_parameters()}
    for _ in range(5):
        adapters.merge()
    assert all(torch.equal(once[n], p) for n, p in stirred_model.named_parameters())
    for item in adapters.items:
        want = (item.base.double() + 1.5 * (item.b.double() @ item.a.double())).to(dtype)
        torch.testing.assert_close(
            item.weight.detach(), want, rtol=2**-7 if dtype.itemsize == 2 else 1e-5, atol=1e-6
        )
    with adapters.holding(None):
        for (name, p), q in zip(stirred_model.named_parameters(), base.parameters(), strict=True):
            assert torch.equal(p, q), name
    assert all(torch.equal(once[n], p) for n, p in stirred_model.named_parameters())


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        model = random_model(tiny.V3, seed=1)
        adapters = stirred(model)
        loss_of(model).backward()
        grads = [p.grad for _, p in adapters.named_parameters() if p.grad is not None]
        return [*(item.weight.detach() for item in adapters.items), *grads]

    whole = run()
    monkeypatch.setattr("hadal.post.lora.PIECE", 1000)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_engine_samples_from_what_was_trained_and_the_base_stays(tmp_path: Path) -> None:
    """Steps of the trainer with adapters: only A and B move, the engine reads merged weights in place, a
    resumed run and the export have the same."""
    model = train_tiny.model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapters = Adapters(model, LoraRecipe(rank=4))
    trainer = train_tiny.trainer(model, speed=0.0, alpha=0.0, rate=1e-2)
    optimizer = AdamW(adapters.named_parameters())
    adapters.attach(optimizer)
    trainer.optimizer = optimizer
    trainer.ema = Ema(optimizer, 0.5)
    chosen = {item.name for item in adapters.items}
    assert all(not p.requires_grad for n, p in model.named_parameters() if n not in chosen)
    addresses = {n: p.data_ptr() for n, p in model.named_parameters()}
    losses = [stats.loss for _ in range(30) for stats in trainer.step()]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in chosen), name
        assert parameter.data_ptr() == addresses[name] and parameter.grad is None
    engine = Engine(model, page_size=4, cache_bytes=1 << 20, max_model_len=64, max_num_seqs=2)
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    reported = engine.generate(TOKEN.tolist(), asked).prompt_logprobs
    with torch.no_grad():
        logits = model.logits(model(TOKEN, Context.packed([7])))
    want = logits[:-1].log_softmax(-1).gather(1, TOKEN[1:, None])[:, 0]
    assert reported is not None
    torch.testing.assert_close(
        torch.tensor([e.logprob for e in reported[1:] if e]), want, rtol=1e-4, atol=1e-4
    )

    merged = {n: p.detach().clone() for n, p in model.named_parameters()}
    with trainer.ema.in_model():
        assert any(not torch.equal(merged[n], p) for n, p in model.named_parameters())
    assert all(torch.equal(merged[n], p) for n, p in model.named_parameters())
    again = train_tiny.model()
    others = Adapters(again, LoraRecipe(rank=4))
    resumed = AdamW(others.named_parameters())
    others.attach(resumed)
    resumed.load_state(optimizer.state(), steps=30)
    assert all(torch.equal(merged[n], p) for n, p in again.named_parameters())
    save(model, tmp_path / "out")
    assert all(torch.equal(merged[n], p) for n, p in load(tmp_path / "out").named_parameters())


@pytest.mark.parametrize("kind", ["v3", "qwen2"])
def test_peft_files_give_the_merged_weights(kind: str, tmp_path: Path) -> None:
    """Every published matrix: base + α/r · B·A from the two files alone is what the export holds."""
    model, base = random_model(tiny.ALL[kind], seed=1), random_model(tiny.ALL[kind], seed=1)
    adapters = stirred(model)
    adapters.save(tmp_path, "some/base")
    files, config = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6.0, "some/base")
    merged, unmerged = model.state_dict(), base.state_dict()
    count = 0
    for name, slot in slots(model.config).items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in files:
            continue
        count += 1
        rows = slice(slot.row, slot.row + slot.shape[0])
        both = [
            s[slot.parameter] if slot.index is None else s[slot.parameter][slot.index]
            for s in (unmerged, merged)
        ]
        low = files[f"{key}.lora_B.weight"] @ files[f"{key}.lora_A.weight"]
        torch.testing.assert_close(both[0][rows] + 1.5 * low, both[1][rows], rtol=1e-5, atol=1e-5)
    assert 2 * count == len(files) and count >= 14


def test_names_are_chosen_by_groups_names_and_patterns() -> None:
    model = random_model(tiny.V3)
    attention = choose(model, ("attention",))
    assert all(".self_attn." in name for name in attention) and len(attention) == 4 * 5
    assert choose(model, ("layers.0.*",))[-1] == "layers.0.mlp.down_proj.weight"
    assert choose(model, ("experts",)) == [
        f"{where}.mlp.experts.{part}"
        for where in ("layers.1", "layers.2", "mtp.0.block")
        for part in ("gate_up_proj", "down_proj")
    ]
    assert len(choose(model, ("o_proj", "attention"))) == len(attention)
    assert choose(random_model(tiny.QWEN2), ("ffn", "experts"))  # a dense model has no experts


@pytest.mark.parametrize(
    ("kind", "pattern", "hint"),
    [
        ("qwen2", "q_proj", "q_proj is a part of qkv_proj here"),
        ("v3", "up_proj", "up_proj is a part of gate_up_proj"),
        ("v3", "o_porj", "did you mean 'o_proj'"),
        ("v3", "atention", "did you mean 'attention'"),
        ("v3", "mlp.gate", "gates and the embedding have no adapters"),
        ("v3", "zzz", "groups are attention, ffn, experts, all; names"),
    ],
)
def test_what_means_nothing_is_refused_with_a_suggestion(kind: str, pattern: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        choose(random_model(tiny.ALL[kind]), (pattern,))


def test_released_a_model_is_an_ordinary_one() -> None:
    model = random_model(tiny.QWEN2)
    adapters = stirred(model)
    adapters.release()
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(RecipeError, match=r"lora\.rank is 0"):
        Adapters(model, LoraRecipe())
