"""The exact operations: each against its reference in FP64, its rows against the batch they are in, its
gradient against the ordinary one's. What whole models do: tests/model/test_exact.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hadal.ops import cross_entropy, dispatch, exact_cpu, invariant, rope, sampling
from hadal.ops.attention import attention_reference
from hadal.ops.exact import ExactError, exact, is_exact, require
from hadal.ops.experts import experts_reference
from hadal.ops.gate import gate_reference
from hadal.ops.invariant import Stream
from hadal.ops.packed import pack
from hadal.ops.rms_norm import rms_norm_reference
from tests.helpers.kernels import GATES

pytestmark = pytest.mark.skipif(exact_cpu.status()[0] is None, reason=f"exact: {exact_cpu.status()[1]}")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
ROWS = 203  # more than two chunks of rows, no multiple of a tile
ROTATION = rope.rotation_table(
    rope.Rope(type="yarn", factor=4.0, original_max_position_embeddings=64), 12, 300
)
MOE = replace(GATES[0], n_routed_experts=8, num_experts_per_tok=3)
MOE_V2 = replace(GATES[3], n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    torch.manual_seed(0)
    exact_cpu.set_threads(3)
    yield
    exact_cpu.set_threads(torch.get_num_threads())


def close(out: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    """Relative error in norm; NaN never passes."""
    error = (out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
    assert error < TOLERANCE[dtype], float(error)


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def bits(x: Tensor) -> Tensor:
    """The numbers as integers: −0 is not 0, and one NaN equals itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,outs,width", [(1, 5, 3), (7, 33, 70), (100, 37, 16), (203, 64, 129)])
def test_linear_is_right(rows, outs, width, dtype):
    x, w, b = draw(rows, width, dtype=dtype), draw(outs, width, dtype=dtype), draw(outs, dtype=dtype)
    want = x.double() @ w.double().T + b.double()
    close(invariant.linear(x, w, b), want, dtype)
    wide = invariant.linear(x, w, wide=True)
    assert wide.dtype == torch.float32
    close(wide, x.double() @ w.double().T, torch.float32)
    close(invariant.linear(x.view(1, rows, width), w), want - b.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_right(dtype):
    x, w = draw(9, 48, dtype=dtype)[:, 3:40], draw(37, dtype=dtype)
    close(invariant.rms_norm(x, w, 1e-6), rms_norm_reference(x.double(), w.double(), 1e-6), dtype)
    x, at = draw(9, 3, 12, dtype=dtype), torch.randint(0, 300, (9,))
    for interleaved, ordinary in ((True, rope.rotate_interleaved), (False, rope.rotate_half)):
        close(invariant.rotate(x, ROTATION[at], interleaved), ordinary(x.float(), ROTATION[at]), dtype)
    x = draw(9, 2 * 21, dtype=dtype, scale=4.0)
    gate, up = x.double().chunk(2, -1)
    close(invariant.swiglu(x), torch.nn.functional.silu(gate) * up, dtype)


def test_logsumexp_is_right():
    x = draw(5, 5003, scale=6.0)
    close(invariant.logsumexp(x), x.double().logsumexp(-1), torch.float32)
    token = torch.randint(0, 5003, (5,))
    want = x.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    close(invariant.token_logprobs(x, token), want, torch.float32)
    x[2] = float("-inf")
    x[2, 7] = 3.0
    assert invariant.logsumexp(x)[2] == 3.0
    x[3, 4001] = float("nan")
    assert invariant.logsumexp(x)[[0, 1, 4]].isfinite().all()


def test_exponentials_of_every_size():
    """Through SwiGLU with up = 1: from far below underflow to far above overflow, and NaN."""
    gate = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([float("nan"), 1e30, -1e30, 0.0])])
    got = invariant.swiglu(torch.stack([gate, torch.ones_like(gate)], 0).T.reshape(-1, 2))[:, 0]
    want = torch.nn.functional.silu(gate.double())
    assert got[4001].isnan() and got[4002] == 1e30 and got[4003] == 0
    gate_ok = torch.cat([got[:4001], got[4004:]]).double()
    torch.testing.assert_close(gate_ok, torch.cat([want[:4001], want[4004:]]), rtol=5e-7, atol=1e-36)


@pytest.mark.parametrize("moe", GATES, ids=lambda m: f"{m.topk_method}-{m.n_routed_experts}")
def test_gate_is_right(moe):
    x, w = draw(23, 32), draw(moe.n_routed_experts, 32, scale=0.3)
    bias = draw(moe.n_routed_experts) - 1.0 if moe.topk_method == "noaux_tc" else None
    expert, weight, score = invariant.gate(x, w, bias, moe)
    want_expert, want_weight, want_score = gate_reference(x, w, bias, moe)
    order, want_order = expert.argsort(-1), want_expert.argsort(-1)
    assert torch.equal(expert.gather(1, order), want_expert.gather(1, want_order))
    close(weight.gather(1, order), want_weight.gather(1, want_order), torch.float32)
    close(score, want_score, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_are_right(dtype):
    x, gate_up, down, expert, weight = routed(41, dtype)
    shared, residual = draw(41, 40, dtype=dtype), draw(41, 40, dtype=dtype)
    args = (x, expert, weight, gate_up, down)
    want = experts_reference(*(t.double() if t.is_floating_point() else t for t in args))
    close(invariant.experts(*args), want, dtype)
    got = invariant.experts(*args, shared, residual)
    close(got, want + shared.double() + residual.double(), dtype)


def routed(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, gate_up, down, and a routing of each row."""
    x = draw(rows, 40, dtype=dtype)
    gate_up, down = draw(8, 2 * 21, 40, dtype=dtype, scale=0.2), draw(8, 40, 21, dtype=dtype, scale=0.2)
    expert = torch.rand(rows, 8).topk(3, -1).indices
    return x, gate_up, down, expert, torch.rand(rows, 3)


# --- attention --------------------------------------------------------------------------------------------

H, NOPE, ROPE, RANK, VALUES = 3, 10, 12, 37, 9


def packed_stream(lengths: list[int]) -> Stream:
    position = torch.cat([torch.arange(n) for n in lengths])
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return Stream.build(position, starts, None, 0)


def mla_inputs(T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, entries, kv_b."""
    q, entries = draw(T, H, NOPE + ROPE, dtype=dtype), draw(T, RANK + ROPE, dtype=dtype)
    return q, entries, draw(H * (NOPE + VALUES), RANK, dtype=dtype, scale=0.3)


def paged(entries: Tensor, lengths: list[int], page: int) -> tuple[Tensor, Tensor]:
    """The same entries on shuffled pages, all else NaN, and the table."""
    per = -(-max(lengths) // page)
    cache = torch.full((len(lengths) * per + 1, page, *entries.shape[1:]), float("nan")).to(entries.dtype)
    table = (torch.randperm(len(lengths) * per) + 1).view(len(lengths), per).int()
    for s, part in enumerate(entries.split(lengths)):
        for t, entry in enumerate(part):
            cache[table[s, t // page], t % page] = entry
    return cache, table


@pytest.mark.parametrize("dtype", DTYPES)
def test_mla_is_right(dtype):
    lengths = [1, 70, 64, 33]
    stream, (q, entries, kv_b) = packed_stream(lengths), mla_inputs(168, dtype)
    rotation = ROTATION[stream.position]
    got = invariant.mla_attention(q, rotation, entries, kv_b, stream, RANK, 0.2)
    wide = (q.double(), entries.double(), kv_b.double())
    want = invariant._mla_expanded(wide[0], rotation, wide[1], wide[2], lengths, RANK, 0.2)
    close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gqa_is_right(dtype):
    lengths = [1, 70, 64, 33]
    stream, q, entries = (
        packed_stream(lengths),
        draw(168, 6, 20, dtype=dtype),
        draw(168, 2, 2, 20, dtype=dtype),
    )
    got = invariant.gqa_attention(q, entries, stream, 0.2)
    k, v = entries.double().unbind(1)
    close(got, attention_reference(q.double(), k, v, lengths, lengths, 0.2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [4, 64, 100])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_attention_has_one_form(kind, page, dtype):
    """Packed; paged in one pass; in chunks; token by token; alone: the same bits, on 1 to 4 threads."""
    lengths = [5, 150, 64, 129]
    stream, T = packed_stream(lengths), sum(lengths)
    if kind == "mla":
        q, entries, kv_b = mla_inputs(T, dtype)
    else:
        q, entries = draw(T, 6, 20, dtype=dtype), draw(T, 2, 2, 20, dtype=dtype)
    cache, table = paged(entries, lengths, page)

    def run(where: Stream, rows: Tensor | slice, keys: Tensor) -> Tensor:
        if kind == "mla":
            return invariant.mla_attention(q[rows], ROTATION[where.position], keys, kv_b, where, RANK, 0.2)
        return invariant.gqa_attention(q[rows], keys, where, 0.2)

    want = run(stream, slice(None), entries)
    assert want.isfinite().all()
    for count in (1, 2, 3, 4):
        exact_cpu.set_threads(count)
        assert same(run(stream, slice(None), entries), want)
        whole = Stream.build(stream.position, stream.start.tolist(), table, page)
        assert same(run(whole, slice(None), cache), want)
    for s, (n, begin) in enumerate(zip(lengths, stream.start.tolist(), strict=False)):
        alone = run(packed_stream([n]), slice(begin, begin + n), entries[begin : begin + n])
        assert same(alone, want[begin : begin + n])
        for a, b in [(0, min(n, 3)), (min(n, 3), n), *((t, t + 1) for t in range(max(0, n - 4), n))]:
            if a == b:
                continue
            chunk = Stream.build(torch.arange(a, b), [0, b - a], table[s : s + 1], page)
            assert same(run(chunk, slice(begin + a, begin + b), cache), want[begin + a : begin + b]), (
                s,
                a,
                b,
            )


# --- rows and batches -------------------------------------------------------------------------------------


def row_operations(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Operations on rows [T, 40], one result a row. Per-row arguments are found by the row's own content."""
    w, b, norm = draw(50, 40, dtype=dtype), draw(50, dtype=dtype), draw(40, dtype=dtype)
    _, gate_up, down, _, _ = routed(1, dtype)
    router, bias, turn = draw(8, 40, dtype=dtype), draw(8), ROTATION[5]

    def through_experts(x: Tensor) -> Tensor:
        expert, weight, _ = invariant.gate(x, router, bias, MOE)
        return invariant.experts(x, expert, weight, gate_up, down)

    return {
        "linear": lambda x: invariant.linear(x, w, b),
        "logits": lambda x: invariant.linear(x, w, wide=True),
        "rms_norm": lambda x: invariant.rms_norm(x, norm, 1e-6),
        "rotate": lambda x: invariant.rotate(
            x[:, :36].unflatten(1, (3, 12)), turn.expand(len(x), 2, 6), True
        ),
        "latent": lambda x: invariant.latent_entry(x, norm[:28], 1e-6, turn.expand(len(x), 2, 6)),
        "swiglu": invariant.swiglu,
        "gate": lambda x: invariant.gate(x, router, bias, MOE)[1],
        "scores": lambda x: invariant.gate(x, router, bias, MOE)[2],
        "experts": through_experts,
        "logsumexp": lambda x: invariant.logsumexp(x.float()),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(row_operations(torch.float32)))
def test_a_row_does_not_know_its_batch(name, dtype):
    """Every size of a batch up to 30 and some larger, every place in it, 1 to 4 threads, unaligned memory."""
    run = row_operations(dtype)[name]
    x = draw(ROWS, 40, dtype=dtype)
    want = run(x)
    for count in (1, 2, 3, 4):
        exact_cpu.set_threads(count)
        order = torch.randperm(ROWS)
        assert same(run(x[order]), want[order]), count
    for n in (*range(1, 31), 95, 96, 97, 193):
        first = int(torch.randint(0, ROWS - n + 1, ()))
        assert same(run(x[first : first + n]), want[first : first + n]), n
    memory = torch.zeros(ROWS * 43 + 1, dtype=dtype)
    strided = memory[1:].view(ROWS, 43)[:, :40]
    strided.copy_(x)
    assert same(run(strided), want)


def test_concurrent_calls_do_not_disturb_each_other():
    """The pool serves one caller at a time; the others run alone, with the same bits."""
    x, w = draw(300, 64), draw(256, 64)
    want, wrong = invariant.linear(x, w), []

    def work() -> None:
        for _ in range(20):
            if not same(invariant.linear(x, w), want):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_ordinary_products_do_know_their_batch():
    """What the tests above would find: torch's product of a row changes with the rows around it."""
    x, w = draw(ROWS, 256), draw(96, 256)
    whole = x @ w.T
    assert any(not same(x[:n] @ w.T, whole[:n]) for n in range(1, 40))
    exactly = invariant.linear(x, w)
    assert all(same(invariant.linear(x[:n], w), exactly[:n]) for n in range(1, 40))


# --- gradients --------------------------------------------------------------------------------------------


def gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = run(*leaves)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return out.detach(), list(torch.autograd.grad((out * weight).sum(), leaves))


def check_gradient(
    run: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Forward with gradients: the bits of the one without. Backward: the reference's, within rounding."""
    out, got = gradients(run, inputs)
    with torch.no_grad():
        assert same(out, run(*inputs))
    _, want = gradients(reference, [t.double() for t in inputs])
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def test_gradients_of_rows():
    x, w, b, norm = draw(9, 24), draw(7, 24), draw(7), draw(24)
    check_gradient(invariant.linear, torch.nn.functional.linear, [x, w, b])
    check_gradient(
        lambda x, w: invariant.rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), [x, norm]
    )
    gate_up = lambda x: torch.nn.functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]  # noqa: E731
    check_gradient(invariant.swiglu, gate_up, [x])
    turn = ROTATION[:9]
    check_gradient(
        lambda x: invariant.rotate(x.unflatten(1, (2, 12)), turn, True),
        lambda x: rope.rotate_interleaved(x.unflatten(1, (2, 12)), turn),
        [x],
    )


@pytest.mark.parametrize("moe", [MOE, MOE_V2], ids=["sigmoid", "softmax"])
def test_gradients_of_gate_and_experts(moe):
    x, gate_up, down, _, _ = routed(17, torch.float32)
    router, bias = draw(8, 40), draw(8) if moe.topk_method == "noaux_tc" else None

    def run(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        expert, weight, score = invariant.gate(x, router, bias, moe)
        return invariant.experts(x, expert, weight, gate_up, down) * score.sum()

    def reference(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        expert, weight, score = gate_reference(x, router, bias, moe)
        return experts_reference(x, expert, weight, gate_up, down) * score.sum()

    check_gradient(run, reference, [x, router, gate_up, down])


def test_gradients_of_attention():
    lengths = [1, 30, 70]
    stream = packed_stream(lengths)
    rotation = ROTATION[stream.position]
    check_gradient(
        lambda q, e, w: invariant.mla_attention(q, rotation, e, w, stream, RANK, 0.2),
        lambda q, e, w: invariant._mla_expanded(q, rotation, e, w, lengths, RANK, 0.2),
        list(mla_inputs(101, torch.float32)),
    )
    check_gradient(
        lambda q, e: invariant.gqa_attention(q, e, stream, 0.2),
        lambda q, e: attention_reference(q, *e.unbind(1), lengths, lengths, 0.2),
        [draw(101, 6, 20), draw(101, 2, 2, 20)],
    )
    cached = replace(stream, table=torch.zeros(3, 1, dtype=torch.int32), page_size=128)
    with pytest.raises(ExactError, match="no gradient"):
        invariant.gqa_attention(draw(101, 6, 20).requires_grad_(), draw(2, 128, 2, 2, 20), cached, 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_are_the_samplers_log_probabilities(dtype):
    """Bit for bit, whatever the loss's chunk; and their gradient is the ordinary loss's."""
    hidden, head, target = draw(37, 24, dtype=dtype), draw(61, 24, dtype=dtype), torch.randint(0, 61, (37,))
    hidden.requires_grad_(), head.requires_grad_()
    with exact():
        logits = invariant.linear(hidden.detach(), head.detach(), wide=True)
        reported = sampling.logprobs(logits, target, 0)[0]
        for chunk in (None, 1, 5, 36):
            loss = cross_entropy.linear_cross_entropy(hidden, head, target, chunk_tokens=chunk)
            assert same(-loss.detach(), reported)
            assert same(invariant.token_logprobs(logits, target), reported)
    got = torch.autograd.grad(loss.sum(), [hidden, head])
    wide = [t.detach().double().requires_grad_() for t in (hidden, head)]
    want = torch.autograd.grad(cross_entropy.cross_entropy_reference(*wide, target).sum(), wide)
    for a, b in zip(got, want, strict=True):
        close(a, b, dtype)


# --- the switch -------------------------------------------------------------------------------------------


def test_the_switch_nests_and_belongs_to_its_thread():
    seen = []
    assert not is_exact()
    with exact():
        assert is_exact()
        with exact(False):
            assert not is_exact()
        worker = threading.Thread(target=lambda: seen.append(is_exact()))
        worker.start()
        worker.join()
        assert is_exact()
        with pytest.raises(ZeroDivisionError), exact(False):
            1 / 0  # noqa: B018
        assert is_exact()
    assert not is_exact() and seen == [False]


def test_no_ordinary_kernel_is_taken_in_exact_mode():
    with torch.no_grad(), exact():
        assert not dispatch.use_cpu_kernels(torch.zeros(2, 2))
        assert not dispatch.use_triton(torch.zeros(2, 2))


def test_what_cannot_be_exact_is_refused():
    with pytest.raises(ExactError, match="float32 or bfloat16, not in float64"):
        invariant.linear(torch.zeros(2, 2).double(), torch.zeros(2, 2).double())
    with pytest.raises(ExactError, match="no operations on int8 weights"):
        invariant.linear(torch.zeros(2, 128), pack(torch.randn(4, 128), "int8"))
    with pytest.raises(ExactError, match="has no gradient"):
        invariant.logsumexp(torch.zeros(2, 2, requires_grad=True))
    with pytest.raises(ExactError, match="cpu and cuda"):
        require(torch.device("meta"), torch.float32)


def test_without_a_compiler_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(exact_cpu, "status", lambda: (None, "no C++ compiler (install g++)"))
    with pytest.raises(ExactError, match="install g"):
        invariant.linear(torch.zeros(2, 2), torch.zeros(2, 2))
