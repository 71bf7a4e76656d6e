"""The FP8 grouped product in Gluon against FP64, on a Hopper card: no interpreter runs Gluon."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hadal.ops import fp8 as numbers
from hadal.ops.packed import pack

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="Gluon's products are compiled for Hopper alone",
)
CONFIGS = [(4, 1, 16), (3, 2, 16), (4, 1, 2)]  # stages, steps on their way out, width of a band


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(torch.bfloat16).cuda()


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


def product(pairs: list[int], outs: int, width: int, config: tuple[int, int, int], monkeypatch) -> float:
    """Relative error of the product where `pairs[e]` rows go to expert e. Unused tiles stay unwritten."""
    from hadal.ops.triton import fp8, fp8_gluon

    weight = pack(draw(len(pairs), outs, width, scale=width**-0.5), "fp8")
    expert = torch.arange(len(pairs)).repeat_interleave(torch.tensor(pairs))
    expert = expert[torch.randperm(expert.numel())].cuda()
    where = fp8.sort_rows(expert.unsqueeze(1), len(pairs))
    q, scale = fp8.quantise_rows(draw(expert.numel(), width), where.place, where.tile_expert.numel() * 128)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda shape, **kinds: torch.full(shape, float("nan"), **kinds))
        out = fp8_gluon.grouped_matmul(
            q, scale, weight, where.tile_expert, where.used, fp8_gluon.Config(*config)
        )
    assert out[int(where.used) * 128 :].isnan().all()
    seen = numbers.dequantise_activations(q[where.place], scale[:, where.place].t(), dtype=torch.float64)
    exact = weight.dequantise(torch.float32).double()
    want = torch.empty(expert.numel(), outs, dtype=torch.float64, device="cuda")
    for e in range(len(pairs)):
        want[expert == e] = seen[expert == e] @ exact[e].T
    return error(out[where.place], want)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "pairs,outs,width",
    [
        ([128], 256, 512),  # one tile, as many groups as stages
        ([5], 256, 128),  # one group of channels
        ([130, 0, 20], 512, 384),
        ([700, 3, 5000, 257, 0, 1100], 2816, 2048),  # several tiles a program
    ],
    ids=["tile", "group", "experts", "many"],
)
def test_grouped_product(pairs, outs, width, config, monkeypatch):
    torch.manual_seed(0)
    assert product(pairs, outs, width, config, monkeypatch) < 3e-3


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_again_and_in_a_graph(config):
    """Barriers are left as they were found, whatever number of groups went through them."""
    from hadal.ops.triton import fp8, fp8_gluon

    torch.manual_seed(0)
    x, weight = draw(4096, 640), pack(draw(1024, 640, scale=0.04), "fp8")
    q, scale = fp8.quantise_rows(x)
    expert = torch.zeros(32, dtype=torch.int32, device="cuda")
    args = (q, scale, weight, expert, torch.full_like(expert[:1], 32))
    first = fp8_gluon.grouped_matmul(*args, fp8_gluon.Config(*config))
    assert error(first, fp8.grouped_matmul(*args, config=fp8.Config())) < 3e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            again = fp8_gluon.grouped_matmul(*args, fp8_gluon.Config(*config))
    for _ in range(20):
        graph.replay()
    assert torch.equal(first, again)
    none = torch.zeros_like(expert[:1])
    fp8_gluon.grouped_matmul(*args[:4], none, fp8_gluon.Config(*config))
    torch.cuda.synchronize()


def test_what_it_takes():
    from hadal.ops.triton import fp8, fp8_gluon

    q = torch.zeros(128, 256, dtype=torch.float8_e4m3fn, device="cuda")
    weight, fine = pack(draw(256, 256), "fp8"), pack(draw(256, 256), "fp8", rows=32)
    assert not fp8_gluon.wants(q, pack(draw(128, 256), "fp8"), torch.bfloat16)
    assert fp8_gluon.wants(q, weight, torch.bfloat16)
    assert not fp8_gluon.wants(q, weight, torch.float32)
    assert not fp8_gluon.wants(q, fine, torch.bfloat16)
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="blocks of 32 outputs"):
        fp8_gluon.grouped_matmul(q, q, fine, one, one)
    x = draw(128, 256)
    q, scale = fp8.quantise_rows(x)
    for packed in (weight, fine):
        out = fp8.grouped_matmul(q, scale, packed, one - 1, one)
        assert error(out, x.double() @ packed.dequantise(torch.float32).double().T) < 0.04
