"""How the verbs end that make a run by a recipe: what came out, and the line that goes on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hadal.cli.terminal import human_count, print_json, say

if TYPE_CHECKING:
    from hadal.train.main import Outcome

_TOLD = ("finished", "reason", "step", "tokens", "loss", "folder", "export")


def tell(outcome: Outcome, json: bool, goes_on: str, *, tokens: str = "tokens") -> None:
    """Print how a run ended. `goes_on`: the command that takes it up; `tokens`: what is counted."""
    if json:
        print_json({key: getattr(outcome, key) for key in _TOLD})
        return
    counted = f"{human_count(outcome.tokens)} {tokens}"
    say(f"{outcome.reason} at step {outcome.step}, {counted}: {outcome.export}")
    if not outcome.finished:
        say(f"`{goes_on}` goes on.")


def command(verb: str, recipe: Path, overrides: Sequence[str] | None, out: Path | None, *more: str) -> str:
    """A command line with the same recipe, values and folder, and `more` behind them."""
    words = ["hadal", verb, str(recipe), *(word for value in overrides or () for word in ("--set", value))]
    words += ["--out", str(out)] if out is not None else []
    return shlex.join([*words, *more])
