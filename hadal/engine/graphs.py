"""Steps as CUDA graphs: static shapes for a few batch sizes, captured on first use or at start.

A step of n rows (a sequence's next token, or one of its drafts) is padded to the next size; a padding row
computes token 0 on the scratch page (page 0), which nobody reads. The graph covers embedding to last block
and leaves hidden states; head and sampling follow outside, on the n real rows. Inputs are two static
buffers, filled by one copy each, and the block table on the device. All graphs share one memory pool.

Short prompts are bound by the host's launches, not by the GPU: a whole prompt of up to a few hundred tokens
runs as a graph as well (`PromptGraphs`).
"""

from __future__ import annotations

import bisect
import logging
from collections import Counter

import torch
from torch import Tensor

from hadal.model.context import Cache, Context
from hadal.model.transformer import Transformer
from hadal.ops.kept import keeping

logger = logging.getLogger(__name__)

PROMPT_SIZES = (32, 64, 128, 192, 256, 384, 512)
"""Tokens of a prompt that is replayed; longer ones keep the GPU busy by themselves."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then multiples of 8 to 64, of 16 to 128, of 32 to 256, of 64 to 512 and of 128 above; up to
    max_num_seqs."""
    sizes = [1, 2, 4]
    for end, stride in ((64, 8), (128, 16), (256, 32), (512, 64)):
        sizes += range(sizes[-1] // stride * stride + stride, end + 1, stride)
    sizes += range(640, max_num_seqs + 1, 128)
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


class DecodeGraphs:
    """`table_SP`: the block table on the device, one row a slot and a last row of zeros for padding."""

    what = "decode steps"

    def __init__(self, model: Transformer, cache: Cache, table_SP: Tensor, max_rows: int) -> None:
        self.model, self.cache, self.table_SP = model, cache, table_SP
        # above 256 rows only the grouped products of BF16 experts run without asking the host for counts
        free = model.config.moe is None or model.dtype == torch.bfloat16
        self.sizes = graph_sizes(max_rows if free else min(max_rows, 256))
        self.broken: str | None = None  # why graphs are off, if they failed
        device = table_SP.device
        self._long = torch.zeros(3 * max_rows, dtype=torch.int64, device=device)
        self._int = torch.zeros(2 * max_rows, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def captured(self) -> list[int]:
        return sorted(self._graphs)

    def size_for(self, rows: int) -> int | None:
        """The smallest size with room for `rows`; None when graphs are off."""
        if self.broken is not None or not 0 < rows <= self.sizes[-1]:
            return None
        return self.size_of(rows)

    def size_of(self, rows: int) -> int:
        """The smallest size with room for `rows`, which must be at most the largest."""
        return self.sizes[bisect.bisect_left(self.sizes, rows)]

    def run(self, size: int, host_long: Tensor, host_int: Tensor) -> Tensor:
        """Hidden states [size, D] of one step; valid until the next call.

        host_long: tokens, positions, slots (3 · size); host_int: visible lengths, table rows (2 · size). A
        size that cannot be captured turns graphs off with a warning, and this and all later steps run
        without. (Of `PromptGraphs`, host_int is empty.)
        """
        self._long[: 3 * size].copy_(host_long, non_blocking=True)
        self._int[: len(host_int)].copy_(host_int, non_blocking=True)
        return self._replay(size)

    def _replay(self, size: int) -> Tensor:
        if size not in self._graphs and self.broken is None:
            self._try_capture(size)
        if size in self._graphs:
            graph, hidden_BD = self._graphs[size]
            graph.replay()
            return hidden_BD
        return self._forward(size)

    def run_ahead(self, size: int, host_long: Tensor, host_int: Tensor, token_n: Tensor) -> Tensor:
        """As `run` for a captured size, with the first tokens taken from the device."""
        self._long[: 3 * size].copy_(host_long, non_blocking=True)
        self._int[: 2 * size].copy_(host_int, non_blocking=True)
        self._long[: token_n.shape[0]].copy_(token_n)
        graph, hidden_BD = self._graphs[size]
        graph.replay()
        return hidden_BD

    @torch.no_grad()
    def capture_all(self) -> None:
        """Capture every size now, the largest first, so that the smaller ones fit in its memory."""
        for size in reversed(self.sizes):
            rows = self._int[: 2 * size].view(2, size)
            rows[0].fill_(1)
            rows[1].fill_(self.table_SP.shape[0] - 1)
            self._long[: 3 * size].zero_()
            if self.broken is None:
                self._try_capture(size)

    def _forward(self, size: int) -> Tensor:
        token_B, position_B, slot_B = self._long[: 3 * size].view(3, size)
        length_B, row_B = self._int[: 2 * size].view(2, size)
        context = Context(
            position_T=position_B,
            cu_seqlens=range(size + 1),
            cache=self.cache,
            slot_T=slot_B,
            block_table_SP=self.table_SP.index_select(0, row_B),
            context_len_S=length_B,
            num_decodes=size,
        )
        return self._compute(token_B, context)

    def _compute(self, token_B: Tensor, context: Context) -> Tensor:
        return self.model(token_B, context)

    def _try_capture(self, size: int) -> None:
        try:
            self._capture(size)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.broken = f"capture of size {size} failed: {error}"
            logger.warning("CUDA graphs of %s are off, which is slower: %s", self.what, self.broken)

    def _capture(self, size: int) -> None:
        """Warm up beside the main stream (kernels compile, libraries allocate), then record."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(size)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (a server's) may use the GPU meanwhile: that must not spoil the recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_BD = self._forward(size)
        self._graphs[size] = (graph, hidden_BD)


class PromptGraphs(DecodeGraphs):
    """A whole prompt of one sequence with nothing cached before it: `size` tokens, those behind the prompt's
    end on the scratch page, where causal attention lets no token of the prompt see them.

    A size is captured when it is asked for the second time; the first prompt of a size runs without.
    """

    what = "prompts"

    def __init__(self, model: Transformer, cache: Cache, table_SP: Tensor, max_tokens: int) -> None:
        super().__init__(model, cache, table_SP, max(PROMPT_SIZES))
        longest = min(max_tokens, model.max_positions, self.sizes[-1])
        self.sizes = [size for size in PROMPT_SIZES if size <= longest]
        self._asked: Counter[int] = Counter()
        self._held: list[Tensor] = []

    def size_for(self, rows: int) -> int | None:
        size = super().size_for(rows) if self.sizes else None
        if size is None or size in self._graphs:
            return size
        self._asked[size] += 1
        return size if self._asked[size] > 1 else None

    def _forward(self, size: int) -> Tensor:
        token_B, position_B, slot_B = self._long[: 3 * size].view(3, size)
        context = Context(
            position_T=position_B,
            cu_seqlens=[0, size],
            cache=self.cache,
            slot_T=slot_B,
            block_table_SP=self.table_SP[-1:],
            context_len_S=self._int[:1],
            context_lens=[size],
        )
        with keeping(self._held):
            return self._compute(token_B, context)


class MtpGraphs(DecodeGraphs):
    """Steps of the MTP block alone, on inputs that are on the device already."""

    def __init__(self, model: Transformer, cache: Cache, table_SP: Tensor, max_rows: int) -> None:
        super().__init__(model, cache, table_SP, max_rows)
        shape = (max_rows, model.config.hidden_size)
        self._hidden_BD = torch.zeros(shape, dtype=model.dtype, device=table_SP.device)

    def follow(self, main: DecodeGraphs, hidden_TD: Tensor, next_T: Tensor) -> Tensor:
        """Outputs [T, D] for the step that `main` has just run, whose inputs it still holds. next: the token
        after each."""
        n = next_T.shape[0]
        size = self.size_of(n)
        self._long[: 3 * size].copy_(main._long[: 3 * size])
        self._int[: 2 * size].copy_(main._int[: 2 * size])
        self._long[:n].copy_(next_T)
        self._hidden_BD[:n].copy_(hidden_TD)
        return self._replay(size)[:n]

    def advance(
        self, hidden_ND: Tensor, token_N: Tensor, position_N: Tensor, slot_N: Tensor, row_N: Tensor
    ) -> Tensor:
        """Outputs [N, D] of one more token for each of N sequences. row: of the block table."""
        n = token_N.shape[0]
        size = self.size_of(n)
        long = self._long[: 3 * size].view(3, size)
        length_B, row_B = self._int[: 2 * size].view(2, size)
        long.zero_()
        length_B.fill_(1)
        row_B.fill_(self.table_SP.shape[0] - 1)
        for row, values in zip(long, (token_N, position_N, slot_N), strict=True):
            row[:n].copy_(values)
        length_B[:n].copy_(position_N + 1)
        row_B[:n].copy_(row_N)
        self._hidden_BD[:n].copy_(hidden_ND)
        return self._replay(size)[:n]

    def _compute(self, token_B: Tensor, context: Context) -> Tensor:
        return self.model.mtp_forward(self._hidden_BD[: token_B.shape[0]], token_B, context)
