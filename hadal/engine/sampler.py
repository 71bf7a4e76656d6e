"""From logits to tokens for a batch of requests: settings as tensors, kept while the batch is the same.

What changes from step to step (the uniform numbers, counts of penalised tokens, grammar masks, the
min_tokens ban) is small; all else is built once for a composition of the batch. The mathematics is in
hadal/ops/sampling.py. A token depends only on its own row, its request's seed and its position: never on
the batch.

With drafts (hadal/engine/speculation.py) a request has a row for its next token and one for the place after
each draft. A row's distribution is what it would be if the drafts before it had been drawn: penalties, bans
and logit bias count them. hadal/ops/speculative.py says which drafts stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from hadal.engine.request import Request, TokenLogprob
from hadal.engine.sampled import Logprobs, Sampled, by_row, entry_of
from hadal.ops import sampling
from hadal.ops.sampling import FAILED, Filters
from hadal.ops.speculative import NO_DRAFT, matched, rejection, settle

_PYTHON_UNIFORMS = 16  # up to so many rows the hash is quicker in Python integers than in tensors
_ACCEPT = 1  # stream of the numbers that accept drafts; tokens are drawn from stream 0, drafts from DRAFT
DRAFT = 2
_NOT_FINITE = "the model's output is not finite (NaN or infinite logits)"


@dataclass
class Verified:
    """New tokens of S requests, still on the device, and how to read them: see `Sampler.finish`."""

    requests: list[Request]
    new_SJ: Tensor  # NO_TOKEN behind the last
    accepted_S: Tensor
    first: list[int]  # row of the logits where each request's begin
    logprobs: list[Logprobs] | None
    errors: dict[int, str]  # by row of the logits
    batch: _Batch


@dataclass
class _Batch:
    """What does not change while the same requests are sampled together."""

    requests: list[Request]
    filters: Filters
    offsets: list[int] = field(default_factory=list)  # drafts before each row; empty: none anywhere
    rejecting: list[int] = field(default_factory=list)  # rows with a draft that are not matched
    rejecting_filters: Filters | None = None
    seed_B: Tensor | None = None  # int64, on the host; None: nothing is drawn
    penalized: list[int] = field(default_factory=list)  # rows
    penalties: list[Tensor] = field(default_factory=list)  # repetition, frequency, presence of those rows
    bias: tuple[Tensor, Tensor, Tensor] | None = None  # row, token, value
    min_tokens: list[int] = field(default_factory=list)  # rows
    grammars: list[int] = field(default_factory=list)  # rows
    model_rows: list[int] = field(default_factory=list)  # that want log-probabilities of the raw logits
    drawn_rows: list[int] = field(default_factory=list)  # that want those of the distribution drawn from
    top_n: int = 0

    @property
    def wants_logprobs(self) -> bool:
        """Whether any row does."""
        return bool(self.model_rows or self.drawn_rows)

    @property
    def changes_logits(self) -> bool:
        """Whether any row's logits are changed before the filters."""
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
        batch = self._batch_of(requests, [])
        errors: dict[int, str] = {}
        x_BV = self._changed(logits_BV, batch, errors)
        token_B = sampling.sample(x_BV, batch.filters, self._uniform(batch))
        if batch.penalized:
            self._count(batch, token_B)
        entries = self._logprobs(logits_BV, x_BV, token_B, batch) if batch.wants_logprobs else []
        tokens = self._read(token_B, entries, then)
        if min(tokens) < 0 or errors:
            for row, token in enumerate(tokens):
                if token < 0 and row not in errors:
                    errors[row] = _NOT_FINITE
            tokens = [FAILED if row in errors else token for row, token in enumerate(tokens)]
        return Sampled(tokens, self._entries(entries, batch, tokens) if entries else None, errors)

    # --- drafts ---

    def verify(
        self,
        logits_RV: Tensor,
        requests: list[Request],
        num_drafts: list[int],
        q_RV: Tensor | None = None,
        forced_acceptance: float | None = None,
    ) -> Verified:
        """The new tokens of each request, from 1 + num_drafts rows of logits for each: those after its last
        token and after each of its `draft_ids`. Starts the work and waits for nothing.

        q_RV: what each draft was drawn from; None: they were not drawn. forced_acceptance: accept every draft
        with this probability instead, for measurements; the output is then not the model's.
        """
        offsets = [j for number in num_drafts for j in range(number + 1)]
        expanded = [r for r, number in zip(requests, num_drafts, strict=True) for _ in range(number + 1)]
        batch = self._batch_of(expanded, offsets)
        drafts = [
            draft
            for r, number in zip(requests, num_drafts, strict=True)
            for draft in (*r.draft_ids[:number], NO_DRAFT)
        ]
        draft_R = self._tensor(drafts, torch.int64)
        errors: dict[int, str] = {}
        x_RV = self._changed(logits_RV, batch, errors)
        token_R = sampling.sample(x_RV, batch.filters, self._uniform(batch))
        accepted_R = matched(token_R, draft_R)
        if batch.rejecting:
            self._reject(x_RV, q_RV, draft_R, token_R, accepted_R, batch)
        if forced_acceptance is not None:
            accepted_R = (draft_R >= 0) & (self._uniform(batch, _ACCEPT) < forced_acceptance)
        first = [row for row, offset in enumerate(offsets) if offset == 0]
        row_SJ = self._rows(first, num_drafts)
        draft_SK, accepted_SK = draft_R[row_SJ[:, :-1]], accepted_R[row_SJ[:, :-1]]
        new_SJ, accepted_S = settle(draft_SK, accepted_SK, token_R[row_SJ])
        logprobs = None
        if batch.wants_logprobs:
            logprobs = self._logprobs(logits_RV, x_RV, torch.where(accepted_R, draft_R, token_R), batch)
        return Verified(list(requests), new_SJ, accepted_S, first, logprobs, errors, batch)

    def _reject(
        self,
        x_RV: Tensor,
        q_RV: Tensor | None,
        draft_R: Tensor,
        token_R: Tensor,
        accepted_R: Tensor,
        batch: _Batch,
    ) -> None:
        """Rejection sampling for the rows that are not matched, written into token_R and accepted_R."""
        assert batch.rejecting_filters is not None
        rows = self._tensor(batch.rejecting, torch.int64)
        accepted_r, token_r = rejection(
            sampling.probabilities(x_RV.index_select(0, rows), batch.rejecting_filters),
            None if q_RV is None else q_RV.index_select(0, rows),
            draft_R[rows],
            self._uniform(batch, _ACCEPT)[rows],
            self._uniform(batch)[rows],
        )
        token_R.index_copy_(0, rows, token_r)
        accepted_R.index_copy_(0, rows, accepted_r)

    def _rows(self, first: list[int], num_drafts: list[int]) -> Tensor:
        """[S, J]: the rows of each request; behind them the last one again, which has no draft."""
        J = max(num_drafts) + 1
        return self._tensor(
            [[f + min(j, n) for j in range(J)] for f, n in zip(first, num_drafts, strict=True)], torch.int64
        )

    def finish(self, verified: Verified, rows: list[list[int]]) -> Sampled:
        """What `verify` found, once `new_SJ` was read by the host (as `rows`)."""
        tokens: list[int] = []
        counts: list[int] = []
        errors: dict[int, str] = {}
        logprobs: list[TokenLogprob | None] = []
        found = verified.logprobs
        entries = None if found is None else by_row(found)
        for s, (request, first, row) in enumerate(zip(verified.requests, verified.first, rows, strict=True)):
            new = [token for token in row if token >= FAILED]
            if first in verified.errors:
                new = [FAILED]
            if new[-1] == FAILED:
                errors[s] = verified.errors.get(first, _NOT_FINITE)
            tokens += new
            counts.append(len(new))
            if entries is not None:
                logprobs += [entry_of(request, token, entries.get(first + j)) for j, token in enumerate(new)]
        return Sampled(tokens, logprobs if entries is not None else None, errors, counts)

    def _read(
        self, token_B: Tensor, entries: list[Logprobs], then: Callable[[Tensor], None] | None
    ) -> list[int]:
        """Tokens on the host. On a GPU their copy and those of `entries`, which are on the host afterwards,
        go first, then what `then` starts; only the copies are awaited."""
        if then is None or not token_B.is_cuda:
            return cast(list[int], token_B.tolist())
        if self._host_token is None:
            self._host_token = torch.empty(self.max_num_seqs, dtype=token_B.dtype, pin_memory=True)
        host = self._host_token[: token_B.shape[0]]
        host.copy_(token_B, non_blocking=True)
        for one in entries:
            one.to_host()
        copied = torch.cuda.Event()
        copied.record()
        then(token_B)
        copied.synchronize()
        return cast(list[int], host.tolist())

    # --- settings ---

    def _batch_of(self, requests: list[Request], offsets: list[int]) -> _Batch:
        batch = self._batch
        if batch is None or batch.offsets != offsets or batch.requests != requests:
            batch = self._batch = self._build(requests, offsets)
        return batch

    def _build(self, requests: list[Request], offsets: list[int]) -> _Batch:
        params = [request.params for request in requests]
        filters = self.filters(requests)
        batch = _Batch(list(requests), filters, list(offsets))
        if offsets:
            batch.rejecting = [
                row
                for row, (request, after) in enumerate(zip(requests, [*offsets[1:], 0], strict=True))
                if after and not request.repeatable
            ]
            batch.rejecting_filters = self.filters([requests[row] for row in batch.rejecting])
        if offsets or not filters.all_greedy:
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
        for at, asked in enumerate(params):
            if asked.logprobs is not None:
                of_sampler = asked.logprobs_of == "sampler"
                (batch.drawn_rows if of_sampler else batch.model_rows).append(at)
                batch.top_n = max(batch.top_n, asked.logprobs)
        return batch

    def filters(self, requests: Sequence[Request]) -> Filters:
        """Temperature and cuts of one row a request."""
        params = [request.params for request in requests]
        return Filters.build(
            [0.0 if p.is_greedy else p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            self.device,
        )

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        host = torch.tensor(values, dtype=dtype)
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    def _uniform(self, batch: _Batch, stream: int = 0) -> Any:  # Tensor, or None where nothing is drawn
        if batch.seed_B is None:
            return None
        positions = [len(request.token_ids) for request in batch.requests]
        if batch.offsets:
            positions = [position + j for position, j in zip(positions, batch.offsets, strict=True)]
        if len(positions) <= _PYTHON_UNIFORMS:
            draws = [
                sampling.uniform_reference(request.seed, position, stream)
                for request, position in zip(batch.requests, positions, strict=True)
            ]
            return self._tensor(draws, torch.float64)
        u_B = sampling.uniform(batch.seed_B, torch.tensor(positions), stream)
        return u_B if self.device.type == "cpu" else u_B.pin_memory().to(self.device, non_blocking=True)

    # --- changes to the logits, in place ---

    def _changed(self, logits_BV: Tensor, batch: _Batch, errors: dict[int, str]) -> Tensor:
        """Logits of the tokens that may be drawn, after all changes; may be `logits_BV` itself, changed."""
        x_BV = logits_BV[:, : self.vocab_size]
        if batch.changes_logits:
            x_BV = x_BV.clone() if batch.wants_logprobs else x_BV
            self._change(x_BV, batch, errors)
        return x_BV

    def _change(self, x_BV: Tensor, batch: _Batch, errors: dict[int, str]) -> None:
        if batch.penalized:
            slots = self._tensor(self._count_slots(batch), torch.int64)
            assert self._count_SV is not None and self._in_prompt_SV is not None
            rows = self._tensor(batch.penalized, torch.int64)
            everyone = len(batch.penalized) == len(batch.requests)
            changed = sampling.penalize(
                x_BV if everyone else x_BV.index_select(0, rows),
                self._with_drafts(self._count_SV.index_select(0, slots), batch),
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
            before = batch.offsets[row] if batch.offsets else 0
            if request.num_generated + before < request.params.min_tokens:
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
            if owner is not request or counted > request.num_generated:
                counted = 0
                prompt = self._tensor(request.prompt_ids, torch.int64)
                self._in_prompt_SV[request.slot].zero_()[prompt] = True
                self._count_SV[request.slot].zero_()
            output = self._tensor(request.token_ids[request.prompt_len + counted :], torch.int64)
            self._count_SV[request.slot].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        return slots

    def _with_drafts(self, count_BV: Tensor, batch: _Batch) -> Tensor:
        """Counts of the penalised rows, each with the drafts before its place; count_BV is changed."""
        places = [
            (index, draft)
            for index, row in enumerate(batch.penalized)
            if batch.offsets
            for draft in batch.requests[row].draft_ids[: batch.offsets[row]]
        ]
        if places:
            row_N, token_N = (self._tensor(column, torch.int64) for column in zip(*places, strict=True))
            one_N = torch.ones_like(row_N, dtype=torch.int32)
            count_BV.index_put_((row_N, token_N), one_N, accumulate=True)
        return count_BV

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

    def _logprobs(self, raw_BV: Tensor, x_BV: Tensor, token_B: Tensor, batch: _Batch) -> list[Logprobs]:
        """The log-probabilities that rows ask for: of the raw logits, or of what tokens are drawn from."""
        found = []
        for rows, logits_BV in ((batch.model_rows, raw_BV), (batch.drawn_rows, x_BV)):
            if not rows:
                continue
            some_B, temperature_B = token_B, batch.filters.temperature_B
            if len(rows) < len(batch.requests):
                index = self._tensor(rows, torch.int64)
                logits_BV, some_B = logits_BV.index_select(0, index), token_B.index_select(0, index)
                temperature_B = temperature_B.index_select(0, index)
            if rows is batch.drawn_rows:
                logits_BV = logits_BV / temperature_B.unsqueeze(1)
            found.append(Logprobs(rows, *sampling.logprobs(logits_BV, some_B, batch.top_n)))
        return found

    def _entries(self, found: list[Logprobs], batch: _Batch, tokens: list[int]) -> list[TokenLogprob | None]:
        if batch.top_n == 0 and len(batch.drawn_rows) == len(tokens):  # what a trainer asks
            return [TokenLogprob(*pair) for pair in zip(tokens, found[0].value_B.tolist(), strict=True)]
        known = by_row(found)
        return [
            entry_of(request, token, known.get(row))
            for row, (request, token) in enumerate(zip(batch.requests, tokens, strict=True))
        ]


Found = tuple[float, list[float], list[int]]  # a token's log-probability; values and ids of the likeliest
