"""Rewards: a completion judged by rules, by tests, or by a model. `docs/rewards.md` is their page.

    recipe = read(tables)                       # the [[reward]] tables of a recipe
    with Rewards(recipe) as rewards:            # starts worker processes
        totals = rewards.score(completions)     # one Total for each Completion, in order

A reward that raises, hangs, forks or dies scores 0, is counted in `rewards.failures`, and the run goes on.
"""

from hadal.post.rewards.compose import Rewards
from hadal.post.rewards.protocol import (
    BatchReward,
    Completion,
    Reward,
    RewardError,
    Score,
    Total,
    Verdict,
)
from hadal.post.rewards.recipe import KINDS, RewardRecipe, read

__all__ = [
    "KINDS",
    "BatchReward",
    "Completion",
    "Reward",
    "RewardError",
    "RewardRecipe",
    "Rewards",
    "Score",
    "Total",
    "Verdict",
    "read",
]
