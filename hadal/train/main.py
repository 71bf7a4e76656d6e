"""`hadal train RECIPE`: from a recipe to a trained model in a folder.

    OUT/recipe.json      the resolved recipe            OUT/export/         the model, in the published layout
    OUT/metrics.jsonl    what was measured              OUT/tensorboard/    curves
    OUT/checkpoints/…    where `--resume` goes on       OUT/data/…          puzzles, as shards
    OUT/export-ema/      the moving average of the weights, where the recipe keeps one

A run stops cleanly, with a checkpoint and an export, at its last step, at `train.max_minutes`, on SIGTERM
and on Ctrl-C. `--resume` goes on bit for bit where the last checkpoint stands.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from hadal.config import ConfigError, ModelConfig
from hadal.model.layers import Ffn
from hadal.model.moe import Experts
from hadal.model.transformer import Transformer
from hadal.ops.fp8_training import Scales
from hadal.text.tokenizer import Tokenizer
from hadal.train import recipe as recipes
from hadal.train import state
from hadal.train.accuracy import Examine
from hadal.train.batches import Batch, Prefetcher, batches
from hadal.train.ema import Ema
from hadal.train.flops import Peak, peak, step_flops
from hadal.train.graphs import PassGraphs, unfit
from hadal.train.initial import start_from, start_table
from hadal.train.losses import Objective
from hadal.train.metrics import Metrics
from hadal.train.occasions import Occasions
from hadal.train.opening import folder_of, opened, say
from hadal.train.optimizer import AdamW
from hadal.train.phases import Stage, begun, config_at, recipe_at, stage_at, stages
from hadal.train.recipe import LogRecipe, OptimizerRecipe, Recipe, RecipeError
from hadal.train.sources import Sources, open_stages, tokenizer_of
from hadal.train.spikes import Spikes
from hadal.train.stopping import Stop
from hadal.train.trainer import Progress, Trainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `reason`: "finished", or "time" (max_minutes) and "signal", which can be resumed."""

    reason: str
    step: int
    tokens: int
    folder: Path
    export: Path
    loss: float | None

    @property
    def finished(self) -> bool:
        return self.reason == "finished"


def train(
    recipe_path: Path | str,
    *,
    resume: bool = False,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    device: str = "auto",
    console: Console | None = None,
    examine: Examine | None = None,
) -> Outcome:
    """Train by a recipe. `overrides`: "section.key=value"; `out`: the run's folder (default: runs/NAME).
    `examine`: what measures accuracy, where the recipe asks for it (hadal.evals.in_training.examine).

    Raises RecipeError, CheckpointError, NonFiniteError, and what the data and the tokenizer raise.
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
) -> AbstractContextManager[Run]:
    """A run where it is to begin, or to go on; see `train`."""
    recipe = recipes.load(Path(recipe_path), overrides)
    check_examine(recipe.log, examine)
    folder, console = folder_of(out, recipe.run.name), console or Console(stderr=True)

    def changed(before: Mapping[str, Any], step: int) -> list[str]:
        return _changed(recipes.from_dict(before), recipe, step)  # keys added since: defaults

    def make() -> Run:
        started = time.perf_counter()
        chosen = device_of(device)
        model_config(recipe, tokenizer_of(recipe.data)[0])  # refused before any data are written
        sources = open_stages(recipe, folder / "data", partial(say, console))
        return Run(recipe, folder, sources, chosen, console, started, examine)

    return opened(folder, recipe.to_dict(), resume, changed, make, console)


def check_examine(log: LogRecipe, examine: Examine | None) -> None:
    """Raises RecipeError where accuracy is asked for, and nothing measures it."""
    if log.accuracy_every_steps and examine is None:
        raise RecipeError(
            f"log.accuracy_every_steps is {log.accuracy_every_steps}, and nothing measures accuracy: "
            "call it with examine=hadal.evals.in_training.examine, or set it to 0"
        )


def _changed(before: Recipe, now: Recipe, step: int) -> list[str]:
    """Keys that a run at `step` depends on and that have changed; phases that have not begun may change."""
    count = begun(stages(before), step)
    one, other = (recipes.comparable(recipe.to_dict(), count) for recipe in (before, now))
    return recipes.differences(one, other)


def device_of(name: str) -> torch.device:
    """The device of a name; "auto": the GPU if there is one. Raises RecipeError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"--device is {name!r}; it must be auto, cpu, cuda, or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda, but torch finds no CUDA device here; use --device cpu or auto")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Of weights that are trained; "auto": bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return DTYPES[name]


def adamw(named: Iterable[tuple[str, torch.nn.Parameter]], recipe: OptimizerRecipe) -> AdamW:
    """The optimizer of an `[optimizer]` table."""
    return AdamW(
        named, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay, clip=recipe.clip,
        moment_dtype=DTYPES[recipe.moments],
    )  # fmt: skip


def model_config(recipe: Recipe, tokenizer: Tokenizer) -> ModelConfig:
    """The recipe's [model] as a ModelConfig; vocabulary and special ids come from the tokenizer."""
    table: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    table |= {"vocab_size": -(-tokenizer.vocab_size // 64) * 64, "initializer_range": recipe.train.init_std}
    try:
        if recipe.init.weights:
            table |= start_table(Path(recipe.init.weights))
        config = ModelConfig.from_hf(table | dict(recipe.model))
    except ConfigError as error:
        raise RecipeError(f"[model]: {error}") from None
    if config.vocab_size < tokenizer.vocab_size:
        raise RecipeError(
            f"model.vocab_size is {config.vocab_size}; the tokenizer has {tokenizer.vocab_size} "
            "ids (leave the key out)"
        )
    if config.max_position_embeddings < recipe.train.context:
        raise RecipeError(
            f"model.max_position_embeddings is {config.max_position_embeddings}; train.context "
            f"needs at least {recipe.train.context}"
        )
    return config


def _compile(model: Transformer) -> None:
    """Compile the parts of a block that see tensors of fixed shapes only: routed experts and feed-forward
    networks.

    Attention stays as it is: it takes the lengths of documents, which differ in every batch.
    """
    if model.device.type != "cuda":
        raise RecipeError(
            "train.compile is true; it is for a GPU (on a CPU, experts take data-dependent shapes)"
        )
    for module in model.modules():
        if isinstance(module, (Experts, Ffn)):
            module.compile(dynamic=False)


class Run:
    """One call of `train`: everything that lives from its start to its end."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        sources: Mapping[int, Sources],
        device: torch.device,
        console: Console,
        started: float,
        examine: Examine | None = None,
    ) -> None:
        self.recipe, self.folder, self.staged, self.device = recipe, folder, sources, device
        self.sources = next(iter(sources.values()))
        self.stage: Stage | None = None
        self.console, self.started, self.examine = console, started, examine
        self.seconds_before = 0.0  # of earlier calls, when resumed
        self.steps, self.stages = recipe.steps, stages(recipe)
        self.model = self._build()
        self.peak = peak(device, self.model.dtype)
        self.trainer = self._trainer()
        self.spikes = Spikes(recipe.log.spike_sigmas)
        self.metrics: Metrics | None = None
        self.occasions: Occasions | None = None
        self.prefetcher: Prefetcher | None = None
        self.stop = Stop(recipe.train.max_minutes, started)

    def _build(self) -> Transformer:
        """The model with its first weights, drawn on the CPU so that every machine starts from the same."""
        config, train = model_config(self.recipe, self.sources.tokenizer), self.recipe.train
        self.config = config_at(config, self.stages, 0)
        config_at(config, self.stages, len(self.stages) - 1)  # a phase that cannot be is refused at once
        torch.manual_seed(self.recipe.run.seed)
        model = Transformer(config, dtype=torch.float32).init_weights(self.recipe.run.seed, train.init_std)
        if self.recipe.init.weights:
            start_from(model, Path(self.recipe.init.weights))
        model = model.to(self.device, dtype_of(train.dtype, self.device))
        if train.compile:
            _compile(model)
        return model

    def _trainer(self) -> Trainer:
        recipe, optimizer = self.recipe, self._optimizer(self.model.named_parameters())
        alpha, train = recipe.balance.sequence_alpha, recipe.train
        scales = cast(Scales, train.fp8_scales)
        objective = Objective(alpha, train.z_loss, train.recompute, train.fp8, scales)
        ema = Ema(optimizer, recipe.ema.rate, recipe.ema.every_steps) if recipe.ema.rate else None
        graphs = self._graphs(optimizer)
        return Trainer(self.model, optimizer, iter(()), recipe.schedule(), objective, ema=ema, graphs=graphs)

    def _optimizer(self, named: Iterable[tuple[str, torch.nn.Parameter]]) -> AdamW:
        return adamw(named, self.recipe.optimizer)

    def _graphs(self, optimizer: AdamW) -> PassGraphs | None:
        """Graphs of passes, where the recipe wants them and they can be."""
        train = self.recipe.train
        if train.graph is False:
            return None
        reason = unfit(self.model, masked=self.recipe.data.mask_documents, compiled=train.compile)
        if reason is None:
            return PassGraphs(self.model, optimizer, required=train.graph is True)
        if train.graph is True:
            raise RecipeError(f'train.graph is true, but {reason}; set it to "auto" or false')
        if self.device.type == "cuda":
            self.console.print(f"steps are no CUDA graphs: {reason}", style="dim", highlight=False)
        return None

    def restore(self, checkpoint: state.Checkpoint) -> None:
        """Go on from a checkpoint."""
        tensors, meta = state.load(checkpoint)
        try:
            self.trainer.restore(tensors, Progress(meta["step"], meta["tokens"], meta["position"]))
        except ValueError as error:
            raise state.CheckpointError(f"{checkpoint.path}: {error}") from None
        self.seconds_before = float(meta["seconds"])
        self.spikes.restore(meta.get("recent_losses", []))

    # --- the loop
    # --------------------------------------------------------------------------------------------
    def go(self) -> Outcome:
        """Train to the end, or until something says stop; then save and export."""
        progress = self.trainer.progress
        self.metrics = Metrics(
            self.folder,
            total_steps=self.steps,
            total_tokens=self.recipe.tokens_read,
            peak_flops=self.peak.flops,
            tensorboard=self.recipe.log.tensorboard,
            after_step=progress.step,
            console=self.console,
        )
        self.occasions = self._occasions(self.metrics)
        self._introduce(self.occasions, self.peak)
        self.prefetcher = Prefetcher(self._stream(progress.step, progress.tokens), self.device)
        self.trainer.batches = self._counted(self.prefetcher, self.metrics)
        self._begin(self.occasions, progress.step)
        with self.stop.signals():
            while self.trainer.progress.step < self.steps and not self.stop.asked():
                self._enter(self.occasions, stage_at(self.stages, self.trainer.progress.step))
                self.occasions.log(self.trainer.step())
                if self.trainer.progress.step < self.steps:
                    self.occasions.after(self.trainer.progress.step)
        return self._finish(self.occasions)

    def _occasions(self, metrics: Metrics) -> Occasions:
        return Occasions(
            self.recipe,
            self.folder,
            self.sources,
            self.trainer,
            metrics,
            self.spikes,
            self._seconds,
            self.examine,
        )

    def _stream(self, step: int, tokens: int) -> Iterator[Batch]:
        """The batches after `step` steps and `tokens` tokens, stage by stage, to the end of the run."""
        for stage in self.stages[stage_at(self.stages, step).index :]:
            if step >= stage.end_step:
                continue
            one = batches(
                self.staged[stage.index].train,
                position=max(0, tokens - stage.first_token) // stage.context,
                rows=stage.rows,
                micro_rows=recipe_at(self.recipe, stage).train.micro_batch_tokens // stage.context,
                depths=len(self.model.mtp),
                mask_documents=self.recipe.data.mask_documents,
            )
            yield from islice(one, stage.end_step - max(step, stage.first_step))

    def _begin(self, occasions: Occasions, step: int) -> None:
        """Be in the stage at `step`. At its very border the stage before may not have been seen off: a run
        that was stopped there, or to which phases were added."""
        stage = stage_at(self.stages, step)
        if stage.index and 0 < step == stage.first_step and self.recipe.export.phases:
            before = self.stages[stage.index - 1]
            if not (self.folder / f"export-{before.name}").exists():
                self._enter(occasions, before)
        self._enter(occasions, stage)

    def rehearse(self, steps: int) -> Batch:
        """Make `steps` steps of which nothing is logged or saved, and return the batch that comes next: of a
        finished run its first. Raises NonFiniteError, and RecipeError where the run ends before."""
        progress = self.trainer.progress
        last = progress.step + steps
        if steps and last >= self.steps:
            raise RecipeError(f"the run has {self.steps} steps; there is none after step {last}")
        at = (progress.step, progress.tokens) if progress.step < self.steps else (0, 0)
        self.prefetcher = Prefetcher(self._stream(*at), self.device)
        self.trainer.batches = self.prefetcher
        while self.trainer.progress.step < last:
            self._set_rope(stage_at(self.stages, self.trainer.progress.step))
            self.trainer.step()
        self.trainer.arrived(wait=True)
        self._set_rope(stage_at(self.stages, min(last, self.steps - 1)))
        return next(self.prefetcher)

    def _set_rope(self, stage: Stage) -> ModelConfig:
        config = config_at(self.config, self.stages, stage.index)
        self.model.set_rope(config)
        return config

    def _enter(self, occasions: Occasions, stage: Stage) -> None:
        """Be in `stage`: its rotary embedding, its held-out rows. The stage that ends here is seen off first;
        one that a call begins in the middle of says nothing."""
        if stage is self.stage:
            return
        if self.stage is not None:
            occasions.leave(self.stage.name)
        self.stage = stage
        config = self._set_rope(stage)
        event = None
        if stage.index and self.trainer.progress.step == stage.first_step:
            rope = config.rope
            event = {"name": stage.name, "context": stage.context, "steps": stage.steps,
                     "tokens": stage.tokens, "rope": f"{rope.type} {rope.factor:g}"}  # fmt: skip
        occasions.enter(recipe_at(self.recipe, stage), self.staged[stage.index], event)

    def _counted(self, source: Prefetcher, metrics: Metrics) -> Iterator[Any]:
        for batch in source:
            metrics.worked(batch.tokens, step_flops(self.model.config, batch.tokens, batch.attended_pairs))
            yield batch

    def _finish(self, occasions: Occasions) -> Outcome:
        occasions.catch_up()
        progress = self.trainer.progress
        reason = "finished" if progress.step >= self.steps else self.stop.reason
        exported = occasions.finish(reason)
        if reason != "finished":
            occasions.metrics.say(f"stopped at step {progress.step} of {self.steps}: go on with --resume")
        loss = None if occasions.last is None else occasions.last.loss
        return Outcome(reason, progress.step, progress.tokens, self.folder, exported, loss)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _introduce(self, occasions: Occasions, found: Peak) -> None:
        metrics = occasions.metrics
        config, n = self.model.config, self.model.config.parameters()
        train, step = self.recipe.train, self.trainer.progress.step
        metrics.say(
            f"{self.recipe.run.name}: {n.main + n.mtp_unique:,} parameters ({n.active:,} active), vocabulary "
            f"{config.vocab_size:,}, {str(self.model.dtype).removeprefix('torch.')} on {self.device}"
        )
        memory = occasions.memory().get("predicted_peak_bytes")
        first = f"{train.batch_tokens_start:,} to " if train.batch_tokens_start else ""
        metrics.say(
            f"{self.stages[0].steps:,} steps of {first}{train.batch_tokens:,} tokens in rows of "
            f"{train.context:,}; peak: {found.source}"
            + "".join(f"; {s.name}: {s.steps:,} steps in rows of {s.context:,}" for s in self.stages[1:])
            + (f"; memory: {memory / 1e9:.2f} GB predicted" if memory else "")
            + (f"; resumed at step {step}" if step else "")
        )

    def close(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.close()
        if self.occasions is not None:
            self.occasions.close()
        if self.trainer.ema is not None:
            self.trainer.ema.close()
        if self.metrics is not None:
            self.metrics.close()
