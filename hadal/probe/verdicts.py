"""What a study's numbers say, in words: evidence, or none, and never more than the tests bear.

A hypothesis is held by *claims*: sets of tests that must all be significant after correction for every model
and language of the study. A claim counts for a model only if it is the model's own: where a network with
random weights shows it too, it lies in the words and their tokens, not in what was learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from hadal.probe.outcome import APART, AROUND, LETTERS, RANDOM, StudyOutcome
from hadal.probe.stats.result import Result

Status = Literal["evidence", "not the model's own", "no evidence", "not tested"]
LOW: Final = "H1: silhouette minus "


@dataclass(frozen=True)
class Hypothesis:
    """For readers. `claims`: names of tests that must all be significant, the first of each leading."""

    id: str
    title: str
    tests: str
    shown_by: str
    claims: tuple[tuple[str, ...], ...]
    family: str


HYPOTHESES: Final = (
    Hypothesis(
        "H1", "Concepts of one category lie together",
        "Every concept has one vector: the mean over its target word in all its sentences. If the categories "
        "of the theory are categories of the model, two concepts of one category point in more similar "
        "directions than two of different ones. Silhouette and ANOSIM R measure this on the categories as "
        "the theory has them; no clusters are searched for. They are compared with the same vectors under "
        "labels exchanged between concepts of the same part of speech, since verbs lie near verbs in any "
        "case.",
        "It would have been shown by a silhouette above nearly all that exchanged labels give, by more than "
        "what a network with random weights, mere counts of the words beside the targets, and the targets' "
        "letters have over their exchanged labels; and by one that stays without the "
        "concepts that share a word with another of their category.",
        (("H1: silhouette",), ("H1: ANOSIM R",)), "H1, categories",
    ),
    Hypothesis(
        "H2", "Semiotic squares have a geometry",
        "In a square, s1 and s2 are contraries (life, death), and each has a contradictory (not-s1, not-s2). "
        "Contraries stand in the same contexts, so plain distances say nothing here. What is tested is "
        "direction: whether s1 − s2 points like not-s2 − not-s1 (the deixes of the square), whether all "
        "squares share a direction from the positive to the negative pole that holds for a square left out, "
        "and more than synonyms and co-hyponyms have; and whether one operator of negation, learned on all "
        "other squares, leads from a term to its contradictory better than the term itself does.",
        "It would have been shown by deixes that agree where exchanging the two negations destroys it, or by "
        "a direction or an operator that holds for squares it was not learned on, beyond the echo of a word "
        "that both terms share.",
        (
            ("H2: deixis",),
            ("H2: offset parallelism", "H2: antonyms against synonyms", "H2: antonyms against co-hyponyms"),
            ("H2: held-out antonym direction", "H2: antonyms against synonyms",
             "H2: antonyms against co-hyponyms"),
            ("H2: negation operator minus identity", "H2: negation operator"),
        ), "H2, squares",
    ),
    Hypothesis(
        "H3", "The category of a text can be read from its vector, without its words",
        "A linear classifier learns the isotopy of sentences (of labelled spans: the category of a word in "
        "its sentence) and is asked about sentences of other words in other templates, so that no word "
        "helps. It is compared with labels exchanged between words, with a bag of the words in the same "
        "folds, and with control sentences that keep the other words and lose the isotopy.",
        "It would have been shown by more right answers than exchanged labels give, and by more than the bag "
        "of words has, or more often for sentences than for their controls.",
        (
            ("H3: balanced accuracy", "H3: accuracy minus bag of words"),
            ("H3: balanced accuracy", "H3: sentences minus lexical controls"),
        ), "H3, isotopies",
    ),
    Hypothesis(
        "H4", "Everyday concepts are sums of primes",
        "Each molecule (lie, promise) has an explication in primes. From the counts of primes in it, a "
        "linear map that has not seen the molecule predicts its vector; its strength is chosen without it, "
        "too. R² is of molecules that the map has not seen (0 is no better than their mean), and the rank "
        "says how near the prediction lies to the right one among all.",
        "It would have been shown by an R² above 0, or a rank below one half, that explications shuffled "
        "among molecules do not reach.",
        (("H4: R² out of sample",), ("H4: retrieval rank",)), "H4, molecules",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Of one hypothesis, model and language. `lead`: the result that the text is about."""

    hypothesis: str
    model: str
    language: str
    status: Status
    text: str
    lead: str = ""


def verdicts(outcome: StudyOutcome) -> list[Verdict]:
    """In the order of the hypotheses; those that the recipe does not ask for are left out."""
    asked = [h for h in HYPOTHESES if h.id in outcome.recipe.tests.hypotheses]
    studied = [m for m in outcome.made if m.maker.role == "studied"]
    return [verdict(outcome, h, m.maker.title, m.material.language) for h in asked for m in studied]


def verdict(outcome: StudyOutcome, hypothesis: Hypothesis, model: str, language: str) -> Verdict:
    """Of the numbers alone: what holds is said with its effect and interval, what does not with its p."""
    of = hypothesis.id, model, language
    names = dict.fromkeys(name for claim in hypothesis.claims for name in claim)
    found = {name: r for name in names if (r := outcome.found(model, language, name)) is not None}
    if not found:
        reasons = [why for m, lang, test, why in outcome.refused
                   if (m, lang) == (model, language) and test.startswith(hypothesis.id)]  # fmt: skip
        why = f": {reasons[0]}" if reasons else ": there are no data for it in this language."
        return Verdict(*of, "not tested", f"Not tested{why}")
    held = [c for c in hypothesis.claims if all(n in found and found[n].significant for n in c)]
    if not held:
        return Verdict(*of, *_nothing(hypothesis, found))
    own = [
        (claim, why) for claim in held if not (why := _not_own(outcome, hypothesis, model, language, claim))
    ]
    if own:
        leads = [found[claim[0]] for claim, _ in own]
        text = f"Evidence: {'; '.join(dict.fromkeys(told(r) for r in leads))}."
        return Verdict(*of, "evidence", f"{text} {_beside(outcome, model)}".strip(), own[0][0][0])
    lead = found[held[0][0]]
    why = _not_own(outcome, hypothesis, model, language, held[0])
    return Verdict(*of, "not the model's own", f"Not the model's own: {told(lead)}; but {why}.", held[0][0])


def _nothing(hypothesis: Hypothesis, found: dict[str, Result]) -> tuple[Status, str, str]:
    """No claim holds: nothing was found, only half of one was, or nothing could be."""
    best = min(found.values(), key=lambda r: 1.0 if r.p_corrected is None else r.p_corrected)
    name = next(n for n, r in found.items() if r is best)
    if all(r.p_floor is not None and r.p_floor > r.alpha for r in found.values()):
        text = f"Not tested: {best.draws} permutations cannot reach p ≤ {best.alpha:g} in {best.comparisons} "
        return "not tested", text + "comparisons; take more (tests.permutations).", name
    if not any(r.significant for r in found.values()):
        lead = found.get(hypothesis.claims[0][0], best)
        other = "" if lead is best else f" The nearest is {told(best)}."
        return "no evidence", f"No evidence: {told(lead)}.{other}", name
    alone = [r for r in found.values() if r.significant]
    open_ = [n for claim in hypothesis.claims if any(found.get(m) in alone for m in claim)
             for n in claim if n in found and not found[n].significant]  # fmt: skip
    missing = ", ".join(dict.fromkeys(plain(n) for n in open_))
    text = f"No evidence: {told(alone[0])}, which alone shows nothing; what must hold with it does not"
    return "no evidence", f"{text}: {missing}.", open_[0]


def _not_own(outcome: StudyOutcome, hypothesis: Hypothesis, model: str, language: str, claim: tuple[str, ...]
             ) -> str:  # fmt: skip
    """Why a claim that holds is not the model's own; empty if it is."""
    blank = outcome.baseline_of(model)
    lead = outcome.found(model, language, claim[0])
    assert lead is not None
    if hypothesis.id == "H1":
        alone = outcome.found(model, language, APART)
        if alone is not None and not alone.significant:
            which = f"the {alone.note} that share no word with another of their category"
            return f"it is not significant among {which} ({told(alone)})"
        for other in (RANDOM, AROUND, LETTERS):
            gap = outcome.found(model, language, LOW + other)
            if gap is not None and gap.interval is not None and gap.interval.low <= gap.null_mean:
                i = gap.interval
                return (
                    f"it is not surely more than {other} have: the "
                    f"silhouettes differ by {gap.statistic:+.3f} [{i.low:+.3f}, {i.high:+.3f}], and by "
                    f"{gap.null_mean:+.3f} if there is nothing in either"
                )
    if blank is None:
        return ""
    theirs = [r for name in claim if (r := outcome.found(blank, language, name)) is not None]
    if theirs and all(r.significant for r in theirs):
        return f"random weights show it too ({told(theirs[0])})"
    if theirs and _at_least(theirs[0], lead):
        return f"random weights reach as much ({told(theirs[0])})"
    return ""


def _at_least(one: Result, other: Result) -> bool:
    """Whether the effect of one is no smaller; effects grow with the evidence, whatever the statistic."""
    return one.effect >= other.effect


def _beside(outcome: StudyOutcome, model: str) -> str:
    if outcome.is_simulation:
        return "The effect was planted: these vectors are simulated, and speak of no model."
    if outcome.baseline_of(model) is None:
        return "There is no network of random weights to compare with: words and tokens alone may do as much."
    return "The network with random weights does not show it."


def plain(name: str) -> str:
    """A test's name without its hypothesis."""
    return name.split(": ", 1)[1] if name[:1] == "H" and ": " in name else name


def told(result: Result) -> str:
    """A result in a clause: statistic, null, p, effect, interval."""
    name = plain(result.name.rsplit(" · ", 1)[-1])
    null = f"{result.null_mean:.3f} [{result.null_low:.3f}, {result.null_high:.3f}] if there is nothing"
    parts = [f"{name} {result.statistic:.3f}, against {null}"]
    if result.p_corrected is not None:
        parts.append(f"corrected p {_p(result.p_corrected)}")
    parts.append(f"effect {result.effect:+.2f} ({result.effect_name})")
    if result.interval is not None:
        parts.append(f"95% interval [{result.interval.low:.3f}, {result.interval.high:.3f}]")
    return ", ".join(parts)


def _p(value: float) -> str:
    return "< .0001" if value < 1e-4 else f"= {value:.3f}" if value < 0.9995 else "= 1"


def summary(found: list[Verdict]) -> str:
    """One sentence over all."""
    number = {s: sum(v.status == s for v in found) for s in
              ("evidence", "not the model's own", "no evidence", "not tested")}  # fmt: skip
    if not number["evidence"]:
        head = "Nothing is there: no hypothesis found evidence in any model or language."
        if number["not the model's own"]:
            head = "No evidence of anything that is the model's own."
        if number["not tested"] == len(found):
            head = "Nothing could be tested."
    else:
        held = [f"{v.hypothesis} in {v.model}, {v.language}" for v in found if v.status == "evidence"]
        head = f"Evidence for {'; '.join(held)}."
    rest = [f"{n} {text}" for key, text in (
        ("no evidence", "without evidence"),
        ("not the model's own", "not surely more than random weights or mere words have"),
        ("not tested", "not tested"),
    ) if (n := number[key])]  # fmt: skip
    return (
        f"{head} Of {len(found)} questions: {number['evidence']} with evidence, {', '.join(rest)}."
        if rest
        else head
    )
