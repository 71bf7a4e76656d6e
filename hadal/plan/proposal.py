"""The layout of a training where nobody names one: the smallest that fits, or why none does.

All devices are used. A dense model is cut into as few pieces as can be (tp · pp), among equals by tp, which
stays within a node, rather than into stages that wait. A model with experts is cut by tp only where it must
be, as DeepSeek did without: its matrices are narrow, its latents not divided. It has few stages, and experts
on few nodes (pp, times one more for each doubling of ep beyond a node). ZeRO's stage, the schedule and what
is computed again stay as asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log2

from hadal.config import ModelConfig
from hadal.plan.layout import Layout
from hadal.plan.machines import Machine
from hadal.plan.pretraining import TrainingLayout, memory, total

RECOMPUTE = ("norm", "up", "swiglu", "rows")
MOST_STAGES, MOST_TP = 64, 8


@dataclass(frozen=True)
class Proposal:
    """A layout and why it was taken; where nothing fits, the one that takes least."""

    of: TrainingLayout
    fits: bool
    why: str


def propose(config: ModelConfig, machine: Machine, asked: TrainingLayout) -> Proposal:
    """For all devices of `machine`; `asked` says the rest of a step (its layout is not looked at)."""
    tried, found = _search(config, machine, asked)
    if found is not None:
        few = "the only one" if tried == 1 else f"the smallest of {tried} that fits"
        return Proposal(found, True, f"proposed: {few}")
    sizes = {x: total(memory(config, x)) for x in _candidates(config, machine, asked)}
    least = min(sizes, key=lambda x: sizes[x])
    parts = memory(config, least)
    largest = max(parts, key=lambda part: part.value)
    why = f"none of {tried} fits" if tried > 1 else "it does not fit"
    why += f"; {least.layout.describe()} takes least, mostly {largest.name} ({largest.value / 1e9:,.1f} GB). "
    return Proposal(least, False, why + _what_would(config, machine, asked))


def _search(
    config: ModelConfig, machine: Machine, asked: TrainingLayout
) -> tuple[int, TrainingLayout | None]:
    """How many layouts there are, and the first that fits."""
    tried = list(_candidates(config, machine, asked))
    fitting = (x for x in tried if total(memory(config, x)) <= machine.usable)
    return len(tried), next(fitting, None)


def _candidates(config: ModelConfig, machine: Machine, asked: TrainingLayout) -> Iterator[TrainingLayout]:
    """Layouts of all devices, the smallest first."""
    n, m = machine.count, config.moe
    experts = 1 if m is None else m.n_routed_experts
    found = []
    for pp in _divisors(n, min(MOST_STAGES, config.num_hidden_layers)):
        if pp > 1 and pp % 2 and asked.schedule.startswith("dual"):
            continue
        for tp in _divisors(n // pp, min(MOST_TP, machine.per_node)):
            if config.num_attention_heads % tp:
                continue
            for ep in _divisors(n // pp, experts):
                if experts % ep == 0:
                    found.append(Layout(tp, n // pp // tp, pp, ep))

    def size(x: Layout) -> tuple[float, ...]:
        nodes = 1 + max(0.0, log2(x.ep / machine.per_node))
        return (x.tp * x.pp, x.pp) if m is None else (x.tp, x.pp * nodes, x.ep)

    return (replace(asked, layout=x) for x in sorted(found, key=size))


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def _what_would(config: ModelConfig, machine: Machine, asked: TrainingLayout) -> str:
    """The smallest change of what was asked with which a layout fits."""
    again = {"recompute": RECOMPUTE} if set(asked.recompute) != set(RECOMPUTE) else {}
    sharded = {"zero": 3} if asked.zero < 3 and machine.count > 1 else {}
    flags = {"recompute": "all of --recompute", "zero": "--zero 3"}
    for change in (again, sharded, again | sharded):
        if not change:
            continue
        _, found = _search(config, machine, replace(asked, **change))
        if found is not None:
            how = " and ".join(flags[key] for key in change)
            return f"With {how} {found.layout.describe()} fits"
    return "Nor does any with ZeRO-3 and all computed again: more devices, more memory, or shorter rows"
