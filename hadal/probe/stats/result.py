"""What may be told: a statistic with its null distribution, its p corrected for its whole family, its n, d
and folds, an effect size and an interval. Nothing less can be built.

    test -> Draft (holds no readable p) -> Family (Holm, Benjamini-Hochberg) -> Result

p of a null that was drawn: (1 + #{null ≥ statistic}) / (1 + draws), never zero (Phipson & Smyth, Stat. Appl.
Genet. Mol. Biol. 9, 2010). p of a null that was enumerated: #{null ≥ statistic} / all, the observed among
them. Corrections: Holm (Scand. J. Stat. 6, 1979) holds the chance of any false positive in a family, under
any dependence; Benjamini & Hochberg (J. R. Stat. Soc. B 57, 1995) holds the share of false ones among the
found, for independent or positively dependent tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from .arrays import Floats, StatsError

Tail = Literal["greater", "less", "two-sided"]
Kind = Literal["confirmatory", "exploratory"]
CORRECTION: dict[Kind, str] = {"confirmatory": "holm", "exploratory": "fdr_bh"}
CORRECTION_NAME = {"holm": "Holm", "fdr_bh": "Benjamini-Hochberg"}
TIE = 1e-9  # statistics that differ by less, relatively, are the same arrangement in another order of sums


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval of a statistic. `method` says which one, and over what was drawn."""

    low: float
    high: float
    method: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise StatsError(f"an interval from {self.low} to {self.high} is none")


@dataclass(frozen=True)
class Null:
    """How a statistic is distributed if there is nothing. `draws` is 0 where the distribution is known by
    formula; `how` says what was exchanged. The p stays here until a family has corrected it."""

    mean: float
    sd: float
    low: float  # 2.5% quantile
    high: float  # 97.5% quantile
    draws: int
    how: str
    _p: float = field(repr=False)
    _floor: float = field(repr=False)

    @staticmethod
    def sampled(
        statistic: float, null_P: Floats, how: str, *, tail: Tail = "greater", exact: bool = False
    ) -> Null:
        """From the statistic under P permutations; `exact`: these are all that there are, the observed one
        among them. Refuses a null that does not vary: nothing was exchanged."""
        null = np.asarray(null_P, np.float64).ravel()
        if null.size < 19 or not np.isfinite(null).all():
            raise StatsError(
                f"a null of {null.size} draws, or with values that are not finite, tells nothing"
            )
        mean, sd = float(null.mean()), float(null.std())
        slack = TIE * max(1.0, abs(statistic), float(np.abs(null).max()))
        if sd <= slack:
            raise StatsError(f"the null does not vary (always {mean:g}): {how} changes nothing here")
        centre = (statistic + float(null.sum())) / (1 + null.size) if not exact else mean
        sign = -1.0 if tail == "less" else 1.0
        if tail == "two-sided":
            beyond = int((np.abs(null - centre) >= abs(statistic - centre) - slack).sum())
        else:
            beyond = int((sign * null >= sign * statistic - slack).sum())
        p = beyond / null.size if exact else (1 + beyond) / (1 + null.size)
        floor = 1 / null.size if exact else 1 / (1 + null.size)
        low, high = (float(q) for q in np.quantile(null, [0.025, 0.975]))
        kind = "all" if exact else f"{null.size} random"
        return Null(mean, sd, low, high, int(null.size), f"{how} ({kind})", min(1.0, p), floor)

    @staticmethod
    def of_flips(statistic: float, gain_N: Floats, sign_PN: Floats, how: str, *, exact: bool) -> Null:
        """Of a sum of paired differences under flipped signs. Where no pair differs, every pattern gives the
        same, and p is 1."""
        if not np.abs(gain_N).max() > 0:
            return Null(0.0, 0.0, 0.0, 0.0, len(sign_PN), f"{how} (no pair differs)", 1.0, 1 / len(sign_PN))
        return Null.sampled(statistic, sign_PN @ gain_N, how, exact=exact)

    @staticmethod
    def binomial(hits: int, n: int, chance: float, how: str) -> Null:
        """Of a share of hits in n independent trials, each of exact probability `chance`; at least as
        many."""
        from scipy.stats import binom

        if n < 5 or not 0 <= hits <= n or not 0 < chance < 1:
            raise StatsError(f"{hits} hits of n = {n} at chance {chance} is no test; n must be 5 or more")
        low, high = (float(binom.ppf(q, n, chance)) / n for q in (0.025, 0.975))
        sd = math.sqrt(chance * (1 - chance) / n)
        return Null(chance, sd, low, high, 0, how, float(binom.sf(hits - 1, n, chance)), chance**n)


@dataclass(frozen=True)
class Draft:
    """What a test found, before its family has corrected it. `n`: independent units (concepts, squares,
    groups; said in `unit`), `d`: dimensions, `folds`: of the cross-validation, 0 where nothing is fitted, −1
    for leaving one out. `descriptive`: a number beside its null, of which no p is ever told."""

    name: str
    statistic: float
    null: Null
    n: int
    unit: str
    d: int
    folds: int
    interval: Interval | None = None
    effect: float | None = None
    effect_name: str = ""
    descriptive: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        _check(self.name, self.statistic, self.n, self.d, self.folds)
        if not self.unit:
            raise StatsError(f"{self.name}: say of what n = {self.n} is the number")
        if self.effect is None:
            z = (self.statistic - self.null.mean) / self.null.sd
            object.__setattr__(self, "effect", z)
            object.__setattr__(self, "effect_name", "standard deviations of the null")
        elif not self.effect_name:
            raise StatsError(f"{self.name}: an effect size needs a name")

    def named(self, name: str) -> Draft:
        return replace(self, name=name)


@dataclass(frozen=True)
class Result:
    """A finding as it may be told. `p` and `p_corrected` are None for descriptive numbers alone. `p_floor`:
    the smallest corrected p that the test could have given; above `alpha` it could not have found
    anything."""

    family: str
    name: str
    statistic: float
    null_mean: float
    null_low: float
    null_high: float
    draws: int
    exchanged: str
    n: int
    unit: str
    d: int
    folds: int
    effect: float
    effect_name: str
    p: float | None
    p_corrected: float | None
    p_floor: float | None
    correction: str
    comparisons: int
    alpha: float
    interval: Interval | None
    note: str = ""

    def __post_init__(self) -> None:
        _check(self.name, self.statistic, self.n, self.d, self.folds)
        null = (self.null_mean, self.null_low, self.null_high)
        if not self.exchanged or not all(math.isfinite(v) for v in null):
            raise StatsError(f"{self.name}: a statistic is not told without its null distribution")
        if (self.p is None) != (self.p_corrected is None):
            raise StatsError(f"{self.name}: a p is told corrected for its family, or not at all")
        if self.p is not None and self.p_corrected is not None:
            if not 0 <= self.p <= self.p_corrected + 1e-12 <= 1 + 2e-12:
                raise StatsError(f"{self.name}: p = {self.p} cannot be corrected to {self.p_corrected}")
            if not self.correction or self.comparisons < 1:
                raise StatsError(f"{self.name}: name the correction, and the number of comparisons")

    @property
    def significant(self) -> bool:
        """Is the corrected p at most alpha? Never for a descriptive number."""
        return self.p_corrected is not None and self.p_corrected <= self.alpha

    def row(self) -> dict[str, Any]:
        """Plain data for CSV and JSON: the interval flat, and the verdict."""
        row = asdict(self)
        row.pop("interval")
        interval = self.interval
        row["interval_low"] = None if interval is None else interval.low
        row["interval_high"] = None if interval is None else interval.high
        row["interval_method"] = "" if interval is None else interval.method
        return row | {"significant": self.significant}

    def sentence(self) -> str:
        """One line in words, with all that makes the number mean something."""
        null = f"null {self.null_mean:.3f} [{self.null_low:.3f}, {self.null_high:.3f}]"
        parts = [f"{self.name}: {self.statistic:.3f} against {null}"]
        if self.p_corrected is None:
            parts.append("descriptive")
        else:
            parts.append(f"corrected p {_p(self.p_corrected)} ({self.correction} over {self.comparisons})")
        parts.append(f"effect {self.effect:+.2f} {self.effect_name}")
        if self.interval is not None:
            i = self.interval
            parts.append(f"interval [{i.low:.3f}, {i.high:.3f}] ({i.method})")
        folds = {0: "nothing fitted", -1: "one left out"}.get(self.folds, f"{self.folds} folds")
        parts.append(f"n = {self.n} {self.unit}, d = {self.d}, {folds}")
        return "; ".join(parts) + (f". {self.note}" if self.note else "")


def _p(value: float) -> str:
    return "< .0001" if value < 1e-4 else f"= {value:.4f}"


def _check(name: str, statistic: float, n: int, d: int, folds: int) -> None:
    if not name:
        raise StatsError("a result needs a name")
    if not math.isfinite(statistic):
        raise StatsError(f"{name}: the statistic is {statistic}; it is undefined for these data")
    if n < 2 or d < 1:
        raise StatsError(f"{name}: n = {n} and d = {d}: a statistic of so little is undefined")
    if folds < -1 or folds == 1:
        raise StatsError(f"{name}: {folds} folds; 0 means that nothing is fitted, −1 that one is left out")


class Family:
    """All comparisons that answer one question. Results come out together, once, corrected for one another:
    confirmatory families by Holm, exploratory ones by Benjamini-Hochberg."""

    def __init__(self, name: str, kind: Kind, alpha: float = 0.05) -> None:
        if kind not in CORRECTION:
            raise StatsError(f"a family is confirmatory or exploratory, not {kind!r}")
        if not name or not 0 < alpha < 1:
            raise StatsError(f"a family needs a name and an alpha between 0 and 1: {name!r}, {alpha}")
        self.name, self.kind, self.alpha = name, kind, alpha
        self._drafts: list[Draft] = []
        self._results: list[Result] | None = None

    def add(self, *drafts: Draft) -> None:
        """Takes what tests have found. After `results` it is closed: one more comparison would have changed
        the p of all that were told."""
        if self._results is not None:
            raise StatsError(
                f"{self.name}: its results have been told; a comparison made later is another family"
            )
        for draft in drafts:
            if draft.name in {other.name for other in self._drafts}:
                raise StatsError(f"{self.name}: {draft.name!r} is in it already")
            self._drafts.append(draft)

    def results(self) -> list[Result]:
        """Every comparison with its corrected p, in the order in which they came."""
        if self._results is None:
            if not self._drafts:
                raise StatsError(f"{self.name}: an empty family has no results")
            self._results = self._corrected()
        return list(self._results)

    def _corrected(self) -> list[Result]:
        tested = [draft for draft in self._drafts if not draft.descriptive]
        method = CORRECTION[self.kind]
        corrected = dict(
            zip((d.name for d in tested), adjust([d.null._p for d in tested], method), strict=True)
        )
        told = []
        for draft in self._drafts:
            p, floor = draft.null._p, min(1.0, draft.null._floor * len(tested))
            shown = draft.name in corrected
            told.append(
                result(
                    self.name, draft, p=p if shown else None, p_corrected=corrected.get(draft.name),
                    p_floor=floor if shown else None, correction=CORRECTION_NAME[method] if shown else "",
                    comparisons=len(tested), alpha=self.alpha,
                )
            )  # fmt: skip
        return told


def result(family: str, draft: Draft, **told: Any) -> Result:
    """A draft with what its correction gave."""
    assert draft.effect is not None  # Draft sets it
    null = draft.null
    note = draft.note
    if told["p_floor"] is not None and told["p_floor"] > told["alpha"]:
        blind = f"{told['comparisons']} comparisons of so few draws cannot reach p ≤ {told['alpha']:g}"
        note = f"{note}; {blind}" if note else blind
    return Result(
        family=family,
        name=draft.name,
        statistic=draft.statistic,
        null_mean=null.mean,
        null_low=null.low,
        null_high=null.high,
        draws=null.draws,
        exchanged=null.how,
        n=draft.n,
        unit=draft.unit,
        d=draft.d,
        folds=draft.folds,
        effect=draft.effect,
        effect_name=draft.effect_name,
        interval=draft.interval,
        note=note,
        **told,
    )


def adjust(p: Sequence[float], method: str) -> list[float]:
    """p values of one family, corrected, in their order. With p sorted, i from 1 to m: "holm" has
    max over j ≤ i of (m − j + 1)·p_j, "fdr_bh" min over j ≥ i of m/j·p_j; at most 1."""
    if method not in CORRECTION_NAME:
        raise StatsError(f"the corrections are holm and fdr_bh, not {method!r}")
    value = np.asarray(p, np.float64)
    order, m = np.argsort(value), len(value)
    if method == "holm":
        step = np.maximum.accumulate((m - np.arange(m)) * value[order])
    else:
        step = np.minimum.accumulate((m / np.arange(1, m + 1) * value[order])[::-1])[::-1]
    corrected = np.empty(m)
    corrected[order] = np.minimum(step, 1.0)
    return [float(q) for q in corrected]
