"""`hadal train RECIPE`: from a recipe to a trained model in a folder.

    OUT/recipe.json      the resolved recipe            OUT/export/         the model, in the published layout
    OUT/metrics.jsonl    what was measured              OUT/tensorboard/    curves
    OUT/checkpoints/…    where `--resume` goes on       OUT/data/…          puzzles, as shards
    OUT/export-ema/      the moving average of the weights, where the recipe keeps one

A run stops cleanly, with a checkpoint and an export, at its last step, at `train.max_minutes`, on SIGTERM
and on Ctrl-C. `--resume` goes on bit for bit where the last checkpoint stands.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from hadal.config import ConfigError, ModelConfig
from hadal.data.stream import PackedRows
from hadal.model.layers import Ffn
from hadal.model.moe import Experts
from hadal.model.transformer import Transformer
from hadal.train import recipe as recipes
from hadal.train import state
from hadal.train.batches import Prefetcher, batches
from hadal.train.ema import Ema
from hadal.train.export import Facts, export
from hadal.train.flops import Peak, peak, step_flops
from hadal.train.heldout import Heldout, evaluate
from hadal.train.losses import Objective
from hadal.train.memory import peak_memory
from hadal.train.metrics import Metrics
from hadal.train.optimizer import AdamW
from hadal.train.recipe import Recipe, RecipeError
from hadal.train.saver import Saver
from hadal.train.sources import Sources, open_sources
from hadal.train.spikes import Spikes
from hadal.train.trainer import Progress, StepStats, Trainer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
) -> Outcome:
    """Train by a recipe. `overrides`: "section.key=value"; `out`: the run's folder (default: runs/NAME).

    Raises RecipeError, CheckpointError, NonFiniteError, and what the data and the tokenizer raise.
    """
    recipe = recipes.load(Path(recipe_path), overrides)
    folder = Path(out) if out is not None else Path("runs") / recipe.run.name
    checkpoint = _open_folder(folder, recipe, resume)
    console = console or Console(stderr=True)
    started = time.perf_counter()
    chosen = _device(device)
    sources = open_sources(recipe, folder / "data", partial(_say, console))
    run = Run(recipe, folder, sources, chosen, console, started)
    try:
        if checkpoint is not None:
            run.restore(checkpoint)
        return run.go()
    finally:
        run.close()


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _open_folder(folder: Path, recipe: Recipe, resume: bool) -> state.Checkpoint | None:
    """Create or check a run's folder; the checkpoint to go on from, if any."""
    saved = folder / "recipe.json"
    checkpoint = state.latest(folder / "checkpoints")
    if checkpoint is not None and not resume:
        raise RecipeError(
            f"{folder} holds a run at step {checkpoint.step}; go on with --resume, or choose another --out"
        )
    if resume and checkpoint is not None:
        before = recipes.from_dict(
            json.loads(saved.read_text(encoding="utf-8"))
        )  # keys added since: defaults
        changed = recipes.differences(before.to_dict(), recipe.to_dict())
        if changed:
            raise RecipeError(
                f"the recipe differs from that of the run in {folder} in {', '.join(changed)}; resume "
                "with the same recipe and --set, or start anew with another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".recipe.json.tmp"
    temporary.write_text(json.dumps(recipe.to_dict(), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, saved)
    return checkpoint


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda, but torch finds no CUDA device here; use --device cpu or auto")
    return device


def model_config(recipe: Recipe, sources: Sources) -> ModelConfig:
    """The recipe's [model] as a ModelConfig; vocabulary and special ids come from the tokenizer."""
    tokenizer = sources.tokenizer
    table: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    table |= {"vocab_size": -(-tokenizer.vocab_size // 64) * 64, "initializer_range": recipe.train.init_std}
    try:
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
        sources: Sources,
        device: torch.device,
        console: Console,
        started: float,
    ) -> None:
        self.recipe, self.folder, self.sources, self.device = recipe, folder, sources, device
        self.console, self.started = console, started
        self.seconds_before = 0.0  # of earlier calls, when resumed
        self.steps = recipe.train.steps
        self.model = self._build()
        self.peak = peak(device, self.model.dtype)
        self.trainer = self._trainer()
        self.spikes = Spikes(recipe.log.spike_sigmas)
        limits = recipe.checkpoint
        self.saver = Saver(folder / "checkpoints", shard_mib=limits.shard_mib, keep=limits.keep)
        self.metrics: Metrics | None = None
        self.prefetcher: Prefetcher | None = None
        self.last: StepStats | None = None
        self.held: Heldout | None = None
        self.held_ema: Heldout | None = None
        self.stop_reason = ""
        self._saved = time.perf_counter()

    def _build(self) -> Transformer:
        """The model with its first weights, drawn on the CPU so that every machine starts from the same."""
        config, train = model_config(self.recipe, self.sources), self.recipe.train
        torch.manual_seed(self.recipe.run.seed)
        model = Transformer(config, dtype=torch.float32).init_weights(self.recipe.run.seed, train.init_std)
        dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        model = model.to(self.device, _DTYPES[dtype if train.dtype == "auto" else train.dtype])
        if train.compile:
            _compile(model)
        return model

    def _trainer(self) -> Trainer:
        recipe, adamw = self.recipe, self.recipe.optimizer
        optimizer = AdamW(
            self.model.named_parameters(),
            betas=adamw.betas,
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
            clip=adamw.clip,
            moment_dtype=_DTYPES[adamw.moments],
        )
        alpha, train = recipe.balance.sequence_alpha, recipe.train
        objective = Objective(alpha, train.z_loss, train.recompute, train.fp8)
        ema = Ema(optimizer, recipe.ema.rate, recipe.ema.every_steps) if recipe.ema.rate else None
        return Trainer(self.model, optimizer, iter(()), recipe.schedule(), objective, ema=ema)

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
            total_tokens=self.recipe.train.tokens_read,
            peak_flops=self.peak.flops,
            tensorboard=self.recipe.log.tensorboard,
            after_step=progress.step,
            console=self.console,
        )
        self._introduce(self.metrics, self.peak)
        train = self.recipe.train
        stream = batches(
            self.sources.train,
            position=progress.position,
            rows=lambda position: train.ramp.rows(position * train.context),
            micro_rows=train.micro_batch_tokens // train.context,
            depths=len(self.model.mtp),
            mask_documents=self.recipe.data.mask_documents,
        )
        self.prefetcher = Prefetcher(stream, self.device)
        self.trainer.batches = self._counted(self.prefetcher, self.metrics)
        with self._signals():
            while self.trainer.progress.step < self.steps and not self._stopping():
                self._log(self.trainer.step())
                self._occasions(self.trainer.progress.step)
        return self._finish(self.metrics)

    def _counted(self, source: Prefetcher, metrics: Metrics) -> Iterator[Any]:
        for batch in source:
            metrics.worked(batch.tokens, step_flops(self.model.config, batch.tokens, batch.attended_pairs))
            yield batch

    def _log(self, arrived: Sequence[StepStats]) -> None:
        assert self.metrics is not None
        for stats in arrived:
            self.last = stats
            usual = self.spikes.expected(stats.loss)
            if usual is not None:
                norm, rows = stats.grad_norm, list(stats.rows)
                self.metrics.event(
                    "spike", stats.step, loss=stats.loss, usual=usual, grad_norm=norm, rows=rows
                )
            if stats.step % self.recipe.log.every_steps == 0:
                self.metrics.step(stats, load=self.trainer.take_load())

    def _occasions(self, step: int) -> None:
        """What happens now and then: held-out loss, checkpoint, export."""
        recipe, last = self.recipe, step >= self.steps
        if last:
            return  # `_finish` does all of it
        self._tell(self.saver.poll())
        if recipe.log.heldout_every_steps and step % recipe.log.heldout_every_steps == 0:
            self._heldout()
        due = recipe.checkpoint.every_steps and step % recipe.checkpoint.every_steps == 0
        minutes = (time.perf_counter() - self._saved) / 60
        if due or (recipe.checkpoint.every_minutes and minutes >= recipe.checkpoint.every_minutes):
            self._save()
        if recipe.export.every_steps and step % recipe.export.every_steps == 0:
            self._export()

    def _stopping(self) -> bool:
        limit = self.recipe.train.max_minutes
        if not self.stop_reason and limit and time.perf_counter() - self.started >= 60 * limit:
            self.stop_reason = "time"
        return bool(self.stop_reason)

    def _finish(self, metrics: Metrics) -> Outcome:
        self._log(self.trainer.arrived(wait=True))
        progress = self.trainer.progress
        reason = "finished" if progress.step >= self.steps else self.stop_reason
        if reason != "signal":  # a signal wants us gone soon
            self._heldout()
        self._save()
        self._tell(self.saver.wait())
        exported = self._export()
        metrics.event("stop", progress.step, reason=reason, seconds=self._seconds(), **self._memory())
        if reason != "finished":
            metrics.say(f"stopped at step {progress.step} of {self.steps}: go on with --resume")
        loss = None if self.last is None else self.last.loss
        return Outcome(reason, progress.step, progress.tokens, self.folder, exported, loss)

    # --- what the loop does now and then
    # -----------------------------------------------------------------------
    def _heldout(self) -> None:
        assert self.metrics is not None
        if self.sources.heldout is None:
            return
        self._log(self.trainer.arrived(wait=True))
        self.held = self._evaluate(self.sources.heldout)
        self.metrics.event("heldout", self.trainer.progress.step, **dataclasses.asdict(self.held))
        if self.trainer.ema is not None:
            with self.trainer.ema.in_model():
                self.held_ema = self._evaluate(self.sources.heldout)
            self.metrics.event("heldout_ema", self.trainer.progress.step, **dataclasses.asdict(self.held_ema))
        self.metrics.restart_clock()

    def _evaluate(self, source: PackedRows) -> Heldout:
        train = self.recipe.train
        return evaluate(
            self.model,
            source,
            rows=max(1, self.recipe.log.heldout_tokens // train.context),
            micro_rows=train.micro_tokens // train.context,
            mask_documents=self.recipe.data.mask_documents,
            recomputed=train.recompute,
        )

    def _save(self) -> None:
        assert self.metrics is not None
        self._log(
            self.trainer.arrived(wait=True)
        )  # a step that was not finite raises here, before it is saved
        progress = self.trainer.progress
        before = self.saver.start(
            progress.step,
            self.trainer.tensors(),
            {
                "tokens": progress.tokens,
                "position": progress.position,
                "seconds": self._seconds(),
                "recent_losses": list(self.spikes.recent),
                "recipe": self.recipe.to_dict(),
            },
        )
        self._tell(before)
        if not self.recipe.checkpoint.asynchronous:
            self._tell(self.saver.wait())
        self._saved = time.perf_counter()
        self.metrics.restart_clock()

    def _tell(self, saved: state.Checkpoint | None) -> None:
        """Log a checkpoint that has reached the disk."""
        if saved is not None and self.metrics is not None:
            self.metrics.event("checkpoint", saved.step, path=str(saved.path))

    def _export(self) -> Path:
        assert self.metrics is not None
        self._log(self.trainer.arrived(wait=True))
        exported = self._write_export("export", self._facts(self.held))
        if self.trainer.ema is not None:
            facts = dataclasses.replace(self._facts(self.held_ema), average=self.recipe.ema.rate)
            with self.trainer.ema.in_model():
                self._write_export("export-ema", facts)
        self.metrics.restart_clock()
        return exported

    def _write_export(self, name: str, facts: Facts) -> Path:
        assert self.metrics is not None
        tokenizer = self.sources.tokenizer_folder
        exported = export(self.model, self.recipe, facts, tokenizer, self.folder / name)
        self.metrics.event("export", self.trainer.progress.step, path=str(exported))
        return exported

    def _facts(self, held: Heldout | None) -> Facts:
        assert self.metrics is not None
        rates = sorted(self.metrics.rates)
        cuda = self.device.type == "cuda"
        return Facts(
            step=self.trainer.progress.step,
            steps=self.steps,
            tokens=self.trainer.progress.tokens,
            seconds=self._seconds(),
            device=torch.cuda.get_device_name(self.device)
            if cuda
            else f"CPU, {torch.get_num_threads()} threads",
            torch=torch.__version__,
            heldout_loss=None if held is None else held.loss,
            heldout_exact=None if held is None else held.exact,
            heldout_documents=0 if held is None else held.documents,
            tokens_per_second=rates[len(rates) // 2] if rates else None,
        )

    def _memory(self) -> dict[str, int]:
        """Bytes on the device at the peak: predicted, and measured where the device counts them."""
        cuda = self.device.type == "cuda"
        found: dict[str, int] = {}
        if not self.recipe.train.fp8:
            found["predicted_peak_bytes"] = peak_memory(self.recipe, self.model.config, cuda=cuda).peak
        if cuda:
            found["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return found

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _introduce(self, metrics: Metrics, found: Peak) -> None:
        config, n = self.model.config, self.model.config.parameters()
        train, step = self.recipe.train, self.trainer.progress.step
        metrics.say(
            f"{self.recipe.run.name}: {n.main + n.mtp_unique:,} parameters ({n.active:,} active), vocabulary "
            f"{config.vocab_size:,}, {str(self.model.dtype).removeprefix('torch.')} on {self.device}"
        )
        memory = self._memory().get("predicted_peak_bytes")
        first = f"{train.batch_tokens_start:,} to " if train.batch_tokens_start else ""
        metrics.say(
            f"{self.steps:,} steps of {first}{train.batch_tokens:,} tokens in rows of {train.context:,}; "
            f"peak: {found.source}"
            + (f"; memory: {memory / 1e9:.2f} GB predicted" if memory else "")
            + (f"; resumed at step {step}" if step else "")
        )

    # --- stopping
    # ------------------------------------------------------------------------------------------------
    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C end the run after the step at hand; the second Ctrl-C ends it at
        once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop_reason == "signal" and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_reason = "signal"

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: whoever called us handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def close(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.close()
        self.saver.close()
        if self.trainer.ema is not None:
            self.trainer.ema.close()
        if self.metrics is not None:
            self.metrics.close()
