"""H1, do categories cluster: silhouette and ANOSIM on the true categories. Purity of k-means for description
only.

- Cosine distance d_ij = 1 − cos(x_i, x_j); on centred vectors, else all cosines are near 1.
- Silhouette (Rousseeuw, J. Comput. Appl. Math. 20, 1987): s_i = (b_i − a_i)/max(a_i, b_i), a_i the mean
  distance to the own category, b_i the smallest mean distance to another; 0 where the category has no second
  member, or where both are 0.
- ANOSIM (Clarke, Austr. J. Ecol. 18, 1993): R = (r̄_between − r̄_within)/(M/2) on ranks of all M distances.

Silhouettes take memberships [P, N, K] = count × one-hot category: permuted labels and bootstrap counts are
the same calculation. Pairs of a concept with its own copy are never counted. Assumes concepts independent,
given strata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Floats, Ints, StatsError, codes, matrix, one_hot, pieces, unit_rows
from .bootstrap import Statistic, interval
from .permute import arrangements, permutations
from .result import Draft, Null

Measure = Callable[[Floats], Floats]


def cosine_distances(x_ND: ArrayLike) -> Floats:
    """[N, N], zero on the diagonal, symmetric to the bit."""
    unit = unit_rows(matrix(x_ND, "vectors"))
    distance = 1.0 - unit @ unit.T
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0.0)
    return np.asarray(np.maximum(distance, 0.0), np.float64)


def silhouette(distance_NN: Floats, member_PNK: Floats) -> Floats:
    """Mean silhouette [P]. NaN where fewer than two categories are left (a bootstrap draw may do that)."""
    n, classes = member_PNK.shape[1:]
    values = []
    for piece in pieces(len(member_PNK), 3 * n * classes):
        member = member_PNK[piece]
        weight = member.sum(2)
        own = member.argmax(2)[..., None]
        count = np.broadcast_to(member.sum(1, keepdims=True), member.shape).copy()
        np.put_along_axis(count, own, np.take_along_axis(count, own, 2) - weight[..., None], 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.matmul(distance_NN, member) / count
        a = np.take_along_axis(mean, own, 2)[..., 0]
        alone = np.take_along_axis(count, own, 2)[..., 0] <= 0
        np.put_along_axis(mean, own, np.inf, 2)
        b = np.where(np.isnan(mean), np.inf, mean).min(2)
        with np.errstate(divide="ignore", invalid="ignore"):
            s = np.where(alone | (np.maximum(a, b) == 0), 0.0, (b - a) / np.maximum(a, b))
            values.append((weight * np.where(weight > 0, s, 0.0)).sum(1) / weight.sum(1))
    found = np.concatenate(values)
    return np.where(np.isfinite(found), found, np.nan)


def distance_ranks(distance_NN: Floats) -> Floats:
    """Ranks 1..M of all pairs, ties shared, as a symmetric [N, N] with a zero diagonal."""
    from scipy.stats import rankdata

    upper = np.triu_indices(len(distance_NN), 1)
    ranks = np.zeros_like(distance_NN)
    ranks[upper] = rankdata(distance_NN[upper])
    return np.asarray(ranks + ranks.T, np.float64)


def anosim(rank_NN: Floats, member_PNK: Floats) -> Floats:
    """R [P], from `distance_ranks`. NaN where no pair is within, or none between, categories."""
    n = len(rank_NN)
    values = []
    for piece in pieces(len(member_PNK), 3 * n * member_PNK.shape[2]):
        member = member_PNK[piece]
        weight = member.sum(2)
        ranked = np.matmul(rank_NN, member)
        inside = (ranked * member).sum((1, 2)) / 2
        total = (weight * (weight @ rank_NN)).sum(1) / 2
        copies = (weight**2).sum(1)
        inside_pairs = ((member.sum(1) ** 2).sum(1) - copies) / 2
        all_pairs = (weight.sum(1) ** 2 - copies) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            between = (total - inside) / (all_pairs - inside_pairs)
            values.append((between - inside / inside_pairs) / (n * (n - 1) / 4))
    found = np.concatenate(values)
    return np.where(np.isfinite(found), found, np.nan)


def anosim_resampled(distance_NN: Floats, label: Ints, weight_BN: Floats) -> Floats:
    """R under bootstrap counts [B]: pairs weigh w_i·w_j, and are ranked anew by their cumulated weight."""
    left, right = np.triu_indices(len(distance_NN), 1)
    order = np.argsort(distance_NN[left, right], kind="stable")
    left, right = left[order], right[order]
    inside, values = label[left] == label[right], []
    for piece in pieces(len(weight_BN), 3 * len(left)):
        pair = weight_BN[piece][:, left] * weight_BN[piece][:, right]
        ranked = pair * (pair.cumsum(1) - (pair - 1) / 2)
        total, within = pair.sum(1), pair[:, inside].sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            between = ranked[:, ~inside].sum(1) / (total - within)
            values.append((between - ranked[:, inside].sum(1) / within) / (total / 2))
    found = np.concatenate(values)
    return np.where(np.isfinite(found), found, np.nan)


def clustering(
    x_ND: ArrayLike,
    labels: ArrayLike,
    draws: int,
    rng: np.random.Generator,
    *,
    strata: ArrayLike | None = None,
    bootstraps: int = 0,
    name: str = "H1",
) -> list[Draft]:
    """Silhouette and ANOSIM of the true categories against labels permuted inside strata (part of speech,
    length). `bootstraps` > 0 gives BCa intervals over concepts, drawn within categories. Refuses strata that
    leave less than 20 different labelings."""
    x = matrix(x_ND, "vectors", 6)
    label, names = codes(labels, len(x))
    if not 2 <= len(names) < len(x):
        raise StatsError(f"{len(names)} categories of n = {len(x)} concepts: nothing can cluster")
    stratum = None if strata is None else codes(strata, len(x), "strata")[0]
    if arrangements(label, stratum) < np.log10(20):
        raise StatsError(
            f"permuting {len(x)} labels within these strata gives fewer than 20 labelings: categories and "
            f"strata are (almost) the same, and the data cannot tell them apart; take coarser strata"
        )
    exchange = permutations(len(x), draws, rng, stratum)
    distance, drafts = cosine_distances(x), []
    rank, hot = distance_ranks(distance), one_hot(label, len(names))
    member = one_hot(label[exchange.order_PN], len(names))
    measures: dict[str, tuple[Measure, Statistic]] = {
        "silhouette": (
            lambda member: silhouette(distance, member),
            lambda weight: silhouette(distance, weight[:, :, None] * hot),
        ),
        "ANOSIM R": (
            lambda member: anosim(rank, member),
            lambda weight: anosim_resampled(distance, label, weight),
        ),
    }
    for measure, (statistic, resampled) in measures.items():
        value = float(statistic(hot[None])[0])
        null = Null.sampled(value, statistic(member), exchange.how, exact=exchange.exact)
        spread = None
        if bootstraps:
            spread = interval(resampled, len(x), bootstraps, rng, unit="concepts", strata=label)
        drafts.append(
            Draft(f"{name}: {measure}", value, null, len(x), "concepts", x.shape[1], 0, spread,
                  note=f"{len(names)} categories; cosine distance")
        )  # fmt: skip
    return drafts


def layer_clusters(
    x_NLD: Floats, labels: ArrayLike, draws: int, rng: np.random.Generator, strata: ArrayLike | None = None
) -> tuple[Floats, Floats, str, bool]:
    """Silhouette at every layer [L], under the same permutations [P, L], what was exchanged, and whether
    these are all: what `max_statistic` takes."""
    label, names = codes(labels, len(x_NLD))
    stratum = None if strata is None else codes(strata, len(x_NLD), "strata")[0]
    exchange = permutations(len(x_NLD), draws, rng, stratum)
    member = one_hot(label[np.concatenate([exchange.identity, exchange.order_PN])], len(names))
    layers = range(x_NLD.shape[1])
    values = np.stack([silhouette(cosine_distances(x_NLD[:, layer]), member) for layer in layers], 1)
    return values[0], values[1:], exchange.how, exchange.exact


def against_baseline(
    x_ND: ArrayLike, base_ND: ArrayLike, labels: ArrayLike, draws: int, rng: np.random.Generator, *,
    strata: ArrayLike | None = None, bootstraps: int = 999, baseline: str,
) -> Draft:  # fmt: skip
    """Silhouette of the model minus that of a baseline on the same concepts (static embeddings, a model of
    random weights, part of speech as one-hot vectors). The null permutes labels for both at once, so p speaks
    against "neither has categories"; whether the model has *more* than the baseline is read from the
    interval, a paired bootstrap over concepts."""
    x, base = matrix(x_ND, "vectors", 6), matrix(base_ND, baseline, 6)
    if len(x) != len(base):
        raise StatsError(f"{len(x)} vectors against {len(base)} of {baseline}: the concepts must be the same")
    label, names = codes(labels, len(x))
    stratum = None if strata is None else codes(strata, len(x), "strata")[0]
    exchange = permutations(len(x), draws, rng, stratum)
    far = [cosine_distances(x), cosine_distances(base)]
    hot = one_hot(label, len(names))

    def difference(member_PNK: Floats) -> Floats:
        return silhouette(far[0], member_PNK) - silhouette(far[1], member_PNK)

    value = float(difference(hot[None])[0])
    null = Null.sampled(value, difference(one_hot(label[exchange.order_PN], len(names))), exchange.how,
                        exact=exchange.exact)  # fmt: skip
    spread = interval(lambda weight: difference(weight[:, :, None] * hot), len(x), bootstraps, rng,
                      unit="concepts", strata=label)  # fmt: skip
    return Draft(
        f"H1: silhouette minus {baseline}",
        value,
        null,
        len(x),
        "concepts",
        x.shape[1],
        0,
        spread,
        value,
        "difference of silhouettes",
        note="the null is that neither has categories; the interval compares them",
    )


def matched_words(
    features_NF: ArrayLike, pool_MF: ArrayLike, draws: int, rng: np.random.Generator, neighbours: int = 10
) -> Ints:
    """For each of N concepts a random one of the `neighbours` pool words nearest in standardised features
    (log frequency, length), no word twice in a draw: [draws, N] indices into the pool."""
    feature, pool = np.asarray(features_NF, float), np.asarray(pool_MF, float)
    if len(pool) < 2 * len(feature):
        raise StatsError(
            f"{len(pool)} words to match n = {len(feature)} concepts; the pool needs twice as many"
        )
    sd = pool.std(0)
    if (sd == 0).any():
        raise StatsError("a feature of the pool does not vary, and nothing can be matched by it")
    far = (((feature[:, None] - pool[None]) / sd) ** 2).sum(2)
    order = np.argsort(far, 1)
    chosen = np.empty((draws, len(feature)), np.int64)
    for draw in range(draws):
        taken: set[int] = set()
        for concept in rng.permutation(len(feature)):
            free = [int(w) for w in order[concept] if int(w) not in taken][:neighbours]
            chosen[draw, concept] = free[int(rng.integers(len(free)))]
            taken.add(int(chosen[draw, concept]))
    return chosen


def against_words(
    x_ND: ArrayLike, labels: ArrayLike, pool_MD: ArrayLike, chosen_PN: Ints, *, name: str = "H1"
) -> Draft:
    """Silhouette of the concepts against that of matched random words which wear the same labels."""
    x, pool = matrix(x_ND, "vectors", 6), matrix(pool_MD, "pool", 6)
    label, names = codes(labels, len(x))
    hot = one_hot(label, len(names))[None]
    value = float(silhouette(cosine_distances(x), hot)[0])
    null = np.array([silhouette(cosine_distances(pool[row]), hot)[0] for row in chosen_PN])
    return Draft(
        f"{name}: silhouette against matched words", value,
        Null.sampled(value, null, "putting words of like frequency and length in place of the concepts"),
        len(x), "concepts", x.shape[1], 0,
    )  # fmt: skip


def purity(x_ND: ArrayLike, labels: ArrayLike, draws: int, rng: np.random.Generator, seed: int = 0) -> Draft:
    """Share of concepts in the majority category of their k-means cluster, k the number of categories.
    Descriptive: it grows with the number of clusters and with small categories; noise has .3 of it."""
    from sklearn.cluster import KMeans

    x = unit_rows(matrix(x_ND, "vectors", 6))
    label, names = codes(labels, len(x))
    found = KMeans(len(names), n_init=10, random_state=seed).fit_predict(x)
    exchange = permutations(len(x), draws, rng)
    cluster = one_hot(np.asarray(found, np.int64), len(names))

    def share(order_PN: Ints) -> Floats:
        table = np.einsum("nc,pnk->pck", cluster, one_hot(label[order_PN], len(names)))
        return np.asarray(table.max(2).sum(1) / len(x), np.float64)

    value = float(share(exchange.identity)[0])
    null = Null.sampled(value, share(exchange.order_PN), exchange.how, exact=exchange.exact)
    return Draft("purity of k-means", value, null, len(x), "concepts", x.shape[1], 0, descriptive=True)


def baselines(
    x_ND: ArrayLike,
    labels: ArrayLike,
    others: Mapping[str, ArrayLike],
    draws: int,
    rng: np.random.Generator,
    *,
    strata: ArrayLike | None = None,
    bootstraps: int = 999,
) -> list[Draft]:
    """`against_baseline` for every baseline by name."""
    return [
        against_baseline(x_ND, base, labels, draws, rng, strata=strata, bootstraps=bootstraps, baseline=name)
        for name, base in others.items()
    ]


def one_hot_rows(labels: Sequence[str]) -> Floats:
    """Part of speech (or any label) as vectors: the baseline that knows nothing else."""
    code, names = codes(labels, len(labels))
    return one_hot(code, len(names))
