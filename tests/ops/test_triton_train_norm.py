"""RMSNorm of training in both directions: against torch in FP64 (on CUDA in BF16 and FP32, else in the
interpreter), its bits under recomputation, and that it compiles for an H100."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from hadal.ops.recompute import recompute, recomputed
from hadal.ops.rms_norm import rms_norm_reference
from hadal.ops.rope import rotate_interleaved
from tests.helpers.kernels import CUDA, DTYPES, INTERPRETED, draw, in_the_interpreter, needs_triton
from tests.ops.test_triton_compiles import BF16, SHARED
from tests.ops.test_triton_compiles import compiled as compiled
from tests.ops.test_triton_train import agree, rotation_of

EPS = 1e-6
SHAPES = [(1, 8), (37, 24), (300, 256), (3, 5000), (0, 64)]


test_norms_of_training_in_the_interpreter = in_the_interpreter(__file__)


def weight_of(width: int, dtype: torch.dtype) -> Tensor:
    return (1 + draw(width, scale=0.2)).to(dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,width", SHAPES)
def test_norm(rows, width, dtype):
    from hadal.ops.triton.train_norm import rms_norm

    agree(
        lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_reference(x, w, EPS),
        [draw(rows, width, dtype=dtype), weight_of(width, dtype)], dtype,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_strided_rows(dtype):
    """A slice of a wider matrix, and heads."""
    from hadal.ops.triton.train_norm import rms_norm

    wide, w = draw(70, 40, dtype=dtype), weight_of(24, dtype)
    agree(
        lambda x, w: rms_norm(x[:, 8:32], w, EPS), lambda x, w: rms_norm_reference(x[:, 8:32], w, EPS),
        [wide, w], dtype,
    )  # fmt: skip
    heads = draw(7, 5, 24, dtype=dtype)
    agree(lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_reference(x, w, EPS), [heads, w], dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,width", SHAPES)
def test_a_stream_beside_its_norm(rows, width, dtype):
    from hadal.ops.triton.train_norm import forked

    agree(
        lambda x, w: forked(x, w, EPS), lambda x, w: (x, rms_norm_reference(x, w, EPS)),
        [draw(rows, width, dtype=dtype), weight_of(width, dtype)], dtype,
    )  # fmt: skip


@needs_triton
def test_one_of_two_ways_alone():
    from hadal.ops.triton.train_norm import forked

    x, w = draw(9, 16).requires_grad_(), weight_of(16, torch.float32).requires_grad_()
    stream, normed = forked(x, w, EPS)
    assert torch.equal(stream, x)
    assert stream.data_ptr() == x.data_ptr()
    (only,) = torch.autograd.grad(stream.sum(), x, retain_graph=True)
    assert torch.equal(only, torch.ones_like(x))
    dx, dw = torch.autograd.grad(normed.square().sum(), (x, w))
    want = torch.autograd.grad(rms_norm_reference(x, w, EPS).square().sum(), (x, w))
    torch.testing.assert_close([dx, dw], list(want), rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)  # the interpreter rounds to BF16 in its own way
def test_the_join_has_the_bits_of_two_kernels(dtype):
    from hadal.ops.triton.train_norm import forked, rms_norm

    x, w = draw(50, 64, dtype=dtype).requires_grad_(), weight_of(64, dtype).requires_grad_()
    dstream, dy = draw(50, 64, dtype=dtype), draw(50, 64, dtype=dtype)
    joined = torch.autograd.grad(forked(x, w, EPS), (x, w), (dstream, dy))
    apart = torch.autograd.grad(rms_norm(x, w, EPS), (x, w), dy)
    if dtype == torch.float32:  # a GPU contracts the last product and the sum: one rounding fewer
        torch.testing.assert_close(joined[0], apart[0] + dstream, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(joined[0], apart[0] + dstream)
    assert torch.equal(joined[1], apart[1])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_keeps_the_bits_and_not_the_norm(dtype):
    """Blocks of a residual stream: a norm's output is noted, the stream is what it was."""
    from hadal.ops.triton.train_norm import forked

    x, w = draw(40, 32, dtype=dtype).requires_grad_(), weight_of(32, dtype).requires_grad_()
    m = draw(32, 32, dtype=dtype, scale=0.2).requires_grad_()
    found, bytes_kept = [], []
    for kinds in ((), ("norm",)):
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> None:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

        with recompute(kinds, keep):
            stream = x
            for _ in range(3):
                stream, normed = recomputed("norm", forked, stream, w, EPS)
                stream = stream + normed @ m
            loss = stream.float().square().sum()
        found.append([loss.detach(), *torch.autograd.grad(loss, (x, w, m))])
        bytes_kept.append(sum(storages.values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert bytes_kept[1] < bytes_kept[0] - 2 * x.nbytes


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,latent,rope", [(1, 8, 4), (130 if CUDA else 40, 128, 32), (5, 512, 64)])
def test_latent_entries(tokens, latent, rope, dtype):
    from hadal.ops.triton.train_norm import latent_entry

    rotation = rotation_of(tokens, rope)

    def reference(kv: Tensor, w: Tensor) -> Tensor:
        turned = rotate_interleaved(kv[:, latent:].float(), rotation.cpu()).double()
        return torch.cat([rms_norm_reference(kv[:, :latent], w, EPS), turned], -1)

    agree(
        lambda kv, w: latent_entry(kv, w, EPS, rotation), reference,
        [draw(tokens, latent + rope, dtype=dtype), weight_of(latent, dtype)], dtype,
    )  # fmt: skip


@pytest.mark.parametrize("width", [128, 256, 2048, 7168])
def test_it_compiles_within_shared_memory(width: int, request: pytest.FixtureRequest) -> None:
    if CUDA or INTERPRETED:
        pytest.skip("the kernels run here")
    kernels: list[Any] = request.getfixturevalue("compiled")
    from hadal.ops.triton import train_heads
    from hadal.ops.triton import train_norm as op

    x, w = (torch.empty(*shape, dtype=BF16, requires_grad=True) for shape in ((5000, width), (width,)))
    kv = torch.empty(50, width + 64, dtype=BF16, requires_grad=True)
    stream, normed = op.forked(x, w, EPS)
    torch.autograd.backward((stream, normed), (x.detach(), x.detach()))
    op.rms_norm(x, w, EPS).backward(x.detach())
    op.latent_entry(kv, w, EPS, torch.empty(50, 2, 32)).backward(kv.detach())
    heads = torch.empty(50, 8, 64, dtype=BF16, requires_grad=True)
    train_heads.narrow(heads, 32).backward(heads.detach()[..., :32])
    pair = train_heads.keys_and_values(heads, kv[:, width:], 32, 96)
    torch.autograd.backward(pair, [torch.empty_like(x) for x in pair])
    assert len(kernels) == 3 + 3 + 5 + 2 + 2
    for kernel in kernels:
        assert "cubin" in kernel.asm and kernel.metadata.shared <= SHARED
