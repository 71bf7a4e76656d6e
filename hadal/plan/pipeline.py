"""Pipeline schedules: their bubbles by formula, and each as a schedule that is carried out and can be drawn.

    1F1B       (PP − 1)(F + B)
    ZB1P       (PP − 1)(F + B − 2W)
    DualPipe   (PP/2 − 1)(F&B + B − 3W)       DualPipeV: the same on PP/2 devices

F: forward of a stage and micro-batch; B: its whole backward, W of which is for weights; F&B: one of each,
overlapped. (V3 report, arXiv 2412.19437, table 2; DualPipe's repository.) A schedule is a list of operations
a device, each begun when the device is free and what it needs has arrived.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hadal.plan.figures import PlanError

Kind = Literal["1f1b", "zb1p", "dualpipe", "dualpipev"]
KINDS: tuple[Kind, ...] = ("1f1b", "zb1p", "dualpipe", "dualpipev")
NAMES = {"1f1b": "1F1B", "zb1p": "ZB1P", "dualpipe": "DualPipe", "dualpipev": "DualPipeV"}
Op = Literal["F", "B", "b", "W"]  # forward, whole backward, backward for inputs alone, for weights alone


@dataclass(frozen=True)
class Times:
    """Of one stage and micro-batch, in any unit. V3's figure: B = 2F, W = F."""

    f: float = 1.0
    b: float = 2.0
    w: float = 1.0
    fb: float | None = None

    @property
    def both(self) -> float:
        return self.f + self.b if self.fb is None else self.fb

    def __post_init__(self) -> None:
        if min(self.f, self.b, self.w) <= 0 or self.w >= self.b:
            raise PlanError(f"F {self.f}, B {self.b}, W {self.w}: all above 0, and W is a part of B")


def bubble(kind: Kind, pp: int, times: Times | None = None) -> float:
    """Idle time of a device in a step, by formula. pp: stages of the model."""
    t = times or Times()
    _check(kind, pp)
    if kind == "1f1b":
        return (pp - 1) * (t.f + t.b)
    if kind == "zb1p":
        return (pp - 1) * (t.f + t.b - 2 * t.w)
    return (pp / 2 - 1) * (t.both + t.b - 3 * t.w)


def _check(kind: str, pp: int) -> None:
    if kind not in KINDS:
        raise PlanError(f"schedule is {kind!r}; use one of {', '.join(KINDS)}")
    if pp < 2 or (kind.startswith("dual") and pp % 2):
        raise PlanError(
            f"{pp} stages: {NAMES[kind]} takes at least 2" + (", and an even number" if "d" in kind else "")
        )


def costs(kind: Kind, pp: int) -> dict[str, str]:
    """What a schedule takes beside time (V3 report, table 2)."""
    dual = kind.startswith("dual")
    return {"parameters": "2×" if dual else "1×", "activations": f"{pp + 1 if dual else pp}"}


# --- carrying a schedule out --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """One operation of one micro-batch in one stage."""

    op: Op
    stage: int
    batch: int
    way: int = 0  # DualPipe's direction


@dataclass(frozen=True)
class Done:
    """Parts that ran together (two where a forward and a backward overlap) on a device, from when to when."""

    device: int
    parts: tuple[Part, ...]
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule carried out."""

    kind: Kind
    devices: int
    done: tuple[Done, ...]

    @property
    def length(self) -> float:
        return max(d.end for d in self.done)

    def idle(self, device: int) -> float:
        """Time in which a device waits."""
        return self.length - sum(d.end - d.start for d in self.done if d.device == device)

    @property
    def bubble(self) -> float:
        """The longest wait of a device."""
        return max(self.idle(device) for device in range(self.devices))


def timeline(kind: Kind, pp: int, micro_batches: int, times: Times | None = None) -> Timeline:
    """The schedule of `micro_batches` in a model of `pp` stages. DualPipe takes an even number of them, at
    least 2·PP; DualPipeV runs on PP/2 devices, and at least PP."""
    _check(kind, pp)
    t = times or Times()
    if kind == "1f1b":
        return _carried_out(kind, [_one_f_one_b(d, pp, micro_batches) for d in range(pp)], pp, t)
    if kind == "zb1p":
        return _zero_bubble(pp, micro_batches, t)
    half = pp // 2
    if kind == "dualpipe":
        if micro_batches % 2 or micro_batches < 2 * pp:
            raise PlanError(
                f"DualPipe over {pp} stages takes an even number of micro-batches, at least {2 * pp}"
            )
        lists = [_dual(min(d, pp - 1 - d), half, micro_batches // 2, d, pp) for d in range(pp)]
        return _carried_out(kind, lists, pp, t)
    if micro_batches < pp:
        raise PlanError(f"DualPipeV over {pp} stages takes at least {pp} micro-batches")
    return _carried_out(kind, [_dual(d, half, micro_batches, d, pp, fold=True) for d in range(half)], pp, t)


Together = tuple[Part, ...]


def _one_f_one_b(device: int, pp: int, count: int) -> list[Together]:
    ahead = min(pp - 1 - device, count)
    found: list[Together] = [(Part("F", device, i),) for i in range(ahead)]
    for i in range(count - ahead):
        found += [(Part("F", device, ahead + i),), (Part("B", device, i),)]
    return found + [(Part("B", device, i),) for i in range(count - ahead, count)]


def _dual(h: int, half: int, count: int, device: int, pp: int, *, fold: bool = False) -> list[Together]:
    """DualPipe's eight steps for a device at distance h from its end: `count` micro-batches a direction. In
    the second half of the pipe both directions change their parts; folded, way 1 is the way back."""
    mirrored = not fold and device >= half
    found: list[Together] = []
    next_f, next_b, next_w = [0, 0], [0, 0], list[Part]()

    def part(op: Op, way: int) -> Part:
        real = way ^ mirrored
        stage = pp - 1 - device if real else device
        counter = next_f if op == "F" else next_b
        number = counter[real]
        counter[real] += 1
        made = Part(op, stage, number, real)
        if op == "b":
            next_w.append(Part("W", stage, number, real))
        return made

    def alone(op: Op, way: int) -> None:
        found.append((part(op, way),))

    def weights() -> None:
        found.append((next_w.pop(0),))

    def overlapped(f: int, b: int) -> None:
        found.append((part("F", f), part("B", b)))

    for _ in range(2 * (half - h - 1)):
        alone("F", 0)
    for _ in range(h + 1):
        alone("F", 0)
        alone("F", 1)
    for _ in range(half - h - 1):
        alone("b", 1)
        weights()
        alone("F", 1)
    for i in range(count - 2 * half + h + 1):
        if i == 0 and h == half - 1:  # the middle has nothing to hide communication behind yet
            alone("F", 0)
            alone("B", 1)
        else:
            overlapped(0, 1)
        overlapped(1, 0)
    for _ in range(half - h - 1):
        alone("B", 1)
        overlapped(1, 0)
    for i in range(2 * (h + 1)):  # the last half leaves its weights for later
        alone("b" if i >= h + 1 else "B", 1 - i % 2)
    for _ in range(half - h - 1):
        weights()
        alone("b", 0)
    while next_w:
        weights()
    return found


def _carried_out(kind: Kind, lists: list[list[Together]], pp: int, t: Times) -> Timeline:
    """Each device works through its list in order."""
    end: dict[tuple[str, int, int, int], float] = {}
    free, at, done = [0.0] * len(lists), [0] * len(lists), list[Done]()
    moved = True
    while moved:
        moved = False
        for device, todo in enumerate(lists):
            while at[device] < len(todo):
                parts = todo[at[device]]
                ready = [_ready(p, end, pp, kind == "dualpipev") for p in parts]
                if any(r is None for r in ready):
                    break
                start = max(free[device], *(r for r in ready if r is not None))
                finish = start + _takes(parts, t)
                for p in parts:
                    end["F" if p.op == "F" else "W" if p.op == "W" else "B", p.stage, p.batch, p.way] = finish
                done.append(Done(device, parts, start, finish))
                free[device], at[device], moved = finish, at[device] + 1, True
    if any(i < len(todo) for i, todo in zip(at, lists, strict=True)):
        raise AssertionError(f"the schedule {kind} waits for itself")
    return Timeline(kind, len(lists), tuple(done))


def _takes(parts: Together, t: Times) -> float:
    if len(parts) == 2:
        return t.both
    return {"F": t.f, "B": t.b, "b": t.b - t.w, "W": t.w}[parts[0].op]


def _ready(p: Part, end: dict[tuple[str, int, int, int], float], pp: int, fold: bool) -> float | None:
    """When what a part needs is there; None: not yet. Stages are numbered along the model in both directions;
    folded, way 1 is its second half."""

    def of(op: str, stage: int) -> float | None:
        return end.get((op, stage, p.batch, int(stage >= pp // 2) if fold else p.way))

    if p.op == "F":
        return 0.0 if p.stage == 0 else of("F", p.stage - 1)
    if p.op == "W":
        return of("B", p.stage)
    own = of("F", p.stage)
    return own if own is None or p.stage == pp - 1 else of("B", p.stage + 1)


def _zero_bubble(pp: int, count: int, t: Times) -> Timeline:
    """ZB1P (ZB-H1 of arXiv 2401.10241): as 1F1B, but a backward pass's part for weights fills the waits.
    A device takes what is ready: backward, else forward (as many in flight as in 1F1B), else weights."""
    end: dict[tuple[str, int, int, int], float] = {}
    free, done = [0.0] * pp, list[Done]()
    f, b, w = [0] * pp, [0] * pp, [0] * pp

    def choices(d: int) -> Iterable[tuple[float, int, Part]]:
        if b[d] < count and (ready := _ready(Part("b", d, b[d]), end, pp, False)) is not None:
            yield max(free[d], ready), 0, Part("b", d, b[d])
        if f[d] < count and f[d] - b[d] < pp - d:
            ready = _ready(Part("F", d, f[d]), end, pp, False)
            if ready is not None:
                yield max(free[d], ready), 1, Part("F", d, f[d])
        if w[d] < b[d]:
            yield max(free[d], end["B", d, w[d], 0]), 2, Part("W", d, w[d])

    while any(n < count for n in w):
        start, _, device, part = min((s, rank, d, p) for d in range(pp) for s, rank, p in choices(d))
        finish = start + _takes((part,), t)
        end["F" if part.op == "F" else "W" if part.op == "W" else "B", device, part.batch, 0] = finish
        done.append(Done(device, (part,), start, finish))
        free[device] = finish
        for counter, op in ((f, "F"), (b, "b"), (w, "W")):
            counter[device] += part.op == op
    return Timeline("zb1p", pp, tuple(done))


# --- drawing ------------------------------------------------------------------------------------------------
LETTERS = (
    "F forward, B backward, b backward for inputs alone, w weights alone, X forward and backward, · waiting"
)


def drawing(line: Timeline, width: int = 100) -> list[str]:
    """A row a device, time from left to right; LETTERS says what is what."""
    scale = max(1, int(width / line.length)) if line.length <= width else width / line.length
    columns = round(line.length * scale)
    rows = [["·"] * columns for _ in range(line.devices)]
    for d in line.done:
        letter = "X" if len(d.parts) == 2 else "w" if d.parts[0].op == "W" else d.parts[0].op
        for column in range(round(d.start * scale), max(round(d.start * scale) + 1, round(d.end * scale))):
            if column < columns:
                rows[d.device][column] = letter
    digits = len(str(line.devices - 1))
    return [f"{i:>{digits}} {''.join(row)}" for i, row in enumerate(rows)]
