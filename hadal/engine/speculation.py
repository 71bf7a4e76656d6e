"""Speculative decoding: a step verifies drafts beside the next token, and drafts for the step after it.

    run      the scheduler's plan holds drafts; a drafted sequence is k + 1 rows of the stream (runner)
    verify   which drafts stand, and the token after them (sampler, hadal/ops/speculative.py)
    follow   the MTP block runs over the same stream, with the tokens just drawn (drafters)
    propose  drafts for the next step
    read     new tokens and drafts come to the host in one copy: the only wait of a step

Greedy and seeded requests give the same tokens with and without drafts; all others the same distribution.

When drafting rests (`Policy`):

    batch    more than `max_batch` sequences run
    pace     tokens a step with drafts ÷ median seconds of such a step  <  1 ÷ median seconds of a plain step,
             at this batch size (powers of two), measured over the last steps without prompt chunks; after
             REST steps it is tried again

Requests with a grammar get no drafts; those in a batch with them do.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from hadal.config import ModelConfig
from hadal.engine.drafters import Drafts, MtpDrafter, NgramDrafter
from hadal.engine.request import EngineError, Request, Status
from hadal.engine.runner import Runner, StepOutput
from hadal.engine.sampled import Sampled
from hadal.engine.sampler import Sampler
from hadal.engine.scheduler import Schedule, Scheduler

Method = Literal["mtp", "ngram"]
METHODS = ("auto", "mtp", "ngram", "off")
MAX_TOKENS = 8
DEFAULT_TOKENS: dict[str, int] = {"mtp": 1, "ngram": 3}
DEFAULT_MAX_BATCH = {"cpu": 4, "cuda": 16}

PLAIN_STEPS = 8  # measured before the first draft at a batch size
TRIED_STEPS = 24  # with drafts before they are judged
REST = 512  # plain steps before drafts are tried again


@dataclass(frozen=True)
class SpeculationOptions:
    """What the caller of the engine asked for. None: the method's or device's default."""

    method: str = "auto"
    num_tokens: int | None = None
    max_batch: int | None = None
    adaptive: bool = True  # False: no pace rule
    forced_acceptance: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise EngineError(f"speculation is one of {', '.join(METHODS)}, not {self.method!r}")
        if self.num_tokens is not None and not 1 <= self.num_tokens <= MAX_TOKENS:
            raise EngineError(f"num_speculative_tokens must be from 1 to {MAX_TOKENS}, not {self.num_tokens}")
        if self.max_batch is not None and self.max_batch < 1:
            raise EngineError(f"speculation_max_batch must be at least 1, not {self.max_batch}")
        if self.forced_acceptance is not None and not 0 <= self.forced_acceptance <= 1:
            raise EngineError(
                f"speculation_forced_acceptance must be from 0 to 1, not {self.forced_acceptance}"
            )

    def resolve(self, config: ModelConfig, device: torch.device | str) -> Method | None:
        """The method for a model; None: no speculation. EngineError where it cannot be."""
        has_mtp = config.num_nextn_predict_layers > 0
        if self.method == "mtp" and not has_mtp:
            raise EngineError(
                f"speculation is mtp, but this {config.model_type} model has no MTP module; use ngram or off"
            )
        if self.method == "auto":
            return "mtp" if has_mtp and torch.device(device).type in AUTO_DEVICES else None
        return None if self.method == "off" else "mtp" if self.method == "mtp" else "ngram"


AUTO_DEVICES: frozenset[str] = frozenset()  # where "auto" drafts with MTP: see docs/speculation.md


@dataclass
class SpeculationStats:
    """Totals since the start. `accepted_by_place[i]`: how often draft number i was accepted, of `drafts`
    rounds that had one at `drafted_by_place[i]`."""

    method: str
    num_tokens: int
    resting: str = ""  # why nothing is drafted now; "": drafts are made
    drafts: int = 0  # sequences' steps that verified drafts
    drafted: int = 0  # tokens
    accepted: int = 0
    emitted: int = 0  # new tokens of those steps
    drafted_by_place: list[int] = field(default_factory=list)
    accepted_by_place: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that were accepted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_step(self) -> float | None:
        """New tokens of a sequence's step with drafts: 1 to num_tokens + 1."""
        return self.emitted / self.drafts if self.drafts else None

    def count(self, drafted: int, accepted: int, emitted: int) -> None:
        """One sequence's step."""
        self.drafts += 1
        self.drafted += drafted
        self.accepted += accepted
        self.emitted += emitted
        for place in range(drafted):
            self.drafted_by_place[place] += 1
            self.accepted_by_place[place] += place < accepted


@dataclass
class _Pace:
    """Measurements at one batch size."""

    plain: deque[float] = field(default_factory=lambda: deque(maxlen=2 * PLAIN_STEPS + 1))  # seconds
    drafted: deque[float] = field(default_factory=lambda: deque(maxlen=TRIED_STEPS))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=TRIED_STEPS))  # a sequence and step
    rest: int = 0  # steps to go


class Policy:
    """Whether the next step should draft. See the module's docstring."""

    def __init__(self, max_batch: int, *, adaptive: bool, plain_cost: float = 1.0) -> None:
        """plain_cost: share of a measured plain step that it would take without the drafter's block."""
        self.max_batch, self.adaptive, self.plain_cost = max_batch, adaptive, plain_cost
        self.why = ""
        self._paces: dict[int, _Pace] = {}

    def _pace(self, batch: int) -> _Pace:
        return self._paces.setdefault(batch.bit_length(), _Pace())

    def allows(self, batch: int) -> bool:
        """Whether the drafter should keep up with a batch of so many running sequences."""
        self.why = ""
        if batch > self.max_batch:
            self.why = f"{batch} sequences run, more than {self.max_batch}"
        elif self.adaptive and self._pace(batch).rest > 0:
            self.why = f"drafts did not pay in batches of {batch}"
        return not self.why

    def wants(self, batch: int) -> bool:
        """Whether drafts should be made for the next step; False at first, to measure plain steps."""
        return not self.adaptive or len(self._pace(batch).plain) >= PLAIN_STEPS

    def observe(self, batch: int, seconds: float, emitted: int, *, drafted: bool) -> None:
        """A step of decodes alone has ended."""
        if not self.adaptive or batch > self.max_batch:
            return
        pace = self._pace(batch)
        if pace.rest > 0:
            pace.rest -= 1
        elif not drafted:
            pace.plain.append(seconds * self.plain_cost)
        else:
            pace.drafted.append(seconds)
            pace.tokens.append(emitted / batch)
            if len(pace.drafted) == TRIED_STEPS and len(pace.plain) >= PLAIN_STEPS and self._loses(pace):
                pace.rest = REST
                pace.drafted.clear()
                pace.tokens.clear()

    @staticmethod
    def _loses(pace: _Pace) -> bool:
        gain = statistics.fmean(pace.tokens) / statistics.median(pace.drafted)
        return gain < 1 / statistics.median(pace.plain)


class Speculator:
    """What the engine asks: is this step to be verified, what came of it, what comes next."""

    def __init__(
        self,
        options: SpeculationOptions,
        method: Method,
        runner: Runner,
        sampler: Sampler,
        scheduler: Scheduler,
    ) -> None:
        self.runner, self.sampler, self.scheduler = runner, sampler, scheduler
        self.num_tokens = options.num_tokens or DEFAULT_TOKENS[method]
        self.forced = options.forced_acceptance
        blocks = runner.model.config.num_hidden_layers
        self.mtp: MtpDrafter | None = None
        self.ngram: NgramDrafter | None = None
        if method == "mtp":
            self.mtp = MtpDrafter(runner, sampler, scheduler, self.num_tokens)
        else:
            self.ngram = NgramDrafter(self.num_tokens)
        self.policy = Policy(
            max_batch_of(options, runner.device),
            adaptive=options.adaptive and options.forced_acceptance is None,
            plain_cost=blocks / (blocks + 1) if method == "mtp" else 1.0,
        )
        self.stats = SpeculationStats(
            method,
            self.num_tokens,
            drafted_by_place=[0] * self.num_tokens,
            accepted_by_place=[0] * self.num_tokens,
        )
        self._drafts: Drafts | None = None  # of the step before, whose q is on the device
        self._proposed: list[tuple[Request, list[int]]] = []
        self._follows = False  # whether the MTP block runs in this step

    # --- the step ---

    def engaged(self, plan: Schedule, output: StepOutput) -> bool:
        """Whether this step is verified and followed here, instead of sampled plainly.

        Prompts are followed while drafting rests, too: else a shared prefix would stay without entries."""
        allowed = self.policy.allows(len(self.scheduler.running))
        self.stats.resting = self.policy.why
        wanted = allowed or not _is_decode(plan)
        self._follows = self.mtp is not None and wanted and not output.ahead
        if self.mtp is not None and not self._follows:
            self.mtp.skip(plan)
        return self._follows or plan.num_drafted > 0

    def expects_drafts(self) -> bool:
        """Whether the next step may have drafts, so that it cannot be started before they are known."""
        return self.policy.allows(len(self.scheduler.running))

    @torch.no_grad()
    def sample(self, plan: Schedule, output: StepOutput) -> Sampled:
        """New tokens of each of output.requests, one or several; drafts are kept for `attach`."""
        self._proposed = []
        if output.logits_BV is None:
            if self.mtp is not None and self._follows:
                self.mtp.follow(plan, output, None)
            return Sampled([])
        verified = self.sampler.verify(
            output.logits_BV,
            output.requests,
            output.num_drafts,
            self._proposals(output),
            self.forced,
        )
        drafts = None
        if self.mtp is not None and self._follows:
            self.mtp.follow(plan, output, verified.new_SJ)
            wanted = self._wanted(self.mtp, output)
            if wanted:
                drafts = self.mtp.propose(plan, output, verified.accepted_S, wanted)
        self._drafts = drafts
        new, proposed = self._read(verified.new_SJ, None if drafts is None else drafts.token_NK)
        if drafts is not None:
            self._proposed = list(zip(drafts.requests, proposed, strict=True))
        return self.sampler.finish(verified, new)

    def _proposals(self, output: StepOutput) -> Tensor | None:
        """q [R, V] of the rows of the logits that have a sampled draft; other rows hold anything."""
        drafts = self._drafts
        if drafts is None or drafts.q_NKV is None:
            return None
        K = drafts.q_NKV.shape[1]
        index = []
        for request, number in zip(output.requests, output.num_drafts, strict=True):
            row = drafts.drawn.get(request.request_id, 0)
            index += [row * K + min(j, K - 1) for j in range(number + 1)]
        return drafts.q_NKV.flatten(0, 1).index_select(0, self.runner.index(index))

    def _wanted(self, mtp: MtpDrafter, output: StepOutput) -> list[int]:
        """Numbers of the requests that get drafts for the next step."""
        batch = len(self.scheduler.running)
        if not (self.policy.allows(batch) and self.policy.wants(batch)):
            return []
        return [
            number
            for number, request in enumerate(output.requests)
            if mtp.can_draft(request) and _may_draft(request)
        ]

    def _read(self, new_SJ: Tensor, drafts_NK: Tensor | None) -> tuple[list[list[int]], list[list[int]]]:
        """Both on the host, by one copy."""
        if drafts_NK is None:
            return new_SJ.tolist(), []
        flat = torch.cat([new_SJ.flatten(), drafts_NK.flatten()]).tolist()
        J, K, end = new_SJ.shape[1], drafts_NK.shape[1], new_SJ.numel()
        new = [flat[at : at + J] for at in range(0, end, J)]
        return new, [flat[at : at + K] for at in range(end, len(flat), K)]

    # --- after the step ---

    def attach(self, plan: Schedule) -> None:
        """Give the requests that go on their drafts. Call it after the scheduler's commit."""
        if self.mtp is not None:
            for request, drafts in self._proposed:
                if request.status is Status.RUNNING:
                    request.draft_ids[:] = drafts
            self._proposed = []
        elif self.ngram is not None:
            batch = len(self.scheduler.running)
            if self.policy.allows(batch) and self.policy.wants(batch):
                for s in plan.sequences:
                    if s.samples and s.request.status is Status.RUNNING and _may_draft(s.request):
                        s.request.draft_ids[:] = self.ngram.propose(s.request)

    def count(self, request: Request, drafted: int, emitted: int) -> int:
        """A request verified `drafted` drafts and took in `emitted` tokens; returns the drafts that count for
        nothing."""
        accepted = max(emitted - 1, 0)
        self.stats.count(drafted, accepted, emitted)
        request.metrics.drafted_tokens += drafted
        request.metrics.accepted_tokens += accepted
        return drafted - accepted

    def snapshot(self) -> SpeculationStats:
        """The totals so far, as a copy."""
        stats = self.stats
        return replace(
            stats,
            drafted_by_place=list(stats.drafted_by_place),
            accepted_by_place=list(stats.accepted_by_place),
        )

    def observe(self, plan: Schedule, seconds: float, emitted: int) -> None:
        """The step is over."""
        if plan.sequences and _is_decode(plan):
            self.policy.observe(len(plan.sequences), seconds, emitted, drafted=plan.num_drafted > 0)

    def forget(self, request: Request) -> None:
        """The request is over."""
        drafter = self.mtp or self.ngram
        if drafter is not None:
            drafter.forget(request)


def max_batch_of(options: SpeculationOptions, device: torch.device) -> int:
    """Running sequences above which nothing is drafted."""
    return options.max_batch or DEFAULT_MAX_BATCH.get(device.type, 1)


def max_rows(options: SpeculationOptions, method: Method | None, seats: int, device: torch.device) -> int:
    """Rows of the largest step that should run at a known size."""
    if method is None:
        return seats
    tokens = options.num_tokens or DEFAULT_TOKENS[method]
    return max(seats, min(seats, max_batch_of(options, device)) * (tokens + 1))


def _is_decode(plan: Schedule) -> bool:
    """No prompt chunks."""
    return plan.num_decodes + plan.num_drafted == len(plan.sequences)


def _may_draft(request: Request) -> bool:
    """Whether drafts can be verified: what a grammar allows behind them is not known."""
    return request.pooling is None and request.matcher is None
