"""H2, do semiotic squares have a geometry. A square is four corners (Greimas & Rastier, Yale French Studies
41, 1968): contraries s₁, s₂ (life, death) and their contradictories n₁ = not s₁, n₂ = not s₂; s₁ implies n₂,
s₂ implies n₁.

Contraries are close in any distributional space, so the order of raw distances tests nothing. Here instead:

- *deixis*: cos(s₁ − s₂, n₂ − n₁) in a square. What all negations share cancels. A shared word in s₁ and "not
  s₁" pulls it to −1, so a positive value is no lexical echo. Null: members n₁, n₂ exchanged; and squares
  permuted.
- *direction*: the offset s₁ − s₂ of a held-out pair against the mean offset of the others (a common antonym
  axis), with the pairs' members exchanged; against synonyms and co-hyponyms, with the kinds of pairs
  exchanged.
- *negation*: an operator s ↦ n (ridge with intercept), learned on all other squares; cos of (n̂₁ − n̂₂, n₁ −
  n₂). And its gain over the identity, which has all of the lexical echo.
- *corners*: contradictories are the diagonals of a square. Of three ways to pair four corners into diagonals
  the true one should be the nearest to a parallelogram: the exact chance is ⅓; of the two ways that give
  every diagonal one negation it is ½.

Squares and pairs are the independent units: no word may be in two.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Floats, StatsError, codes, matrix, pieces
from .bootstrap import interval
from .linear import linear_kernel, out_of_fold
from .permute import permutations, sign_flips
from .result import Draft, Null

S1, S2, N1, N2 = range(4)
PAIRINGS = (
    (1, -1, 1, -1),
    (1, 1, -1, -1),
    (1, -1, -1, 1),
)  # {s₁ n₁ | s₂ n₂}, {s₁ s₂ | n₁ n₂}, {s₁ n₂ | s₂ n₁}
RIDGE = 1.0  # of the operator, times the mean eigenvalue; fixed beforehand


def _corners(corner_Q4D: ArrayLike, least: int = 6) -> Floats:
    array = np.asarray(corner_Q4D, np.float64)
    if array.ndim != 3 or array.shape[1] != 4:
        raise StatsError(
            f"squares are [q, 4, d] (s1, s2, not s1, not s2), and the shape is {list(array.shape)}"
        )
    if len(array) < least:
        raise StatsError(f"n = {len(array)} squares; this needs at least {least}")
    if not np.isfinite(array).all():
        raise StatsError("a corner of a square is not finite")
    return array


def cosines(a_ND: Floats, b_ND: Floats, what: str) -> Floats:
    """Of rows with rows [N]. A zero offset (both members have the same vector) is refused by its number."""
    scale = np.linalg.norm(a_ND, axis=-1) * np.linalg.norm(b_ND, axis=-1)
    if (scale == 0).any():
        raise StatsError(f"{what} {int((scale == 0).argmax())}: two members have the same vector")
    return np.asarray((a_ND * b_ND).sum(-1) / scale, np.float64)


def deixis(corner_Q4D: ArrayLike, draws: int, rng: np.random.Generator, *, bootstraps: int = 0,
           name: str = "H2") -> list[Draft]:  # fmt: skip
    """Mean cos(s₁ − s₂, n₂ − n₁) against exchanged members and against permuted squares (the second asks
    whether a square's own negations fit it better than another square's)."""
    corner = _corners(corner_Q4D)
    positive, negative = corner[:, S1] - corner[:, S2], corner[:, N2] - corner[:, N1]
    value = cosines(positive, negative, "square")
    mean, count = float(value.mean()), len(value)
    flips = sign_flips(count, draws, rng, "exchanging not-s1 and not-s2 in squares")
    spread = None
    if bootstraps:
        spread = interval(lambda w: w @ value / w.sum(1), count, bootstraps, rng, unit="squares")
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (positive, negative)]
    table = unit[0] @ unit[1].T
    mixed = permutations(count, draws, rng)
    other = np.array([table[np.arange(count), order].mean() for order in mixed.order_PN])
    tail = (count, "squares", corner.shape[2], 0)
    return [
        Draft(
            f"{name}: deixis",
            mean,
            Null.sampled(mean, flips.sign_PN @ value / count, flips.how, exact=flips.exact),
            *tail,
            spread,
            mean,
            "mean cosine",
        ),
        Draft(
            f"{name}: deixis of permuted squares",
            mean,
            Null.sampled(mean, other, "giving squares the negations of others", exact=mixed.exact),
            *tail,
            effect=mean - float(other.mean()),
            effect_name="cosine above permuted squares",
        ),
    ]


def _axis(gram_NN: Floats, sign_PN: Floats) -> Floats:
    """Mean cosine-like margin [P] of each offset with the sum of the others, under flipped signs:
    Σ_{i≠j} σᵢσⱼGᵢⱼ / (N(N − 1)), G the cosines of offsets."""
    off = gram_NN - np.diag(np.diag(gram_NN))
    n = len(gram_NN)
    return np.asarray(((sign_PN @ off) * sign_PN).sum(1) / (n * (n - 1)), np.float64)


def _held_out(gram_NN: Floats, sign_PN: Floats) -> Floats:
    """Share [P] of pairs that the mean offset of the others orders rightly; a tie is half."""
    off = gram_NN - np.diag(np.diag(gram_NN))
    margin = (sign_PN @ off) * sign_PN
    return np.asarray(((margin > 0) + 0.5 * (margin == 0)).mean(1), np.float64)


def antonym_direction(
    pair_N2D: ArrayLike, draws: int, rng: np.random.Generator, *, name: str = "H2"
) -> list[Draft]:
    """Oriented pairs (positive pole first): parallelism of offsets, the mean cosine over pairs of pairs, and
    the share of held-out pairs that the direction of the others orders rightly (chance ½). Null: members
    exchanged."""
    gram, count, d = _offsets(pair_N2D)
    flips = sign_flips(count, draws, rng, "exchanging the members of pairs")
    still = np.ones((1, count))
    drafts = []
    for title, statistic, chance, effect in (
        ("offset parallelism", _axis, 0.0, "mean cosine of offsets"),
        ("held-out antonym direction", _held_out, 0.5, "above the chance of one half"),
    ):
        value = float(statistic(gram, still)[0])
        null = Null.sampled(value, statistic(gram, flips.sign_PN), flips.how, exact=flips.exact)
        drafts.append(
            Draft(f"{name}: {title}", value, null, count, "pairs", d, -1, None, value - chance, effect)
        )
    return drafts


def _offsets(pair_N2D: ArrayLike) -> tuple[Floats, int, int]:
    pair = np.asarray(pair_N2D, np.float64)
    if pair.ndim != 3 or pair.shape[1] != 2 or not np.isfinite(pair).all():
        raise StatsError(f"pairs are finite [n, 2, d], and the shape is {list(pair.shape)}")
    if len(pair) < 6:
        raise StatsError(f"n = {len(pair)} pairs; this needs at least 6")
    offset = pair[:, 0] - pair[:, 1]
    norm = np.linalg.norm(offset, axis=1, keepdims=True)
    if (norm == 0).any():
        raise StatsError(f"pair {int((norm == 0).argmax())}: both members have the same vector")
    unit = offset / norm
    return np.asarray(unit @ unit.T, np.float64), len(pair), pair.shape[2]


def against_kinds(
    antonym_N2D: ArrayLike,
    others: Mapping[str, ArrayLike],
    draws: int,
    rng: np.random.Generator,
    *,
    name: str = "H2",
) -> list[Draft]:
    """Offset parallelism of antonyms minus that of another kind of pairs (synonyms, co-hyponyms), whose
    members should be ordered by the same outer mark (frequency), against kinds of pairs exchanged."""
    drafts = []
    antonym = np.asarray(antonym_N2D, np.float64)
    for kind, pairs in others.items():
        other = np.asarray(pairs, np.float64)
        if other.ndim != 3 or len(other) < 6:
            raise StatsError(f"{kind}: n = {len(other)} pairs of shape {list(other.shape)}; 6 are the least")
        gram, count, d = _offsets(np.concatenate([antonym, other]))
        off, first = gram - np.diag(np.diag(gram)), len(antonym)
        exchange = permutations(count, draws, rng)
        mine = (exchange.order_PN < first).astype(float)

        def contrast(mine_PN: Floats, off: Floats = off, count: int = count, first: int = first) -> Floats:
            rest, other = 1 - mine_PN, count - first
            a = ((mine_PN @ off) * mine_PN).sum(1) / (first * (first - 1))
            b = ((rest @ off) * rest).sum(1) / (other * (other - 1))
            return np.asarray(a - b, np.float64)

        value = float(contrast((np.arange(count) < first)[None].astype(float))[0])
        null = Null.sampled(value, contrast(mine), f"exchanging antonyms and {kind}", exact=exchange.exact)
        drafts.append(
            Draft(f"{name}: antonyms against {kind}", value, null, count, "pairs", d, -1, None, value,
                  "difference of mean cosines")
        )  # fmt: skip
    return drafts


def negation(corner_Q4D: ArrayLike, draws: int, rng: np.random.Generator, *, ridge: float = RIDGE,
             name: str = "H2") -> list[Draft]:  # fmt: skip
    """The learned operator of negation, leaving one square out, and its gain over the identity. Null: n₁ and
    n₂ exchanged in every square, in training and in test alike."""
    corner = _corners(corner_Q4D)
    count, d = len(corner), corner.shape[2]
    source = corner[:, :2].reshape(2 * count, d)
    rows = np.arange(2 * count).reshape(count, 2)
    folds = [(np.delete(rows, q, 0).ravel(), rows[q]) for q in range(count)]
    weight = out_of_fold(linear_kernel(source), folds, ridge)
    weight_QQ2 = (weight[0::2] - weight[1::2]).reshape(count, count, 2)
    even, odd = weight_QQ2.sum(2), (weight_QQ2[:, :, 0] - weight_QQ2[:, :, 1]) / 2
    middle, offset = corner[:, 2:].mean(1), corner[:, N1] - corner[:, N2]
    cosines(offset, offset, "square")  # refuses a square whose negations coincide
    echo = cosines(corner[:, S1] - corner[:, S2], offset, "square")
    flips = sign_flips(count, draws, rng, "exchanging not-s1 and not-s2 in squares")

    def fitted(sign_PQ: Floats) -> Floats:
        """cos(n̂₁ − n̂₂, n₁ − n₂) [P, Q] under flips."""
        found = []
        for piece in pieces(len(sign_PQ), 3 * count * count):
            sign = sign_PQ[piece]
            guess = _guess(even @ middle, odd, offset, sign)
            found.append(sign * guess)
        return np.concatenate(found)

    true = fitted(np.ones((1, count)))
    null = fitted(flips.sign_PN)
    tail = (count, "squares", d, -1)
    value, gain = float(true.mean()), float((true[0] - echo).mean())
    gains = (null - flips.sign_PN * echo).mean(1)
    return [
        Draft(
            f"{name}: negation operator",
            value,
            Null.sampled(value, null.mean(1), flips.how, exact=flips.exact),
            *tail,
            None,
            value,
            "mean cosine",
        ),
        Draft(
            f"{name}: negation operator minus identity",
            gain,
            Null.sampled(gain, gains, flips.how, exact=flips.exact),
            *tail,
            None,
            gain,
            "difference of mean cosines",
        ),
    ]


def _guess(fixed_QD: Floats, odd_QQ: Floats, offset_QD: Floats, sign_PQ: Floats) -> Floats:
    """cos of the predicted offset of each held-out square with its offset [P, Q], by inner products alone:
    n̂₁ − n̂₂ = fixed + Σ_r odd_qr·σ_r·offset_r."""
    gram = offset_QD @ offset_QD.T
    cross, fixed = fixed_QD @ offset_QD.T, (fixed_QD**2).sum(1)
    signed = odd_QQ[None] * sign_PQ[:, None]
    moved = np.matmul(signed, gram)
    own = np.diag(cross) + np.diagonal(moved, axis1=1, axis2=2)
    square = fixed + 2 * (signed * cross).sum(2) + (moved * signed).sum(2)
    return np.asarray(own / np.sqrt(np.maximum(square, 1e-30) * np.diag(gram)), np.float64)


def nearest_pairing(corner_Q4D: ArrayLike) -> Floats:
    """Squares whose diagonals, paired as the theory has it, are nearest to halving one another: of the three
    pairings of four corners the true one has the smallest |s₁ + n₁ − s₂ − n₂|; 1 or 0, a tie its share,
    [Q]."""
    corner = _corners(corner_Q4D, 1)
    defect = np.stack([np.linalg.norm(np.einsum("qcd,c->qd", corner, sign), axis=1) for sign in PAIRINGS], 1)
    best = defect <= defect.min(1, keepdims=True) * (1 + 1e-9)
    return np.asarray(best[:, 0] / best.sum(1), np.float64)


def corners(corner_Q4D: ArrayLike, name: str = "H2") -> list[Draft]:
    """Shares of squares by their exact chance: positive deixis (½, if not-s₁ and not-s₂ are exchangeable),
    and the true diagonals (⅓, if all four corners are: all negations must share nothing)."""
    corner = _corners(corner_Q4D)
    positive = cosines(corner[:, S1] - corner[:, S2], corner[:, N2] - corner[:, N1], "square") > 0
    drafts = []
    for title, hit, chance, told in (
        ("squares of positive deixis", positive, 1 / 2, "not-s1 and not-s2 exchangeable"),
        ("squares of true diagonals", nearest_pairing(corner) >= 1, 1 / 3, "four corners exchangeable"),
    ):
        hits, count = int(hit.sum()), len(corner)
        null = Null.binomial(hits, count, chance, f"{told} (binomial, exact)")
        share = hits / count
        drafts.append(
            Draft(f"{name}: {title}", share, null, count, "squares", corner.shape[2], 0, None, share - chance,
                  f"above the exact chance of 1/{round(1 / chance)}")
        )  # fmt: skip
    return drafts


def pair_rows(vectors_ND: ArrayLike, names: ArrayLike, pairs: list[tuple[str, str]]) -> Floats:
    """[n, 2, d] of named rows. Refuses names that are unknown, double, or in two pairs (pairs must be
    independent)."""
    x = matrix(vectors_ND, "vectors")
    code, known = codes(names, len(x), "names")
    if len(known) < len(x):
        raise StatsError("a name is given to two vectors")
    used = [word for pair in pairs for word in pair]
    wrong = sorted(set(used) - set(known)) or sorted({word for word in used if used.count(word) > 1})
    if wrong:
        raise StatsError(f"{wrong[0]!r} is unknown, or in two pairs")
    place = {known[c]: i for i, c in enumerate(code.tolist())}
    return np.stack([np.stack([x[place[a]], x[place[b]]]) for a, b in pairs])
