"""Part `fp8train` of kernels_gpu.py: the three products of linear layers and experts in FP8 against BF16, at
the sizes of V2-Lite; then a layer of experts and a dense network, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from kernels_train import Draw, _differentiable
from torch import Tensor

from hadal.ops import experts as expert_op
from hadal.ops import fp8_training
from hadal.ops.fp8_tiles import Rows
from hadal.ops.triton import fp8_train
from hadal.ops.triton import fp8_train_products as products

if TYPE_CHECKING:
    from kernels_gpu import Bench

Call = Callable[[], Any]
DENSE = [(3072, 2048), (2048, 2048), (21888, 2048), (2048, 10944)]


@_differentiable
def fp8train(bench: Bench) -> None:
    """Quantising is counted in rows that say so: what a product needs beside what another one has made."""
    from kernels_gpu import CUDA, DEVICE, DTYPE

    draw = Draw(DEVICE, DTYPE)
    for tokens in (256,) if bench.small else (8192, 16384):
        for N, K in [(512, 256)] if bench.small else DENSE:
            dense_products(bench, draw, tokens, N, K)
        if CUDA:
            for name in ("gate_up", "down"):
                expert_products(bench, draw, tokens, name)
        training_layers(bench, draw, tokens)


def dense_products(bench: Bench, draw: Draw, tokens: int, N: int, K: int) -> None:
    x, dy, w = (draw(*shape, grad=False) for shape in ((tokens, K), (tokens, N), (N, K)))
    dtype, codes, (d, d_columns) = w.dtype, fp8_train.quantise(x, True), fp8_train.quantise_both(dy, True)
    weight = fp8_train.quantise_weight(w, True)
    turned, columns = fp8_train.transposed(weight), fp8_train.columns(codes, None)
    race(
        bench, f"{tokens} × {N} × {K}", 2 * tokens * N * K,
        ("Fprop", products.matmul_path(codes, weight, dtype, None), lambda: x @ w.t(),
         lambda: products.matmul(codes, weight, dtype, None), lambda: fp8_train.quantise(x, True)),
        ("Dgrad", products.matmul_path(d, turned, dtype, None), lambda: dy @ w,
         lambda: products.matmul(d, turned, dtype, None), lambda: fp8_train.quantise_both(dy, True)),
        ("Wgrad", products.outer_path(d_columns, columns, None), lambda: dy.t() @ x,
         lambda: products.outer(d_columns, columns, dtype, None), lambda: fp8_train.columns(codes, None)),
    )  # fmt: skip


def routed(draw: Draw, tokens: int, small: bool) -> tuple[int, int, int, int, Tensor]:
    E, top, hidden, width = (4, 2, 256, 256) if small else (64, 6, 2048, 1408)
    return E, top, hidden, width, torch.rand(tokens, E, device=draw.device).topk(top, 1).indices


def expert_products(bench: Bench, draw: Draw, tokens: int, name: str) -> None:
    E, top, hidden, width, expert = routed(draw, tokens, bench.small)
    rows: Rows = fp8_train.sort_rows(expert, E)
    N, K = (2 * width, hidden) if name == "gate_up" else (hidden, width)
    R, token = rows.token_R.numel(), fp8_train.quantise(draw(tokens, hidden, grad=False), True)
    w, x, dy = (draw(*shape, grad=False) for shape in ((E, N, K), (R, K), (R, N)))
    dtype, weight = w.dtype, fp8_train.quantise_weight(w, True)
    turned, a, d = fp8_train.transposed(weight), fp8_train.quantise(x, True), fp8_train.quantise(dy, True)
    d_columns, columns = fp8_train.columns(d, None), fp8_train.columns(a, None)
    grouped = functools.partial(torch._grouped_mm, offs=rows.end_E)
    race(
        bench, f"{tokens}, experts, {name}", 2 * tokens * top * N * K,
        ("Fprop", products.matmul_path(a, weight, dtype, rows), lambda: grouped(x, w.transpose(1, 2)),
         lambda: products.matmul(a, weight, dtype, rows),
         (lambda: fp8_train.gather(token, rows)) if hidden == K else None),
        ("Dgrad", products.matmul_path(d, turned, dtype, rows), lambda: grouped(dy, w),
         lambda: products.matmul(d, turned, dtype, rows),
         (lambda: fp8_train.gather(token, rows)) if hidden == N else None),
        ("Wgrad", products.outer_path(d_columns, columns, rows), lambda: grouped(dy.t(), x),
         lambda: products.outer(d_columns, columns, dtype, rows), lambda: fp8_train.columns(token, rows)),
    )  # fmt: skip
    emulated = functools.partial(products.outer_emulated, d_columns, columns, dtype, rows)
    bench.race("fp8train", f"{tokens}, experts, {name}", "Wgrad, BF16 of codes", [emulated],
               flops=2 * tokens * top * N * K)  # fmt: skip
    own = functools.partial(products.outer_by_tiles, d_columns, columns, dtype, rows)
    bench.race("fp8train", f"{tokens}, experts, {name}", "Wgrad, FP8, triton", [own],
               flops=2 * tokens * top * N * K, rate="fp8")  # fmt: skip
    swiglu(bench, draw, rows, tokens, width)
    if bench.tune:
        from kernels_gpu import best_of

        sizes = [(128, 1, 8, 3), (128, 1, 8, 4), (128, 1, 8, 5), (64, 2, 8, 4), (128, 2, 8, 3), (64, 1, 8, 4)]
        beside = [(64, 1, 4, 3, 2), (64, 1, 8, 3, 2), (128, 1, 4, 3, 1)]
        configs = [products.OuterConfig(*sizes) for sizes in (*sizes, *beside)]
        best_of(bench, f"Wgrad {name}", configs, lambda config: [lambda: own(config)])


def race(bench: Bench, case: str, flops: float, *rows: tuple[str, str, Call, Call, Call | None]) -> None:
    for name, path, plain, product, quantise in rows:
        best = bench.race("fp8train", case, f"{name}, BF16", [plain], flops=flops)
        fp8 = functools.partial(bench.race, "fp8train", case, flops=flops, rate="fp8", peer=("BF16", best))
        fp8(f"{name}, FP8, {path}", [product])
        if quantise is not None:
            fp8(f"{name}, FP8, and quantising", [functools.partial(in_turn, quantise, product)])


def in_turn(first: Call, second: Call) -> Any:
    first()
    return second()


def swiglu(bench: Bench, draw: Draw, rows: Rows, tokens: int, width: int) -> None:
    """Bytes of rows in use: BF16 in, codes out; codes and BF16 in, three kinds of codes out."""
    R = rows.token_R.numel()
    x, dh, weight_R = (
        draw(R, 2 * width, grad=False),
        draw(R, width, grad=False),
        torch.rand(R, device=draw.device),
    )
    kept = fp8_train.swiglu(x, weight_R, True, rows)[1]
    used = int(rows.used) * 128 * width
    case = f"{tokens}, experts, SwiGLU"
    bench.race(
        "fp8train", case, "forward", [lambda: fp8_train.swiglu(x, weight_R, True, rows)], nbytes=7 * used
    )
    call = functools.partial(fp8_train.swiglu_backward, kept, dh, weight_R, True, rows)
    bench.race("fp8train", case, "backward", [call], nbytes=9 * used)


def training_layers(bench: Bench, draw: Draw, tokens: int) -> None:
    """Weights quantised beforehand, as where several micro-batches share them, and in each pass."""
    E, top, hidden, width, expert = routed(draw, tokens, bench.small)
    dense = 512 if bench.small else 10944
    x, share = draw(tokens, hidden), torch.rand(tokens, top, device=draw.device, requires_grad=True)
    dy = draw(tokens, hidden, grad=False)
    stacks, matrices = (
        [(draw(*lead, 2 * wide, hidden).detach() * 0.05).requires_grad_(),
         (draw(*lead, hidden, wide).detach() * 0.05).requires_grad_()]
        for lead, wide in (((E,), width), ((), dense))
    )  # fmt: skip

    def experts() -> Any:
        return torch.autograd.grad(expert_op.experts(x, expert, share, *stacks), [x, share, *stacks], dy)

    def network() -> Any:
        return torch.autograd.grad(expert_op.ffn(x, *matrices), [x, *matrices], dy)

    for name, both, flops in (
        ("experts", experts, 18 * tokens * top * hidden * width),
        ("dense", network, 18 * tokens * hidden * dense),
    ):
        case = f"{tokens}, layer, {name}"
        best = bench.race("fp8train", case, "both ways, BF16", [both], flops=flops)
        for constant in (True, False):
            title = "both ways, FP8" + ("" if constant else ", and weights")
            with fp8_training.fp8_training(), fp8_training.constant_weights(constant):
                bench.race(
                    "fp8train", case, title, [both], flops=flops, rate="fp8", peer=("BF16", best)
                )  # fmt: skip
