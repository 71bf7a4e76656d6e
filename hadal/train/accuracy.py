"""Accuracy in the loop: what a run asks of whoever lets its model answer (hadal/evals/in_training.py).

Answering takes an engine, which the trainer does not know: the program that starts a run hands it over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hadal.model.transformer import Transformer
from hadal.train.sources import Sources


@dataclass(frozen=True)
class Accuracy:
    """`accuracy`: the mean over `tasks`, each a share of right answers. `unfinished`: answers that did not
    end in time; they count as wrong."""

    accuracy: float
    tasks: Mapping[str, float]
    problems: int
    unfinished: int
    seconds: float


Examine = Callable[[Transformer, Sources, int, int], Accuracy]
"""(model, sources, problems of each task, most tokens of an answer) to an accuracy. Leaves the model, random
states and memory as they were."""
