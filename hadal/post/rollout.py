"""Roll-outs: prompts of a recipe's tasks, groups of completions by the engine, their rewards.

The engine runs on the trainer's own tensors; nothing is copied. Each completion has a seed made of the run's,
the prompt's number and its own, so that a roll-out follows from the weights and the prompt's number.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hadal.engine import Engine, SamplingParams
from hadal.engine.memory import available_memory
from hadal.engine.request import Completion as Answer
from hadal.model.context import Cache
from hadal.model.transformer import Transformer
from hadal.ops.log_probs import Law
from hadal.post.grpo_recipe import RecipeError, SampleRecipe
from hadal.post.rewards import Completion, Rewards, Total
from hadal.post.score import law_of
from hadal.post.tasks import Prompts, Record, chat
from hadal.text.templates import Template
from hadal.text.tokenizer import Tokenizer

PAGE = 64
_FREE_SHARE = 0.5  # of the memory that is free, at most, for the cache
_TOO_LONG = 1000  # prompts passed over in a row


class RolloutError(RuntimeError):
    """The engine could not sample; the message says why."""


@dataclass
class Group:
    """A prompt, its completions, and what they were worth."""

    number: int
    record: Record
    prompt: list[int]
    answers: list[Answer]
    totals: list[Total] = field(default_factory=list)

    @property
    def rewards(self) -> list[float]:
        return [total.value for total in self.totals]


@dataclass
class Drawn:
    """The groups of a step. `position`: the number of the next prompt; `tokens`: sampled, groups that were
    replaced included."""

    groups: list[Group]
    position: int
    tokens: int
    replaced: int = 0
    too_long: int = 0


class Sampler:
    """Draws groups from a model that is being trained. Call `weights_changed` after each update."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        template: Template,
        recipe: SampleRecipe,
        prompts: Prompts,
        rewards: Rewards,
        *,
        exact: bool,
        seed: int,
    ) -> None:
        """Raises RecipeError for a context that the model has not, EngineError where exact mode cannot be
        kept or the cache is too small."""
        if recipe.longest > model.max_positions:
            raise RecipeError(
                f"sample.max_prompt_tokens and max_tokens are {recipe.longest} together; the model has "
                f"{model.max_positions} positions: lower one of them"
            )
        self.recipe, self.prompts, self.rewards, self.seed = recipe, prompts, rewards, seed
        self.template = template
        seats = min(recipe.max_seqs, recipe.prompts * recipe.group)
        self.engine = Engine(
            model,
            tokenizer,
            template,
            max_model_len=recipe.longest,
            max_num_seqs=seats,
            cache_bytes=self._cache_bytes(model, seats),
            page_size=PAGE,
            exact=exact,
            speculation=recipe.speculation,
            seed=seed,
        )
        self.law: Law = law_of(self.engine, self._params(1, 0))

    def _cache_bytes(self, model: Transformer, seats: int) -> int:
        extra = 1 if len(model.mtp) else 0  # of drafts
        page = Cache.bytes_per_page(model.config, PAGE, model.dtype, extra_layers=extra)
        pages = -(-self.recipe.longest // PAGE)
        if self.recipe.cache_mib:
            return self.recipe.cache_mib * 2**20
        most = max(1, int(_FREE_SHARE * _free(model.device)) // (pages * page))
        return (pages * min(seats, most) + 2) * page

    def _params(self, max_tokens: int, seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens, temperature=self.recipe.temperature, seed=seed, logprobs=0,
            logprobs_of="sampler",
        )  # fmt: skip

    def weights_changed(self) -> None:
        """Keys that the cache holds are those of the old weights."""
        self.engine.scheduler.pages.forget_prefixes()

    def draw(self, position: int, progress: float, tells: Callable[[Group], bool]) -> Drawn:
        """The groups of a step, from prompt `position` on. With `refill`, further prompts are asked while
        fewer than `prompts` groups `tell` something; those that do come first. Raises RolloutError."""
        found = Drawn([], position, 0)
        for _ in range(1 + self.recipe.refill):
            fresh = self._ask(found, progress)
            found.tokens += sum(len(answer.token_ids) for group in fresh for answer in group.answers)
            found.groups += fresh
            if sum(map(tells, found.groups)) >= self.recipe.prompts:
                break
        ordered = sorted(found.groups, key=lambda group: not tells(group)) if self.recipe.refill else None
        if ordered is not None:
            found.replaced = len(ordered) - self.recipe.prompts
            found.groups = ordered[: self.recipe.prompts]
        return found

    def _ask(self, found: Drawn, progress: float) -> list[Group]:
        """`prompts` groups from `found.position` on, sampled and judged."""
        groups: list[Group] = []
        limit, size, passed = self.recipe.limit(progress), self.recipe.group, 0
        while len(groups) < self.recipe.prompts:
            number, record = found.position, self.prompts.record(found.position)
            found.position += 1
            prompt = self.engine.encode_chat(chat(record))
            if len(prompt) > self.recipe.max_prompt_tokens:
                found.too_long, passed = found.too_long + 1, passed + 1
                if passed == _TOO_LONG:
                    raise RecipeError(
                        f"{passed} prompts in a row are longer than sample.max_prompt_tokens "
                        f"{self.recipe.max_prompt_tokens}, the last has {len(prompt)}: raise it"
                    )
                continue
            passed = 0
            groups.append(Group(number, record, prompt, []))
        self.rewards.check(group.record for group in groups)
        params = [self._params(limit, self._seed(g.number, i)) for g in groups for i in range(size)]
        asked = [group.prompt for group in groups for _ in range(size)]
        with _uncollected():
            answers: list[Answer] = self.engine.generate(asked, params)
        failed = next((a for a in answers if a.finish_reason in ("error", "abort")), None)
        if failed is not None:
            raise RolloutError(f"a completion could not be sampled: {failed.error}")
        for n, group in enumerate(groups):
            group.answers = answers[n * size : (n + 1) * size]
        self._judge(groups, progress)
        return groups

    def _judge(self, groups: list[Group], progress: float) -> None:
        judged = [
            Completion(
                group.record, answer.text, len(answer.token_ids), answer.finish_reason,
                self.template.starts_in_reasoning(None, chat(group.record)), answer.token_ids,
            )
            for group in groups
            for answer in group.answers
        ]  # fmt: skip
        totals = self.rewards.score(judged, progress)
        for n, group in enumerate(groups):
            group.totals = totals[n * self.recipe.group : (n + 1) * self.recipe.group]

    def _seed(self, number: int, index: int) -> int:
        text = f"{self.seed}/{number}/{index}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python's collector stays off: a record a token is made and all of them live on, so that it would go
    through them for nothing (0.12 s for 65,536 tokens on the host where this was measured). Nor does it go
    through them afterwards: what there is now is left out until the next roll-out, when these are gone."""
    was = gc.isenabled()
    gc.unfreeze()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.freeze()
            gc.enable()


def _free(device: torch.device) -> int:
    """Bytes that a cache may take, those among them that the allocator holds and nobody uses."""
    if device.type == "cpu":
        return available_memory()
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle
