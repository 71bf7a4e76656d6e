"""Parts `train` and `attention-train` of kernels_gpu.py: operations of training, forward and backward, at the
sizes of V2-Lite (8,192 tokens) and of Qwen 1.5B. Bytes are those that must be moved if everything is read and
written once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from hadal.ops import attention as attention_op
from hadal.ops import experts as expert_op
from hadal.ops.cross_entropy import linear_cross_entropy, loss_and_gradient, weighted_cross_entropy
from hadal.ops.triton import route, train_adamw, train_experts, train_heads

if TYPE_CHECKING:
    from kernels_gpu import Bench

Call = Callable[[], Any]


def both(f: Callable[..., Any], *inputs: Tensor) -> Call:
    """Forward and backward pass of f for ones as gradients of its outputs, which are made once."""
    wanted = [x for x in inputs if x.requires_grad]
    ones: list[Tensor] = []

    def call() -> Any:
        out = f(*inputs)
        outs = [out] if isinstance(out, Tensor) else list(out)
        if not ones:
            ones.extend(torch.ones_like(x) for x in outs)
        return torch.autograd.grad(outs, wanted, ones)

    return call


class Draw:
    """Random inputs on the bench's device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(*shape, device=self.device) * 0.5
        return x.to(dtype or self.dtype).requires_grad_(grad)


def _differentiable(part: Callable[[Bench], None]) -> Callable[[Bench], None]:
    @functools.wraps(part)
    def run(bench: Bench) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            part(bench)

    return run


@_differentiable
def train(bench: Bench) -> None:
    from kernels_gpu import DEVICE, DTYPE

    draw, b = Draw(DEVICE, DTYPE), DTYPE.itemsize
    T, K, E, D, width, V = (8, 2, 4, 32, 16, 50) if bench.small else (8192, 6, 64, 2048, 1408, 102_400)
    _rows(bench, draw, T, K, E, D, width, b)
    _heads(bench, draw, T, b, (2, 8, 8, 8) if bench.small else (16, 128, 64, 128))
    _head(bench, draw, T, D, V)
    _optimizer(bench, draw, 1 << (10 if bench.small else 28))


def _rows(bench: Bench, draw: Draw, T: int, K: int, E: int, D: int, width: int, b: int) -> None:
    N, title = T * K, f"{T} × {K} of {E}, {D} × {width}"
    x = draw(N, 2 * width)
    for name, f in (("ours", train_experts.swiglu), ("torch", expert_op.swiglu_reference)):
        bench.race("train", f"SwiGLU {N} × {width}", name, [both(f, x)], nbytes=8 * N * width * b)
    expert_TK = torch.rand(T, E, device=draw.device).topk(K, -1).indices
    place, _ = route.places(expert_TK, E)
    token, x, weight_TK = draw(T, D), draw(N, D), draw(T, K, dtype=torch.float32)
    index = place.argsort() // K
    spread = {
        "ours": lambda x: train_experts.spread(x, place, K),
        "torch": lambda x: x.index_select(0, index),
    }
    for name, f in spread.items():
        bench.race("train", f"rows out, {title}", name, [both(f, token)], nbytes=2 * (N + T) * D * b)
    combine = {
        "ours": lambda row, w: train_experts.combine(row, place, w, None, None),
        "torch": lambda row, w: torch.einsum("tkd,tk->td", row[place].unflatten(0, (-1, K)).float(), w).to(
            row.dtype
        ),
    }
    for name, f in combine.items():
        bench.race(
            "train", f"rows back, {title}", name, [both(f, x, weight_TK)], nbytes=(3 * N + 2 * T) * D * b
        )
    gate_up, down = draw(E, 2 * width, D), draw(E, D, width)
    if x.is_cuda:
        whole = both(lambda *a: expert_op.experts_grouped(a[0], expert_TK, *a[1:]), token, weight_TK, gate_up, down)  # fmt: skip  # noqa: E501
        bench.race("train", f"experts, {title}", "both directions", [whole], flops=18 * N * D * width)


def _heads(bench: Bench, draw: Draw, T: int, b: int, sizes: tuple[int, int, int, int]) -> None:
    H, nope, rope, value = sizes
    rotation = draw(T, 2, rope // 2, grad=False, dtype=torch.float32)
    q, kv, entry = draw(T, H, nope + rope), draw(T, H, nope + value), draw(T, rope)
    turned = both(lambda q: train_heads.turned(q, rotation, nope), q)
    bench.race("train", f"MLA queries, {T} × {H}", "ours", [turned], nbytes=4 * T * H * (nope + rope) * b)
    keys = both(lambda kv, entry: train_heads.keys_and_values(kv, entry, nope), kv, entry)
    moved = 2 * T * b * (H * (nope + value) + rope + H * (nope + rope + value))
    bench.race("train", f"MLA keys and values, {T} × {H}", "ours", [keys], nbytes=moved)
    width = nope + rope if bench.small else 128
    qkv, rotation = draw(T, 16, width), draw(T, 2, width // 2, grad=False, dtype=torch.float32)
    stacked = both(lambda x: train_heads.gqa_heads(x, rotation, 2), qkv)
    bench.race("train", f"GQA heads, {T} × (12 + 4)", "ours", [stacked], nbytes=4 * T * 16 * width * b)


def _head(bench: Bench, draw: Draw, T: int, D: int, V: int) -> None:
    rows = min(T, 1280)
    logits, target = draw(rows, V, grad=False, dtype=torch.float32), torch.arange(T, device=draw.device) % V
    share = torch.full((T,), 1 / T, device=draw.device)
    one = functools.partial(loss_and_gradient, logits, target[:rows], share[:rows], 0.0, draw.dtype)
    moved = rows * V * (4 + 4 + draw.dtype.itemsize)
    bench.race("train", f"loss and gradient, {rows} × {V}", "ours", [one], nbytes=moved)
    del logits
    hidden, head = draw(T, D), draw(V, D)
    ways = {
        "weighted": lambda h, w: weighted_cross_entropy(h, w, target, share),
        "by token": lambda h, w: (linear_cross_entropy(h, w, target) * share).sum(),
    }
    for name, f in ways.items():
        bench.race("train", f"head, {T} × {D} × {V}", name, [both(f, hidden, head)], flops=6 * T * D * V)


def _optimizer(bench: Bench, draw: Draw, count: int) -> None:
    flat = [draw(count, grad=False, dtype=torch.float32) for _ in range(2)]
    half = [torch.zeros(count, dtype=torch.bfloat16, device=draw.device) for _ in range(3)]
    one = torch.ones((), device=draw.device)
    numbers = train_adamw.Numbers(0.9, 0.95, 1e-8, 1e-4, math.sqrt(0.05), 1e-5, 1.0)
    call = functools.partial(train_adamw.update, *flat, *half, one, one, count, numbers)
    bench.race("train", f"AdamW, {count:,}", "ours", [call], nbytes=22 * count)
    add = functools.partial(flat[0].add_, half[0])
    bench.race("train", f"gradients summed, {count:,}", "torch", [add], nbytes=10 * count)


@_differentiable
def attention_train(bench: Bench) -> None:
    """Whole rows and documents through what torch has; ours is what `hadal.ops.attention` chooses."""
    from kernels_gpu import DEVICE, DTYPE

    draw = Draw(DEVICE, DTYPE)
    cases = [(16, 16, 192, 128), (12, 2, 128, 128)]
    rows, length = (2, 32) if bench.small else (2, 4096)
    for heads, groups, width, value in cases:
        T = rows * length
        q, k, v = draw(T, heads, width), draw(T, groups, width), draw(T, groups, value)
        for title, lengths in (("rows", [length] * rows), ("documents", [length // 4] * (4 * rows - 1))):
            lengths = lengths if title == "rows" else [*lengths[:-1], length // 8, T - sum(lengths[:-1]) - length // 8]  # fmt: skip  # noqa: E501
            flops = 3 * heads * (width + value) * sum(n * n for n in lengths)
            case = f"{title} of {length}, {heads}/{groups} × {width}/{value}"
            ours = both(lambda q, k, v, n=lengths: attention_op.attention(q, k, v, n, n, 0.1), q, k, v)
            bench.race("attention-train", case, "ours", [ours], flops=flops)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            if DEVICE.type == "cuda":
                name = backend.name.split("_")[0].lower()
                flops = 3 * heads * (width + value) * rows * length**2
                call = both(functools.partial(_sdpa, backend, rows), q, k, v)
                case = f"rows of {length}, {heads}/{groups} × {width}/{value}"
                bench.race("attention-train", case, f"{name}, values padded", [call], flops=flops)


def _sdpa(backend: SDPBackend, rows: int, *heads_TnC: Tensor) -> Tensor:
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in heads_TnC)
    v = pad(v, (0, q.shape[3] - v.shape[3]))
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
