"""Number puzzles with worked answers: what `hadal-mini` learns, and what it is examined on.

Fifteen tasks in English, French and Portuguese, seeded, verified, split into training and held-out problems.
"""

from hadal.data.puzzles.mixture import SPLITS, TASKS, Conversation, conversation, sample, verify
from hadal.data.puzzles.task import LANGUAGES, Problem, Sample, Solution, Task, is_held_out

__all__ = [
    "LANGUAGES",
    "SPLITS",
    "TASKS",
    "Conversation",
    "Problem",
    "Sample",
    "Solution",
    "Task",
    "conversation",
    "is_held_out",
    "sample",
    "verify",
]
