"""Small plots as SVG text, for pages that load nothing: bars, lines on logarithmic axes, points, heat maps.

Every mark has a `<title>`, which browsers show when the mouse rests on it. Colours are the page's own (CSS
variables), so that light and dark fit. All words are escaped here. Sizes are those of the viewBox.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil, floor, log10

WIDTH = 720
HUES = tuple(f"var(--hadal-{letter})" for letter in "abcdefgh")
_LABEL, _ROW = 230, 24


@dataclass(frozen=True)
class Bar:
    """One row of a bar plot. `shown`: its value in words. low, high: a range to draw as a whisker."""

    label: str
    value: float
    shown: str
    tip: str = ""
    hue: int = 0
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """One point of a line or a scatter plot."""

    x: float
    y: float
    label: str = ""
    tip: str = ""
    hue: int = 0


def frame(height: float, body: str, title: str, width: float = WIDTH) -> str:
    """An `<svg>` of that size that fills its column. `title`: what it shows, for those who cannot see it."""
    return (
        f'<svg class="hadal-plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def words(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "", turn: float = 0) -> str:
    """A line of text. kind: a class for its look (quiet, strong)."""
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    look = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}{turned}>{escape(text)}</text>'


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _rect(x: float, y: float, width: float, height: float, more: str, tip: str = "") -> str:
    place = f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:g}" {more}'
    return f"{place}>{_tip(tip)}</rect>" if tip else f"{place}/>"


def bars(rows: Sequence[Bar], title: str, limit: tuple[float, str] | None = None) -> str:
    """Horizontal bars from zero on one scale. limit: a value to mark with a line, and its name."""
    most = max(
        [max(row.value, row.low or 0.0, row.high or 0.0) for row in rows]
        + ([limit[0]] if limit else [])
        + [1e-30]
    )
    shown = max((len(row.shown) for row in rows), default=0)
    room = WIDTH - _LABEL - 7.2 * shown - 16
    top = 22 if limit else 4
    out = []
    for i, row in enumerate(rows):
        y, width = top + i * _ROW, max(1.0, row.value / most * room)
        whisker, end = "", width
        if row.low is not None and row.high is not None:
            low, high = sorted((row.low / most * room, row.high / most * room))
            end = max(width, high)
            whisker = (
                f'<path class="hadal-whisker" d="M{_LABEL + low:.1f} {y + 11:g}H{_LABEL + high:.1f}'
                f'M{_LABEL + low:.1f} {y + 7:g}v8M{_LABEL + high:.1f} {y + 7:g}v8"/>'
            )
        out.append(
            f"<g>{_tip(row.tip)}{words(_LABEL - 10, y + 15, row.label, anchor='end')}"
            + _rect(_LABEL, y + 3, width, 16, f'rx="2" fill="{HUES[row.hue % 8]}"')
            + f"{whisker}{words(_LABEL + end + 8, y + 15, row.shown, kind='quiet')}</g>"
        )
    height = top + len(rows) * _ROW + 4
    if limit:
        x = _LABEL + limit[0] / most * room
        anchor = "end" if x > WIDTH - 160 else "start" if x < _LABEL + 60 else "middle"
        # First, so that it lies behind the values.
        out.insert(0, f'<path class="hadal-limit" d="M{x:.1f} 18V{height - 2:g}"/>')
        out.append(words(x, 13, limit[1], anchor=anchor, kind="strong"))
    return frame(height, "".join(out), title)


def decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis from low to high: powers of ten, with 2 and 5 where there are few."""
    first, last = floor(log10(low)), ceil(log10(high))
    steps = (1, 2, 5) if log10(high / low) <= 3.5 else (1,)
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in steps]
    return [tick for tick in ticks if low <= tick * 1.0001 and tick <= high * 1.0001]


def short(value: float) -> str:
    """A number in few signs: 0.5, 20, 1.5k, 3M."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def log_lines(
    series: Sequence[tuple[str, Sequence[Point]]], title: str, x_name: str, y_name: str, height: float = 300
) -> str:
    """Lines over two logarithmic axes. Values must be positive."""
    points = [p for _, line in series for p in line]
    left, right, top, bottom = 62.0, WIDTH - 150.0, 14.0, height - 46
    x0, x1 = min(p.x for p in points), max(p.x for p in points)
    y0, y1 = min(p.y for p in points) * 0.85, max(p.y for p in points) * 1.18
    x1 = x1 if x1 > x0 else x0 * 2

    def at(p: Point) -> tuple[float, float]:
        across = log10(p.x / x0) / log10(x1 / x0)
        return left + across * (right - left), bottom - log10(p.y / y0) / log10(y1 / y0) * (bottom - top)

    out = []
    for tick in decades(y0, y1):
        y = at(Point(x0, tick))[1]
        out.append(f'<path class="hadal-grid" d="M{left:g} {y:.1f}H{right:g}"/>')
        out.append(words(left - 8, y + 4, short(tick), anchor="end", kind="quiet"))
    xs = sorted({p.x for p in points})
    last = -1e9
    for tick in xs:
        x = at(Point(tick, y0))[0]
        if x - last >= 38:
            out.append(f'<path class="hadal-grid" d="M{x:.1f} {top:g}V{bottom:g}"/>')
            out.append(words(x, bottom + 17, short(tick), anchor="middle", kind="quiet"))
            last = x
    ends: list[tuple[float, float, str, int]] = []
    for i, (name, line) in enumerate(series):
        places = [at(p) for p in line]
        path = "".join(f"{'ML'[k > 0]}{x:.1f} {y:.1f}" for k, (x, y) in enumerate(places))
        out.append(f'<path class="hadal-line" d="{path}" stroke="{HUES[i]}"/>')
        for p, (x, y) in zip(line, places, strict=True):
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{HUES[i]}">{_tip(p.tip)}</circle>')
        ends.append((*places[-1], name, i))
    for (_, _, name, i), spot in zip(ends, _spread([y for _, y, _, _ in ends], 16), strict=True):
        out.append(f'<circle cx="{right + 24:g}" cy="{spot - 4:.1f}" r="4" fill="{HUES[i]}"/>')
        out.append(words(right + 33, spot, name))
    out.append(words((left + right) / 2, height - 8, x_name, anchor="middle", kind="quiet"))
    out.append(words(14, (top + bottom) / 2, y_name, anchor="middle", kind="quiet", turn=-90))
    return frame(height, "".join(out), title)


def _spread(places: Sequence[float], least: float) -> list[float]:
    """The places in their order, moved so that neighbours are `least` apart."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = [p + 4 for p in places]
    for a, b in pairwise(order):
        found[b] = max(found[b], found[a] + least)
    return found


def scatter(points: Sequence[Point], title: str, x_name: str, y_name: str, height: float = 440) -> str:
    """Labelled points on axes of one scale; their numbers mean nothing by themselves and are not written."""
    left, right, top, bottom = 34.0, WIDTH - 20.0, 12.0, height - 30
    xs, ys = [p.x for p in points], [p.y for p in points]
    span = max(max(xs) - min(xs), (max(ys) - min(ys)) * (right - left) / (bottom - top), 1e-12) * 1.16
    scale = (right - left) / span
    mid_x, mid_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    out = [_rect(left, top, right - left, bottom - top, 'class="hadal-frame" rx="6"')]
    taken: list[tuple[float, float, float, float]] = []
    spots = []
    for p in points:
        x, y = (left + right) / 2 + (p.x - mid_x) * scale, (top + bottom) / 2 - (p.y - mid_y) * scale
        spots.append((x, y))
        taken.append((x - 5, y - 5, x + 5, y + 5))
    for p, (x, y) in zip(points, spots, strict=True):
        out.append(
            f'<g><circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{HUES[p.hue % 8]}">{_tip(p.tip)}</circle>'
        )
        wide = 6.6 * len(p.label) + 4
        for dx, dy, anchor in ((9, 4, "start"), (-9, 4, "end"), (0, -9, "middle"), (0, 17, "middle")):
            begin = x + dx - (0 if anchor == "start" else wide if anchor == "end" else wide / 2)
            box = (begin, y + dy - 10, begin + wide, y + dy + 3)
            if box[0] > left and box[2] < right and box[1] > top and not any(_meet(box, b) for b in taken):
                taken.append(box)  # a label that finds no room is left to the mouse
                out.append(words(x + dx, y + dy, p.label, anchor=anchor))
                break
        out.append("</g>")
    out.append(words((left + right) / 2, height - 8, x_name, anchor="middle", kind="quiet"))
    out.append(words(18, (top + bottom) / 2, y_name, anchor="middle", kind="quiet", turn=-90))
    return frame(height, "".join(out), title)


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def heat(
    rows: Sequence[str], columns: int, values: Sequence[Sequence[float]], tips: Sequence[Sequence[str]],
    title: str, x_name: str,
) -> str:  # fmt: skip
    """A cell for each value (0: empty, 1: full). Columns are numbered from 0."""
    left, top = 120.0, 8.0
    wide = (WIDTH - left - 10) / max(1, columns)
    high = 18.0 if len(rows) <= 60 else 8.0
    out = []
    for r, name in enumerate(rows):
        y = top + r * high
        if high >= 12 or r % 4 == 0:
            out.append(words(left - 8, y + high - 4, name, anchor="end", kind="cell"))
        out.append(_rect(left, y, columns * wide, high - 1, 'class="hadal-cell"'))
        for c, value in enumerate(values[r]):
            if value > 0:
                full = f'fill="var(--hadal-a)" fill-opacity="{0.15 + 0.85 * min(1.0, value):.2f}"'
                out.append(_rect(left + c * wide, y, max(wide - 0.6, 0.8), high - 1, full, tips[r][c]))
    bottom = top + len(rows) * high
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 10**6) if n * wide >= 26)
    for c in range(0, columns, every):
        out.append(words(left + (c + 0.5) * wide, bottom + 14, str(c), anchor="middle", kind="quiet"))
    out.append(words(left + columns * wide / 2, bottom + 32, x_name, anchor="middle", kind="quiet"))
    return frame(bottom + 40, "".join(out), title)
