"""Kernels around prefill's products against their references: on CUDA, else in the interpreter (FP32)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from tests.helpers.kernels import CUDA, DEVICE, DTYPES, cases, close, draw, in_the_interpreter, needs_triton

test_kernels_in_the_interpreter = in_the_interpreter(__file__)


@needs_triton
@pytest.mark.parametrize(
    "tokens,experts,per_token",
    cases(
        [(0, 4, 2), (1, 4, 1), (1, 8, 8), (3, 64, 6), (57, 64, 6), (70, 6, 2), (1000, 5, 3)],
        *[(257, 64, 6), (700, 6, 2), (2000, 256, 8), (9000, 5, 3)],
    ),
)
def test_rows_by_expert_are_those_of_a_stable_sort(tokens, experts, per_token, monkeypatch):
    from hadal.ops.experts import dispatch
    from hadal.ops.triton import route
    from hadal.ops.triton.route import places, spread

    if not CUDA:
        monkeypatch.setattr(route, "CHUNKS", 12)  # so that runs of a thousand pairs have several blocks, too
    expert = torch.rand(tokens, experts).topk(per_token, -1).indices
    if tokens in (70, 700):
        expert = torch.full_like(expert, 3)  # everybody's choice
    x = torch.randn(tokens, 40)[:, :37]
    rows, place, end = dispatch(x, expert, experts)
    got_place, got_end = places(expert.to(DEVICE), experts)
    assert torch.equal(got_place.cpu(), place) and torch.equal(got_end.cpu(), end)
    if tokens <= 700:
        assert torch.equal(spread(x.to(DEVICE), got_place, per_token).cpu(), rows)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,keys,heads,nope,rope,value", [(1, 1, 2, 8, 4, 8), (5, 9, 20, 24, 12, 16)])
def test_mla_heads(tokens, keys, heads, nope, rope, value, dtype):
    from hadal.ops import heads as op
    from hadal.ops.triton.heads import mla_heads, rotate_queries

    rotation = torch.randn(tokens, 2, rope // 2, device=DEVICE)
    wide = draw(tokens, heads * (nope + rope) + 3, dtype=dtype)
    q = wide[:, :-3].unflatten(-1, (heads, -1))
    kv = draw(keys, heads, nope + value, dtype=dtype)
    k_rope = draw(keys, 5 + rope, dtype=dtype)[:, 5:]
    double = (q.cpu().double(), rotation.cpu().double(), kv.cpu().double(), k_rope.cpu().double())
    want_q, want_k, want_v = op.mla_heads(*double)
    alone = q.clone()
    rotate_queries(alone, rotation, nope)
    k = mla_heads(q, rotation, kv, k_rope)
    close(q, want_q, dtype)
    close(alone, q, dtype)  # bit for bit but where a card fuses products with sums
    assert torch.equal(q[..., :nope].cpu(), double[0][..., :nope].to(dtype))
    assert torch.equal(k[..., :nope].cpu(), want_k[..., :nope].to(dtype))
    close(k, want_k, dtype)  # a card fuses the rotation's products with their sums
    assert torch.equal(want_v, double[2][..., nope:])
    with pytest.raises(ValueError, match="side by side"):
        mla_heads(q.transpose(1, 2), rotation, kv, k_rope)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,heads,groups,width", [(1, 4, 2, 8), (7, 12, 2, 24), (3, 9, 3, 64)])
def test_gqa_heads(tokens, heads, groups, width, dtype):
    from hadal.ops import heads as op
    from hadal.ops.triton.heads import gqa_heads

    rotation = torch.randn(tokens, 2, width // 2, device=DEVICE)
    qkv = draw(tokens, heads + 2 * groups, width, dtype=dtype)
    alone = qkv.clone()
    cache = draw(5, 4, 2, groups, width, dtype=dtype)
    want_cache = cache.cpu().double()
    slot = torch.randperm(19)[:tokens] + 1
    double = qkv.cpu().double()
    want = op.gqa_heads(double, rotation.cpu().double(), groups, want_cache, slot)
    out = gqa_heads(qkv, rotation, groups, cache, slot.to(DEVICE))
    assert out is qkv
    close(out, torch.cat(want, 1), dtype)
    close(cache, want_cache, dtype)
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[slot] = False
    assert torch.equal(cache.flatten(0, 1).cpu()[untouched].double(), want_cache.flatten(0, 1)[untouched])
    assert torch.equal(gqa_heads(alone, rotation, groups), out)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "q_len,k_len,heads,groups,width,value",
    [
        ([1], [1], 1, 1, 16, 16),
        ([40], [40], 2, 2, 24, 16),  # a width of two parts, values narrower
        ([7, 33, 1, 20], [7, 80, 65, 20], 4, 2, 16, 16),  # a cached prefix before some
        ([70, 3], [70, 130], 2, 1, 32, 24),
    ],
)
def test_flash_attention(q_len, k_len, heads, groups, width, value, dtype):
    from hadal.ops.attention import attention_reference
    from hadal.ops.triton.flash import Config, attention

    T, N = sum(q_len), sum(k_len)
    q, k = draw(T, heads, width, dtype=dtype), draw(N, groups, width, dtype=dtype)
    v = draw(N, groups, 5 + value, dtype=dtype)[..., 5:]  # as it lies beside the keys
    double = (x.cpu().double() for x in (q, k, v))
    want = attention_reference(*double, q_len, k_len, 0.3)
    for config in (Config(32, 16, 4, 2), Config(16, 32, 4, 3)):
        close(attention(q, k, v, q_len, k_len, 0.3, config=config), want, dtype)


@pytest.mark.skipif(not CUDA, reason="the dispatcher takes the kernels on CUDA only")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "q_len,k_len", [([300], [300]), ([200], [333]), ([128, 128], [128, 128]), ([5, 90], [64, 90])]
)
def test_both_forms_of_attention_on_cuda(q_len, k_len, own, monkeypatch):
    """MLA's and GQA's heads as a model has them, through torch's kernels and through ours."""
    from hadal.ops import attention as op

    if not own:
        monkeypatch.setattr(op, "use_triton", lambda *tensors: False)
    T, N, bf16 = sum(q_len), sum(k_len), torch.bfloat16
    q, kv, rope = (
        draw(T, 16, 192, dtype=bf16),
        draw(N, 16, 256, dtype=bf16),
        draw(N, 576, dtype=bf16)[:, 512:],
    )
    rotation = torch.randn(T, 2, 32, device=DEVICE)
    want = op.mla_attention(
        q.cpu().double(), rotation.cpu().double(), kv.cpu().double(), rope.cpu().double(), q_len, k_len, 0.1
    )
    with torch.no_grad():
        close(op.mla_attention(q, rotation, kv, rope, q_len, k_len, 0.1), want, bf16)
        qkv, more = draw(T, 16, 128, dtype=bf16), draw(N, 4, 128, dtype=bf16)
        out = op.attention(qkv[:, :12], more[:, :2], more[:, 2:], q_len, k_len, 0.1)
    want = op.attention_reference(
        qkv[:, :12].cpu().double(), more[:, :2].cpu().double(), more[:, 2:].cpu().double(), q_len, k_len, 0.1
    )
    close(out, want, bf16)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_flash_attention_with_one_rope_key_for_all_heads(dtype):
    from hadal.ops.attention import attention_reference
    from hadal.ops.triton.flash import Config, attention

    q, kv, rope = (draw(*shape, dtype=dtype) for shape in ((37, 3, 24), (50, 3, 32), (50, 19)))
    k, v, rope = kv[..., :16], kv[..., 16:], rope[:, 11:]
    whole = torch.cat([k, rope.unsqueeze(1).expand(-1, 3, -1)], -1)
    want = attention_reference(*(x.cpu().double() for x in (q, whole, v)), [37], [50], 0.3)
    close(attention(q, k, v, [37], [50], 0.3, rope, Config(16, 16, 4, 2)), want, dtype)
    with pytest.raises(ValueError, match="as wide as queries"):
        attention(q, k, v, [37], [50], 0.3, rope[:, 1:])


def test_sizes_are_tritons():
    import triton

    from hadal.ops.triton.sizes import ceil_div, power_of_2

    for number in (0, 1, 2, 3, 63, 64, 65, 4000):
        assert power_of_2(number) == max(1, triton.next_power_of_2(number))
        assert ceil_div(number, 64) == triton.cdiv(number, 64)
