"""cons@k: the share of problems whose most frequent answer is right (R1 report, arXiv 2501.12948; Wang et al.
2022, arXiv 2203.11171)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def vote(answers: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    """A problem's part of cons@k. answers: of each sample, equal ones voting together; None: no answer, no
    vote. right: of each sample; an answer is judged by the first sample that gave it.

    1 if the most frequent answer is right, 0 if it is wrong or nobody voted. Where several lead, each is as
    likely to be taken: the share of them that are right.
    """
    counts: Counter[Hashable] = Counter()
    good: dict[Hashable, bool] = {}
    for answer, verdict in zip(answers, right, strict=True):
        if answer is not None:
            counts[answer] += 1
            good.setdefault(answer, verdict)
    if not counts:
        return 0.0
    most = max(counts.values())
    leaders = [answer for answer, count in counts.items() if count == most]
    return sum(good[answer] for answer in leaders) / len(leaders)
