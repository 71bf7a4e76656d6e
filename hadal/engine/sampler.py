"""From logits to tokens for a batch of requests: settings as tensors, kept while the batch is the same.

What changes from step to step (the uniform numbers, counts of penalised tokens, grammar masks, the
min_tokens ban) is small; all else is built once for a composition of the batch. The mathematics is in
hadal/ops/sampling.py. A token depends only on its own row, its request's seed and its position: never on
the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from hadal.engine.request import Request, TokenLogprob
from hadal.ops import sampling
from hadal.ops.sampling import FAILED, Filters

_PYTHON_UNIFORMS = 16  # up to so many rows the hash is quicker in Python integers than in tensors


@dataclass
class Sampled:
    """Tokens in the order of the requests. A token of FAILED (−1) has its reason in `errors` by row."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    errors: dict[int, str] = field(default_factory=dict)


@dataclass
class _Batch:
    """What does not change while the same requests are sampled together."""

    requests: list[Request]
    filters: Filters
    seed_B: Tensor | None = None  # int64, on the host; None: nothing is drawn
    penalized: list[int] = field(default_factory=list)  # rows
    penalties: list[Tensor] = field(default_factory=list)  # repetition, frequency, presence of those rows
    bias: tuple[Tensor, Tensor, Tensor] | None = None  # row, token, value
    min_tokens: list[int] = field(default_factory=list)  # rows
    grammars: list[int] = field(default_factory=list)  # rows
    logprob_rows: list[int] = field(default_factory=list)
    top_n: int = 0

    @property
    def changes_logits(self) -> bool:
        return bool(self.penalized or self.bias is not None or self.min_tokens or self.grammars)


class Sampler:
    """`vocab_size`: ids that may be drawn; the model's table may have further, unused rows."""

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.max_num_seqs = max_num_seqs
        self.device = device
        self._batch: _Batch | None = None
        self._host_token: Tensor | None = None  # pinned
        self._count_SV: Tensor | None = None  # int32: tokens of the output, by the request's slot
        self._in_prompt_SV: Tensor | None = None  # bool
        self._counted: dict[
            int, tuple[Request, int]
        ] = {}  # slot -> whose counts it holds, of how many tokens

    def sample(
        self, logits_BV: Tensor, requests: list[Request], then: Callable[[Tensor], None] | None = None
    ) -> Sampled:
        """The next token of each request, from the logits after its last token. May change `logits_BV`.

        `then` gets the tokens on the device before the host waits for them: what it starts runs meanwhile.
        """
        batch = self._batch
        if batch is None or batch.requests != requests:
            batch = self._batch = self._build(requests)
        errors: dict[int, str] = {}
        x_BV = logits_BV[:, : self.vocab_size]
        if batch.changes_logits:
            x_BV = x_BV.clone() if batch.logprob_rows else x_BV
            self._change(x_BV, batch, errors)
        token_B = sampling.sample(x_BV, batch.filters, self._uniform(batch))
        if batch.penalized:
            self._count(batch, token_B)
        entries = self._logprobs(logits_BV, token_B, batch) if batch.logprob_rows else None
        # log-probabilities are read after the tokens: nothing may be started before them
        tokens = self._read(token_B, None if entries else then)
        if min(tokens) < 0 or errors:
            for row, token in enumerate(tokens):
                if token < 0 and row not in errors:
                    errors[row] = "the model's output is not finite (NaN or infinite logits)"
            tokens = [FAILED if row in errors else token for row, token in enumerate(tokens)]
        return Sampled(tokens, self._entries(entries, batch, tokens) if entries else None, errors)

    def _read(self, token_B: Tensor, then: Callable[[Tensor], None] | None) -> list[int]:
        """Tokens on the host. On a GPU their copy goes first, then what `then` starts; only the copy is
        awaited."""
        if then is None or not token_B.is_cuda:
            return cast(list[int], token_B.tolist())
        if self._host_token is None:
            self._host_token = torch.empty(self.max_num_seqs, dtype=token_B.dtype, pin_memory=True)
        host = self._host_token[: token_B.shape[0]]
        host.copy_(token_B, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        then(token_B)
        copied.synchronize()
        return cast(list[int], host.tolist())

    # --- settings ---

    def _build(self, requests: list[Request]) -> _Batch:
        params = [request.params for request in requests]
        filters = Filters.build(
            [0.0 if p.is_greedy else p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            self.device,
        )
        batch = _Batch(list(requests), filters)
        if not filters.all_greedy:
            batch.seed_B = torch.tensor([request.seed for request in requests])
        batch.penalized = [row for row, p in enumerate(params) if p.has_penalties]
        if batch.penalized:
            rows = [params[row] for row in batch.penalized]
            batch.penalties = [
                self._tensor([p.repetition_penalty for p in rows], torch.float32),
                self._tensor([p.frequency_penalty for p in rows], torch.float32),
                self._tensor([p.presence_penalty for p in rows], torch.float32),
            ]
        biases = [(row, token, bias) for row, p in enumerate(params) for token, bias in p.logit_bias.items()]
        if biases:
            row, token, value = zip(*biases, strict=True)
            batch.bias = (
                self._tensor(row, torch.int64),
                self._tensor(token, torch.int64),
                self._tensor(value, torch.float32),
            )
        batch.min_tokens = [row for row, p in enumerate(params) if p.min_tokens]
        batch.grammars = [row for row, request in enumerate(requests) if request.matcher is not None]
        batch.logprob_rows = [row for row, p in enumerate(params) if p.logprobs is not None]
        batch.top_n = max((params[row].logprobs or 0 for row in batch.logprob_rows), default=0)
        return batch

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        host = torch.tensor(values, dtype=dtype)
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    def _uniform(self, batch: _Batch) -> Tensor | None:
        if batch.seed_B is None:
            return None
        positions = [len(request.token_ids) for request in batch.requests]
        if len(positions) <= _PYTHON_UNIFORMS:
            draws = [
                sampling.uniform_reference(request.seed, position)
                for request, position in zip(batch.requests, positions, strict=True)
            ]
            return self._tensor(draws, torch.float64)
        u_B = sampling.uniform(batch.seed_B, torch.tensor(positions))
        return u_B if self.device.type == "cpu" else u_B.pin_memory().to(self.device, non_blocking=True)

    # --- changes to the logits, in place ---

    def _change(self, x_BV: Tensor, batch: _Batch, errors: dict[int, str]) -> None:
        if batch.penalized:
            slots = self._tensor(self._count_slots(batch), torch.int64)
            assert self._count_SV is not None and self._in_prompt_SV is not None
            rows = self._tensor(batch.penalized, torch.int64)
            everyone = len(batch.penalized) == len(batch.requests)
            changed = sampling.penalize(
                x_BV if everyone else x_BV.index_select(0, rows),
                self._count_SV.index_select(0, slots),
                self._in_prompt_SV.index_select(0, slots),
                *batch.penalties,
            )
            x_BV.index_copy_(0, rows, changed)
        if batch.bias is not None:
            row, token, value = batch.bias
            x_BV.index_put_((row, token), value.to(x_BV.dtype), accumulate=True)
        if batch.min_tokens:
            self._ban_end(x_BV, batch)
        if batch.grammars:
            self._apply_grammars(x_BV, batch, errors)

    def _ban_end(self, x_BV: Tensor, batch: _Batch) -> None:
        rows: list[int] = []
        tokens: list[int] = []
        for row in batch.min_tokens:
            request = batch.requests[row]
            if request.num_generated < request.params.min_tokens:
                ends = request.eos_ids.union(request.params.stop_token_ids)
                tokens.extend(ends)
                rows.extend([row] * len(ends))
        if rows:
            x_BV[self._tensor(rows, torch.int64), self._tensor(tokens, torch.int64)] = float("-inf")

    def _apply_grammars(self, x_BV: Tensor, batch: _Batch, errors: dict[int, str]) -> None:
        for row in batch.grammars:
            matcher = batch.requests[row].matcher
            assert matcher is not None
            try:
                mask = torch.as_tensor(matcher.mask())
            except Exception as error:  # a fault in one grammar is that request's alone
                errors[row] = f"the grammar failed: {error}"
                continue
            mask = mask.to(self.device)
            if mask.dtype == torch.bool:
                allowed_V = torch.nn.functional.pad(mask, (0, max(0, self.vocab_size - mask.numel())))
                allowed_V = allowed_V[: self.vocab_size]
            else:
                allowed_V = sampling.expand_bitmask(mask.view(1, -1), self.vocab_size)[0]
            x_BV[row].masked_fill_(~allowed_V, float("-inf"))

    # --- counts of the penalties ---

    def _count_slots(self, batch: _Batch) -> list[int]:
        """Slots of the penalised requests, whose counts are brought up to date first where they are not."""
        if self._count_SV is None or self._in_prompt_SV is None:
            shape = (self.max_num_seqs, self.vocab_size)
            self._count_SV = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._in_prompt_SV = torch.zeros(shape, dtype=torch.bool, device=self.device)
        slots = []
        for row in batch.penalized:
            request = batch.requests[row]
            slots.append(request.slot)
            owner, counted = self._counted.get(request.slot, (None, -1))
            if owner is request and counted == request.num_generated:
                continue
            self._counted[request.slot] = (request, request.num_generated)
            prompt = self._tensor(request.prompt_ids, torch.int64)
            output = self._tensor(request.output_ids, torch.int64)
            self._in_prompt_SV[request.slot].zero_()[prompt] = True
            count_V = self._count_SV[request.slot].zero_()
            count_V.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        return slots

    def _count(self, batch: _Batch, token_B: Tensor) -> None:
        """Count the tokens just drawn, on the device. A failed row counts token 0: its request is over
        anyway."""
        assert self._count_SV is not None
        slots = [batch.requests[row].slot for row in batch.penalized]
        token = token_B[self._tensor(batch.penalized, torch.int64)].clamp(min=0)
        one = torch.ones_like(token, dtype=torch.int32)
        self._count_SV.index_put_((self._tensor(slots, torch.int64), token), one, accumulate=True)
        for slot in slots:
            request, counted = self._counted[slot]
            self._counted[slot] = (request, counted + 1)

    # --- log-probabilities ---

    def _logprobs(self, raw_BV: Tensor, token_B: Tensor, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
        if len(batch.logprob_rows) < len(batch.requests):
            rows = self._tensor(batch.logprob_rows, torch.int64)
            raw_BV, token_B = raw_BV.index_select(0, rows), token_B.index_select(0, rows)
        return sampling.logprobs(raw_BV, token_B, batch.top_n)

    def _entries(
        self, found: tuple[Tensor, Tensor, Tensor], batch: _Batch, tokens: list[int]
    ) -> list[TokenLogprob | None]:
        entries: list[TokenLogprob | None] = [None] * len(tokens)
        columns = (tensor.tolist() for tensor in found)
        for row, value, top_values, top_ids in zip(batch.logprob_rows, *columns, strict=True):
            n = batch.requests[row].params.logprobs or 0
            entries[row] = TokenLogprob(
                tokens[row], value, list(zip(top_ids[:n], top_values[:n], strict=True))
            )
        return entries
