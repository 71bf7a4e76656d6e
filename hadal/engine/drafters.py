"""Where drafts come from: the model's own MTP module, or what the text itself has said before.

MTP (V3 report §2.2, §5.4.3). Block 0 predicts the token after the next from h_i and token i + 1; applied to
its own output it predicts one further (as vLLM does; V3 trained it for the first alone). Its entries of the
key/value cache are a layer of their own in the same pages: entry i at the place of the model's entry i. It is
filled for prompts, too. Entry i depends on token i + 1, so the hash of a page covers the token after the page
(`Scheduler.hash_ahead`), and a page of the prefix cache is right for everyone who finds it.

A step that runs without the MTP block (drafting rests) leaves holes. `MtpDrafter` knows which pages have
some; a sequence with holes gets no drafts. What is drawn never depends on any of this.

N-gram (prompt lookup, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). The longest suffix of the
text, of 4 to 2 tokens, that occurred before: what followed it then is proposed now. Needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hadal.engine.request import Request
from hadal.engine.runner import Runner, StepOutput
from hadal.engine.sampler import DRAFT, Sampler
from hadal.engine.scheduler import Schedule, ScheduledSequence, Scheduler
from hadal.ops import sampling

LONGEST_MATCH, SHORTEST_MATCH = 4, 2


@dataclass
class Drafts:
    """Drafts of N sequences, on the device; q [N, K, V] is what they were drawn from, for the requests of
    `drawn` (row of q by request id)."""

    requests: list[Request]
    token_NK: Tensor
    q_NKV: Tensor | None = None
    drawn: dict[str, int] = field(default_factory=dict)


class MtpDrafter:
    """K drafts a sequence from MTP block 0. Follows every step that it is shown (`follow`)."""

    name = "mtp"

    def __init__(self, runner: Runner, sampler: Sampler, scheduler: Scheduler, num_tokens: int) -> None:
        self.runner, self.sampler, self.scheduler, self.num_tokens = runner, sampler, scheduler, num_tokens
        self.model, self.page_size = runner.model, runner.page_size
        self._holes: set[int] = set()  # pages that lack some MTP entry
        self._whole: dict[str, tuple[list[int], bool]] = {}  # request id -> its pages, no entry is missing
        self._hidden_TD: Tensor | None = None
        runner.use_mtp()

    # --- which entries are there ---

    def skip(self, plan: Schedule) -> None:
        """A step goes by without the MTP block: its tokens have no entries."""
        for s in plan.sequences:
            self._whole[s.request.request_id] = (s.pages, False)
            self._holes.update(self._touched(s))

    def _note(self, plan: Schedule) -> None:
        """A step is followed: its tokens get entries, good ones where none before them is missing."""
        for s in plan.sequences:
            pages, whole = self._whole.get(s.request.request_id, (None, False))
            if pages is not s.pages:  # a new seating: its pages so far were found in the prefix cache
                whole = self._holes.isdisjoint(s.pages[: s.start // self.page_size])
                self._whole[s.request.request_id] = (s.pages, whole)
            if whole:
                self._holes.difference_update(self._touched(s))
            else:
                self._holes.update(self._touched(s))

    def _touched(self, s: ScheduledSequence) -> list[int]:
        size = self.page_size
        return s.pages[s.start // size : (s.start + s.num_tokens - 1) // size + 1]

    def forget(self, request: Request) -> None:
        """The request is over."""
        self._whole.pop(request.request_id, None)

    def can_draft(self, request: Request) -> bool:
        """Whether all its MTP entries are there."""
        pages, whole = self._whole.get(request.request_id, (None, False))
        return whole and pages is request.pages

    # --- the block ---

    def follow(self, plan: Schedule, output: StepOutput, new_SJ: Tensor | None) -> None:
        """Run the block over the stream of a step: entries for all its tokens. new: what was drawn for each
        of output.requests."""
        self._note(plan)
        next_T = self._next_tokens(plan, output, new_SJ)
        self._hidden_TD = self.runner.mtp_follow(output, next_T)

    def _next_tokens(self, plan: Schedule, output: StepOutput, new_SJ: Tensor | None) -> Tensor:
        """The token after each of the stream, int64 [T]. Behind a rejected draft: any."""
        T = plan.num_tokens
        places = None
        if new_SJ is not None:
            J = new_SJ.shape[1]
            index = [s * J + j for s, n in enumerate(output.num_drafts) for j in range(n + 1)]
            places = new_SJ.flatten()[self.runner.index(index)].clamp(min=0)
            if len(index) == T:
                return places
        known = [0] * T
        begin = 0
        for s in plan.sequences:
            if not s.is_decode:
                ids = s.request.token_ids[s.start + 1 : s.start + s.num_tokens + 1]
                known[begin : begin + len(ids)] = ids
            begin += s.num_tokens
        next_T = self.runner.index(known)
        if places is not None:
            next_T = next_T.index_copy(0, self.runner.index(output.rows), places)
        return next_T

    # --- drafts ---

    def propose(
        self, plan: Schedule, output: StepOutput, accepted_S: Tensor, wanted: Sequence[int]
    ) -> Drafts | None:
        """Drafts for those of output.requests whose numbers are `wanted`, from the step just followed."""
        assert self._hidden_TD is not None
        K = self.num_tokens
        by_id = {s.request.request_id: s for s in plan.sequences}
        chosen, sequences = [], []
        for number in wanted:
            s = by_id[output.requests[number].request_id]
            if K == 1 or self._reserve(s):
                chosen.append(number)
                sequences.append(s)
        if not sequences:
            return None
        if K > 1:
            self.runner.update_table(sequences)
        requests = [s.request for s in sequences]
        accepted_N = accepted_S[self.runner.index(chosen)]
        first = self._first_rows(output)
        row_N = self.runner.index([first[number] for number in chosen]) + accepted_N
        hidden_ND = self._hidden_TD.index_select(0, row_N)
        last_N = (
            self.runner.index([s.start + s.num_tokens - 1 - s.num_drafts for s in sequences]) + accepted_N
        )
        return self._chain(requests, sequences, hidden_ND, last_N)

    def _reserve(self, s: ScheduledSequence) -> bool:
        """Pages for the entries of drafts that are drafted from."""
        end = min(s.start + s.num_tokens + self.num_tokens - 1, s.request.max_len)
        return self.scheduler.reserve(s.request, end)

    @staticmethod
    def _first_rows(output: StepOutput) -> list[int]:
        """Row of the stream after whose token each request's next one is due."""
        first, at = [], 0
        for number in output.num_drafts:
            first.append(output.rows[at])
            at += number + 1
        return first

    def _chain(
        self,
        requests: list[Request],
        sequences: list[ScheduledSequence],
        hidden_ND: Tensor,
        last_N: Tensor,
    ) -> Drafts:
        """K drafts one after the other. last: position of the hidden state, two before the first draft's."""
        drawing = [n for n, request in enumerate(requests) if not request.repeatable]
        filters = self.sampler.filters(requests)
        limit = self.model.max_positions  # a draft too many near the end is computed, and never scheduled
        ends = self.runner.index([min(len(s.pages) * self.page_size, limit) - 1 for s in sequences])
        tokens: list[Tensor] = []
        probabilities: list[Tensor] = []
        for place in range(self.num_tokens):
            if place:
                position_N = torch.minimum(last_N + place, ends)
                hidden_ND = self.runner.mtp_advance(hidden_ND, tokens[-1], position_N, sequences)
            logits_NV = self.model.mtp_logits(hidden_ND)[:, : self.sampler.vocab_size]
            token_N, q_nV = self._draw(logits_NV, requests, filters, last_N + place + 2, drawing)
            tokens.append(token_N)
            if q_nV is not None:
                probabilities.append(q_nV)
        drawn = {requests[n].request_id: row for row, n in enumerate(drawing)}
        q_NKV = torch.stack(probabilities, 1) if probabilities else None
        return Drafts(requests, torch.stack(tokens, 1), q_NKV, drawn)

    def _draw(
        self,
        logits_NV: Tensor,
        requests: list[Request],
        filters: sampling.Filters,
        position_N: Tensor,
        drawing: list[int],
    ) -> tuple[Tensor, Tensor | None]:
        """(a draft each, and for the rows `drawing` the distributions that they were drawn from).

        Repeatable requests take the number that will draw the token itself, so that draft and token are the
        same where the distributions are."""
        if filters.all_greedy:
            return logits_NV.argmax(-1), None
        seed_N = self.runner.index([request.seed for request in requests])
        token_N = sampling.sample(logits_NV, filters, sampling.uniform(seed_N, position_N)).clamp(min=0)
        if not drawing:
            return token_N, None
        rows = self.runner.index(drawing)
        q_nV = sampling.probabilities(
            logits_NV.index_select(0, rows), self.sampler.filters([requests[n] for n in drawing])
        )
        u_n = sampling.uniform(seed_N[rows], position_N[rows], DRAFT)
        return token_N.index_copy(0, rows, sampling.choose(q_nV, u_n)), q_nV


class NgramDrafter:
    """Up to K drafts a sequence, out of its own text."""

    name = "ngram"

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._seen: dict[str, _Seen] = {}

    def forget(self, request: Request) -> None:
        """The request is over."""
        self._seen.pop(request.request_id, None)

    def propose(self, request: Request) -> list[int]:
        """What followed the last tokens when they came before; [] if they never did."""
        seen = self._seen.get(request.request_id)
        if seen is None:
            seen = self._seen[request.request_id] = _Seen()
        place = seen.find(request.token_ids)
        if not place:
            return []
        period = len(request.token_ids) - place  # a match near the end goes on as what repeats
        return [request.token_ids[place + j % period] for j in range(self.num_tokens)]


@dataclass
class _Seen:
    """Where each run of tokens ended last, not counting the text's own end."""

    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    known: int = 0  # ends before this are in `places`

    def find(self, ids: list[int]) -> int:
        """Index after the latest earlier occurrence of the longest suffix that has one; 0: none."""
        for end in range(max(self.known, SHORTEST_MATCH), len(ids)):
            for width in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
                self.places[tuple(ids[end - width : end])] = end
        self.known = len(ids)
        for width in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            if len(ids) >= width and (place := self.places.get(tuple(ids[-width:]))):
                return place
        return 0
