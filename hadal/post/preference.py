"""A preference model from a pool of samples: pairs of a better and a worse answer to a prompt, a scalar head.

R1's helpfulness model learnt 66K pairs that a model had judged (report §2.3.4). Here a rule stands in for
that judge, of two samples of one prompt: the right one is better; of two alike in that, the one with more
words in the prompt's language; of two alike in both, the one that says more in its answer. Pairs that differ
in none are left out. What a head learns of such pairs is a smooth copy of the rule, and can be fooled where
the rule cannot: its accuracy on prompts that it has not seen stands in the report.

    FOLDER/export/              the transformer with the head (hadal/post/rewards/model.py)
    FOLDER/NAME.jsonl           the pairs        FOLDER/report.json     pairs, accuracy, centre and spread
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hadal.data.strict import RecipeError, require
from hadal.post import rejection
from hadal.post.rejection import rows_of
from hadal.post.rewards.model import Encode, RewardModel, bradley_terry
from hadal.post.rewards.protocol import Completion
from hadal.post.rewards.text import split
from hadal.post.tasks import chat
from hadal.text.templates import Template
from hadal.text.tokenizer import Tokenizer

REPORT = "report.json"
HELD_OUT = 8  # one in so many prompts is not learnt from


@dataclass(frozen=True)
class PreferenceRecipe:
    """kind = "preference"."""

    model: str
    pool: str  # samples with verdicts, of a rejection stage
    pairs: int = 2000  # at most
    epochs: int = 2
    batch: int = 16  # pairs
    rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("pairs", "epochs", "batch"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.rate > 0, "rate", self.rate, "above 0")


@dataclass(frozen=True)
class Pair:
    """Two samples of a prompt, as lines of a pool."""

    better: Mapping[str, Any]
    worse: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.better["provenance"]["prompt"])

    @property
    def held_out(self) -> bool:
        return int(self.prompt, 16) % HELD_OUT == 0


def worth(line: Mapping[str, Any]) -> tuple[float, float, int]:
    """The rule that stands in for a judge: larger is better."""
    right = float(line["provenance"]["accuracy"] or 0.0)
    answer = split(_completion(line)).answer
    return right, float(line["language_share"]), len(answer.split())


def pairs_of(pool: Sequence[Mapping[str, Any]], most: int, seed: int) -> list[Pair]:
    """The best and the worst sample of each prompt, then random ones, while they differ in worth."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in pool:
        by_prompt[line["provenance"]["prompt"]].append(line)
    rng, found = random.Random(seed), []
    for lines in by_prompt.values():
        ordered = sorted(lines, key=worth)
        candidates = [(ordered[-1], ordered[0])]
        if len(ordered) > 3:
            candidates.append((ordered[-2], ordered[rng.randrange(len(ordered) - 2)]))
        found += [Pair(better, worse) for better, worse in candidates if worth(better) > worth(worse)]
    rng.shuffle(found)
    return found[:most]


def _completion(line: Mapping[str, Any]) -> Completion:
    return Completion(line["record"], line["text"], int(line["provenance"]["tokens"]), opened=line["opened"])


def encoder(template: Template, tokenizer: Tokenizer) -> Encode:
    """Tokens of a prompt as the model reads it, and of the completion behind it, its end of sentence."""
    end = tokenizer.eos_ids[:1]

    def encode(completion: Completion) -> list[int]:
        prompt = tokenizer.encode_parts(template.render(chat(completion.record)))
        said = list(completion.token_ids) or tokenizer.encode_with_controls(completion.text)
        return [*prompt, *said, *([] if said[-1:] == list(end) else end)]

    return encode


def train(
    model: RewardModel, pairs: Sequence[Pair], encode: Encode, recipe: PreferenceRecipe,
    tell: Callable[[int, int, float], None],
) -> dict[str, Any]:  # fmt: skip
    """Bradley-Terry over the pairs, all weights. Returns the report. Raises RecipeError without pairs."""
    learnt = [pair for pair in pairs if not pair.held_out]
    kept_back = [pair for pair in pairs if pair.held_out]
    if not learnt or not kept_back:
        raise RecipeError(
            f"the pool gives {len(learnt)} pairs to learn and {len(kept_back)} to judge by; sample "
            "more prompts, or at a higher temperature, so that answers differ"
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.0)
    rng = random.Random(recipe.seed)
    steps = recipe.epochs * -(-len(learnt) // recipe.batch)
    done, tokens = 0, 0
    for _ in range(recipe.epochs):
        order = list(learnt)
        rng.shuffle(order)
        for first in range(0, len(order), recipe.batch):
            block = order[first : first + recipe.batch]
            sequences = [encode(_completion(p.better)) for p in block]
            sequences += [encode(_completion(p.worse)) for p in block]
            tokens += sum(map(len, sequences))
            score_S = model.measure(sequences)
            loss = bradley_terry(score_S[: len(block)], score_S[len(block) :])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * (1 - done / steps)
            optimizer.step()
            done += 1
            tell(done, steps, float(loss.detach()))
    return _judged(model, learnt, kept_back, encode, tokens)


@torch.no_grad()
def _judged(
    model: RewardModel, learnt: Sequence[Pair], kept_back: Sequence[Pair], encode: Encode, tokens: int
) -> dict[str, Any]:
    """Accuracy on pairs of unseen prompts; centre and spread of the scores there."""
    measure = model.scorer(encode)
    better = measure([_completion(pair.better) for pair in kept_back])
    worse = measure([_completion(pair.worse) for pair in kept_back])
    right = sum(a > b for a, b in zip(better, worse, strict=True))
    scores = torch.tensor([*better, *worse])
    centre, spread = float(scores.mean()), max(1e-6, float(scores.std()))
    return {"pairs": len(learnt), "held_out_pairs": len(kept_back), "accuracy": right / len(kept_back),
            "centre": centre, "spread": spread, "tokens": tokens}  # fmt: skip


def scorer(folder: Path, template: Template, tokenizer: Tokenizer, device: str) -> Any:
    """What `grpo(…, model=…)` takes, from a stage's export: scores less their centre, over their spread.
    Equal completions get equal scores: in batches apart they would differ in their last bits, and a group of
    equals would then seem to say something."""
    report = json.loads((folder.parent / REPORT).read_text(encoding="utf-8"))
    measure = RewardModel.load(folder, device=device).scorer(encoder(template, tokenizer))
    centre, spread = report["centre"], report["spread"]

    def normal(completions: Sequence[Completion]) -> list[float]:
        names = [(rejection.prompt_id(c.record), c.text, tuple(c.token_ids)) for c in completions]
        first = dict(zip(names, completions, strict=True))
        scores = dict(zip(first, measure(list(first.values())), strict=True))
        return [(scores[name] - centre) / spread for name in names]

    return normal


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """The pairs as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            line = {"prompt": chat(pair.better["record"]), "better": pair.better["text"],
                    "worse": pair.worse["text"], "worth": [worth(pair.better), worth(pair.worse)],
                    "provenance": [pair.better["provenance"], pair.worse["provenance"]]}  # fmt: skip
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def pool_of(place: str) -> list[dict[str, Any]]:
    """The pool beside a rejection stage's rows."""
    path = Path(place)
    return list(rows_of(path if path.name == "samples.jsonl" else path.with_name("samples.jsonl")))
