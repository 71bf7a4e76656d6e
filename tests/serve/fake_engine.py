"""An engine without a model: AsyncEngine's face over a script, so that the server's own behaviour is tested
in milliseconds. Tokens are bytes (and a few control tokens); what it "generates" is scripted per test."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hadal.config import Mla, ModelConfig, Moe, Rope
from hadal.engine.request import (
    RequestMetrics,
    SamplingParams,
    TokenLogprob,
    Update,
    check_token_ids,
    resolve_max_tokens,
)
from hadal.engine.speculation import SpeculationStats
from hadal.engine.watching import Watched, Wish
from hadal.text.detokenizer import Detokenizer
from hadal.text.templates import TEMPLATES
from hadal.text.tokenizer import Tokenizer
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

VOCAB = 512


@dataclass
class FakeStats:
    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.25
    preemptions: int = 1
    prefix_queries: int = 20
    prefix_hits: int = 10
    prompt_tokens: int = 100
    generation_tokens: int = 50
    speculation: SpeculationStats | None = field(
        default_factory=lambda: SpeculationStats("mtp", 2, "", 10, 20, 14, 24, [10, 10], [9, 5])
    )


class FakeEngine:
    """The attributes that the server reads of an Engine."""

    def __init__(self, name: str = "fake", template: str = "deepseek-r1", max_model_len: int = 2048) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hadal-fake-"))
        make_tiny_tokenizer(self.folder, VOCAB)
        self.tokenizer = Tokenizer.load(self.folder)
        self.template = TEMPLATES[template]
        self.name = name
        self.max_model_len = max_model_len
        self.vocab_size = VOCAB
        self.max_num_seqs = 4
        self.device = "cpu"
        self.dtype = "torch.float32"
        self.config = tiny_config()
        self.counts = FakeStats()

    def stats(self) -> FakeStats:
        return self.counts


def tiny_config() -> ModelConfig:
    """A V3 in small, valid for `ModelConfig`."""
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention=Mla(16, 16, 8, 8, 8),
        rope=Rope(),
        moe=Moe(4, 1, 2, 16, 1),
        num_nextn_predict_layers=1,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=(1,),
    )


@dataclass
class FakeAsyncEngine:
    """`script(prompt_ids, params)` gives the text that a sequence answers with; `delay` seconds pass before
    each token; `gate`, when set, holds all sequences until it is released."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    script: Callable[[list[int], SamplingParams], str] = lambda prompt, params: "thought</think>Hello, world"
    delay: float = 0.0
    alive: bool = True
    error: str | None = None
    frozen: bool = False
    seen: list[tuple[list[int], SamplingParams, str]] = field(default_factory=list)
    aborted: int = 0
    finished: int = 0
    active: int = 0
    embedded: list[tuple[list[list[int]], str, int, bool]] = field(default_factory=list)
    last_progress: float = field(default_factory=time.monotonic)
    shut: bool = False

    async def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Update, None]:
        ids = check_token_ids(list(prompt_ids), self.engine.vocab_size)
        limit = resolve_max_tokens(len(ids), params.max_tokens, self.engine.max_model_len)
        self.seen.append((ids, params, cache_salt))
        self.active += 1
        self.engine.counts.running = self.active
        done = False
        try:
            async for update in self._run(ids, params, limit, deadline):
                self.last_progress = time.monotonic()
                done = update.finish_reason is not None
                yield update
        finally:
            self.active -= 1
            self.engine.counts.running = self.active
            self.finished += done
            self.aborted += not done

    async def _run(
        self, ids: list[int], params: SamplingParams, limit: int, deadline: float | None
    ) -> AsyncIterator[Update]:
        times = RequestMetrics(time.monotonic())
        times.first_scheduled = time.monotonic()
        count = {"prompt_tokens": len(ids), "cached_tokens": min(2, len(ids) - 1)}
        while self.frozen:
            await asyncio.sleep(0.01)
        tokenizer = self.engine.tokenizer
        answer = tokenizer.encode_with_controls(self.script(ids, params))
        text = Detokenizer(tokenizer, params.stop)
        for place, token in enumerate([*answer, 1][:limit]):
            if self.delay:
                await asyncio.sleep(self.delay)
            times.first_token = times.first_token or time.monotonic()
            times.completion_tokens = place + 1
            if self.error is not None or (deadline is not None and time.monotonic() > deadline):
                reason = "error" if self.error is not None else "abort"
                yield Update(finish_reason=reason, error=self.error or "deadline passed", **count)
                return
            reason = "stop" if token == 1 else "length" if place + 1 == limit else None
            piece = text.push([token]) if token != 1 else ""
            if text.stopped is not None:
                reason = "stop"
            if reason is not None:
                times.finished = time.monotonic()
                piece += text.finish()
            yield Update(
                text=piece,
                token_ids=[token],
                logprobs=None if params.logprobs is None else [self._logprob(token, params.logprobs)],
                finish_reason=reason,
                stop_reason=text.stopped,
                completion_tokens=place + 1,
                prompt_logprobs=self._prompt_logprobs(ids, params) if place == 0 else None,
                metrics=times if reason is not None else None,
                **count,
            )
            if reason is not None:
                return

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        return TokenLogprob(
            token, -0.5, [(token + i if token + i < VOCAB else i, -0.5 - i) for i in range(top)]
        )

    def _prompt_logprobs(self, ids: list[int], params: SamplingParams) -> list[TokenLogprob | None] | None:
        if params.prompt_logprobs is None:
            return None
        return [None, *(self._logprob(token, params.prompt_logprobs) for token in ids[1:])]

    async def embed(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[float]]:
        self.embedded.append(
            ([list(p) for p in prompts], options["pooling"], options["layer"], options["normalize"])
        )
        return [[float(len(prompt)), 0.5, -0.25] for prompt in prompts]

    async def watch(self, prompts: Sequence[Sequence[int]], wish: Wish) -> list[Watched]:
        """States that say which text and layer they are of; routers that choose experts 0 and 1."""
        c, found = self.engine.config, []
        for prompt in prompts:
            layers = wish.layers or tuple(range(c.num_hidden_layers + 1))
            shape = (
                (len(layers), c.hidden_size) if wish.pooling else (len(layers), len(prompt), c.hidden_size)
            )
            states = np.random.default_rng(sum(prompt)).normal(size=shape).astype(np.float32)
            blocks = (1,) if wish.routing else ()
            found.append(
                Watched(states, {b: [[0, 1]] * len(prompt) for b in blocks},
                        {b: [[0.75, 0.25]] * len(prompt) for b in blocks})
            )  # fmt: skip
        return found

    def healthy(self) -> bool:
        return self.alive

    def shutdown(self, drain: bool = True, timeout: float | None = None) -> bool:
        self.shut = True
        self.alive = False
        return True
