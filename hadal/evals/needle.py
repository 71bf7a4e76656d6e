"""Needle in a haystack: is a fact found wherever it stands in a long context? A grid of lengths × depths.

One sentence, "The magic number of Lisbon is 48213.", is planted at a depth of a haystack, and asked for at
its end; greedy decoding is right if the first number of the answer is the planted one. A sample has one
haystack and one fact for all depths of a length. It is the test behind DeepSeek-V3's Figure 8 (report §4.3),
scored by rule, 0 or 1, where the figure shows a judge's 1 to 10. (G. Kamradt's "pressure testing", 2023.)

Length L means that prompt and answer fit in L tokens. Works on any model that the engine runs, in its chat
template or, for a base model, as text to be completed, and with any text as haystack.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

from hadal.data.needles import Fact, draw_facts, is_right, puzzle_lines, question, text_lines

DEPTHS = tuple(range(0, 101, 10))  # per cent, as in the report's figure
SAMPLES = 4
MAX_TOKENS = 32  # of an answer

Progress = Callable[[int, int], None]


class Cell(TypedDict):
    """One square of the grid. `tokens`: the mean length of its prompts."""

    length: int
    depth: int
    correct: int
    total: int
    tokens: float


class Grid(TypedDict):
    """Everything that was measured and how. Plain data: ready for JSON. `beyond`: lengths that were asked for
    and that the model's positions do not reach."""

    suite: str
    title: str
    lengths: list[int]
    depths: list[int]
    beyond: list[int]
    accuracy: float
    cells: list[Cell]
    failures: list[dict[str, Any]]
    settings: dict[str, Any]


class NeedleEngine(Protocol):
    """What is used of `hadal.engine.Engine`."""

    tokenizer: Any
    template: Any
    max_model_len: int

    def encode(self, prompt: str) -> list[int]: ...
    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]: ...
    def generate(self, prompts: Any, params: Any = None) -> Any: ...


def powers(first: int, last: int) -> list[int]:
    """Lengths from `first` to `last`, doubling; `last` is always one of them. Raises ValueError."""
    if not 0 < first <= last:
        raise ValueError(f"lengths from {first} to {last}: the first is at least 1, the last not below it")
    doubling = itertools.takewhile(lambda n: n < last, (first << i for i in itertools.count()))
    return [*doubling, last]


@dataclass(frozen=True)
class Haystack:
    """Lines and the tokens of each, counted one by one."""

    lines: Sequence[str]
    tokens: Sequence[int]

    def take(self, first: int, budget: int) -> tuple[list[str], list[int]]:
        """Lines from number `first` on, round and round, that hold at most `budget` tokens."""
        lines: list[str] = []
        counts: list[int] = []
        for at in itertools.count(first):
            count = self.tokens[at % len(self.lines)]
            if budget < count:
                return lines, counts
            budget -= count
            lines.append(self.lines[at % len(self.lines)])
            counts.append(count)
        raise AssertionError("count() does not end")


def gather(source: Iterator[str], count_tokens: Callable[[str], int], tokens: int) -> Haystack:
    """The first lines of a source that hold `tokens` tokens."""
    lines: list[str] = []
    counts: list[int] = []
    known: dict[str, int] = {}
    total = 0
    while total < tokens:
        line = next(source)
        if line not in known:
            known[line] = max(1, count_tokens(line))
        lines.append(line)
        counts.append(known[line])
        total += known[line]
    return Haystack(lines, counts)


def plant(lines: Sequence[str], counts: Sequence[int], fact: Fact, depth: float) -> str:
    """The haystack's text with the needle as the line that begins nearest to `depth` per cent of its
    tokens."""
    ends = [0, *itertools.accumulate(counts)]
    wanted = ends[-1] * depth / 100
    at = min(range(len(ends)), key=lambda i: abs(ends[i] - wanted))
    return "".join([*lines[:at], fact.sentence + "\n", *lines[at:]])


def _prompt(engine: NeedleEngine, haystack: str, fact: Fact, chat: bool) -> list[int]:
    asked = haystack + question([fact])
    if chat:
        return engine.encode_chat([{"role": "user", "content": asked}])
    return engine.encode(f"{asked}\nThe magic number of {fact.town} is")


@dataclass(frozen=True)
class _Sample:
    length: int
    depth: int
    fact: Fact
    prompt: list[int]


def _samples(
    engine: NeedleEngine, pile: Haystack, length: int, depths: Sequence[int], *, number: int, seed: int,
    chat: bool, max_tokens: int,
) -> list[_Sample]:  # fmt: skip
    """Sample `number` of a length at every depth: the same haystack, the same fact."""
    rng = random.Random(f"needle:{seed}:{length}:{number}")
    (fact,) = draw_facts(rng, "held-out", 1)
    first = rng.randrange(len(pile.lines))
    bare = len(_prompt(engine, fact.sentence + "\n", fact, chat))
    budget = length - max_tokens - bare
    if budget < 0:
        raise ValueError(
            f"length {length} is too short for a question and {max_tokens} tokens of answer; at least "
            f"{bare + max_tokens} are wanted"
        )
    found = []
    for depth in depths:
        lines, counts = pile.take(first, budget)
        prompt = _prompt(engine, plant(lines, counts, fact, depth), fact, chat)
        while len(prompt) > length - max_tokens:  # lines joined may be more tokens than one by one
            lines, counts = lines[1:], counts[1:]
            prompt = _prompt(engine, plant(lines, counts, fact, depth), fact, chat)
        found.append(_Sample(length, depth, fact, prompt))
    return found


def evaluate(
    engine: NeedleEngine,
    *,
    lengths: Sequence[int],
    depths: Sequence[int] = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    haystack: Sequence[Path] = (),
    chat: bool | None = None,
    max_tokens: int = MAX_TOKENS,
    title: str = "",
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Grid:
    """Measure an engine. `haystack`: text files; none: seeded puzzles of the held-out split. `chat`: ask in
    the model's chat template (None: if it has one). Lengths beyond the engine's are left out and listed.

    Raises ValueError on lengths, depths or texts that cannot be used, OSError on files that cannot be read.
    """
    if samples < 1 or not lengths or not depths or not all(0 <= d <= 100 for d in depths):
        raise ValueError(
            f"{samples} samples of lengths {list(lengths)} at depths {list(depths)}: at least one of each, "
            "depths from 0 to 100"
        )
    reach = [length for length in sorted(set(lengths)) if length <= engine.max_model_len]
    chat = engine.template is not None if chat is None else chat
    source = text_lines(haystack) if haystack else puzzle_lines(seed, "held-out")
    pile = gather(source, lambda line: len(engine.tokenizer.encode(line)), 2 * max(reach, default=0))
    started = time.perf_counter()
    asked: list[_Sample] = []
    said: list[str] = []
    of = len(reach) * len(depths) * samples
    for length in reach:
        block = [
            one
            for number in range(samples)
            for one in _samples(
                engine, pile, length, depths, number=number, seed=seed, chat=chat, max_tokens=max_tokens
            )
        ]
        said += _generate(engine, [one.prompt for one in block], max_tokens)
        asked += block
        if progress is not None:
            progress(len(asked), of)
    used: dict[str, Any] = {
        "samples": samples,
        "seed": seed,
        "max_tokens": max_tokens,
        "sampling": "greedy (temperature 0), one answer a needle",
        "prompt": "chat template" if chat else "completion",
        "haystack": [path.name for path in haystack] or "puzzles (held-out)",
        "seconds": round(time.perf_counter() - started, 3),
        **dict(settings or {}),
    }
    beyond = sorted(set(lengths) - set(reach))
    return _grid(asked, said, title, reach, list(depths), beyond, used)


def _generate(engine: NeedleEngine, prompts: list[list[int]], max_tokens: int) -> list[str]:
    from hadal.engine.request import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return [completion.text for completion in engine.generate(prompts, params)]


def _grid(
    asked: Sequence[_Sample], said: Sequence[str], title: str, lengths: list[int], depths: list[int],
    beyond: list[int], settings: dict[str, Any],
) -> Grid:  # fmt: skip
    cells: dict[tuple[int, int], Cell] = {}
    failures: list[dict[str, Any]] = []
    for one, text in zip(asked, said, strict=True):
        empty: Cell = {"length": one.length, "depth": one.depth, "correct": 0, "total": 0, "tokens": 0.0}
        cell = cells.setdefault((one.length, one.depth), empty)
        right = is_right(text, one.fact)
        cell["correct"] += right
        cell["tokens"] = (cell["tokens"] * cell["total"] + len(one.prompt)) / (cell["total"] + 1)
        cell["total"] += 1
        if not right and sum(f["length"] == one.length for f in failures) < 3:
            wanted = {"wanted": one.fact.sentence, "completion": text}
            failures.append({"length": one.length, "depth": one.depth, **wanted})
    total = sum(cell["total"] for cell in cells.values())
    return {
        "suite": "needle",
        "title": title,
        "lengths": lengths,
        "depths": depths,
        "beyond": beyond,
        "accuracy": sum(cell["correct"] for cell in cells.values()) / max(1, total),
        "cells": list(cells.values()),
        "failures": failures,
        "settings": settings,
    }


def by_length(grid: Grid) -> dict[int, float]:
    """The share that is found at each length."""
    found: dict[int, float] = {}
    for length in grid["lengths"]:
        cells = [cell for cell in grid["cells"] if cell["length"] == length]
        found[length] = sum(c["correct"] for c in cells) / max(1, sum(c["total"] for c in cells))
    return found


def shares(grid: Grid) -> list[list[float | None]]:
    """Rows are depths, columns all lengths that were asked for; None where the model does not reach."""
    known = {(c["length"], c["depth"]): c["correct"] / c["total"] for c in grid["cells"]}
    return [[known.get((length, depth)) for length in columns(grid)] for depth in grid["depths"]]


def columns(grid: Grid) -> list[int]:
    """All lengths that were asked for."""
    return sorted({*grid["lengths"], *grid["beyond"]})


def short(length: int) -> str:
    """16384 as 16K."""
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)


def heat_lines(grid: Grid, *, colour: bool) -> list[str]:
    """The grid as text: a column a length, a line a depth, per cent found; `-` beyond the model's reach."""
    lengths, means = columns(grid), by_length(grid)
    lines = ["depth " + "".join(f"{short(n):>6}" for n in lengths)]
    for depth, row in zip(grid["depths"], shares(grid), strict=True):
        lines.append(f"{depth:>4}% " + "".join(_square(share, colour) for share in row))
    total = "".join("     -" if n not in means else f"{100 * means[n]:>6.0f}" for n in lengths)
    return [*lines, f"{'all':>5} {total}"]


def _square(share: float | None, colour: bool) -> str:
    if share is None:
        return "     -"
    text = f"{100 * share:>5.0f} "
    if not colour:
        return " " + text[:-1]
    shade = 203 if share < 0.25 else 215 if share < 0.5 else 221 if share < 0.75 else 149 if share < 1 else 78
    return f"\x1b[30;48;5;{shade}m{text}\x1b[0m"


def draw(grids: Sequence[Grid], path: Path) -> Path:
    """Heat maps one below the other, as the report draws them: lengths to the right, depth downwards, green
    where the needle is found. PNG, SVG or PDF, by the file's ending. Raises ValueError without grids or
    without matplotlib (the extra `train`)."""
    if not grids:
        raise ValueError("no grid to draw")
    try:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'hadal[train]'") from None
    traffic_light = LinearSegmentedColormap.from_list("needle", ["#F0496E", "#EBB839", "#0CD79F"])
    colours = traffic_light.with_extremes(bad="#DDDDDD")
    widest = max(len(columns(grid)) for grid in grids)
    figure = Figure(figsize=(max(6.0, 0.55 * widest + 3), 2.9 * len(grids)), layout="constrained")
    axes = figure.subplots(len(grids), 1, squeeze=False)[:, 0]
    for axis, grid in zip(axes, grids, strict=True):
        values = [[float("nan") if v is None else v for v in row] for row in shares(grid)]
        image = axis.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks(range(len(columns(grid))), [short(n) for n in columns(grid)])
        axis.set_yticks(range(len(grid["depths"])), [f"{d}%" for d in grid["depths"]], fontsize=7)
        axis.set_xticks([x + 0.5 for x in range(len(columns(grid)) - 1)], minor=True)
        axis.set_yticks([y + 0.5 for y in range(len(grid["depths"]) - 1)], minor=True)
        axis.grid(which="minor", color="white", linewidth=1)
        axis.tick_params(which="minor", length=0)
        axis.set_xlabel("context length, tokens")
        axis.set_ylabel("depth of the needle")
        axis.set_title(grid["title"] or "Needle in a haystack", fontsize=10)
        figure.colorbar(image, ax=axis, label="found")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
