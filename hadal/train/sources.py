"""Where a run's tokens come from: puzzles written for it, or a folder of packed shards; their tokenizer.

Training puzzles take the way of any text through `hadal.data.prepare`: exact copies and what the examination
asks are dropped, and DATA/train/report.md says how much. Held-out puzzles are written as they are drawn.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hadal.data.documents import write_puzzles
from hadal.data.prepare import Progress, prepare
from hadal.data.puzzle_source import puzzle_recipe
from hadal.data.reading import sha256_of
from hadal.data.report import read_report
from hadal.data.shards import ShardError, read_manifest
from hadal.data.stream import PackedRows, StreamRows, packed_rows
from hadal.data.tasks import Local
from hadal.text.tokenizer import Tokenizer
from hadal.train.needle_set import write_needle_sets
from hadal.train.phases import recipe_at, stages
from hadal.train.recipe import DataRecipe, Recipe, RecipeError

ON_BOARD = Path(__file__).resolve().parents[1] / "assets" / "hadal-mini"
_ONE_PROCESS = 2_000_000  # tokens of puzzles that are written sooner than other processes have started


@dataclass(frozen=True)
class Sources:
    """Rows to train on, rows that are never trained on (or None), and the tokenizer of both."""

    train: PackedRows | StreamRows
    heldout: PackedRows | None
    tokenizer: Tokenizer
    tokenizer_folder: Path


def open_stages(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> dict[int, Sources]:
    """The sources of every stage that has steps, by its number. A phase without a `path` reads what the main
    part reads; of needles it gets documents of its own length, below the folder of the main set.

    Raises as `open_sources`.
    """
    found: dict[int, Sources] = {}
    for stage in stages(recipe):
        if not stage.steps:
            continue
        view, data = recipe_at(recipe, stage), recipe.data
        if stage.index and (path := recipe.phases[stage.index - 1].path):
            held = recipe.phases[stage.index - 1].heldout_path
            data = replace(data, source="shards", path=path, heldout_path=held)
        elif stage.index and data.source == "needles":
            data = replace(data, path=str((Path(data.path) if data.path else folder) / stage.name))
        if recipe.phases:
            say(f"{stage.name}, rows of {stage.context:,}:")
        found[stage.index] = open_sources(recipe, folder, say, replace(view, data=data))
    return found


def open_sources(
    recipe: Recipe, folder: Path, say: Callable[[str], None], view: Recipe | None = None
) -> Sources:
    """The sources of a recipe. Puzzles and needles are written below `data.path` (default: `folder`) unless
    they lie there. `view`: the recipe as one of its stages sees it.

    Raises RecipeError, TokenizerError, ShardError.
    """
    whole, recipe = recipe, view or recipe
    data = recipe.data
    tokenizer, tokenizer_folder = tokenizer_of(data)
    heldout: Path | None
    if data.source == "puzzles":
        train, heldout = _puzzles(whole, Path(data.path) if data.path else folder, tokenizer_folder, say)
    elif data.source == "needles":
        train, heldout = write_needle_sets(
            recipe, Path(data.path) if data.path else folder, tokenizer_folder, say
        )
    else:
        train = Path(data.path)
        heldout = Path(data.heldout_path) if data.heldout_path else None
        if heldout is not None and not (heldout / "manifest.json").is_file():
            raise RecipeError(
                f"data.heldout_path: {heldout} holds no finished shards. `hadal data prepare` holds "
                "documents out by heldout.share, of few perhaps none; leave the key out to do without"
            )
        for folder in filter(None, (train, heldout)):
            _check_tokenizer(folder, data.tokenizer, tokenizer_folder)
    rows: PackedRows | StreamRows
    if data.source == "shards" and not data.mask_documents:
        rows = StreamRows(train, recipe.train.context, seed=recipe.run.seed)
        _check_ids(rows, tokenizer)
    else:
        rows = _open(recipe, train, tokenizer, shuffle=True)
    epochs = recipe.train.tokens_read / (recipe.train.context * rows.rows_per_epoch)
    say(
        f"data: {rows.manifest.tokens:,} tokens in {rows.manifest.documents:,} documents, "
        f"{rows.rows_per_epoch:,} rows of {recipe.train.context:,} ({rows.filled:.1%} filled, {rows.cut:,} "
        f"documents cut); this run sees {epochs:.2f} epochs"
    )
    held = None if heldout is None else _open(recipe, heldout, tokenizer, shuffle=False)
    return Sources(rows, held, tokenizer, tokenizer_folder)


def tokenizer_of(data: DataRecipe) -> tuple[Tokenizer, Path]:
    """The tokenizer of `data.tokenizer`, and its folder. Raises RecipeError, TokenizerError."""
    folder = ON_BOARD if data.tokenizer == "hadal-mini" else Path(data.tokenizer)
    if not (folder / "tokenizer.json").is_file():
        raise RecipeError(f"data.tokenizer: {folder} has no tokenizer.json; `hadal data tokenizer` makes one")
    return Tokenizer.load(folder), folder


def _check_tokenizer(shards: Path, name: str, folder: Path) -> None:
    """Refuse shards of `hadal data prepare` that another tokenizer wrote: their ids mean other text. The one
    on board keeps its ids, whatever else in its file changes."""
    made_by = read_manifest(shards).made_by
    recipe, written = made_by.get("recipe"), made_by.get("tokenizer_sha256")
    if recipe is None or written is None or written == sha256_of(folder / "tokenizer.json"):
        return
    theirs = recipe["tokens"]["tokenizer"]
    if not theirs == name == "hadal-mini":
        raise RecipeError(
            f"data.tokenizer is {name!r}, but the shards in {shards} were written with {theirs!r} as it was "
            "then: the same ids mean other text. Name that one, or prepare the data again"
        )


def _open(recipe: Recipe, folder: Path, tokenizer: Tokenizer, *, shuffle: bool) -> PackedRows:
    rows = packed_rows(
        folder,
        recipe.train.context,
        tokenizer.special,
        prompt_weight=recipe.data.prompt_weight,
        seed=recipe.run.seed,
        shuffle=shuffle,
    )
    _check_ids(rows, tokenizer)
    return rows


def _check_ids(rows: PackedRows | StreamRows, tokenizer: Tokenizer) -> None:
    """Refuse shards that were written with a larger vocabulary."""
    largest = int(rows.rows(0, 1).token_RC.max())
    if largest >= tokenizer.vocab_size:
        raise ShardError(
            f"{rows.folder} holds token {largest}; the tokenizer of data.tokenizer has "
            f"{tokenizer.vocab_size} ids: the shards were written with another"
        )


def _puzzles(recipe: Recipe, folder: Path, tokenizer: Path, say: Callable[[str], None]) -> tuple[Path, Path]:
    """Write the training and held-out shards of a puzzle recipe (what is there already is kept)."""
    data, seed = recipe.data, recipe.run.seed
    tokens = recipe.train.tokens_read or recipe.tokens_read
    wanted = puzzle_recipe(tokens, seed, data.tokenizer, tokenizer, data.examined)
    folder.mkdir(parents=True, exist_ok=True)
    workers = (data.workers or os.cpu_count() or 1) if tokens > _ONE_PROCESS else 1
    prepare(wanted, folder / "train", executor=Local(workers), progress=_stages(say))
    report, page = read_report(folder / "train"), folder / "train" / "report.md"
    gone = {stage: sum(s["dropped"][stage] for s in report["sources"].values())
            for stage in ("exact", "contamination")}  # fmt: skip
    say(
        f"puzzles: {gone['exact']:,} exact copies and {gone['contamination']:,} documents that the "
        f"examination of {report['evaluations']['texts']:,} questions asks for are left out; "
        f"{report['evaluations'].get('remaining', 0)} such are in the shards ({page})"
    )
    write_puzzles(
        folder / "held-out",
        tokenizer,
        tokens=recipe.log.heldout_tokens,
        seed=seed,
        split="held-out",
        workers=data.workers,
    )
    return folder / "train", folder / "held-out"


def _stages(say: Callable[[str], None]) -> Progress:
    """Names each stage of the pipeline, and says something at every quarter of its way."""
    told: dict[str, int] = {}

    def progress(title: str, done: int, of: int) -> None:
        share = done * 4 // max(1, of)
        if share > told.get(title, -1):
            told[title] = share
            say(f"puzzles: {title}, {done / max(1, of):.0%}")

    return progress
