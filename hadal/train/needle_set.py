"""The needles of a stage, as shards of its own length (hadal/data/needles.py writes them)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hadal.data.needles import write_needles
from hadal.data.shards import ShardError
from hadal.train.recipe import Recipe, RecipeError


def write_needle_sets(
    recipe: Recipe, folder: Path, tokenizer: Path, say: Callable[[str], None]
) -> tuple[Path, Path]:
    """Write the training and held-out needles of a stage (what is there already is kept); their folders.

    Raises ShardError, and RecipeError where the haystack cannot be read."""
    wanted = {"train": recipe.train.tokens_read, "held-out": recipe.log.heldout_tokens}
    for split, tokens in wanted.items():
        try:
            write_needles(
                folder / split,
                tokenizer,
                tokens=tokens,
                context=recipe.train.context,
                seed=recipe.run.seed,
                split=split,
                share=recipe.needles.share,
                lists=recipe.needles.lists,
                short=recipe.needles.short,
                workers=recipe.data.workers,
                haystack=[Path(path) for path in recipe.needles.haystack],
                progress=_tenths(f"writing {split} needles", say),
            )
        except ShardError:
            raise
        except (OSError, ValueError) as error:
            raise RecipeError(f"needles: {error}") from None
    return folder / "train", folder / "held-out"


def _tenths(what: str, say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Says something at every tenth of the way."""
    told = 0

    def progress(done: int, of: int) -> None:
        nonlocal told
        if of > 1 and done * 10 // of > told:
            told = done * 10 // of
            say(f"{what}: {done} of {of} shards")

    return progress
