"""What a run does now and then beside its steps: log, evaluate, save, export.

Each occasion first waits for the statistics of every step made so far, so that a step that was not finite
raises before anything is made of it; and the clock of the rates starts anew behind it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hadal.data.stream import PackedRows
from hadal.train import state
from hadal.train.accuracy import Examine
from hadal.train.batches import Ints
from hadal.train.domains import Domains, find_domains, token_bytes
from hadal.train.export import Facts, export
from hadal.train.heldout import Heldout, evaluate
from hadal.train.memory import peak_memory
from hadal.train.metrics import Metrics
from hadal.train.recipe import Recipe
from hadal.train.saver import Saver
from hadal.train.sources import Sources
from hadal.train.spikes import Spikes
from hadal.train.trainer import StepStats, Trainer


class Occasions:
    """The occasions of one run. `seconds` tells how long the run has trained, earlier calls included."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        sources: Sources,
        trainer: Trainer,
        metrics: Metrics,
        spikes: Spikes,
        seconds: Callable[[], float],
        examine: Examine | None = None,
    ) -> None:
        self.recipe, self.folder, self.sources = recipe, folder, sources
        self.trainer, self.metrics, self.spikes, self.seconds = trainer, metrics, spikes, seconds
        self.examine = examine
        self._domains: tuple[PackedRows, Domains] | None = None  # of held-out rows, once they were asked for
        self._bytes_V: Ints = np.empty(0, dtype=np.int64)
        self._training_peak = 0
        self.now = recipe  # as the stage at hand sees it
        limits = recipe.checkpoint
        self.saver = Saver(folder / "checkpoints", shard_mib=limits.shard_mib, keep=limits.keep)
        self.last: StepStats | None = None
        self.held: Heldout | None = None
        self.held_ema: Heldout | None = None
        self._saved = time.perf_counter()

    def log(self, arrived: Sequence[StepStats]) -> None:
        """Log steps whose statistics have arrived, and spikes among them."""
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

    def catch_up(self) -> None:
        """Log every step made so far (waits for the device). Raises NonFiniteError."""
        self.log(self.trainer.arrived(wait=True))

    def after(self, step: int) -> None:
        """Do what is due after `step`, which is not the last: held-out loss, accuracy, checkpoint, export."""
        recipe = self.recipe
        self._tell(self.saver.poll())
        if recipe.log.heldout_every_steps and step % recipe.log.heldout_every_steps == 0:
            self.heldout()
        if recipe.log.accuracy_every_steps and step % recipe.log.accuracy_every_steps == 0:
            self.accuracy()
        due = recipe.checkpoint.every_steps and step % recipe.checkpoint.every_steps == 0
        minutes = (time.perf_counter() - self._saved) / 60
        if due or (recipe.checkpoint.every_minutes and minutes >= recipe.checkpoint.every_minutes):
            self.save()
        if recipe.export.every_steps and step % recipe.export.every_steps == 0:
            self.export()

    def finish(self, reason: str) -> Path:
        """The last evaluation (a signal wants us gone soon: none then), checkpoint and export; returns the
        export's folder."""
        self.catch_up()
        if reason != "signal":
            self.heldout()
            if self.recipe.log.accuracy_every_steps:
                self.accuracy()
        self.save()
        self._tell(self.saver.wait())
        exported = self.export()
        progress = self.trainer.progress
        told = {"tokens": progress.tokens, "reason": reason, "seconds": self.seconds()}
        self.metrics.event("stop", progress.step, **told, **self.memory())
        return exported

    def heldout(self) -> None:
        """Evaluate on held-out text, the moving average too."""
        if self.sources.heldout is None:
            return
        self.catch_up()
        self.trainer.make_room()
        self.held = self._evaluate(self.sources.heldout)
        self.metrics.event("heldout", self.trainer.progress.step, **dataclasses.asdict(self.held))
        if self.trainer.ema is not None:
            with self.trainer.ema.in_model():
                self.held_ema = self._evaluate(self.sources.heldout)
            self.metrics.event("heldout_ema", self.trainer.progress.step, **dataclasses.asdict(self.held_ema))
        self.metrics.restart_clock()

    def _evaluate(self, source: PackedRows) -> Heldout:
        train, model = self.now.train, self.trainer.model
        rows = max(1, self.recipe.log.heldout_tokens // train.context)
        if self._domains is None or self._domains[0] is not source:
            self._domains = source, find_domains(source, rows)
            self._bytes_V = token_bytes(self.sources.tokenizer, model.config.vocab_size)
        return evaluate(
            model,
            source,
            rows=rows,
            micro_rows=train.micro_tokens // train.context,
            mask_documents=self.recipe.data.mask_documents,
            recomputed=train.recompute,
            domains=self._domains[1],
            bytes_V=self._bytes_V,
        )

    def accuracy(self) -> None:
        """Let the model answer held-out problems. On a GPU the peak of memory stays that of training."""
        assert self.examine is not None, "checked by `train`"
        self.catch_up()
        self.trainer.make_room()
        log, model = self.recipe.log, self.trainer.model
        self._training_peak = self._peak()
        found = self.examine(model, self.sources, log.accuracy_problems, log.accuracy_max_tokens)
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        self.metrics.event("accuracy", self.trainer.progress.step, **dataclasses.asdict(found))
        self.metrics.restart_clock()

    def _peak(self) -> int:
        """The most bytes on a GPU so far, but for what `accuracy` took; 0 on a CPU."""
        device = self.trainer.model.device
        now = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return max(self._training_peak, now)

    def enter(self, now: Recipe, sources: Sources, event: Mapping[str, Any] | None) -> None:
        """Go on in another stage; `event` tells of a phase whose first step comes next."""
        self.now, self.sources = now, sources
        if event is not None:
            self.metrics.event("phase", self.trainer.progress.step + 1, **event)
            self.spikes.restore(())  # other rows, another loss: what was usual is no measure

    def leave(self, name: str) -> None:
        """What a stage leaves that another follows: held-out loss, `export-NAME`, checkpoint."""
        self.heldout()
        if self.recipe.export.phases:
            self.catch_up()
            self._write_export(f"export-{name}", self._facts(self.held))
        self.save()

    def save(self) -> None:
        """Write a checkpoint, beside the next steps where the recipe says so."""
        self.catch_up()  # a step that was not finite raises here, before it is saved
        progress = self.trainer.progress
        before = self.saver.start(
            progress.step,
            self.trainer.tensors(),
            {
                "tokens": progress.tokens,
                "position": progress.position,
                "seconds": self.seconds(),
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
        if saved is not None:
            self.metrics.event("checkpoint", saved.step, path=str(saved.path))

    def export(self) -> Path:
        """Write the model, and its moving average, in the published layout."""
        self.catch_up()
        exported = self._write_export("export", self._facts(self.held))
        if self.trainer.ema is not None:
            facts = dataclasses.replace(self._facts(self.held_ema), average=self.recipe.ema.rate)
            with self.trainer.ema.in_model():
                self._write_export("export-ema", facts)
        self.metrics.restart_clock()
        return exported

    def _write_export(self, name: str, facts: Facts) -> Path:
        tokenizer = self.sources.tokenizer_folder
        exported = export(self.trainer.model, self.recipe, facts, tokenizer, self.folder / name)
        self.metrics.event("export", self.trainer.progress.step, path=str(exported))
        return exported

    def _facts(self, held: Heldout | None) -> Facts:
        rates = sorted(self.metrics.rates)
        cuda = self.trainer.model.device.type == "cuda"
        return Facts(
            step=self.trainer.progress.step,
            steps=self.recipe.steps,
            context=self.now.train.context,
            tokens=self.trainer.progress.tokens,
            seconds=self.seconds(),
            device=torch.cuda.get_device_name(self.trainer.model.device)
            if cuda
            else f"CPU, {torch.get_num_threads()} threads",
            torch=torch.__version__,
            heldout_loss=None if held is None else held.loss,
            heldout_exact=None if held is None else held.exact,
            heldout_documents=0 if held is None else held.documents,
            tokens_per_second=rates[len(rates) // 2] if rates else None,
        )

    def memory(self) -> dict[str, int]:
        """Bytes on the device at the peak: predicted, and measured where the device counts them."""
        cuda = self.trainer.model.device.type == "cuda"
        found: dict[str, int] = {}
        if not self.recipe.train.fp8:
            found["predicted_peak_bytes"] = peak_memory(
                self.recipe, self.trainer.model.config, cuda=cuda
            ).peak
        if cuda:
            found["peak_bytes"] = self._peak()
        return found

    def close(self) -> None:
        """Wait for the save on its way."""
        self.saver.close()
