"""The engine: requests in, updates out. One `step()` is schedule → run → sample → commit.

    engine = Engine.load("hadal-mini")
    print(engine.chat([{"role": "user", "content": "12 + 35?"}], SamplingParams(temperature=0)).text)

Everything runs in the caller's thread; `AsyncEngine` gives it a thread of its own. A fault in a step ends
its requests with finish_reason "error" and frees their pages; the others, and the engine, go on.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hadal.engine.blocks import PageAllocator
from hadal.engine.defaults import sampling_defaults
from hadal.engine.memory import pick_cache_dtype, release
from hadal.engine.offline import OfflineApi
from hadal.engine.output import advance, ended
from hadal.engine.pooling import pooled, weights
from hadal.engine.request import (
    EngineError,
    FinishReason,
    PoolingParams,
    Request,
    RequestError,
    SamplingParams,
    TokenLogprob,
    Update,
    merge_updates,
    pack_token_ids,
    resolve_max_tokens,
)
from hadal.engine.runner import Runner, StepOutput
from hadal.engine.sampled import Sampled
from hadal.engine.sampler import Sampler
from hadal.engine.scheduler import Schedule, Scheduler
from hadal.engine.setup import Wishes, check_exact, choose_sizes
from hadal.engine.speculation import SpeculationOptions, Speculator
from hadal.engine.stats import EngineStats, Totals
from hadal.model.context import Cache
from hadal.model.transformer import Transformer
from hadal.ops.exact import exact as exact_operations
from hadal.ops.sampling import FAILED
from hadal.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from hadal.text.templates import Template
    from hadal.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

OnUpdate = Callable[[Update], None]


class Engine(OfflineApi):
    """Continuous batching over one model. `load` reads a folder; the constructor takes live tensors.

    config, tokenizer, template, name, folder, device, dtype describe the model; `vocab_size` bounds the
    token ids that go in and come out; `max_model_len` bounds prompt + output. Without a tokenizer, requests
    are token ids and have no text. Sizes that are None are chosen for the device; `cache_bytes` overrides
    what is measured.

    speculation: "auto", "mtp", "ngram" or "off", with num_speculative_tokens drafts a sequence while at most
    speculation_max_batch sequences run; see docs/speculation.md. speculation_adaptive False: no rest where it
    is slower. speculation_forced_acceptance, for measurements only: accept each draft with this probability;
    the output is then not the model's.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        template: Template | None = None,
        *,
        name: str = "",
        folder: Path | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        cache_bytes: int | None = None,
        page_size: int = 64,
        prefix_caching: bool = True,
        cuda_graphs: bool = True,
        capture_at_start: bool = False,
        exact: bool = False,
        cache_dtype: str = "auto",
        seed: int | None = None,
        speculation: str = "auto",
        num_speculative_tokens: int | None = None,
        speculation_max_batch: int | None = None,
        speculation_adaptive: bool = True,
        speculation_forced_acceptance: float | None = None,
    ) -> None:
        """`exact`: batch-invariant operations (docs/exact.md). `cache_dtype`: "auto", the model's, or "fp8"
        (MLA only). Raises EngineError when the cache cannot hold one context, for options that do not fit, or
        where exact mode cannot be kept."""
        options = SpeculationOptions(
            speculation, num_speculative_tokens, speculation_max_batch, speculation_adaptive,
            speculation_forced_acceptance,
        )  # fmt: skip
        method = options.resolve(model.config, model.device)
        if exact:
            check_exact(model)
        stored = pick_cache_dtype(model, cache_dtype, exact)
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)  # kernels and streams of our own go to the current device
        wishes = Wishes(
            max_model_len,
            max_num_seqs,
            max_num_batched_tokens,
            gpu_memory_utilization,
            cache_bytes,
            page_size,
        )
        sizes = choose_sizes(model, wishes, stored, options, method)
        self._describe(model, tokenizer, template, name, folder)
        self._empty(seed)
        seats, budget = sizes.max_num_seqs, sizes.max_num_batched_tokens
        self.exact, self.max_num_seqs, self.max_model_len = exact, seats, sizes.max_model_len
        limits = {"max_num_seqs": seats, "max_num_batched_tokens": budget}
        pages = PageAllocator(sizes.num_pages, page_size, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(pages, hash_ahead=sizes.extra_layers, **limits)
        cache = Cache(model.config, sizes.num_pages, page_size, stored, model.device, sizes.extra_layers)
        with exact_operations(exact):  # graphs captured at the start are of its operations, too
            self.runner = Runner(
                model,
                cache,
                **limits,
                max_model_len=sizes.max_model_len,
                cuda_graphs=cuda_graphs,
                capture_at_start=capture_at_start,
                max_rows=sizes.max_rows,
            )
        self.sampler = Sampler(self.vocab_size, seats, model.device)
        self.speculation: Speculator | None = None
        if method is not None:
            self.speculation = Speculator(options, method, self.runner, self.sampler, self.scheduler)

    def _describe(
        self, model: Transformer, tokenizer: Tokenizer | None, template: Template | None, name: str,
        folder: Path | None,
    ) -> None:  # fmt: skip
        """What callers may read of the model."""
        self.model, self.config = model, model.config
        self.tokenizer, self.template = tokenizer, template
        self.name, self.folder = name or model.config.model_type, folder
        self.device, self.dtype = model.device, model.dtype
        try:
            self.sampling_defaults = sampling_defaults(folder)
        except ValueError as error:
            raise EngineError(str(error)) from None
        size = model.config.vocab_size
        self.vocab_size = size if tokenizer is None else min(size, tokenizer.vocab_size)
        self._eos = frozenset(model.config.eos_token_id if tokenizer is None else tokenizer.eos_ids)

    def _empty(self, seed: int | None) -> None:
        """No request yet, and nothing counted."""
        self.failure: str | None = None  # why the engine cannot go on at all
        self._requests: dict[str, Request] = {}
        self._totals = Totals()
        self._names = itertools.count()
        self._seeds, self._seeded = random.Random(seed), seed is not None
        self._owner: str | None = None  # who else runs step()

    @classmethod
    def load(cls, model: str | Path = "hadal-mini", **options: Any) -> Engine:
        """An engine for a published folder, a preset's name or a repository in the cache.

        Options: device ("auto", "cpu", "cuda", …), dtype ("auto", "float32", "bfloat16"), progress (called
        with bytes read and bytes in all), and those of the constructor. See hadal/engine/loading.py.
        """
        from hadal.engine.loading import load_engine

        return load_engine(cls, model, **options)

    # --- the step ---

    def step(self) -> list[tuple[str, Update]]:
        """One step for everybody: who computes what, compute, draw, book. Returns what became known."""
        self._check_alive()
        begin = time.monotonic()
        plan = self.scheduler.schedule()
        updates = [
            self._end(request, "abort", "the deadline passed in the queue") for request in plan.expired
        ]
        if plan.sequences:
            try:
                with exact_operations(self.exact):
                    output = self.runner.run(plan)
                    sampled = self._sample(plan, output)
                updates += self._commit(plan, output, sampled)
                if self.speculation is not None:
                    self.speculation.observe(plan, time.monotonic() - begin, len(sampled.tokens))
            except Exception as error:
                updates += self._fail(plan, error)
        return self._deliver(updates)

    def _sample(self, plan: Schedule, output: StepOutput) -> Sampled:
        if self.speculation is not None and self.speculation.engaged(plan, output):
            return self.speculation.sample(plan, output)
        if output.logits_BV is None:
            return Sampled([])
        return self.sampler.sample(output.logits_BV, output.requests, self._next_step(plan))

    def _next_step(self, plan: Schedule) -> Callable[[torch.Tensor], None] | None:
        """What starts the decode step after this one on the GPU, before this one's tokens are read.

        Only where nobody waits for a seat, and for sequences that have room for another token; the next plan
        decides whether it counts.
        """
        if not self.runner.can_look_ahead(plan) or self.scheduler.waiting:
            return None
        if self.speculation is not None and self.speculation.expects_drafts():
            return None
        size, reserve = self.scheduler.pages.page_size, self.scheduler.reserve
        goes_on = [
            row
            for row, s in enumerate(plan.sequences)
            if s.start + 2 <= s.request.max_len
            and (s.start + 2 <= len(s.pages) * size or reserve(s.request, s.start + 2))
        ]
        return partial(self.runner.look_ahead, plan, goes_on) if goes_on else None

    def _commit(self, plan: Schedule, output: StepOutput, sampled: Sampled) -> list[tuple[Request, Update]]:
        """Book a step: tokens to their requests, full pages to the prefix cache, finished requests out."""
        now = time.monotonic()
        for request, entries in output.prompt_logprobs:
            request.prompt_logprobs += entries
        updates = []
        rejected: dict[str, int] = {}
        new = zip(output.requests, output.num_drafts, sampled.by_request(), strict=True)
        for row, (request, drafted, (tokens, logprobs)) in enumerate(new):
            known = len(request.token_ids)
            updates.append((request, self._advance(request, tokens, logprobs, sampled.errors.get(row), now)))
            emitted = len(request.token_ids) - known
            self._totals.generation_tokens += emitted
            if drafted and self.speculation is not None:
                rejected[request.request_id] = self.speculation.count(request, drafted, emitted)
        updates += [self._embedded(request, vector, now) for request, vector in output.embeddings]
        self.scheduler.commit(plan, rejected)
        for request, update in updates:
            if update.finish_reason is not None:
                self._remove(request, update.finish_reason)
        if self.speculation is not None:
            self.speculation.attach(plan)
        self._totals.steps += 1
        return updates

    def _advance(
        self,
        request: Request,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob | None],
        error: str | None,
        now: float,
    ) -> Update:
        """Take in new tokens, up to one that ends the request or failed."""
        if request.metrics.first_token is None:
            self._totals.prompt_tokens += request.prompt_len
        if len(tokens) == 1 and error is None:  # as below, without the detours
            try:
                return advance(request, tokens[0], logprobs[0], now)
            except Exception as fault:
                return ended(request, "error", now, f"the new token could not be taken in: {fault}")
        taken: list[Update] = []
        for token, logprob in zip(tokens, logprobs, strict=True):
            if error is not None and token == FAILED:
                break
            try:
                taken.append(advance(request, token, logprob, now))
            except Exception as fault:  # its text or its grammar: nobody else's fault
                error = f"the new token could not be taken in: {fault}"
                break
            if taken[-1].finish_reason is not None:
                return merge_updates(taken)
        if error is not None:
            taken.append(ended(request, "error", now, error))
        return merge_updates(taken)

    def _embedded(self, request: Request, vector: torch.Tensor, now: float) -> tuple[Request, Update]:
        self._totals.prompt_tokens += request.prompt_len
        values = vector.tolist()
        if not all(map(math.isfinite, values)):
            return request, ended(request, "error", now, "the model's output is not finite (NaN or infinity)")
        update = ended(request, "stop", now)
        update.embedding = values
        return request, update

    def _fail(self, plan: Schedule, error: Exception) -> list[tuple[Request, Update]]:
        """End the requests of a step that raised; see whether the device still works."""
        logger.error("a step of %d tokens failed", plan.num_tokens, exc_info=error)
        message = f"the step failed: {type(error).__name__}: {error}"
        if _is_out_of_memory(error):
            message = (
                f"out of memory in a step of {plan.num_tokens} tokens and {len(plan.sequences)} sequences; "
                "send less at once, or start with a lower max_num_batched_tokens, max_num_seqs or cache"
            )
        ended_ = [
            self._end(s.request, "error", message)
            for s in plan.sequences
            if s.request.request_id in self._requests
        ]
        error.__traceback__ = None  # its frames hold the step's tensors
        release()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except Exception as fatal:
                self.failure = f"the GPU is lost: {fatal}"
        return ended_

    def _end(self, request: Request, reason: FinishReason, error: str | None) -> tuple[Request, Update]:
        self._remove(request, reason)
        return request, ended(request, reason, time.monotonic(), error)

    def _remove(self, request: Request, reason: FinishReason) -> None:
        """Forget a request. What a faulty one left in the cache is not to be shared."""
        self.scheduler.finish(request, poisoned=reason == "error")
        if self.speculation is not None:
            self.speculation.forget(request)
        self._requests.pop(request.request_id, None)
        self._totals.finished[reason] += 1

    def _deliver(self, updates: list[tuple[Request, Update]]) -> list[tuple[str, Update]]:
        for request, update in updates:
            if request.on_update is not None:
                try:
                    request.on_update(update)
                except Exception:
                    logger.exception(
                        "on_update of request %s raised; the request is aborted", request.request_id
                    )
                    if request.request_id in self._requests:
                        self._remove(request, "abort")
        return [(request.request_id, update) for request, update in updates]

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise EngineError(f"the engine is dead: {self.failure}; restart it")

    # --- requests ---

    def prepare(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        deadline: float | None = None,
        on_update: OnUpdate | None = None,
        pooling: PoolingParams | None = None,
    ) -> Request:
        """A checked request, not yet in the queue; `params` None: what the model asks for. Safe from any
        thread. Raises RequestError.

        May take long where a grammar must be compiled. deadline: time.monotonic() by which it must have
        started.
        """
        params = params or SamplingParams(**self.sampling_defaults)
        ids, words = pack_token_ids(prompt_ids, self.vocab_size)
        max_tokens = self._checked(len(ids), params, pooling)
        request = Request(
            request_id if request_id is not None else f"request-{next(self._names)}",
            ids,
            params,
            time.monotonic(),
            max_tokens,
            priority=priority,
            cache_salt=cache_salt,
            deadline=deadline,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            pooling=pooling,
            pool_weights=None if pooling is None else self._pool_weights(ids, pooling),
            on_update=on_update,
            prompt_array=words,
            eos_ids=frozenset() if params.ignore_eos else self._eos,
            repeatable=params.is_greedy or params.seed is not None or self._seeded,
        )
        self.scheduler.check_fits(request.prompt_len, request.max_len)
        if self.tokenizer is not None and pooling is None:
            request.detokenizer = Detokenizer(self.tokenizer, params.stop, include_stop=params.include_stop)
        if params.grammar is not None:
            request.matcher = params.grammar()
        return request

    def _checked(self, prompt_len: int, params: SamplingParams, pooling: PoolingParams | None) -> int:
        """New tokens that a request may have, none of a pooling one. RequestError for what this model cannot
        do."""
        for field_name, tokens in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if tokens and max(tokens) >= self.vocab_size:
                raise RequestError(
                    f"{field_name} names token id {max(tokens)}; ids go from 0 to {self.vocab_size - 1}",
                    field_name,
                )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this engine has none", "stop")
        if pooling is None:
            return resolve_max_tokens(prompt_len, params.max_tokens, self.max_model_len)
        resolve_max_tokens(prompt_len, None, self.max_model_len + 1)
        last = self.config.num_hidden_layers
        if pooling.layer > last:
            raise RequestError(f"layer must be from -1 to {last}, not {pooling.layer}", "layer")
        return 0

    def _pool_weights(self, ids: Sequence[int], pooling: PoolingParams) -> NDArray[np.float32]:
        special: frozenset[int] = frozenset()
        if self.tokenizer is not None and not pooling.special:
            special = frozenset(self.tokenizer.special.values())
        return weights(len(ids), pooled(ids, special), pooling.pooling)

    def enqueue(self, request: Request) -> str:
        """Queue a prepared request; returns its id. Raises RequestError for an id that is in use."""
        self._check_alive()
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id!r} is in use", "request_id")
        self.scheduler.add(request)
        self._requests[request.request_id] = request
        return request.request_id

    def add(self, prompt_ids: Sequence[int], params: SamplingParams | None = None, **options: Any) -> str:
        """`prepare` (its options) and `enqueue`; `step()` and `on_update` tell what follows."""
        return self.enqueue(self.prepare(prompt_ids, params, **options))

    def abort(self, request_id: str) -> bool:
        """Stop a request and free its pages now; its last update says "abort". False: not known."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._deliver([self._end(request, "abort", None)])
        return True

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pages, seats and requests add up."""
        self.scheduler.check_integrity()
        queued = {request.request_id for request in (*self.scheduler.running, *self.scheduler.waiting)}
        if queued != set(self._requests):
            raise EngineError(f"requests without a place, or twice: {sorted(queued ^ set(self._requests))}")

    def stats(self) -> EngineStats:
        """Cheap, and safe from any thread (the numbers may be from different moments of a step)."""
        speculation = None if self.speculation is None else self.speculation.snapshot()
        return self._totals.stats(self.scheduler, speculation, exact=self.exact)


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA's error, Python's, or the CPU allocator's, which is a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
