"""Statistics that can say "nothing": every test brings its null distribution, and no number is told without
it.

    family = Family("H1", "confirmatory")
    family.add(*clustering(x_ND, categories, draws=999, rng=rng, strata=part_of_speech))
    for result in family.results():
        print(result.sentence())

Pure functions on numpy arrays. A test gives a `Draft`; a `Family` corrects its drafts together and gives each
as a `Result` (result.py). What is exchanged under the null is in permute.py, intervals in bootstrap.py.
"""

from .arrays import StatsError
from .bootstrap import interval
from .clusters import against_baseline, against_words, clustering, matched_words, purity
from .molecules import molecules
from .permute import Curve, max_statistic
from .predict import Sentences, isotopies, lexical_controls
from .probing import description_length, selectivity
from .result import Draft, Family, Interval, Null, Result
from .similarity import debiased_cka, geometry, largest_correlation, rsa
from .squares import against_kinds, antonym_direction, corners, deixis, negation

__all__ = [
    "Curve", "Draft", "Family", "Interval", "Null", "Result", "Sentences", "StatsError", "against_baseline",
    "against_kinds", "against_words", "antonym_direction", "clustering", "corners", "debiased_cka", "deixis",
    "description_length", "geometry", "interval", "isotopies", "largest_correlation", "lexical_controls",
    "matched_words", "max_statistic", "molecules", "negation", "purity", "rsa", "selectivity",
]  # fmt: skip
