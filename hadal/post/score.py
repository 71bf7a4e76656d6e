"""Log-probabilities of given completions by the trainer's own forward pass, with gradients.

Prompts and completions lie end to end in packs without padding; attention stays inside a sequence. logits[t]
score token t + 1, so a completion of n tokens is scored from the position before its first token to the one
before its last, which is not even fed. Only these positions meet the head, a chunk at a time
(hadal/ops/log_probs.py). In exact mode the numbers are the engine's `logprobs_of="sampler"`, bit for bit.

Gates' correction biases are not touched: nothing here updates them.

Legend: T tokens of a pack, N tokens of its completions, D hidden, K MTP depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from hadal.engine import Engine, SamplingParams
from hadal.model.context import Context, Routing
from hadal.model.layers import Linear
from hadal.model.mtp import Mtp
from hadal.model.transformer import Transformer
from hadal.ops.cross_entropy import linear_cross_entropy
from hadal.ops.log_probs import Law, linear_log_probs
from hadal.ops.recompute import recompute

Ids = Sequence[int]


def law_of(engine: Engine, params: SamplingParams) -> Law:
    """The distribution that an engine draws from under these parameters. Raises ValueError where its reported
    log-probabilities would be others."""
    if params.logprobs is None or params.logprobs_of != "sampler":
        raise ValueError(
            'old log-probabilities are the sampler\'s: ask for logprobs=0, logprobs_of="sampler"'
        )
    return Law(params.temperature, engine.vocab_size, tuple(params.logit_bias.items()))


@dataclass(frozen=True)
class Sample:
    """A prompt and what was sampled after it, the end-of-sequence token included: the engine's exact ids."""

    prompt: Ids
    completion: Ids

    def __post_init__(self) -> None:
        if not len(self.prompt) or not len(self.completion):
            raise ValueError(
                f"a sample needs tokens on both sides; it has {len(self.prompt)} of a prompt and "
                f"{len(self.completion)} of a completion"
            )

    @property
    def tokens(self) -> int:
        """What is fed: all but the last token."""
        return len(self.prompt) + len(self.completion) - 1


@dataclass
class Pack:
    """Some samples as one stream. `members`: their numbers, in the order of the stream; `lengths`: tokens of
    their completions in that order, N in all."""

    members: list[int]
    lengths: list[int]
    token_T: Tensor  # int64: what is embedded
    fed: list[int]  # tokens of each sample in the stream
    row_N: Tensor  # int64: the position that predicts each completion's token
    target_N: Tensor  # int64
    # for each MTP depth: what is embedded at each position, which positions predict, and what
    mtp_token_KT: Tensor
    mtp_row: list[Tensor] = field(default_factory=list)
    mtp_target: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.token_T.shape[0]

    def to(self, device: torch.device) -> Pack:
        """On the device."""

        def move(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

        return Pack(
            self.members, self.lengths, move(self.token_T), self.fed, move(self.row_N), move(self.target_N),
            move(self.mtp_token_KT), [move(x) for x in self.mtp_row], [move(x) for x in self.mtp_target],
        )  # fmt: skip


def pack(samples: Sequence[Sample], *, members: Sequence[int] | None = None, depths: int = 0) -> Pack:
    """`samples[m]` for each of `members` (default: all) as one stream, for a model with `depths` MTP
    modules: depth k at position i embeds token i + k and predicts i + k + 1, inside a sample."""
    chosen = list(range(len(samples))) if members is None else list(members)
    token: list[int] = []
    row: list[int] = []
    target: list[int] = []
    deep_token: list[list[int]] = [[] for _ in range(depths)]
    deep_row: list[list[int]] = [[] for _ in range(depths)]
    deep_target: list[list[int]] = [[] for _ in range(depths)]
    for member in chosen:
        sample, start = samples[member], len(token)
        ids, first = [*sample.prompt, *sample.completion], len(sample.prompt)
        token += ids[:-1]
        row += range(start + first - 1, start + len(ids) - 1)
        target += ids[first:]
        for k in range(depths):
            shifted = ids[k + 1 :]
            deep_token[k] += shifted[: len(ids) - 1] + [0] * (len(ids) - 1 - len(shifted))
            at = [i for i in range(len(ids) - 1) if first <= i + k + 2 < len(ids)]
            deep_row[k] += [start + i for i in at]
            deep_target[k] += [ids[i + k + 2] for i in at]
    return Pack(
        members=chosen,
        lengths=[len(samples[m].completion) for m in chosen],
        token_T=torch.tensor(token),
        fed=[samples[m].tokens for m in chosen],
        row_N=torch.tensor(row),
        target_N=torch.tensor(target),
        mtp_token_KT=torch.tensor(deep_token, dtype=torch.int64).view(depths, len(token)),
        mtp_row=[torch.tensor(rows, dtype=torch.int64) for rows in deep_row],
        mtp_target=[torch.tensor(targets, dtype=torch.int64) for targets in deep_target],
    )


def share_out(samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
    """The samples' numbers in packs of at most `max_tokens` tokens each, as few as best-fit finds, longest
    first; a sample that is longer has a pack to itself. Each pack lists its samples in their own order."""
    packs: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(samples)), key=lambda i: (-samples[i].tokens, i)):
        size = samples[number].tokens
        fits = [p for p in range(len(packs)) if room[p] >= size]
        if fits:
            best = min(fits, key=lambda p: room[p])
            packs[best].append(number)
            room[best] -= size
        else:
            packs.append([number])
            room.append(max_tokens - size)
    return [sorted(one) for one in packs]


@dataclass
class Scores:
    """What a pass says of a pack's completions, in the order of the stream."""

    logprob_N: Tensor  # FP32, with a gradient where the model has one
    entropy_N: Tensor | None  # of the whole distribution at each token; no gradient
    mtp_nll: list[Tensor]  # for each depth, [tokens that it predicts]; [] where not asked for
    routing: list[Routing]  # what each gate chose; recorded with gradients, or where asked for


def score(
    model: Transformer,
    packed: Pack,
    law: Law | None = None,
    *,
    entropy: bool = False,
    mtp: bool = False,
    recomputed: Sequence[str] = (),
    record_routing: bool = False,
) -> Scores:
    """One forward pass over a pack that lies on the model's device. Gradients as torch's mode says; `exact()`
    around it makes the bits the sampler's.

    `mtp`: the MTP modules' losses on the completions too, to be added to the objective so that drafts keep
    up with the policy; they train the modules alone: the trunk's states, the embedding and the head are
    constants to them. `recomputed`: of hadal/ops/recompute.py, to save memory. Raises ValueError for a
    sample beyond the model's positions.
    """
    if max(packed.fed) > model.max_positions:
        raise ValueError(
            f"a sample has {max(packed.fed)} tokens, the model {model.max_positions} positions: shorten "
            "completions, or set a longer context"
        )
    law, context = law or Law(), Context.packed(packed.fed, model.device)
    context.record_routing = record_routing or torch.is_grad_enabled()  # the gates' kernels of training
    with recompute(tuple(recomputed)):
        hidden_TD = model(packed.token_T, context)
        normed_ND = model.norm(hidden_TD.index_select(0, packed.row_N))
        logprob_N, entropy_N = linear_log_probs(
            normed_ND, _head(model).matrix, packed.target_N, law, entropy=entropy
        )
        losses = _mtp_losses(model, packed, hidden_TD.detach(), context) if mtp else []
    return Scores(logprob_N, entropy_N, losses, context.routing)


def _mtp_losses(model: Transformer, packed: Pack, hidden_TD: Tensor, context: Context) -> list[Tensor]:
    """Cross-entropies of each depth on the completions' tokens."""
    if len(model.mtp) and packed.mtp_token_KT.shape[0] != len(model.mtp):
        raise ValueError(f"pack(…, depths={len(model.mtp)}) is wanted for this model's MTP modules")
    head_VD, found = _head(model).matrix.detach(), []
    if model.config.mtp_after_norm and len(model.mtp):
        hidden_TD = model.norm(hidden_TD).detach()
    for depth, module in enumerate(model.mtp):
        embedded_TD = model.embed(packed.mtp_token_KT[depth]).detach()
        hidden_TD = cast(Mtp, module)(hidden_TD, embedded_TD, context)
        normed_ND = cast(Mtp, module).norm(hidden_TD.index_select(0, packed.mtp_row[depth]))
        found.append(linear_cross_entropy(normed_ND, head_VD, packed.mtp_target[depth]))
    return found


def _head(model: Transformer) -> Linear:
    return model.embed_tokens if model.lm_head is None else model.lm_head


@torch.no_grad()
def score_all(
    model: Transformer, samples: Sequence[Sample], law: Law | None = None, *, max_tokens: int
) -> list[Tensor]:
    """Log-probabilities of every sample's completion, in the samples' order, on the model's device; without
    gradients, in packs of at most `max_tokens`: for a reference, or to check the sampler."""
    found: list[Tensor] = [torch.empty(0)] * len(samples)
    for members in share_out(samples, max_tokens):
        packed = pack(samples, members=members).to(model.device)
        pieces = score(model, packed, law).logprob_N.split(packed.lengths)
        for member, piece in zip(members, pieces, strict=True):
            found[member] = piece
    return found
