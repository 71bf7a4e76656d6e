"""The model card of a fine-tuned model: what it was, what it was shown, what is known of the result."""

from __future__ import annotations

import json
from dataclasses import dataclass

from hadal.config import ModelConfig
from hadal.post.chat_rows import Report
from hadal.post.grpo_recipe import GrpoRecipe
from hadal.post.sft_recipe import SftRecipe
from hadal.train.export import ACCURACY_BEGIN, ACCURACY_END, Facts


@dataclass(frozen=True)
class Started:
    """The model that a run started from."""

    name: str
    folder: str
    digest: str  # of its files
    template: str


def sft_card(recipe: SftRecipe, started: Started, config: ModelConfig, data: Report, facts: Facts) -> str:
    """The card as Markdown."""
    count = config.parameters()
    state = "" if facts.step >= facts.steps else f" **Unfinished:** step {facts.step:,} of {facts.steps:,}."
    lora = recipe.lora
    how = f"LoRA of rank {lora.rank} on {', '.join(lora.modules)}, merged" if lora.rank else "all weights"
    held = "not measured" if facts.heldout_loss is None else f"{facts.heldout_loss:.4f} nats a token"
    rows = {
        "Fine-tuned from": f"{started.name} (files: {started.digest[:16]}…)",
        "Trained": how,
        "Chat template": started.template,
        "Parameters": f"{count.main + count.mtp_unique:,} ({count.active:,} active per token)",
        "Conversations": f"{data.conversations:,} in {', '.join(data.files)}; {data.documents:,} documents, "
        f"{data.tokens:,} tokens, {data.trained_tokens:,} of them trained on",
        "Dropped": "; ".join(f"{n:,}: {why}" for why, n in data.dropped.items()) or "nothing",
        "Training": f"{facts.tokens:,} tokens in {facts.step:,} steps, {recipe.train.epochs:g} epochs, rows "
        f"of {recipe.train.context:,}, peak rate {recipe.learning_rate.peak:g}",
        "Machine": f"{facts.device}, torch {facts.torch}, {facts.seconds / 60:.1f} minutes",
        "Seed": str(recipe.run.seed),
        **({} if facts.average is None else {"Weights": f"their moving average, rate {facts.average}"}),
        "Held-out loss": held,
    }
    lines = [
        f"# {recipe.run.name}",
        "",
        (recipe.run.title or "A model fine-tuned with `hadal sft`.") + state,
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "## Accuracy",
        "",
        ACCURACY_BEGIN,
        "Not measured yet.",
        ACCURACY_END,
        "",
        "## What it cannot do",
        "",
        "It can do what the model that it was made from could, as far as the conversations have not changed "
        "that; nothing has been done to make it safe beyond what they teach.",
        "",
        "## How it was made",
        "",
        "```json",
        json.dumps(recipe.to_dict(), indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)


def grpo_card(recipe: GrpoRecipe, started: Started, config: ModelConfig, facts: Facts) -> str:
    """The card of a model trained by rewards, as Markdown."""
    count, sample, lora = config.parameters(), recipe.sample, recipe.lora
    state = "" if facts.step >= facts.steps else f" **Unfinished:** step {facts.step:,} of {facts.steps:,}."
    how = f"LoRA of rank {lora.rank} on {', '.join(lora.modules)}, merged" if lora.rank else "all weights"
    tasks = ", ".join(task.task or task.name or task.path or task.source for task in recipe.tasks)
    rewards = ", ".join(f"{one.get('weight', 1.0):g} × {one['kind']}" for one in recipe.reward)
    rows = {
        "Trained from": f"{started.name} (files: {started.digest[:16]}…)",
        "Trained": f"{how}, by {recipe.objective.variant}" + (", exact" if recipe.train.exact else ""),
        "Chat template": started.template,
        "Parameters": f"{count.main + count.mtp_unique:,} ({count.active:,} active per token)",
        "Prompts": tasks,
        "Rewards": rewards,
        "Training": f"{facts.step:,} steps of {sample.prompts} prompts × {sample.group} completions, "
        f"{facts.tokens:,} tokens sampled, at most {sample.max_tokens:,} each, rate "
        f"{recipe.learning_rate.peak:g}",
        "Machine": f"{facts.device}, torch {facts.torch}, {facts.seconds / 60:.1f} minutes",
        "Seed": str(recipe.run.seed),
    }
    lines = [
        f"# {recipe.run.name}", "", (recipe.run.title or "A model trained with `hadal grpo`.") + state, "",
        "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), "",
        "## Accuracy", "", ACCURACY_BEGIN, "Not measured yet.", ACCURACY_END, "",
        "## What it cannot do", "",
        "It does what its rewards pay for, which is not always what was meant; look at samples.jsonl of the "
        "run. Nothing has been done to make it safe.", "",
        "## How it was made", "", "```json", json.dumps(recipe.to_dict(), indent=1), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)
