"""Will a model run on a machine, and how fast: memory on the fullest device, speeds at three levels, and what
would help where it does not fit.

What is said of more than one device holds for any engine with such a layout; Hadal's own runs on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

from hadal.config import PRESETS, ConfigError, ModelConfig
from hadal.plan.figures import Figure, PlanError
from hadal.plan.layout import Layout, layouts, memory_on_device
from hadal.plan.machines import USABLE, Machine
from hadal.plan.memory import (
    DTYPE_NAMES,
    CacheDtype,
    WeightDtype,
    cache_bytes_per_token,
    cache_dtype_of,
    counts,
    expert_group_bytes,
    memory_bytes,
    weight_groups,
)
from hadal.plan.roofline import LEVELS, Step, Work, ceiling, decode_step, efficiency, prefill

MIN_CONTEXT = 4096
DECODE_CONTEXT = 4096  # speeds are stated for this context unless one is asked for
MOST_A_REPLICA = 512  # sequences, in a sweep
PUBLISHED_FP8 = 1e10  # parameters from which on a model that was published in FP8 is taken to run in FP8
_CHIP = "the device's datasheet"


@dataclass(frozen=True)
class Ask:
    """A question. None leaves a choice to the planner. batch: sequences at once, over all replicas."""

    config: ModelConfig
    machine: Machine
    name: str = "the model"
    stated_context: int | None = None
    dtype: WeightDtype | None = None
    cache: CacheDtype | None = None
    context: int | None = None
    prompt: int = 1024
    batch: int = 1
    drafts: int = 0
    acceptance: float | None = None
    offload: Literal["cpu", "disk"] | None = None
    tp: int | None = None
    dp: int | None = None
    pp: int | None = None
    ep: int | None = None

    @property
    def weights(self) -> WeightDtype:
        """The dtype that is meant: as asked, else as published."""
        if self.dtype is not None:
            return self.dtype
        large = self.config.fp8 is not None and counts(self.config).main > PUBLISHED_FP8
        return "fp8" if large else "bf16"

    @property
    def cache_dtype(self) -> CacheDtype:
        return self.cache or cache_dtype_of(self.weights)

    @property
    def wanted_context(self) -> int:
        longest = self.config.max_position_embeddings
        return min(self.context or self.stated_context or longest, longest)

    def check(self) -> None:
        """PlanError names a value that means nothing."""
        for name in ("batch", "prompt"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.context is not None and not 1 <= self.context <= self.config.max_position_embeddings:
            most = self.config.max_position_embeddings
            raise PlanError(f"context is {self.context:,}; {self.name} bears 1 to {most:,} tokens")
        if self.drafts < 0 or (self.drafts and not self.config.num_nextn_predict_layers):
            raise PlanError(f"mtp drafts: {self.drafts}; {self.name} has no MTP module to draft with")
        if self.drafts and self.acceptance is None:
            raise PlanError(
                "how many drafts are accepted depends on the text; give acceptance (DeepSeek: 0.85 to 0.9)"
            )
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            raise PlanError(f"acceptance is {self.acceptance}; it is a share from 0 to 1")
        if self.offload and self.config.moe is None:
            raise PlanError("offloading is for experts; this model is dense")


@dataclass(frozen=True)
class Running:
    """The answer. `memory`: of the fullest device, by part. `why_no_speed`: what speeds would need."""

    ask: Ask
    fits: bool
    layout: Layout
    context: int
    memory: tuple[Figure, ...]
    needed: Figure
    usable: Figure
    notes: tuple[str, ...]
    remedies: tuple[str, ...]
    speeds: tuple[Figure, ...] = ()
    limits: tuple[str, str] = ("", "")
    steps: tuple[tuple[int, Step], ...] = ()
    why_no_speed: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The whole answer."""
        a = self.ask
        return {
            "model": a.name,
            "on": a.machine.describe(),
            "fits": self.fits,
            "layout": self.layout.describe(),
            "weights": a.weights,
            "cache": a.cache_dtype,
            "context": self.context,
            "asked_context": a.wanted_context,
            "batch": a.batch,
            "memory": [f.as_json() for f in self.memory],
            "needed": self.needed.as_json(),
            "usable": self.usable.as_json(),
            "notes": list(self.notes),
            "remedies": list(self.remedies),
            "speeds": [f.as_json() for f in self.speeds],
            "limited_by": {"prefill": self.limits[0], "decode": self.limits[1]} if self.speeds else None,
            "sweep": [
                {"batch": n, "tokens_per_s": s.rate, "per_sequence": s.per_sequence, "limited_by": s.limit}
                for n, s in self.steps
            ],
            "why_no_speed": self.why_no_speed,
        }


def running(ask: Ask) -> Running:
    """Whether it runs there, how fast, and what would help if not."""
    ask.check()
    layout = _chosen(ask)
    context = _context_that_fits(ask, layout)
    fits = context is not None
    context = context if context is not None else ask.wanted_context
    parts = _parts(ask, layout, context)
    memory = tuple(_memory_figures(ask, layout, context, parts))
    need, have = sum(parts.values()), _usable(ask)
    fits = fits and _host_short(ask) is None
    answer = Running(
        ask=ask,
        fits=fits,
        layout=layout,
        context=context,
        memory=memory,
        needed=Figure("needed on the fullest device", need, "B", " + ".join(p for p in parts)),
        usable=Figure("usable there", have, "B", f"{USABLE:.0%} of {_of(ask):,.0f} B", _device_source(ask)),
        notes=tuple(_notes(ask, fits)),
        remedies=() if fits else tuple(remedies(ask)),
    )
    return _with_speeds(answer) if fits else answer


# --- memory -------------------------------------------------------------------------------------------------
def _of(ask: Ask) -> float:
    device = ask.machine.device
    return ask.machine.ram if device.is_cpu else device.memory


def _usable(ask: Ask) -> float:
    return ask.machine.usable


def _device_source(ask: Ask) -> str:
    return ask.machine.device.source


def _parts(ask: Ask, layout: Layout, context: int) -> dict[str, float]:
    parts = memory_on_device(
        ask.config,
        layout,
        dtype=ask.weights,
        cache=ask.cache_dtype,
        context=context,
        batch=ask.batch,
        with_mtp=ask.drafts > 0,
        gpu=not ask.machine.device.is_cpu,
    )
    if ask.offload == "disk" or (ask.offload == "cpu" and not ask.machine.device.is_cpu):
        parts.pop("routed experts", None)
    return parts


def _host_short(ask: Ask) -> str | None:
    """Why offloaded experts do not fit the host, if they do not."""
    if ask.offload != "cpu" or ask.machine.device.is_cpu or ask.machine.device.unified:
        return None
    experts, ram = (
        expert_group_bytes(ask.config, ask.weights, with_mtp=ask.drafts > 0),
        ask.machine.ram * USABLE,
    )
    if experts <= ram:
        return None
    return f"the experts take {_gb(experts)} of host memory, and {_gb(ram)} of it are usable"


def _total(ask: Ask, layout: Layout, context: int) -> float:
    return sum(_parts(ask, layout, context).values())


def _context_that_fits(ask: Ask, layout: Layout) -> int | None:
    """As asked, or as much as fits (at least 4,096 tokens where none was asked for); None if not."""
    wanted, have = ask.wanted_context, _usable(ask)
    if _total(ask, layout, wanted) <= have:
        return wanted
    if ask.context is not None:
        return None
    empty = _total(ask, layout, 0)
    each = (_total(ask, layout, 64) - empty) / 64
    room = int((have - empty) / each) // 64 * 64 if each else 0
    return room if room >= min(MIN_CONTEXT, wanted) else None


def _chosen(ask: Ask) -> Layout:
    """The layout asked for; else the fastest that fits, or the least full one."""
    m, given = ask.machine, (ask.tp, ask.dp, ask.pp, ask.ep)
    if any(n is not None for n in given):
        tp, pp = ask.tp or 1, ask.pp or 1
        dp = ask.dp or max(1, m.count // (tp * pp))
        found = Layout(tp, dp, pp, ask.ep or 1)
        found.check(ask.config, m.count)
        return found
    candidates = list(layouts(ask.config, m.count, m.per_node))
    fitting = [x for x in candidates if _context_that_fits(ask, x) is not None]
    if not fitting:
        return min(candidates, key=lambda x: _total(ask, x, min(MIN_CONTEXT, ask.wanted_context)))
    if len(fitting) == 1 or ask.offload:
        return fitting[0]
    try:
        of = efficiency(m.device.kind, "typical")
        context = min(ask.wanted_context, DECODE_CONTEXT)
        return max(fitting, key=lambda x: decode_step(_work(ask, x), m, ask.batch, context, of).rate)
    except PlanError:  # without a figure that speeds need, the first that fits
        return fitting[0]


def _memory_figures(ask: Ask, layout: Layout, context: int, parts: dict[str, float]) -> list[Figure]:
    groups = {g.name: g for g in weight_groups(ask.config, ask.weights, with_mtp=ask.drafts > 0)}
    found = []
    for name, size in parts.items():
        if name in groups:
            g = groups[name]
            per = (g.bytes - g.scales) / g.parameters if g.parameters else 0
            formula = f"{g.parameters:,} parameters × {per:.3g} B" if g.parameters else "a copy in INT8"
            formula += f" + {g.scales:,} B of scales" if g.scales else ""
            formula += f", {size / g.bytes:.3g} of it here" if size < g.bytes - 1 else ""
        elif name.startswith("cache"):
            per_token = cache_bytes_per_token(ask.config, ask.cache_dtype)
            sequences = ceil(ask.batch / layout.dp)
            formula = f"{per_token:,.0f} B a token × {context:,} × {sequences:,} sequences"
            formula += (
                f" / {layout.cache_split(ask.config)} devices" if layout.cache_split(ask.config) > 1 else ""
            )
            formula += f", {ceil(ask.config.num_hidden_layers / layout.pp)} layers" if layout.pp > 1 else ""
            if "MTP" in name:
                formula = f"one layer more × {context:,} × {sequences:,} sequences"
        elif name == "the GPU's runtime":
            formula = "an allowance"
        else:
            formula = "2,048 tokens through the widest layer, FP32 logits of 64 sequences"
        found.append(Figure(name, size, "B", formula))
    return found


# --- explanations -------------------------------------------------------------------------------------------
def _notes(ask: Ask, fits: bool) -> list[str]:
    c, device, n = ask.config, ask.machine.device, counts(ask.config)
    found = []
    whole = memory_bytes(c, ask.weights, with_mtp=False)
    if ask.dtype is None and ask.weights == "fp8":
        found.append("Weights are taken in FP8, as they are published (`hadal run --quantize fp8`)")
    if device.lacks_fp8 and ask.weights == "fp8":
        peak = device.peak("bf16")
        how = f"multiplied in {peak[1].upper()}" if peak else "decoded"
        found.append(
            f"{device.title} has no FP8 units: {device.lacks_fp8}. Weights may lie there in FP8 and are {how}"
        )
    if c.moe is not None and not fits:
        active, total = (f"{x / 1e9:.{0 if x >= 1e10 else 1}f}B" for x in (n.active_with_head, n.main))
        found.append(
            f"{active} active is what one token computes with, not what memory must hold: the next token "
            f"takes other experts, so all {total} ({_gb(whole)}) lie in memory, or are streamed"
        )
    if n.mtp_copies and n.main > PUBLISHED_FP8:
        found.append(
            f"The {n.stored / 1e9:.0f}B of the hub count the MTP module ({n.mtp_unique / 1e9:.1f}B, and "
            f"copies of embedding and head) and scales; the model has {n.main / 1e9:.1f}B"
        )
    if ask.machine.count > 1:
        found.append(
            "Hadal's own engine runs on one device; figures for more hold for engines with such a layout"
        )
    if device.note:
        found.append(f"{device.title}: {device.note}")
    if c.dsa is not None:
        found.append(
            "Hadal does not run sparse attention (V3.2); cache and times are those of full attention"
        )
    short = _host_short(ask)
    if short:
        found.append(short[0].upper() + short[1:])
    if "bf16" not in device.flops and "fp16" in device.flops and ask.weights == "bf16":
        found.append(f"{device.title} has no BF16 units; the products are counted in FP16")
    return found


def remedies(ask: Ask) -> list[str]:
    """Changes that would make it fit, each judged by the same arithmetic; the smallest change first."""
    found = []
    if ask.wanted_context > MIN_CONTEXT and _fits(replace(ask, context=MIN_CONTEXT)):
        found.append(
            f"a context of {MIN_CONTEXT:,} tokens" + (f" with {ask.batch} sequences" if ask.batch > 1 else "")
        )
    if ask.batch > 1 and _fits(replace(ask, batch=1)):
        found.append("fewer sequences at once")
    drafts = ask.drafts > 0
    size = memory_bytes(ask.config, ask.weights, with_mtp=drafts)
    smaller: tuple[WeightDtype, ...] = ("int8", "int4")  # integers where FP8 has no units
    if not ask.machine.device.lacks_fp8 and not ask.machine.device.is_cpu:
        smaller = ("fp8", *smaller)
    for dtype in smaller:
        less = memory_bytes(ask.config, dtype, with_mtp=drafts)
        if less < 0.99 * size and (room := _room(replace(ask, dtype=dtype))) is not None:
            found.append(f"weights in {DTYPE_NAMES[dtype]}: {_gb(less)} (--dtype {dtype}){room}")
            break
    found += _offloads(ask)
    alone = ask.machine.device.is_cpu or ask.machine.device.unified
    count = None if alone else cards(replace(ask, offload=None))
    if count is not None:
        least = ceil(memory_bytes(ask.config, ask.weights, with_mtp=False) / ask.machine.device.memory)
        found.append(
            f"{count} × {ask.machine.device.title} in {DTYPE_NAMES[ask.weights]} "
            f"(the weights alone fill {least})"
        )
    found += _other_models(ask)
    return found


def _fits(ask: Ask) -> bool:
    plain = replace(ask, tp=None, dp=None, pp=None, ep=None)
    return _context_that_fits(plain, _chosen(plain)) is not None and _host_short(plain) is None


def _room(ask: Ask) -> str | None:
    """What to say of the context with which it fits: nothing if it is all that was asked for; None if it does
    not fit."""
    plain = replace(ask, tp=None, dp=None, pp=None, ep=None)
    if ask.context is not None and _fits(plain):
        return ""
    plain = replace(plain, context=None)
    context = _context_that_fits(plain, _chosen(plain))
    if context is None or _host_short(plain) is not None:
        return None
    return "" if context >= ask.wanted_context else f", with {context:,} tokens of context"


def _offloads(ask: Ask) -> list[str]:
    """Offloading, with what it costs: every token then waits for its experts."""
    found: list[str] = []
    if ask.config.moe is None or ask.offload is not None or ask.machine.count > 1:
        return found
    places: tuple[Literal["cpu", "disk"], ...] = ("cpu", "disk")
    for place in places:
        for dtype in dict.fromkeys((ask.weights, "int4")):
            if place == "cpu" and (ask.machine.device.is_cpu or ask.machine.device.unified):
                continue  # it is the same memory
            other = replace(ask, offload=place, dtype=dtype, context=None)
            if not _fits(other):
                continue
            experts = expert_group_bytes(ask.config, dtype, with_mtp=False)
            where = "host memory" if place == "cpu" else "the files on disk"
            each = experts / ask.config.moe.n_routed_experts * ask.config.moe.num_experts_per_tok
            found.append(
                f"--offload {place} --dtype {dtype}: {_gb(experts)} of experts in {where}; a token then "
                f"reads {_gb(each)} of them from there"
            )
            break
    return found


def cards(ask: Ask) -> int | None:
    """The fewest devices of this kind that hold it (powers of two up to a node, then whole nodes)."""
    per_node = max(1, ask.machine.per_node if ask.machine.nodes > 1 else 8)
    counts = [1, 2, 4, 8, *(per_node * n for n in range(2, 33))]
    for count in sorted(set(counts)):
        nodes = max(1, count // per_node) if count % per_node == 0 else 1
        other = replace(ask.machine, count=count, nodes=nodes)
        if _fits(replace(ask, machine=other, context=ask.context or min(MIN_CONTEXT, ask.wanted_context))):
            return count
    return None


def _other_models(ask: Ask, limit: int = 2) -> list[str]:
    """Smaller models that fit, named for what they are."""
    size = counts(ask.config).main
    found: dict[int, str] = {}
    for preset in PRESETS.values():
        count = counts(preset.config).main
        if count >= size or count in found or preset.template == "plain" or preset.config.dsa is not None:
            continue
        other = replace(
            ask, config=preset.config, dtype=None, cache=None, context=None, stated_context=preset.context
        )
        other = replace(other, drafts=0, acceptance=None, offload=None)
        if preset.repo_id is not None and _fits(other):
            kind = "a distill, not the same model" if preset.is_distill else "not the same model"
            found[count] = f"{preset.name}: {kind} ({preset.title.split(': ', 1)[1]})"
    return [found[count] for count in sorted(found, reverse=True)[:limit]]


# --- speed --------------------------------------------------------------------------------------------------
def _work(ask: Ask, layout: Layout) -> Work:
    streamed, rate = 0.0, None
    if ask.offload == "disk":
        streamed, rate = 1.0, ask.machine.disk
    elif ask.offload == "cpu" and not ask.machine.device.is_cpu:
        streamed, rate = 1.0, ask.machine.device.host
    if streamed and not ask.machine.device.is_cpu:
        experts = expert_group_bytes(ask.config, ask.weights, with_mtp=False)
        spare = _usable(ask) - _total(ask, layout, _context_that_fits(ask, layout) or MIN_CONTEXT)
        streamed = max(0.0, 1 - max(0.0, spare) / experts)
    return Work(
        ask.config,
        ask.weights,
        ask.cache_dtype,
        layout,
        ask.drafts,
        ask.acceptance or 0.0,
        None,
        streamed,
        rate,
    )


def _with_speeds(answer: Running) -> Running:
    ask, m, layout = answer.ask, answer.ask.machine, answer.layout
    work = _work(ask, layout)
    context = min(answer.context, ask.context or DECODE_CONTEXT)
    prompt = min(ask.prompt, answer.context)
    try:
        efficiencies = [efficiency(m.device.kind, level) for level in LEVELS]
        decodes = [decode_step(work, m, ask.batch, context, of) for of in efficiencies]
        fills = [prefill(work, m, prompt, of) for of in efficiencies]
        top = ceiling(work, m, ask.batch, context)
        of = efficiencies[1]
        steps = tuple((n, decode_step(work, m, n, context, of)) for n in _batches(ask, layout, context))
    except PlanError as error:
        return replace(answer, why_no_speed=str(error))
    source = f"{m.device.source}; efficiencies: {of.source}"
    notes = answer.notes
    if work.streamed and work.stream is not None:
        where = "host memory" if ask.offload == "cpu" else "disk"
        notes += (
            f"Experts come from {where} at {work.stream / 1e9:g} GB/s, the full rate, at all three levels: "
            "what that limits is a ceiling, not a forecast",
        )

    def levels(name: str, unit: str, values: Sequence[float], formula: str) -> Figure:
        low, typical, high = values
        return Figure(name, typical, unit, formula, source, of.date, low, high)

    shown = " + ".join(f"{s * 1e3:,.3g} ms {part}" for part, s in decodes[1].parts.items())
    after = f"at {context:,} tokens of context"
    speeds = [
        levels(
            "decode",
            "tokens/s",
            [s.rate for s in decodes],
            f"{ask.batch} × tokens / step {after}; step = {shown}",
        ),
        levels("decode, each sequence", "tokens/s", [s.per_sequence for s in decodes], "decode / sequences"),
        levels(
            "prefill", "tokens/s", [s.rate for s in fills], f"prompts of {prompt:,} tokens on every replica"
        ),
        levels("first token after", "s", [s.seconds for s in fills], f"one prompt of {prompt:,} tokens"),
        Figure(
            "decode ceiling",
            top,
            "tokens/s",
            f"bytes of a step {after} / memory bandwidth, all else free",
            m.device.source,
        ),
    ]
    if m.nodes > 1:
        per_node = [s.rate / m.nodes for s in decodes]
        speeds.append(levels("decode, a node", "tokens/s", per_node, f"decode / {m.nodes} nodes"))
        per_node = [s.rate / m.nodes for s in fills]
        speeds.append(levels("prefill, a node", "tokens/s", per_node, f"prefill / {m.nodes} nodes"))
    return replace(
        answer, notes=notes, speeds=tuple(speeds), limits=(fills[1].limit, decodes[1].limit), steps=steps
    )


def _batches(ask: Ask, layout: Layout, context: int) -> list[int]:
    """Batches of the sweep whose cache fits at `context`."""
    found = []
    powers = (2**i for i in range((MOST_A_REPLICA * layout.dp).bit_length()))
    for n in sorted({*powers, ask.batch}):
        if _total(replace(ask, batch=n), layout, context) <= _usable(ask):
            found.append(n)
    return found


def _gb(n: float) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.0f} MB"


def config_of(name: str) -> tuple[str, ModelConfig, int]:
    """(name, shape, stated context) of a preset or of a model that is known by its shape alone."""
    from hadal.config import Gqa, Rope, preset, suggest
    from hadal.plan.figures import data

    rows = {row["name"]: row for row in data("models").values()}
    row = rows.get(name.lower())
    if row is None:
        try:
            known = preset(name)
        except ConfigError:
            raise PlanError(f"unknown model {name!r}.{suggest(name.lower(), [*PRESETS, *rows])}") from None
        return known.name, known.config, known.context
    config = ModelConfig(
        row["model_type"],
        row["vocab_size"],
        row["hidden_size"],
        row["intermediate_size"],
        row["num_hidden_layers"],
        row["num_attention_heads"],
        Gqa(row["num_key_value_heads"], row["head_dim"], row.get("qkv_bias", False)),
        Rope(),
        max_position_embeddings=row["max_position_embeddings"],
        tie_word_embeddings=row.get("tie_word_embeddings", False),
    )
    return row["name"], config, row["max_position_embeddings"]
