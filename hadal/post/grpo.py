"""`hadal grpo RECIPE`: a model, prompts and rewards to a model that earns more of them.

    OUT/recipe.json      the resolved recipe            OUT/samples.jsonl    completions, rewards, verdicts
    OUT/metrics.jsonl    what was measured              OUT/checkpoints/…    where `--resume` goes on
    OUT/export/          the model in the published layout, with a card; adapters are merged

The step itself is in hadal/post/policy.py. A run stops cleanly, with a checkpoint and an export, at its last
step, at `train.max_minutes`, on SIGTERM and on Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hadal.post import rewards
from hadal.post.base import Base, changed_since, write_export
from hadal.post.card import grpo_card
from hadal.post.grpo_recipe import GrpoRecipe, from_dict, load
from hadal.post.lora import Adapters
from hadal.post.policy import GrpoStats, Policy, Rollout
from hadal.post.reference import PREFIX, Reference
from hadal.post.rollout import Sampler
from hadal.post.samples import harmless
from hadal.post.tasks import Prompts
from hadal.train import state
from hadal.train.export import Facts
from hadal.train.flops import peak, step_flops
from hadal.train.main import Outcome, adamw, device_of
from hadal.train.metrics import JsonLines, Metrics
from hadal.train.opening import folder_of, opened
from hadal.train.schedules import LearningRate, Schedule
from hadal.train.stopping import Stop
from hadal.train.trainer import Progress, Trainer


def grpo(
    recipe_path: Path | str,
    *,
    resume: bool = False,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    device: str = "auto",
    console: Console | None = None,
    judge: Any = None,
    model: Any = None,
) -> Outcome:
    """Train by rewards, by a recipe; arguments as of `hadal.train.main.train`. `judge`, `model`: what rewards
    of these kinds ask (hadal.post.rewards.Rewards).

    Raises RecipeError, RewardError, RolloutError, EngineError, WeightsError, HubError, CheckpointError,
    NonFiniteError.
    """
    with open_run(recipe_path, resume, overrides, out, device, console, judge, model) as run:
        return run.go()


@contextmanager
def open_run(
    recipe_path: Path | str,
    resume: bool,
    overrides: Sequence[str],
    out: Path | str | None,
    device: str,
    console: Console | None,
    judge: Any = None,
    model: Any = None,
) -> Iterator[GrpoRun]:
    """A run where it is to begin, or to go on; see `grpo`."""
    recipe = _with_paths(load(Path(recipe_path), overrides), Path(recipe_path).parent)
    folder, console = folder_of(out, recipe.run.name), console or Console(stderr=True)
    base = Base.of(recipe.model)
    started = base.started()
    prompts = Prompts(recipe.tasks, recipe.run.seed)
    resolved = recipe.to_dict() | {"started": dataclasses.asdict(started)}
    changed = changed_since(recipe, started, from_dict)
    with rewards.Rewards(rewards.read(recipe.reward), judge=judge, model=model) as judged:
        judged.check_set(prompts.placed())
        make = partial(GrpoRun, recipe, base, folder, device_of(device), prompts, judged, console)
        with opened(folder, resolved, resume, changed, make, console) as run:
            yield run


def _with_paths(recipe: GrpoRecipe, beside: Path) -> GrpoRecipe:
    """Files of prompts are looked for here, then beside the recipe."""

    def found(path: str) -> str:
        here = Path(path).expanduser()
        return str(here if here.is_file() or not (beside / path).is_file() else beside / path)

    tasks = [dataclasses.replace(t, path=found(t.path)) if t.path else t for t in recipe.tasks]
    return dataclasses.replace(recipe, tasks=tuple(tasks))


class GrpoRun:
    """One call of `grpo`: everything that lives from its start to its end."""

    def __init__(
        self,
        recipe: GrpoRecipe,
        base: Base,
        folder: Path,
        device: torch.device,
        prompts: Prompts,
        judged: rewards.Rewards,
        console: Console | None,
    ) -> None:
        self.recipe, self.base, self.folder, self.rewards = recipe, base, folder, judged
        self.begun, self.seconds_before = time.perf_counter(), 0.0
        self.stop = Stop(recipe.train.max_minutes, self.begun)
        self.console = console or Console(stderr=True)
        self.model = base.load(recipe.train.dtype, device, recipe.run.seed)
        self.adapters: Adapters | None = None
        self.trainer = self._trainer()
        seed, exact = recipe.run.seed, recipe.train.exact
        sampler = Sampler(
            self.model, base.tokenizer, base.template, recipe.sample, prompts, judged, exact=exact, seed=seed
        )
        on_host, reference = recipe.objective.reference_on == "host", None
        if recipe.objective.resolve().kl_weight:
            reference = Reference(self.model, self.trainer.optimizer, self.adapters, on_host=on_host)
        self.policy = Policy(self.trainer, sampler, reference, recipe)
        self.peak = peak(device, self.model.dtype)
        self.last: GrpoStats | None = None
        self.metrics: GrpoMetrics | None = None

    def _trainer(self) -> Trainer:
        """Its progress counts updates, sampled tokens, prompts; its schedule goes by updates."""
        rate, named = self.recipe.learning_rate, self.model.named_parameters()
        if self.recipe.lora.rank:
            self.adapters = Adapters(self.model, self.recipe.lora, seed=self.recipe.run.seed)
            named = self.adapters.named_parameters()
        optimizer = adamw(named, self.recipe.optimizer)
        if self.adapters is not None:
            self.adapters.attach(optimizer)
        shape = LearningRate(rate.peak, rate.peak, rate.warmup, math.inf, math.inf)
        schedule = Schedule(shape, 0.0, 0.0, self.recipe.mtp.weight, self.recipe.mtp.weight, 0.0)
        return Trainer(self.model, optimizer, iter(()), schedule)

    # --- the loop ---
    def go(self) -> Outcome:
        """Train to the end, or until something says stop; then save and export."""
        policy, recipe = self.policy, self.recipe
        self.metrics = GrpoMetrics(
            self.folder, total_steps=recipe.train.steps, total_tokens=0, peak_flops=self.peak.flops,
            tensorboard=recipe.log.tensorboard, after_step=policy.steps, console=self.console,
        )  # fmt: skip
        self._introduce(self.metrics)
        with self.stop.signals():
            while policy.steps < recipe.train.steps and not self.stop.asked():
                rollout, self.last = policy.step()
                flops = step_flops(self.model.config, self.last.fed_tokens, self.last.fed_pairs)
                self.metrics.failures(rollout)
                self.metrics.grpo(self.last, flops / max(self.last.train_seconds, 1e-9) / self.peak.flops)
                if recipe.log.samples and policy.steps % recipe.log.samples_every == 0:
                    self.metrics.samples(policy.steps, rollout, recipe.log.samples)
                every = recipe.checkpoint.every_steps
                if every and policy.steps % every == 0 and policy.steps < recipe.train.steps:
                    self.save()
        return self._finish(self.metrics)

    def _finish(self, metrics: GrpoMetrics) -> Outcome:
        steps, tokens = self.policy.steps, self.trainer.progress.tokens
        reason = "finished" if steps >= self.recipe.train.steps else self.stop.reason
        self.save()
        exported = self.export()
        metrics.event(
            "stop", steps, reason=reason, seconds=self.seconds(), failures=dict(self.rewards.failures)
        )
        if reason != "finished":
            metrics.say(f"stopped at step {steps} of {self.recipe.train.steps}: go on with --resume")
        return Outcome(reason, steps, tokens, self.folder, exported, self.last.loss if self.last else None)

    def seconds(self) -> float:
        """Of the run, earlier calls included."""
        return self.seconds_before + time.perf_counter() - self.begun

    def _introduce(self, metrics: GrpoMetrics) -> None:
        sample, n = self.recipe.sample, self.model.config.parameters()
        metrics.say(
            f"{self.recipe.run.name}: {self.base.name}, {n.main + n.mtp_unique:,} parameters, "
            f"{str(self.model.dtype).removeprefix('torch.')} on {self.model.device}; "
            f"{self.recipe.objective.variant}, {self.recipe.train.steps} steps of {sample.prompts} prompts × "
            f"{sample.group}" + (f"; resumed at step {self.policy.steps}" if self.policy.steps else "")
        )
        if self.adapters is not None:
            metrics.say(str(self.adapters))

    # --- state ---
    def save(self) -> None:
        """Write a checkpoint."""
        progress, reference = self.trainer.progress, self.policy.reference
        kept = {} if reference is None else reference.state()
        meta = {"tokens": progress.tokens, "position": progress.position, "updates": progress.step,
                "seconds": self.seconds(), "recipe": self.recipe.to_dict()}  # fmt: skip
        limits, root = self.recipe.checkpoint, self.folder / "checkpoints"
        saved = state.save(root, self.policy.steps, self.trainer.tensors() | kept, meta, keep=limits.keep)
        if self.metrics is not None:
            self.metrics.event("checkpoint", saved.step, path=str(saved.path))

    def restore(self, checkpoint: state.Checkpoint) -> None:
        """Go on from a checkpoint. Raises CheckpointError."""
        tensors, meta = state.load(checkpoint)
        kept = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
        try:
            self.trainer.restore(tensors, Progress(meta["updates"], meta["tokens"], meta["position"]))
            if self.policy.reference is not None:
                self.policy.reference.load_state(kept)
        except ValueError as error:
            raise state.CheckpointError(f"{checkpoint.path}: {error}") from None
        self.policy.steps, self.seconds_before = meta["step"], float(meta["seconds"])
        self.policy.sampler.weights_changed()

    def export(self) -> Path:
        """Write the model as a published folder with the base's tokenizer and settings, and a card."""
        target, device = self.folder / "export", self.model.device
        name = f"CPU, {torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        facts = Facts(
            self.policy.steps, self.recipe.train.steps, self.trainer.progress.tokens, self.seconds(), name,
            torch.__version__,
        )  # fmt: skip
        write_export(
            self.model, target, self.base, self.recipe.export, template=self.recipe.model.template,
            adapters=self.adapters, facts=facts,
            metadata={"name": self.recipe.run.name, "trained_by": "hadal grpo"},
            card=grpo_card(self.recipe, self.base.started(), self.model.config, facts),
        )  # fmt: skip
        if self.metrics is not None:
            self.metrics.event("export", self.policy.steps, path=str(target))
        return target

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()


class GrpoMetrics(Metrics):
    """metrics.jsonl of reinforcement learning, and samples.jsonl beside it."""

    def __init__(self, folder: Path, *, after_step: int = 0, **options: Any) -> None:
        super().__init__(folder, after_step=after_step, **options)
        self._samples = JsonLines(folder / "samples.jsonl", after_step=after_step)
        self._told: set[tuple[str, str]] = set()

    def grpo(self, stats: GrpoStats, mfu: float) -> None:
        """Log a step."""
        record = dataclasses.asdict(stats) | {"mfu": mfu}
        self._jsonl.write({"kind": "step", **record})
        numbers = {k: v for k, v in record.items() if v is not None and k not in ("step", "tokens")}
        self._curves(stats.step, numbers, "grpo")
        right = "" if stats.accuracy is None else f" right {stats.accuracy:.1%}"
        gap = "" if stats.gap_max is None else f" gap {stats.gap_max:.1e}"
        entropy = "" if stats.entropy is None else f" entropy {stats.entropy:.3f}"
        failed = f" failed {stats.failed}" if stats.failed else ""
        self._line(
            f"step {stats.step}/{self._total_steps} reward {stats.reward:.3f} ± {stats.reward_std:.3f}"
            f"{right}{failed} | length {stats.length:.0f} cut {stats.truncated:.0%} "
            f"silent {stats.zero_variance} |{entropy}{gap} clip {stats.clipped:.2%} | "
            f"{stats.sample_tokens_per_second:,.0f} tok/s sampled, {stats.tokens_per_second:,.0f} trained"
        )

    def failures(self, rollout: Rollout) -> None:
        """Say once of each kind of failure that a reward has failed: the run goes on all the same."""
        for group in rollout.groups:
            for name, score in (part for total in group.totals for part in total.parts.items()):
                kind = (name, score.failed.partition(":")[0])
                if score.failed and kind not in self._told:
                    self._told.add(kind)
                    self.say(f"reward {name} has failed, and counts 0 there: {harmless(score.failed)}")

    def samples(self, step: int, rollout: Rollout, count: int) -> None:
        """Keep the first groups of a step, one line each."""
        for number, group in enumerate(rollout.groups[:count]):
            first = sum(len(g.answers) for g in rollout.groups[:number])
            completions = [
                {"text": answer.text, "tokens": len(answer.token_ids), "finish_reason": answer.finish_reason,
                 "advantage": float(rollout.advantage_B[first + i]), **total.as_json()}
                for i, (answer, total) in enumerate(zip(group.answers, group.totals, strict=True))
            ]  # fmt: skip
            plain = json.loads(json.dumps(group.record, default=str))
            self._samples.write(
                {"step": step, "number": group.number, "record": plain, "completions": completions}
            )

    def close(self) -> None:
        super().close()
        self._samples.close()
