"""Sampling against its word-for-word transcription, against chi-square, and against its own batch."""

from __future__ import annotations

import math
import random
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hadal.ops import sampling
from hadal.ops.sampling import FAILED, Filters


def draw_settings(rng: random.Random) -> dict[str, float]:
    return {
        "temperature": rng.choice([0.0, 0.3, 0.7, 1.0, 1.9]),
        "top_k": rng.choice([0, 0, 1, 3, 17, 10_000]),
        "top_p": rng.choice([1.0, 1.0, 0.95, 0.5, 0.05]),
        "min_p": rng.choice([0.0, 0.0, 0.02, 0.3]),
    }


def filters_of(rows: list[dict[str, float]]) -> Filters:
    columns = ([row[name] for row in rows] for name in ("temperature", "top_k", "top_p", "min_p"))
    return Filters.build(*columns, "cpu")  # type: ignore[arg-type]


def expected_token(p: list[float], u: float) -> int:
    """Inverse CDF, one addition after the other."""
    mass = 0.0
    for token, value in enumerate(p):
        mass += value
        if mass > u:
            return token
    return max(t for t, value in enumerate(p) if value > 0)


# --- uniform numbers ---


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31), st.integers(0, 3))
def test_uniform_tensor_has_the_bits_of_the_reference(seed: int, position: int, stream: int) -> None:
    u = sampling.uniform(torch.tensor([seed]), torch.tensor([position]), stream)
    assert u.dtype == torch.float64
    assert u.item() == sampling.uniform_reference(seed, position, stream)
    assert 0.0 <= u.item() < 1.0


def test_splitmix_published_value() -> None:
    """The first outputs of SplitMix64 for seed 1234567 (https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64)."""
    outputs = [sampling._mix_reference((1234567 + i * sampling._WEYL) & sampling._MASK64) for i in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("vary", ["seed", "position", "stream"])
def test_uniform_is_uniform_and_uncorrelated(vary: str) -> None:
    n = 20_000
    count = torch.arange(n)
    zero = torch.zeros(n, dtype=torch.int64)
    if vary == "stream":
        u = torch.cat([sampling.uniform(zero[:1] + 5, zero[:1], stream) for stream in range(n // 10)])
    else:
        u = sampling.uniform(count, zero + 3) if vary == "seed" else sampling.uniform(zero + 3, count)
    observed = torch.histc(u, 64, 0, 1)
    chi2 = ((observed - len(u) / 64) ** 2 / (len(u) / 64)).sum().item()
    assert chi2 < 63 + 5 * math.sqrt(2 * 63)
    pairs = torch.stack([u[:-1], u[1:]])
    assert abs(torch.corrcoef(pairs)[0, 1].item()) < 5 / math.sqrt(len(u))


# --- filters ---


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.integers(1, 700), st.integers(1, 5))
def test_filters_equal_the_transcription(seed: int, V: int, B: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, V, generator=generator, dtype=torch.float64).float() * rng.choice([0.1, 1, 5])
    rows = [draw_settings(rng) for _ in range(B)]
    p_BV = sampling.filtered_probabilities(logits, filters_of(rows))
    for row, p_V, l_V in zip(rows, p_BV, logits.tolist(), strict=True):
        if row["temperature"] == 0:
            continue
        expected = torch.tensor(sampling.probabilities_reference(l_V, **row), dtype=torch.float64)  # type: ignore[arg-type]
        actual = p_V.double() / p_V.double().sum()
        # A value within rounding of a cut may fall on either side: its whole mass is then small.
        assert (actual - expected).abs().max() < 1e-5 + 2 * _mass_at_the_edge(l_V, row)


def _mass_at_the_edge(logits: list[float], row: dict[str, float]) -> float:
    """Largest change of the distribution when top_p moves by rounding."""
    if row["top_p"] >= 1:
        return 0.0
    near = [
        sampling.probabilities_reference(logits, **{**row, "top_p": row["top_p"] + delta})  # type: ignore[arg-type]
        for delta in (-1e-6, 1e-6)
    ]
    return max(abs(a - b) for a, b in zip(*near, strict=True))


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 400), st.floats(0.01, 1.0), st.sampled_from([0.1, 3.0, 12.0]))
def test_bisection_cuts_where_the_sort_cuts(seed: int, V: int, top_p: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(3, V, generator=generator) * scale).softmax(-1)
    bisect = p >= sampling.top_p_cut(p, torch.full((3,), top_p))
    for row, kept in zip(p, bisect, strict=True):
        by_sort = torch.from_numpy(
            (row / row.max()).numpy() >= sampling._top_p_cut_row((row / row.max()).numpy(), top_p)
        )
        if top_p < 1 and not torch.equal(kept, by_sort):  # only where the mass meets top_p within rounding
            smaller = min(row[kept].double().sum().item(), row[by_sort].double().sum().item())
            assert smaller == pytest.approx(top_p, abs=1e-6)


def test_ties_at_the_cut_are_kept() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.2, 0.2, 0.2]]))
    for row in ({"top_k": 2, "top_p": 1.0}, {"top_k": 0, "top_p": 0.5}):
        p = sampling.filtered_probabilities(logits, filters_of([{"temperature": 1.0, "min_p": 0.0, **row}]))
        assert (p > 0).all()


@pytest.mark.parametrize("V", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("form", ["tensor", "numpy"])
def test_choose_is_the_inverse_cdf(V: int, form: str) -> None:
    generator = torch.Generator().manual_seed(V)
    weight = torch.rand(200, V, generator=generator)
    weight[torch.rand(200, V, generator=generator) < 0.5] = 0.0
    weight[:, V // 2] += 0.01
    u = torch.rand(200, generator=generator, dtype=torch.float64)
    u[:3] = torch.tensor([0.0, 1.0 - 2.0**-53, 0.5], dtype=torch.float64)
    if form == "tensor":
        token = sampling.choose(weight, u)
    else:
        token = torch.from_numpy(sampling._choose_cpu(weight.numpy(), u.numpy()))
    cdf = weight.double().cumsum(-1)
    cdf /= cdf[:, -1:]
    for row in range(200):
        t = int(token[row])
        assert weight[row, t] > 0
        assert (cdf[row, t - 1] if t else 0.0) - 1e-12 <= u[row] <= cdf[row, t] + 1e-12


# --- the whole, by the path of the CPU and by the path of the GPU ---

both = pytest.mark.parametrize("sample", [sampling.sample, sampling.sample_tensors], ids=["cpu", "tensors"])


@both
def test_tokens_equal_the_transcription(sample: Any) -> None:
    rng = random.Random(5)
    V, B = 300, 64
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(0)) * 2
    rows = [draw_settings(rng) for _ in range(B)]
    u = [sampling.uniform_reference(rng.randrange(2**40), i) for i in range(B)]
    token = sample(logits, filters_of(rows), torch.tensor(u, dtype=torch.float64))
    expected = [
        expected_token(sampling.probabilities_reference(l_V, **row), v)  # type: ignore[arg-type]
        for l_V, row, v in zip(logits.tolist(), rows, u, strict=True)
    ]
    assert token.tolist() == expected


@pytest.mark.parametrize(
    "row",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.6, "top_k": 0, "top_p": 0.9, "min_p": 0.0},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.95, "min_p": 0.05},
    ],
)
@both
def test_chi_square(row: dict[str, float], sample: Any) -> None:
    n = 20_000
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 1.5
    p = torch.tensor(sampling.probabilities_reference(logits[0].tolist(), **row), dtype=torch.float64)  # type: ignore[arg-type]
    u = sampling.uniform(torch.full((n,), 77), torch.arange(n))
    token = sample(logits.expand(n, -1), filters_of([row] * n), u)
    observed = torch.bincount(token, minlength=40).double()
    assert (observed[p == 0] == 0).all()
    kept = p > 0
    chi2 = ((observed[kept] - n * p[kept]) ** 2 / (n * p[kept])).sum().item()
    degrees = int(kept.sum()) - 1
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


@both
def test_a_row_does_not_see_its_batch(sample: Any) -> None:
    rng = random.Random(1)
    logits = torch.randn(9, 1000, generator=torch.Generator().manual_seed(1)) * 3
    rows = [draw_settings(rng) for _ in range(9)]
    u = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = sample(logits, filters_of(rows), u)
    for i in range(9):
        assert sample(logits[i : i + 1], filters_of(rows[i : i + 1]), u[i : i + 1]) == whole[i]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    shuffled = sample(logits[order], filters_of([rows[i] for i in order]), u[order])
    assert torch.equal(shuffled, whole[order])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
@both
def test_a_row_without_finite_logits_fails_alone(temperature: float, bad: float | str, sample: Any) -> None:
    logits = torch.zeros(3, 50)
    if isinstance(bad, str):
        logits[1] = -math.inf
    else:
        logits[1, 7] = bad
    row = {"temperature": temperature, "top_k": 3, "top_p": 0.9, "min_p": 0.1}
    token = sample(logits, filters_of([row] * 3), torch.full((3,), 0.5, dtype=torch.float64))
    assert token[1] == FAILED and (token[[0, 2]] >= 0).all()


@both
def test_greedy_takes_the_first_of_equals_in_a_padded_table(sample: Any) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 9.0], [5.0, 2.0, 2.0, 9.0]])[
        :, :3
    ]  # a view without the last column
    assert sample(
        logits, filters_of([{"temperature": 0.0, "top_k": 0, "top_p": 1, "min_p": 0}] * 2), None
    ).tolist() == [1, 0]


@both
def test_mixed_greedy_and_drawn_rows(sample: Any) -> None:
    logits = torch.randn(6, 90, generator=torch.Generator().manual_seed(8))
    rows = [{"temperature": t, "top_k": 0, "top_p": 1.0, "min_p": 0.0} for t in (0.0, 1.0) * 3]
    token = sample(logits, filters_of(rows), torch.full((6,), 0.999, dtype=torch.float64))
    assert torch.equal(token[::2], logits[::2].argmax(-1))
    assert not torch.equal(token[1::2], logits[1::2].argmax(-1))


# --- penalties, masks, log-probabilities ---


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 60))
def test_penalties_equal_the_transcription(seed: int, V: int) -> None:
    rng = random.Random(seed)
    logits = [rng.uniform(-3, 3) for _ in range(V)]
    prompt = [rng.randrange(V) for _ in range(rng.randrange(6))]
    output = [rng.randrange(V) for _ in range(rng.randrange(9))]
    repetition, frequency, presence = rng.uniform(0.5, 2), rng.uniform(-2, 2), rng.uniform(-2, 2)
    count = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=V).int()
    in_prompt = torch.zeros(V, dtype=torch.bool)
    in_prompt[prompt] = True
    one = torch.ones(1)
    changed = sampling.penalize(
        torch.tensor([logits]),
        count[None],
        in_prompt[None],
        one * repetition,
        one * frequency,
        one * presence,
    )
    expected = sampling.probabilities_reference(
        logits, prompt=prompt, output=output, repetition=repetition, frequency=frequency, presence=presence
    )
    assert torch.allclose(changed.softmax(-1)[0], torch.tensor(expected), atol=1e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=100), st.integers(0, 40))
def test_bitmask(allowed: list[bool], extra: int) -> None:
    words = [0] * -(-len(allowed) // 32)
    for token, yes in enumerate(allowed):
        words[token // 32] |= yes << (token % 32)
    signed = [word - 2**32 if word >= 2**31 else word for word in words]
    mask = sampling.expand_bitmask(torch.tensor([signed], dtype=torch.int32), len(allowed) + extra)
    assert mask.tolist() == [allowed + [False] * extra]


def test_logprobs() -> None:
    logits = torch.randn(4, 70, generator=torch.Generator().manual_seed(0)) * 4
    token = torch.tensor([3, 69, FAILED, 0])
    chosen, values, ids = sampling.logprobs(logits, token, 5)
    expected = logits.double().log_softmax(-1)
    for row in (0, 1, 3):
        assert chosen[row].item() == pytest.approx(expected[row, token[row]].item(), abs=1e-5)
    assert torch.allclose(values.double(), expected.sort(-1, descending=True).values[:, :5], atol=1e-5)
    assert torch.equal(ids, logits.argsort(-1, descending=True)[:, :5])
    assert sampling.logprobs(logits, token, 0)[1].shape == (4, 0)
