"""Extraction is transformers' hidden states, attentions and routers, whatever lies in the same stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hadal.model.context import Context
from hadal.ops.exact import exact
from hadal.ops.exact import unavailable as no_exact
from hadal.probe.extract import ProbeError, batches, extract, extract_all, layer_numbers
from hadal.weights import load, save
from tests.weights import tiny
from tests.weights.helpers import random_model

transformers = pytest.importorskip("transformers")
NAMES = ["v3", "v2", "v2-lite", "qwen2", "qwen2-tied", "llama"]
LENGTHS = [17, 1, 40, 9, 17, 96]  # 96: beyond the length that YaRN (v3, v2) and llama3 stretch from


def texts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(our model, transformers' model of the same folder), made once a name."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp("probe") / "m"
            save(random_model(tiny.ALL[name], seed=4), folder)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
            made[name] = load(folder, with_mtp=False), theirs.eval()
        return made[name]

    return get


def run_theirs(theirs: Any, ids: list[int]) -> tuple[Any, dict[int, torch.Tensor]]:
    """transformers' output of one text alone, and the logits of its routers by block."""
    logits: dict[int, torch.Tensor] = {}

    def watch(block: int) -> Any:
        def hook(module: Any, inputs: Any, out: Any) -> None:
            logits[block] = inputs[0].flatten(0, -2) @ module.weight.float().T

        return hook

    gates = {i: layer.mlp.gate for i, layer in enumerate(theirs.model.layers) if hasattr(layer.mlp, "gate")}
    hooks = [gate.register_forward_hook(watch(i)) for i, gate in gates.items()]
    out = theirs(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    return out, logits


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_everything_is_what_transformers_sees(name: str, pairs: Any) -> None:
    ours, theirs = pairs(name)
    config = ours.config
    many, blocks = texts(config.vocab_size), range(config.num_hidden_layers)
    found = extract_all(ours, many, routing=config.moe is not None, attention=blocks, max_tokens=60)
    for ids, taken in zip(many, found, strict=True):
        out, logits = run_theirs(theirs, ids)
        assert taken.hidden_lnD.shape[0] == len(out.hidden_states) == config.num_hidden_layers + 1
        for mine, expected in zip(taken.hidden_lnD, out.hidden_states, strict=True):
            torch.testing.assert_close(mine, expected[0], rtol=2e-4, atol=2e-4)
        for block in blocks:
            torch.testing.assert_close(taken.attention[block], out.attentions[block][0], rtol=1e-4, atol=1e-5)
        assert set(taken.scores) == set(taken.experts) == set(logits)
        for block, logit_nE in logits.items():
            assert config.moe is not None
            sigmoid = config.moe.scoring_func == "sigmoid"
            expected = logit_nE.sigmoid() if sigmoid else logit_nE.softmax(-1)
            torch.testing.assert_close(taken.scores[block], expected, rtol=1e-4, atol=1e-5)


def test_chosen_experts_are_those_that_run(pairs: Any) -> None:
    """Silencing the experts that were not chosen changes nothing; silencing a chosen one does."""
    ours, _ = pairs("v3")
    ids = texts(ours.config.vocab_size)[0]
    [taken] = extract_all(ours, [ids], routing=True)
    block = max(taken.experts)
    chosen = set(taken.experts[block][-1].tolist())  # of the last token
    stack = ours.layers[block].mlp.experts.down_proj.data
    before = stack.clone()
    try:
        stack[[e for e in range(stack.shape[0]) if e not in chosen]] = 0
        [same] = extract_all(ours, [ids], [-1])
        stack[min(chosen)] = 0
        [other] = extract_all(ours, [ids], [-1])
    finally:
        stack.copy_(before)
    torch.testing.assert_close(same.hidden_lnD[0, -1], taken.hidden_lnD[-1, -1])
    assert not torch.allclose(other.hidden_lnD[0, -1], taken.hidden_lnD[-1, -1], atol=1e-4)


@pytest.mark.parametrize("name", ["v3", "qwen2"])
def test_neighbours_and_order_do_not_matter(name: str, pairs: Any) -> None:
    ours, _ = pairs(name)
    many = texts(ours.config.vocab_size)
    alone = [extract_all(ours, [ids])[0] for ids in many]
    for order, room in (([0, 1, 2, 3, 4, 5], 10_000), ([5, 3, 1, 0, 2, 4], 50), ([4, 2, 0, 5, 1, 3], 1)):
        found = extract_all(ours, [many[i] for i in order], max_tokens=room)
        for place, i in enumerate(order):
            torch.testing.assert_close(found[place].hidden_lnD, alone[i].hidden_lnD, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(no_exact(torch.device("cpu"), torch.float32) is not None, reason="needs the C++ kernels")
def test_exact_mode_gives_the_same_bits_in_any_stream(pairs: Any) -> None:
    ours, _ = pairs("v3")
    many = texts(ours.config.vocab_size)
    with exact():
        together = extract_all(ours, many, routing=True)
        alone = extract_all(ours, many, routing=True, max_tokens=1)
        with pytest.raises(ProbeError, match="expanded form"):
            extract_all(ours, many, attention=[0])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.hidden_lnD, b.hidden_lnD) and torch.equal(a.scores[2], b.scores[2])


def test_watching_changes_no_bit_and_leaves_nothing_behind(pairs: Any) -> None:
    ours, _ = pairs("v3")
    ids = texts(ours.config.vocab_size)[2]
    plain = Context.packed([len(ids)])
    with torch.no_grad():
        expected = ours.norm(ours(torch.tensor(ids), plain))
    assert not (plain.captured or plain.attention or plain.routing)
    [taken] = extract_all(ours, [ids], attention=range(3))
    assert torch.equal(taken.hidden_lnD[-1], expected)
    for map_Hnn in taken.attention.values():
        torch.testing.assert_close(map_Hnn.sum(-1), torch.ones(4, len(ids)))
        assert not map_Hnn.triu(1).any(), "nobody sees what comes later"


def test_streams_hold_no_padding_and_lose_nobody() -> None:
    lengths = [3, 9, 1, 12, 4, 4]
    made = batches(lengths, 10)
    assert made == [[3], [1], [4, 5], [0, 2]]
    assert sorted(i for batch in batches([5] * 40, 17) for i in batch) == list(range(40))


def test_progress_reaches_the_end(pairs: Any) -> None:
    ours, _ = pairs("llama")
    seen: list[tuple[int, int]] = []
    for _ in extract(ours, [[1, 2], [3], [4, 5, 6]], [0], max_tokens=3, progress=lambda *at: seen.append(at)):
        pass
    assert seen == [(3, 6), (6, 6)]


def test_layers_by_number() -> None:
    assert layer_numbers(3, None) == (0, 1, 2, 3) and layer_numbers(3, [-1, 0, 2]) == (3, 0, 2)
    for wrong in ([4], [-5], [], [3, -1]):
        with pytest.raises(ProbeError, match="layer"):
            layer_numbers(3, wrong)


def test_refusals_name_the_text(pairs: Any) -> None:
    ours, _ = pairs("qwen2")
    for wrong, match in (([[1], []], "text 1 has no"), ([[130]], "outside 0 to 129"), ([[1] * 513], "513")):
        with pytest.raises(ProbeError, match=match):
            extract_all(ours, wrong)
    with pytest.raises(ProbeError, match="dense"):
        extract_all(ours, [[1]], routing=True)
    with pytest.raises(ProbeError, match="block 2"):
        extract_all(ours, [[1]], attention=[2])
