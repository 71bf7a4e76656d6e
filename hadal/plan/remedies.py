"""What would make a model fit: a shorter context, fewer sequences, smaller weights, offloading, more devices,
other models. Each is judged by the arithmetic that says that it does not."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Literal

from hadal.config import PRESETS
from hadal.plan.ask import Ask
from hadal.plan.figures import gb
from hadal.plan.memory import DTYPE_NAMES, WeightDtype, counts, expert_group_bytes, memory_bytes
from hadal.plan.placing import MIN_CONTEXT, choose, context_that_fits, fits, host_short


def remedies(ask: Ask) -> list[str]:
    """Changes that would make it fit, each judged by the same arithmetic; the smallest change first."""
    found = []
    if ask.wanted_context > MIN_CONTEXT and fits(replace(ask, context=MIN_CONTEXT)):
        found.append(
            f"a context of {MIN_CONTEXT:,} tokens" + (f" with {ask.batch} sequences" if ask.batch > 1 else "")
        )
    if ask.batch > 1 and fits(replace(ask, batch=1)):
        found.append("fewer sequences at once")
    drafts = ask.drafts > 0
    size = memory_bytes(ask.config, ask.weights, with_mtp=drafts)
    smaller: tuple[WeightDtype, ...] = ("int8", "int4")  # integers where FP8 has no units
    if not ask.machine.device.lacks_fp8 and not ask.machine.device.is_cpu:
        smaller = ("fp8", *smaller)
    for dtype in smaller:
        less = memory_bytes(ask.config, dtype, with_mtp=drafts)
        if less < 0.99 * size and (room := _room(replace(ask, dtype=dtype))) is not None:
            found.append(f"weights in {DTYPE_NAMES[dtype]}: {gb(less)} (--dtype {dtype}){room}")
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


def _room(ask: Ask) -> str | None:
    """What to say of the context with which it fits: nothing if it is all that was asked for; None if it does
    not fit."""
    plain = replace(ask, tp=None, dp=None, pp=None, ep=None)
    if ask.context is not None and fits(plain):
        return ""
    plain = replace(plain, context=None)
    context = context_that_fits(plain, choose(plain))
    if context is None or host_short(plain) is not None:
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
            if not fits(other):
                continue
            experts = expert_group_bytes(ask.config, dtype, with_mtp=False)
            where = "host memory" if place == "cpu" else "the files on disk"
            each = experts / ask.config.moe.n_routed_experts * ask.config.moe.num_experts_per_tok
            found.append(
                f"--offload {place} --dtype {dtype}: {gb(experts)} of experts in {where}; a token then "
                f"reads {gb(each)} of them from there"
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
        if fits(replace(ask, machine=other, context=ask.context or min(MIN_CONTEXT, ask.wanted_context))):
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
        if preset.repo_id is not None and fits(other):
            kind = "a distill, not the same model" if preset.is_distill else "not the same model"
            found[count] = f"{preset.name}: {kind} ({preset.title.split(': ', 1)[1]})"
    return [found[count] for count in sorted(found, reverse=True)[:limit]]
