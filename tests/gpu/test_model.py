"""The network on a CUDA device: fast paths against the FP32 references, in BF16, and inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from hadal.model import Cache, Context, Transformer
from hadal.ops import dispatch
from tests.weights import tiny
from tests.weights.helpers import random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
PAGE = 16


def decode_context(model: Transformer, cache: Cache, at: list[int]) -> Context:
    """One query token for each sequence, at position at[s]; sequence s owns pages 8s+1 … 8s+8."""
    table = (torch.arange(len(at) * 8).view(-1, 8) + 1).int().cuda()
    position = torch.tensor(at).cuda()
    rows = torch.arange(len(at)).cuda()
    slot = table[rows, position // PAGE].long() * PAGE + position % PAGE
    lens = [n + 1 for n in at]
    starts = list(range(len(at) + 1))
    return Context(position, starts, cache, slot, table, torch.tensor(lens).int().cuda(), lens, len(at))


@pytest.mark.parametrize("name", ["v3", "v2", "v2-lite", "moe-16b", "qwen2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.inference_mode()
def test_prefill_and_decode_equal_the_reference(name, dtype, monkeypatch):
    exact = random_model(tiny.ALL[name], seed=1)
    model = Transformer(exact.config, dtype=dtype, device="cuda")
    model.load_state_dict(exact.state_dict())
    wide = Transformer(exact.config, dtype=torch.float64)
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    token = torch.randint(0, exact.config.vocab_size, (90,), generator=torch.Generator().manual_seed(0))
    want = wide.logits(wide(token, Context.packed([90])))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2

    def close(got: torch.Tensor, reference: torch.Tensor) -> None:
        """Row by row; in BF16 a near-tie of the gate may send a row elsewhere: nine rows of ten count."""
        error = (got.double().cpu() - reference).norm(dim=-1) / reference.norm(dim=-1)
        assert error.quantile(1.0 if dtype == torch.float32 else 0.9) < tolerance, error

    close(model.logits(model(token.cuda(), Context.packed([90], "cuda"))), want)
    cache = Cache(exact.config, 9, PAGE, dtype, "cuda")
    for layer in cache.layers:
        layer[1:].fill_(float("nan"))
    table = (torch.arange(8).view(1, 8) + 1).int().cuda()
    got = []
    for a, b in [(0, 33), (33, 80), *((i, i + 1) for i in range(80, 90))]:
        at = torch.arange(a, b).cuda()
        slot = table[0, at // PAGE].long() * PAGE + at % PAGE
        context = Context(
            at, [0, b - a], cache, slot, table, torch.tensor([b]).int().cuda(), [b], int(b - a == 1)
        )
        got.append(model.logits(model(token[a:b].cuda(), context)))
    close(torch.cat(got), want)


@torch.inference_mode()
def test_decode_step_in_a_cuda_graph():
    """A captured step replayed on other tokens, positions and pages equals the eager step."""
    model = random_model(tiny.V3, seed=2).to("cuda", torch.bfloat16)
    cache = Cache(model.config, 8 * 3 + 1, PAGE, torch.bfloat16, "cuda")
    for layer in cache.layers:
        layer.normal_(0, 0.3)
    token = torch.randint(0, model.config.vocab_size, (3,)).cuda()
    context = decode_context(model, cache, [5, 40, 100])
    table = model.rotation_table()

    def step() -> torch.Tensor:
        context.rotation_T2r = table[context.position_T]
        return model.logits(model(token, context))

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    other = decode_context(model, cache, [6, 41, 101])
    token.copy_(torch.randint(0, model.config.vocab_size, (3,)))
    for name in ("position_T", "slot_T", "block_table_SP", "context_len_S"):
        getattr(context, name).copy_(getattr(other, name))
    out.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(out, step(), rtol=1e-2, atol=1e-2)


def test_the_default_path_on_cuda_is_triton():
    with torch.inference_mode():
        assert dispatch.use_triton(torch.zeros(1, device="cuda"))
