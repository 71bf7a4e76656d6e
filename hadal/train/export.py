"""From a training run to a published folder: weights in FP8 blocks, tokenizer, generation settings, model
card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hadal.config import ModelConfig
from hadal.model.transformer import Transformer
from hadal.train.recipe import Recipe
from hadal.weights.writer import save

CARD = "README.md"
PUZZLE_LIMITS = """\
It solves the kinds of puzzles listed above, in English, French and Portuguese, and nothing else:

- It has read no other text: it knows no facts of the world, and cannot chat, translate or write code. It was
  trained to say so, but a question that looks like a puzzle may still get a puzzle's answer.
- Numbers longer than in the table above; three-digit times three-digit products; divisors above 25; sums and
  products of decimals; fractions, percentages, powers, roots; equations with x on both sides or squared;
  Countdown with five or more numbers, and four-number solutions that do not split into two pairs.
- Word problems beyond a few fixed forms ("I have 12 apples and get 35 more"), and wordings far from those
  that it was trained on.
- It checks almost nothing: a wrong step is written with the same confidence as a right one. Check it."""
ACCURACY_BEGIN, ACCURACY_END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"


@dataclass(frozen=True)
class Facts:
    """What is known of a run when it is exported; kept in config.json under "hadal" and told by the model
    card."""

    step: int
    steps: int
    tokens: int
    seconds: float
    device: str
    torch: str
    heldout_loss: float | None = None
    heldout_exact: float | None = None
    heldout_documents: int = 0
    tokens_per_second: float | None = None
    context: int | None = None  # tokens in a row of the stage at hand
    average: float | None = None  # the rate, where the weights are a moving average


def export(
    model: Transformer, recipe: Recipe, facts: Facts, tokenizer: Path, folder: Path, *, accuracy: str = ""
) -> Path:
    """Write the model as a published folder (an earlier export is replaced whole), and return its path."""
    temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=folder.parent))
    try:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, temporary / name)
        generation = json.dumps(_generation(model.config, recipe.export.temperature), indent=2) + "\n"
        (temporary / "generation_config.json").write_text(generation, encoding="utf-8")
        save(
            model,
            folder,
            fp8=recipe.export.fp8,
            max_shard_bytes=recipe.export.max_shard_mib * 2**20,
            metadata=_metadata(recipe, facts),
            files_from=temporary,
            overwrite=True,
        )
    finally:
        shutil.rmtree(temporary)
    _write(folder / CARD, model_card(model.config, recipe, facts, accuracy=accuracy))
    return folder


def _metadata(recipe: Recipe, facts: Facts) -> dict[str, Any]:
    return {"name": recipe.run.name, "trained_by": "hadal train", **asdict(facts)}


def _generation(config: ModelConfig, temperature: float) -> dict[str, Any]:
    """generation_config.json: the sampling that holds where a user sets none; temperature 0 is greedy."""
    eos = config.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95}
    if temperature == 0:
        sampling = {"do_sample": False, "temperature": 0.0}
    return {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        **sampling,
    }


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# --- the model card ---
def model_card(config: ModelConfig, recipe: Recipe, facts: Facts, *, accuracy: str = "") -> str:
    """The card as Markdown; `accuracy` is a table, to be filled in later by `set_accuracy` where it is
    empty."""
    n = config.parameters()
    state = "" if facts.step >= facts.steps else f" **Unfinished:** step {facts.step:,} of {facts.steps:,}."
    held = "not measured"
    if facts.heldout_loss is not None:
        held = f"{facts.heldout_loss:.4f} nats a token"
        if facts.heldout_documents:
            held += (
                f"; {facts.heldout_exact:.1%} of {facts.heldout_documents:,} unseen documents are "
                "reproduced whole by greedy decoding (a lower bound of accuracy)"
            )
    rows = {
        "Architecture": _architecture(config),
        "Parameters": f"{n.main + n.mtp_unique:,} ({n.active:,} active per token; MTP {n.mtp_unique:,})",
        "Context": f"{facts.context or recipe.train.context:,} tokens in training, "
        f"{config.max_position_embeddings:,} at most",
        "Vocabulary": f"{config.vocab_size:,}",
        "Training data": _data(recipe),
        "Training tokens": f"{facts.tokens:,} in {facts.step:,} steps of {_batch(recipe)}",
        "Machine": f"{facts.device}, torch {facts.torch}, {facts.seconds / 60:.1f} minutes{_rate(facts)}",
        "Seed": str(recipe.run.seed),
        **({} if facts.average is None else {"Weights": f"their moving average, rate {facts.average}"}),
        "Held-out loss": held,
        "Stored as": "FP8 (E4M3, 128×128 blocks); embedding, head, norms, gates in BF16"
        if recipe.export.fp8
        else "BF16",
    }
    lines = [
        f"# {recipe.run.name}",
        "",
        (recipe.run.title or "A model trained with `hadal train`.") + state,
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "## Accuracy on unseen problems",
        "",
        ACCURACY_BEGIN,
        accuracy.strip() or "Not measured yet.",
        ACCURACY_END,
        "",
        "## What it cannot do",
        "",
        _limits(recipe),
        "",
        "## How it was made",
        "",
        "The recipe below and the seed reproduce it (up to the order of floating-point sums on a GPU):",
        "",
        "```json",
        json.dumps(recipe.to_dict(), indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)


def set_accuracy(card: Path, table: str) -> None:
    """Put a Markdown table between the accuracy marks of a model card. Raises ValueError when it has none."""
    text = card.read_text(encoding="utf-8")
    head, begin, rest = text.partition(ACCURACY_BEGIN)
    _, end, tail = rest.partition(ACCURACY_END)
    if not begin or not end:
        raise ValueError(
            f"{card} has no accuracy section: it lacks the marks {ACCURACY_BEGIN} … {ACCURACY_END}"
        )
    _write(card, f"{head}{begin}\n{table.strip()}\n{end}{tail}")


def _architecture(config: ModelConfig) -> str:
    text = f"{config.model_type}: {config.num_hidden_layers} layers of width {config.hidden_size}"
    text += f", {config.num_attention_heads} heads"
    if config.moe is not None:
        m = config.moe
        text += f", {m.n_routed_experts} routed experts ({m.num_experts_per_tok} per token)"
        text += f" and {m.n_shared_experts} shared"
    if config.num_nextn_predict_layers:
        text += f", {config.num_nextn_predict_layers} MTP module"
    return text


def _batch(recipe: Recipe) -> str:
    first = recipe.train.batch_tokens_start
    return (f"{first:,} to " if first else "") + f"{recipe.train.batch_tokens:,}"


def _data(recipe: Recipe) -> str:
    if recipe.data.source == "puzzles":
        return "puzzles with worked solutions, written by the seeded generators in `hadal/data/puzzles`"
    if recipe.data.source == "needles":
        return "long documents with planted facts, and puzzles, written by `hadal/data/needles.py`"
    return f"packed shards in `{recipe.data.path}`"


def _rate(facts: Facts) -> str:
    return "" if facts.tokens_per_second is None else f", {facts.tokens_per_second:,.0f} tokens/s"


def _limits(recipe: Recipe) -> str:
    if recipe.data.source != "puzzles":
        return (
            "It knows what its training text taught it, and nothing has been done to make it safe or helpful."
        )
    return PUZZLE_LIMITS
