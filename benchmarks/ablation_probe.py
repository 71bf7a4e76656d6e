"""What an ablation measures on a trained model: balance on held-out text, and how many drafts stand.

    python benchmarks/ablation_probe.py RUN/export --heldout SHARDS --context 512 --device cuda

Prints one JSON object. MaxVio is over *all* held-out rows read, and the mean over rows of each row's own;
both are means over gates. Drafts come in two kinds: `draft_*`, accepted by the engine as it generates (one
draft a step), and `forced_*`, without generating: on held-out text, the share of places where the MTP
module's first choice is the main model's (temperature 0), and the mean of Σ min(p, q), which is the chance
that a drawn draft is accepted (temperature 1).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hadal.data.stream import PackedRows, packed_rows
from hadal.engine.engine import Engine
from hadal.engine.request import SamplingParams
from hadal.model.transformer import Transformer
from hadal.text.tokenizer import Tokenizer
from hadal.train.balance import expert_counts, max_violation
from hadal.train.batches import MicroBatch, build
from hadal.weights import load

ROWS = 128  # of held-out text
PROMPTS = 32
PROMPT_TOKENS = 32  # of a text without a question
NEW_TOKENS = 64
CACHE_BYTES = 256 << 20


def spaced(source: PackedRows, rows: int) -> list[int]:
    """Numbers of `rows` rows, evenly over the whole set, so that every part of it is heard."""
    count = min(rows, source.rows_per_epoch)
    return [round(i) for i in np.linspace(0, source.rows_per_epoch - 1, count)]


def micros(source: PackedRows, numbers: Sequence[int], depths: int, mask: bool) -> Iterator[MicroBatch]:
    for number in numbers:
        yield build(source.rows(number, 1), depths=depths, mask_documents=mask)


# --- balance and teacher-forced drafts ---
@torch.no_grad()
def forced(model: Transformer, source: PackedRows, mask: bool) -> dict[str, float]:
    """MaxVio, and the agreement of MTP with the main model, over spaced held-out rows."""
    depths, moe = len(model.mtp), model.config.moe
    total_GE, by_row, agreed = None, [], torch.zeros(3, dtype=torch.float64)
    for micro in micros(source, spaced(source, ROWS), depths, mask):
        micro = micro.to(model.device)
        context = micro.context(record_routing=True)
        hidden_TD = model(micro.token_KT[0], context)
        if depths:
            agreed += agreement(model, micro, hidden_TD, context)
        if moe is not None:
            count_GE = torch.stack(
                [expert_counts(r.expert_TK, moe.n_routed_experts, micro.counted_KT[0])
                 for r in context.routing if r.layer < model.config.num_hidden_layers]
            )  # fmt: skip
            by_row.append(max_violation(count_GE).mean().item())
            total_GE = count_GE if total_GE is None else total_GE + count_GE
    out = {}
    if total_GE is not None:
        out = {"maxvio_heldout": max_violation(total_GE).mean().item(), "maxvio_sequence": fmean(by_row)}
    if depths:
        same, overlap, places = agreed.tolist()
        out |= {"forced_t0": same / places, "forced_t1": overlap / places}
    return out


def agreement(model: Transformer, micro: MicroBatch, hidden_TD: Tensor, context: Any) -> Tensor:
    """[places with the same first choice, Σ over places of Σ min(p, q), places] for the first MTP depth.

    At position i the module predicts token i + 2 from tokens up to i + 1, as the main model does at i + 1."""
    main_TV = model.head(model.norm(hidden_TD)).float()[1:]
    draft_TV = model.mtp_logits(model.mtp_forward(hidden_TD, micro.token_KT[1], context)).float()[:-1]
    counted_T = micro.weight_KT[1][:-1] > 0
    same_T = main_TV.argmax(-1) == draft_TV.argmax(-1)
    overlap_T = torch.minimum(main_TV.softmax(-1), draft_TV.softmax(-1)).sum(-1)
    parts = [same_T[counted_T].sum(), overlap_T[counted_T].sum(), counted_T.sum()]
    return torch.stack([part.double() for part in parts]).cpu()


# --- drafts of the engine ---
def prompts(source: PackedRows, number: int) -> list[list[int]]:
    """The beginnings of held-out documents, evenly over the set: the question of a puzzle, or PROMPT_TOKENS
    of a text. Documents too short for a prompt and as much again are passed over."""
    found = []
    for row in spaced(source, 2 * number):
        rows = source.rows(row, 1)
        end = 0
        for length, padding in zip(rows.lengths, rows.padding, strict=True):
            begin, end = end, end + length
            question = int(
                np.argmax(rows.weight_RC[0, begin:end] > 0)
            )  # 1: none, the text counts from its start
            prompt, needed = (question, question + 1) if question > 1 else (PROMPT_TOKENS, 2 * PROMPT_TOKENS)
            if not padding and length >= needed:
                found.append(rows.token_RC[0, begin : begin + prompt].tolist())
                break
    return found[:: max(1, math.ceil(len(found) / number))]


def drafts(folder: Path, source: PackedRows, device: str) -> dict[str, float]:
    """The share of drafts that the engine accepts while it continues held-out prompts."""
    engine = Engine.load(
        folder, device=device, speculation="mtp", num_speculative_tokens=1, speculation_adaptive=False,
        speculation_max_batch=PROMPTS, max_num_seqs=PROMPTS, cache_bytes=CACHE_BYTES, cuda_graphs=False,
    )  # fmt: skip
    many, out, drafted, accepted = prompts(source, PROMPTS), {}, 0, 0
    for temperature in (0, 1):
        engine.generate(many, SamplingParams(temperature=temperature, top_p=1.0, max_tokens=NEW_TOKENS))
        stats = engine.stats().speculation
        if stats is None or stats.drafted == drafted:
            raise SystemExit(f"{folder}: the engine made no drafts at temperature {temperature}")
        out[f"draft_t{temperature}"] = (stats.accepted - accepted) / (stats.drafted - drafted)
        drafted, accepted = stats.drafted, stats.accepted
    return out


def probe(
    folder: Path, heldout: Path, context: int, device: str, mask: bool, engine: bool
) -> dict[str, float]:
    """The numbers of one exported model; with `engine` the engine's drafts, too."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = load(folder, dtype=dtype, device=device)
    source = packed_rows(heldout, context, Tokenizer.load(folder).special, shuffle=False)
    out = forced(model, source, mask)
    if engine and len(model.mtp):
        del model
        out |= drafts(folder, source, device)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mask-documents", action="store_true")
    parser.add_argument("--drafts", action="store_true", help="of the engine, where there is an MTP module")
    args = parser.parse_args()
    torch.manual_seed(0)
    found = probe(args.folder, args.heldout, args.context, args.device, args.mask_documents, args.drafts)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
