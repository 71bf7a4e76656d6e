"""`hadal sft RECIPE`: a model and conversations to a fine-tuned model in a folder.

    OUT/recipe.json      the resolved recipe, and what it started from
    OUT/data/train/      rows of tokens and masks, and the report of what was left out
    OUT/export/          the model in the published layout, with a card; adapters are merged
    OUT/export-adapters/ A and B alone, as PEFT's files, where the recipe asks for them

Everything else (steps, checkpoints, --resume, metrics, the live line) is `hadal.train`: a run here is one of
there with another start, other rows, and other trained numbers where there is LoRA.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hadal.model.transformer import Transformer
from hadal.post.base import Base as Base
from hadal.post.base import changed_since, write_export
from hadal.post.card import sft_card
from hadal.post.chat_rows import ChatRows, Report, Wanted, write_rows
from hadal.post.conversations import Conversation
from hadal.post.lora import Adapters
from hadal.post.sft_recipe import RecipeError, SftRecipe, from_dict, load
from hadal.text.tokenizer import Tokenizer
from hadal.train.accuracy import Examine
from hadal.train.export import Facts
from hadal.train.main import Outcome, Run, check_examine, device_of
from hadal.train.metrics import Metrics
from hadal.train.occasions import Occasions
from hadal.train.opening import folder_of, opened, say
from hadal.train.optimizer import AdamW
from hadal.train.recipe import Recipe
from hadal.train.sources import Sources
from hadal.weights.layout import read_config


def sft(
    recipe_path: Path | str,
    *,
    resume: bool = False,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    device: str = "auto",
    console: Console | None = None,
    examine: Examine | None = None,
) -> Outcome:
    """Fine-tune by a recipe; arguments as of `hadal.train.main.train`.

    Raises RecipeError, DataError, ShardError, WeightsError, HubError, CheckpointError, NonFiniteError.
    """
    with open_run(recipe_path, resume, overrides, out, device, console, examine) as run:
        return run.go()


def open_run(
    recipe_path: Path | str,
    resume: bool,
    overrides: Sequence[str],
    out: Path | str | None,
    device: str,
    console: Console | None,
    examine: Examine | None = None,
) -> AbstractContextManager[SftRun]:
    """A run where it is to begin, or to go on; see `sft`."""
    recipe = load(Path(recipe_path), overrides)
    check_examine(recipe.log, examine)
    folder, console = folder_of(out, recipe.run.name), console or Console(stderr=True)
    base = Base.of(recipe.model)
    started = base.started()

    def make() -> SftRun:
        begun = time.perf_counter()
        rows = prepare(recipe, base, folder / "data", Path(recipe_path).parent, partial(say, console))
        whole = recipe.to_train(rows.train.rows_per_epoch, base.folder, folder / "data" / "train")
        return SftRun(recipe, base, rows, whole, folder, device_of(device), console, begun, examine)

    resolved = recipe.to_dict() | {"started": dataclasses.asdict(started)}
    changed = changed_since(recipe, started, from_dict)
    return opened(folder, resolved, resume, changed, make, console)


# --- the data ---
@dataclass(frozen=True)
class Prepared:
    """Rows, and what became of the files."""

    train: ChatRows
    heldout: ChatRows | None
    report: Report


def prepare(
    recipe: SftRecipe, base: Base, folder: Path, beside: Path, tell: Callable[[str], None]
) -> Prepared:
    """Write the rows of a recipe below `folder`, or take those that lie there. Paths are looked for here,
    then `beside` the recipe. Raises RecipeError, DataError, ShardError."""
    data, seed = recipe.data, recipe.run.seed
    files = _files(data.files, beside, "data.files")
    held = _files(data.heldout_files, beside, "data.heldout_files") or (files if data.heldout_share else [])
    marks = (("heldout_share", data.heldout_share), ("seed", seed)) if data.heldout_share else ()

    def rows(name: str, paths: list[Path], is_held: bool) -> tuple[ChatRows, Report]:
        keep = partial(_drawn, share=data.heldout_share, seed=seed, held=is_held)
        wanted = Wanted(
            paths, base.template, base.tokenizer, recipe.train.context, data.kind,
            keep if data.heldout_share else _everyone, marks,
        )  # fmt: skip
        report = write_rows(folder / name, wanted, "heldout" if is_held else "chat")
        return (
            ChatRows(folder / name, recipe.train.context, pad_id=base.pad_id, seed=seed, shuffle=not is_held),
            report,
        )

    train, report = rows("train", files, False)
    for line in report.lines():
        tell(f"data: {line}")
    epoch = train.rows_per_epoch
    tell(
        f"data: {epoch:,} rows of {recipe.train.context:,}, {train.filled:.1%} filled; "
        f"template {base.template.name}"
    )
    heldout = rows("held-out", held, True)[0] if held else None
    return Prepared(train, heldout, report)


def _files(names: Sequence[str], beside: Path, key: str) -> list[Path]:
    found = []
    for name in names:
        places = [Path(name).expanduser(), beside / name]
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            raise RecipeError(f"{key}: there is no file {name!r}, neither here nor beside the recipe")
        found.append(path)
    stems = [path.name.split(".")[0] for path in found]
    if len(set(stems)) != len(stems):
        raise RecipeError(
            f"{key}: two files are named alike ({', '.join(stems)}); their shards would be, too"
        )
    return found


def _everyone(conversation: Conversation) -> bool:
    return True


def _drawn(conversation: Conversation, *, share: float, seed: int, held: bool) -> bool:
    """Whether a conversation belongs to the held-out part (or not), by its content: copies go together."""
    text = f"{seed}\0{json.dumps(conversation.messages, sort_keys=True)}"
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return (number < share * 2**64) == held


# --- the run ---
class SftRun(Run):
    """One call of `sft`."""

    def __init__(
        self,
        sft: SftRecipe,
        base: Base,
        rows: Prepared,
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        console: Console,
        started: float,
        examine: Examine | None = None,
    ) -> None:
        self.sft, self.base, self.rows = sft, base, rows
        self.adapters: Adapters | None = None
        sources = Sources(rows.train, rows.heldout, base.tokenizer, base.folder)
        super().__init__(recipe, folder, {0: sources}, device, console, started, examine)

    def _build(self) -> Transformer:
        """The model of the base's folder, on the device at once."""
        train, found = self.recipe.train, read_config(self.base.folder)
        if found.max_position_embeddings < train.context:
            raise RecipeError(
                f"train.context is {train.context}; {self.base.name} has {found.max_position_embeddings} "
                "positions: shorten the rows"
            )
        if found.vocab_size < self.base.tokenizer.vocab_size:
            raise RecipeError(
                f"the tokenizer of {self.base.folder} has {self.base.tokenizer.vocab_size} ids, its model "
                f"{found.vocab_size}: the folder mixes two models"
            )
        model = self.base.load(train.dtype, self.device, self.recipe.run.seed)
        self.config = model.config
        return model

    def _optimizer(self, named: Iterable[tuple[str, torch.nn.Parameter]]) -> AdamW:
        if not self.sft.lora.rank:
            return super()._optimizer(named)
        self.adapters = Adapters(self.model, self.sft.lora, seed=self.recipe.run.seed)
        optimizer = super()._optimizer(self.adapters.named_parameters())
        self.adapters.attach(optimizer)
        return optimizer

    def _occasions(self, metrics: Metrics) -> Occasions:
        if self.adapters is not None:
            metrics.say(str(self.adapters))
        return SftOccasions(
            self.recipe, self.folder, self.sources, self.trainer, metrics, self.spikes, self._seconds,
            self.examine, run=self,
        )  # fmt: skip

    def export(self, name: str, facts: Facts) -> Path:
        """Write the model as a published folder with the base's tokenizer and settings, and a card."""
        target = self.folder / name
        write_export(
            self.model, target, self.base, self.sft.export, template=self.sft.model.template,
            adapters=self.adapters, facts=facts,
            metadata={"name": self.recipe.run.name, "trained_by": "hadal sft"},
            card=sft_card(self.sft, self.base.started(), self.model.config, self.rows.report, facts),
        )  # fmt: skip
        return target


class SftOccasions(Occasions):
    """Exports are a fine-tuned model's."""

    def __init__(self, *arguments: Any, run: SftRun) -> None:
        super().__init__(*arguments)
        self.run = run

    def _write_export(self, name: str, facts: Facts) -> Path:
        exported = self.run.export(name, facts)
        self.metrics.event("export", self.trainer.progress.step, path=str(exported))
        return exported

    def memory(self) -> dict[str, int]:
        found = super().memory()
        if self.run.adapters is not None:  # predicted for the training of all weights
            found.pop("predicted_peak_bytes", None)
        return found


# --- looking at rows ---
def show(
    recipe_path: Path | str, count: int, *, overrides: Sequence[str] = (), console: Console | None = None
) -> Report:
    """Print the first `count` rows as they would be trained on, and leave nothing behind: what counts in bold
    green, or between ⟦ and ⟧ without a terminal."""
    recipe, console = load(Path(recipe_path), overrides), console or Console()
    base = Base.of(recipe.model)
    with tempfile.TemporaryDirectory(prefix="hadal-sft-") as folder:
        rows = prepare(recipe, base, Path(folder), Path(recipe_path).parent, partial(say, console))
        for number in range(min(count, rows.train.rows_per_epoch)):
            _show_row(rows.train, number, base.tokenizer, console)
    return rows.report


def _show_row(rows: ChatRows, number: int, tokenizer: Tokenizer, console: Console) -> None:
    row, at = rows.rows(number, 1), 0
    kept = [n for n, padding in zip(row.lengths, row.padding, strict=True) if not padding]
    trained = int((row.weight_RC > 0).sum())
    say(
        console,
        f"— row {number}: {len(kept)} documents, {sum(kept):,} of {rows.context:,} tokens, "
        f"{trained:,} trained",
    )
    for length in kept:
        ids, weights = row.token_RC[0, at : at + length].tolist(), row.weight_RC[0, at : at + length].tolist()
        at += length
        for text, counts in _runs(ids, weights, tokenizer):
            if console.is_terminal:
                style = "bold green" if counts else "dim"
                console.print(text, style=style, end="", highlight=False, markup=False, soft_wrap=True)
            else:
                marked = f"⟦{text}⟧" if counts else text
                console.print(marked, end="", highlight=False, markup=False, soft_wrap=True)
        console.print()


def _runs(ids: list[int], weights: list[float], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Stretches of text that count alike."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (weights[end] > 0) != (weights[start] > 0):
            yield tokenizer.decode(ids[start:end], skip_control=False), weights[start] > 0
            start = end
