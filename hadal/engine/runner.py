"""One rank's view of the model and its cache: from the plan of a step, through its tensors, to logits.

A plan becomes one flat stream: token ids, positions, the cache slot of each token (page · page_size +
offset), and per sequence its pages and visible length. A sequence with drafts is k + 1 rows of one token
each, which share its pages and see one token more from row to row: all entries of a step are written before
any is read, so drafts need no attention of their own. The pages of a running sequence sit in one row of a
block table, at the row that the scheduler gave it (`Request.slot`); a row is touched only when its sequence
gets a page. Host buffers are allocated once (pinned beside a GPU) and each kind of input crosses in one
copy.

On a GPU, steps of single tokens run on static shapes, replayed as CUDA graphs (hadal/engine/graphs.py).
Legend: T tokens, S sequences, P pages, D hidden, V vocabulary, B rows that are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hadal.engine.graphs import DecodeGraphs, MtpGraphs, PromptGraphs
from hadal.engine.request import Request, TokenLogprob
from hadal.engine.scheduler import Schedule, ScheduledSequence
from hadal.model.context import Cache, Context
from hadal.model.transformer import Transformer
from hadal.ops import sampling
from hadal.ops.exact import is_exact

Array = npt.NDArray[np.int64]

_FEW_ROWS = 4  # of the block table: more of them cross in one copy of it all
_LOGIT_ELEMENTS = 2**24  # at most so many logits at once for prompt log-probabilities (64 MiB)


@dataclass
class StepOutput:
    """What a step computed. `logits_BV` has one row for each of `requests`, those whose next token is due,
    and one more for each of its drafts (`num_drafts`)."""

    requests: list[Request] = field(default_factory=list)
    logits_BV: Tensor | None = None
    num_drafts: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of the stream, whose logits these are
    hidden_TD: Tensor | None = None  # of the whole stream, before the final norm; valid until the next step
    context: Context | None = None  # None: the step was replayed
    ahead: bool = False  # it had been started before it was planned; its inputs are gone
    prompt_logprobs: list[tuple[Request, list[TokenLogprob | None]]] = field(default_factory=list)
    embeddings: list[tuple[Request, Tensor]] = field(
        default_factory=list
    )  # finished pooling requests, FP32 [D]


@dataclass
class Ahead:
    """Hidden states of a decode step started before it was planned, on tokens still on the device."""

    rows: list[tuple[Request, int, list[int]]]  # of each row: position computed, its pages at the time
    hidden_BD: Tensor

    def rows_of(self, sequences: list[ScheduledSequence]) -> list[int] | None:
        """Where a plan's sequences stand in it; None unless all are there, with the same pages."""
        found, row, known = [], -1, self.rows
        for s in sequences:  # in the same order, some of them gone
            row += 1
            while row < len(known) and known[row][0] is not s.request:
                row += 1
            if row == len(known) or known[row][1] != s.start or known[row][2] is not s.pages:
                return None
            found.append(row)
        return found


class Runner:
    """Not thread-safe. `model` and `cache` are used where they are; nothing is copied."""

    def __init__(
        self,
        model: Transformer,
        cache: Cache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        cuda_graphs: bool = True,
        capture_at_start: bool = False,
        max_rows: int = 0,
    ) -> None:
        """max_rows: of a step of single tokens and drafts; at least max_num_seqs."""
        self.model, self.cache, self.device = model, cache, model.device
        self.page_size = cache.page_size
        self.max_num_seqs = max_num_seqs
        max_rows = max(max_rows, max_num_seqs)
        self._max_rows = max_rows
        on_gpu = self.device.type == "cuda"
        pages = -(-max_model_len // cache.page_size)

        def buffer(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, pin_memory=on_gpu)

        longest = max(max_num_batched_tokens, max_rows)
        self._host_long = buffer(3 * longest, dtype=torch.int64)  # tokens, positions, slots
        self._host_int = buffer(2 * (max_rows + 1), dtype=torch.int32)  # visible lengths, table rows
        self._host_table = buffer(max_num_seqs + 1, pages, dtype=torch.int32)  # the last row stays 0: padding
        self._long, self._int, self._table = (
            tensor.numpy() for tensor in (self._host_long, self._host_int, self._host_table)
        )
        self._owner: list[list[int] | None] = [None] * max_num_seqs  # whose pages a row holds
        self._filled = [0] * max_num_seqs
        self._device_table = self._host_table.to(self.device) if on_gpu else self._host_table
        self._copied = torch.cuda.Event() if on_gpu else None  # the host buffers have been read
        # inputs of steps started ahead: two sets in turn, as the GPU may not have read the last one yet
        self._ahead_buffers = [
            (buffer(3 * max_num_seqs, dtype=torch.int64), buffer(2 * max_num_seqs, dtype=torch.int32))
            for _ in range(2 if on_gpu and cuda_graphs else 0)
        ]
        self._ahead: Ahead | None = None
        self.graphs: DecodeGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = None
        self._mtp_graphs: MtpGraphs | None = None
        if on_gpu and cuda_graphs:
            self.graphs = DecodeGraphs(model, cache, self._device_table, max_rows)
            if any(layer.dtype != torch.uint8 for layer in cache.layers):  # FP8 prompts read the cache back
                self.prompt_graphs = PromptGraphs(model, cache, self._device_table, longest)
            for graphs in (self.graphs, self.prompt_graphs) if capture_at_start else ():
                if graphs is not None:
                    graphs.capture_all()
        self._capture_at_start = capture_at_start

    # --- one step ---

    @torch.no_grad()
    def run(self, plan: Schedule) -> StepOutput:
        """Compute a plan: the keys of all its tokens are in the cache afterwards. The GPU may still be at
        work."""
        sequences = plan.sequences
        if self._copied is not None:
            self._copied.synchronize()  # a step that samples nothing does not wait for the GPU by itself
        self.update_table(sequences)
        plain = self._plain_decode(plan)
        ahead, self._ahead = self._ahead, None
        drafted = plan.num_drafted > 0
        if plain and not drafted and ahead is not None and (rows := ahead.rows_of(sequences)) is not None:
            everyone = rows == list(range(len(rows)))
            hidden_TD = ahead.hidden_BD[: len(rows)] if everyone else ahead.hidden_BD[self.index(rows)]
            return replace(self._decoded(plan, hidden_TD, None), ahead=True)
        size = self.graphs.size_for(plan.num_tokens) if plain and self.graphs is not None else None
        if size is not None and self.graphs is not None:
            self._fill_padded(plan, size)
            hidden_TD = self.graphs.run(size, self._host_long[: 3 * size], self._host_int[: 2 * size])
            self._record_copies()
            return self._decoded(plan, hidden_TD[: plan.num_tokens], None)
        if (size := self._prompt_size(plan)) is not None and self.prompt_graphs is not None:
            self._fill_prompt(sequences[0], size)
            hidden_TD = self.prompt_graphs.run(size, self._host_long[: 3 * size], self._host_int[:0])
            self._record_copies()
            return self._output(plan, None, hidden_TD[: plan.num_tokens])
        context, token_T = self._context(plan)
        self._record_copies()
        hidden_TD = self.model(token_T, context)
        if plain:
            return self._decoded(plan, hidden_TD, context)
        return self._output(plan, context, hidden_TD)

    def _prompt_size(self, plan: Schedule) -> int | None:
        """The size of the graph that computes this plan, if it is one short prompt whole, and nothing else is
        asked of its hidden states."""
        s = plan.sequences[0]
        alone = len(plan.sequences) == 1 and s.start == 0 and s.num_tokens > 1 and not s.num_drafts
        if self.prompt_graphs is None or not alone or s.request.pooling is not None or is_exact():
            return None
        return self.prompt_graphs.size_for(s.num_tokens)

    def _decoded(self, plan: Schedule, hidden_TD: Tensor, context: Context | None) -> StepOutput:
        """The output of a step of single tokens and drafts alone: every row's logits."""
        return StepOutput(
            requests=[s.request for s in plan.sequences],
            logits_BV=self.model.logits(hidden_TD),
            num_drafts=[s.num_drafts for s in plan.sequences],
            rows=list(range(plan.num_tokens)),
            hidden_TD=hidden_TD,
            context=context,
        )

    def look_ahead(self, plan: Schedule, goes_on: list[int], token_B: Tensor) -> None:
        """Start the next decode step of the sequences numbered `goes_on`, whose tokens were just drawn.

        The GPU computes it while the host still books this step. The next `run` takes it if its plan agrees,
        and otherwise computes what the plan wants: entries written twice get the same values.
        """
        size = self.graphs.size_for(len(goes_on)) if self.graphs is not None else None
        if self.graphs is None or size is None or size not in self.graphs.captured:
            return
        sequences = [plan.sequences[row] for row in goes_on]
        self.update_table(sequences)
        host_long, host_int = self._ahead_buffers[0]
        self._ahead_buffers.reverse()
        self._fill_next(sequences, size, host_long.numpy(), host_int.numpy())
        token_n = token_B if len(goes_on) == len(plan.sequences) else token_B[self.index(goes_on)]
        hidden_BD = self.graphs.run_ahead(
            size, host_long[: 3 * size], host_int[: 2 * size], token_n.clamp(min=0)
        )
        rows = [(s.request, s.start + 1, s.pages) for s in sequences]
        self._ahead = Ahead(rows, hidden_BD)

    def can_look_ahead(self, plan: Schedule) -> bool:
        """Whether the plan is one of single tokens on a GPU whose steps are replayed."""
        return (
            self.graphs is not None
            and self.graphs.broken is None
            and not plan.num_drafted
            and self._plain_decode(plan)
        )

    def _fill_next(self, sequences: list[ScheduledSequence], size: int, longs: Array, ints: Array) -> None:
        """As `_fill_padded`, for the tokens after these; the tokens themselves are left to the caller."""
        n = len(sequences)
        token, position, slot = longs[: 3 * size].reshape(3, size)
        length, row = ints[: 2 * size].reshape(2, size)
        token[:] = 0
        position[n:] = slot[n:] = 0
        position[:n] = [s.start + 1 for s in sequences]
        row[:n] = [s.request.slot for s in sequences]
        slot[:n] = self._places(row[:n], position[:n])
        row[n:] = self.max_num_seqs
        np.add(position, 1, out=length, casting="unsafe")

    def _record_copies(self) -> None:
        if self._copied is not None:
            self._copied.record()

    @staticmethod
    def _plain_decode(plan: Schedule) -> bool:
        """Single tokens and drafts only, and nothing asked but the next one (a prompt of one token may want
        more)."""
        return plan.num_decodes + plan.num_drafted == len(plan.sequences) and all(
            s.start >= s.request.prompt_len
            or (s.request.pooling is None and s.request.params.prompt_logprobs is None)
            for s in plan.sequences
        )

    def update_table(self, sequences: list[ScheduledSequence]) -> None:
        """Write what is new of each sequence's pages into its row, and send changed rows to the GPU.

        The copy may read a row later than it was asked to: rows of running sequences only grow.
        """
        changed: list[tuple[int, int, int]] = []  # row, from … to
        for s in sequences:
            slot, pages = s.request.slot, s.pages
            if (
                self._owner[slot] is not pages
            ):  # every seating makes a new list, so identity tells seatings apart
                self._owner[slot] = pages
                self._filled[slot] = 0
            filled = self._filled[slot]
            if len(pages) > filled:
                self._table[slot, filled : len(pages)] = pages[filled:]
                self._filled[slot] = len(pages)
                changed.append((slot, filled, len(pages)))
        if self._device_table is self._host_table:
            return
        if len(changed) > _FEW_ROWS:
            self._device_table.copy_(self._host_table, non_blocking=True)
            return
        for row, begin, end in changed:
            new = self._host_table[row, begin:end]
            self._device_table[row, begin:end].copy_(new, non_blocking=True)

    def _fill_singles(
        self, sequences: list[ScheduledSequence], token: Array, position: Array, slot: Array
    ) -> list[int]:
        """Inputs of sequences with one token each; their pages are in the table. Returns their rows of it."""
        n = len(sequences)
        rows = [s.request.slot for s in sequences]
        token[:n] = [s.request.token_ids[s.start] for s in sequences]
        position[:n] = [s.start for s in sequences]
        slot[:n] = self._places(rows, position[:n])
        return rows

    def _places(self, rows: list[int] | Array, position_n: Array) -> Array:
        """Cache slots of one position for each of these rows of the table."""
        page_n, offset_n = np.divmod(position_n, self.page_size)
        return self._table[rows, page_n].astype(np.int64) * self.page_size + offset_n

    def _fill_tokens(self, s: ScheduledSequence, token: Array, position: Array, slot: Array) -> None:
        """Inputs of one sequence's tokens, drafts last, into arrays of their number."""
        request, size, end = s.request, self.page_size, s.start + s.num_tokens
        if end <= len(request.prompt_words):
            token[:] = np.frombuffer(request.prompt_words, np.int32)[s.start : end]
        else:
            ids = request.token_ids[s.start : end]
            token[:] = ids + request.draft_ids[: s.num_drafts] if s.num_drafts else ids
        position[:] = np.arange(s.start, end)
        first = s.start // size
        pages = self._table[request.slot, first : -(-end // size)].astype(np.int64)
        places = (pages * size)[:, None] + np.arange(size)
        slot[:] = places.ravel()[s.start - first * size :][: s.num_tokens]

    def _fill_decodes(self, plan: Schedule, token: Array, position: Array, slot: Array) -> list[int]:
        """Inputs of single tokens and drafts; returns each row's row of the block table."""
        d = plan.num_decodes
        rows = self._fill_singles(plan.sequences[:d], token, position, slot)
        for s in plan.sequences[d : d + plan.num_drafted]:
            at = slice(len(rows), len(rows) + s.num_tokens)
            self._fill_tokens(s, token[at], position[at], slot[at])
            rows += [s.request.slot] * s.num_tokens
        return rows

    def _fill_padded(self, plan: Schedule, size: int) -> None:
        """A step of single tokens and drafts into the host buffers, padded to `size` rows: token 0 at
        position 0, written to and read from the scratch page."""
        n = plan.num_tokens
        token, position, slot = self._long[: 3 * size].reshape(3, size)
        length, row = self._int[: 2 * size].reshape(2, size)
        token[n:] = position[n:] = slot[n:] = 0
        row[:n] = self._fill_decodes(plan, token, position, slot)
        row[n:] = self.max_num_seqs
        np.add(position, 1, out=length, casting="unsafe")

    def _fill_prompt(self, s: ScheduledSequence, size: int) -> None:
        """A prompt into the host buffers, padded to `size` tokens at position 0 of the scratch page."""
        token, position, slot = self._long[: 3 * size].reshape(3, size)
        n = s.num_tokens
        token[n:] = position[n:] = slot[n:] = 0
        self._fill_tokens(s, token[:n], position[:n], slot[:n])

    def _context(self, plan: Schedule) -> tuple[Context, Tensor]:
        """Inputs of any plan: single tokens and drafts, a row each, then chunks."""
        T = plan.num_tokens
        token, position, slot = self._long[: 3 * T].reshape(3, T)
        rows = self._fill_decodes(plan, token, position, slot)
        d = len(rows)
        cu_seqlens = list(range(d + 1))
        lengths: list[int] = (position[:d] + 1).tolist()
        for s in plan.sequences[plan.num_decodes + plan.num_drafted :]:
            at = slice(cu_seqlens[-1], cu_seqlens[-1] + s.num_tokens)
            self._fill_tokens(s, token[at], position[at], slot[at])
            cu_seqlens.append(at.stop)
            lengths.append(s.start + s.num_tokens)
            rows.append(s.request.slot)
        S = len(rows)
        if self._int.size < S:  # more drafts than were announced
            raise ValueError(f"a step of {S} rows exceeds the {self._max_rows} that this runner was made for")
        self._int[:S] = lengths
        long = self._to_device(self._host_long[: 3 * T])
        context = Context(
            position_T=long[T : 2 * T],
            cu_seqlens=cu_seqlens,
            cache=self.cache,
            slot_T=long[2 * T :],
            block_table_SP=self._block_table(rows, -(-max(lengths) // self.page_size)),
            context_len_S=self._to_device(self._host_int[:S]),
            context_lens=lengths,
            num_decodes=d,
            capture_layers=frozenset(
                self._layer(s.request) for s in plan.sequences if s.request.pooling is not None
            ),
        )
        return context, long[:T]

    def _block_table(self, rows: list[int], pages: int) -> Tensor:
        """[S, P]: the first `pages` entries of these rows of the table."""
        if self.device.type == "cpu":
            return torch.from_numpy(self._table[rows, :pages])
        return self._device_table[:, :pages].index_select(0, self.index(rows))

    def _to_device(self, host: Tensor) -> Tensor:
        return host if self.device.type == "cpu" else host.to(self.device, non_blocking=True)

    def index(self, values: list[int]) -> Tensor:
        host = torch.tensor(values)
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)

    # --- the MTP block, for drafts ---

    def use_mtp(self) -> None:
        """Get ready to run MTP block 0, whose cache layer follows the model's."""
        self.prompt_graphs = None  # the MTP block follows a prompt by its context
        if self.graphs is not None:
            self._mtp_graphs = MtpGraphs(self.model, self.cache, self._device_table, self._max_rows)
            if self._capture_at_start:
                self._mtp_graphs.capture_all()

    def mtp_follow(self, output: StepOutput, next_T: Tensor) -> Tensor:
        """Outputs [T, D] of the MTP block for the whole stream of the step just run; next: the token after
        each. Its entries lie where the model's lie, at the position of its hidden state."""
        assert output.hidden_TD is not None
        if output.context is not None:
            return self.model.mtp_forward(output.hidden_TD, next_T, output.context)
        assert self._mtp_graphs is not None and self.graphs is not None
        return self._mtp_graphs.follow(self.graphs, output.hidden_TD, next_T)

    def mtp_advance(
        self, hidden_ND: Tensor, token_N: Tensor, position_N: Tensor, sequences: list[ScheduledSequence]
    ) -> Tensor:
        """Outputs [N, D] of the MTP block for one more token of each sequence, at these positions (on the
        device), which the sequences' pages hold."""
        size = self.page_size
        rows = [s.request.slot for s in sequences]
        pages = max(len(s.pages) for s in sequences)
        table_NP = self._block_table(rows, pages)
        page_N = table_NP.gather(1, (position_N // size).unsqueeze(1)).squeeze(1)
        slot_N = page_N.long() * size + position_N % size
        n = len(rows)
        if self._mtp_graphs is not None and n <= self._mtp_graphs.sizes[-1]:
            return self._mtp_graphs.advance(hidden_ND, token_N, position_N, slot_N, self.index(rows))
        context = Context(
            position_T=position_N,
            cu_seqlens=range(n + 1),
            cache=self.cache,
            slot_T=slot_N,
            block_table_SP=table_NP,
            context_len_S=(position_N + 1).int(),
            num_decodes=n,
        )
        return self.model.mtp_forward(hidden_ND, token_N, context)

    # --- what is asked of the hidden states ---

    def _output(self, plan: Schedule, context: Context | None, hidden_TD: Tensor) -> StepOutput:
        out = StepOutput(hidden_TD=hidden_TD, context=context)
        begin = 0
        for s in plan.sequences:
            request, end = s.request, begin + s.num_tokens
            if request.pooling is not None:
                assert context is not None
                self._pool(s, context.captured[self._layer(request)][begin:end], out)
            else:
                if request.params.prompt_logprobs is not None and s.start < request.prompt_len:
                    entries = self._prompt_logprobs(s, hidden_TD[begin:end])
                    out.prompt_logprobs.append((request, entries))
                if s.samples:
                    out.requests.append(request)
                    out.num_drafts.append(s.num_drafts)
                    out.rows += range(end - 1 - s.num_drafts, end)
            begin = end
        if out.requests:
            everyone = len(out.rows) == hidden_TD.shape[0]
            out.logits_BV = self.model.logits(hidden_TD if everyone else hidden_TD[self.index(out.rows)])
        return out

    def _prompt_logprobs(self, s: ScheduledSequence, hidden_nD: Tensor) -> list[TokenLogprob | None]:
        """Log-probabilities of the prompt's tokens that this chunk predicts and that are not known yet: row
        t of the hidden states speaks about token t + 1. A few rows at a time, so that the logits stay
        small."""
        request = s.request
        known = len(request.prompt_logprobs)
        entries: list[TokenLogprob | None] = [None] if known == 0 else []  # nothing predicts the first token
        first = max(known + len(entries), s.start + 1)  # a chunk computed again after a preemption is skipped
        stop = min(s.start + s.num_tokens + 1, request.prompt_len)
        top_n = request.params.prompt_logprobs or 0
        step = max(1, _LOGIT_ELEMENTS // self.model.config.vocab_size)
        for begin in range(first, stop, step):
            ids = list(request.prompt_ids[begin : min(begin + step, stop)])
            row = begin - 1 - s.start
            logits_nV = self.model.logits(hidden_nD[row : row + len(ids)])
            found = sampling.logprobs(logits_nV, self.index(ids), top_n)
            values, top_values, top_ids = (tensor.tolist() for tensor in found)
            entries += [
                TokenLogprob(ids[i], values[i], list(zip(top_ids[i], top_values[i], strict=True)))
                for i in range(len(ids))
            ]
        return entries

    def _layer(self, request: Request) -> int:
        """Index in `Context.captured` of the layer that a pooling request asks for."""
        assert request.pooling is not None
        return self.model.config.num_hidden_layers if request.pooling.layer == -1 else request.pooling.layer

    def _pool(self, s: ScheduledSequence, hidden_nD: Tensor, output: StepOutput) -> None:
        """Add a chunk to a running sum in FP32; at the prompt's end, normalise."""
        request, end = s.request, s.start + s.num_tokens
        assert request.pooling is not None and request.pool_weights is not None
        weight_n = torch.from_numpy(request.pool_weights[s.start : end]).to(hidden_nD.device)
        total_D = weight_n @ hidden_nD.float()
        if s.start > 0:  # from the start again after a preemption
            total_D = total_D + request.pool_state
        request.pool_state = total_D
        if end == request.prompt_len:
            if request.pooling.normalize:
                total_D = total_D / total_D.norm().clamp(min=1e-12)
            output.embeddings.append((request, total_D))

    # --- for the engine's books ---

    def describe(self) -> dict[str, Any]:
        """What `stats` and `doctor` show of the runner."""
        return {
            "device": str(self.device),
            "cache_pages": self.cache.num_pages - 1,
            "cache_tokens": (self.cache.num_pages - 1) * self.page_size,
            "cuda_graph_sizes": self.graphs.captured if self.graphs is not None else [],
        }
