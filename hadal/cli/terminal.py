"""What the verbs print with: results to stdout, the rest to stderr, colour only on a terminal.

An answer, a table or JSON goes to stdout, so that it can be piped; progress, rates and errors go to stderr.
Rich is imported on first use: `hadal --help` does without it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

BAR_AFTER_S = 2.0  # what takes less needs no bar
DIM, BOLD, RED, CYAN, OFF = "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[36m", "\x1b[0m"


class CliError(Exception):
    """A fault: one line (cause, value, remedy), and the exit status: 1, or 2 for misuse."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def is_terminal(stream: IO[str]) -> bool:
    """True where a person looks on; a closed stream is none."""
    try:
        return stream.isatty()
    except ValueError:
        return False


def has_colour(stream: IO[str]) -> bool:
    """Escape sequences only on a terminal, and never with NO_COLOR set (no-color.org) or TERM=dumb."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, stream: IO[str] | None = None) -> str:
    """`text` in `style` where the stream takes colour, else as it is."""
    return f"{style}{text}{OFF}" if text and has_colour(stream or sys.stdout) else text


def say(text: str = "") -> None:
    """One line of result, to stdout."""
    print(text, flush=True)


def note(text: str = "") -> None:
    """One line beside the result (a rate, a hint), dim, to stderr."""
    print(paint(text, DIM, sys.stderr), file=sys.stderr, flush=True)


def error_line(message: str) -> None:
    """`hadal: ` and the fault, on exactly one line of stderr."""
    line = " ".join(message.split()) or "unknown error"
    print(paint("hadal: ", RED, sys.stderr) + line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document to stdout; NaN and infinities become null, since JSON has none."""
    print(json.dumps(_finite(value), ensure_ascii=False, indent=2), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> None:
    """Columns as wide as their widest cell, two spaces apart; those in `right` align to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *cells]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        columns = enumerate(zip(row, widths, strict=True))
        return "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in columns).rstrip()

    say(paint(line(header), BOLD))
    for row in cells:
        say(line(row))


def fields(pairs: Iterable[tuple[str, object]]) -> None:
    """Name and value on a line each, the values in one column; pairs whose value is None are left out."""
    kept = [(name, value) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in kept), default=0)
    for name, value in kept:
        say(f"{paint(name.ljust(width), CYAN)}  {value}")


def human_bytes(n: float) -> str:
    """1,342,000,000,000 -> '1.34 TB' (decimal units, as drives and datasheets count)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}" if n < 1000 else f"{n:,.0f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def human_count(n: float) -> str:
    """671,026,419,200 -> '671.0B'."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return f"{n:.0f}"


def human_seconds(s: float) -> str:
    """0.0123 -> '12 ms', 75 -> '1 min 15 s'."""
    if s < 1:
        return f"{s * 1000:.0f} ms"
    if s < 60:
        return f"{s:.1f} s"
    if s < 3600:
        return f"{int(s // 60)} min {int(s % 60)} s"
    return f"{int(s // 3600)} h {int(s % 3600 // 60)} min"


@dataclass
class Bar:
    """A progress bar that appears after two seconds; a line every ten seconds where there is no terminal."""

    title: str
    unit_bytes: bool = True
    quiet: bool = False
    _start: float = field(default_factory=lambda: time.monotonic())
    _last_line: float = field(default_factory=lambda: time.monotonic())
    _progress: Progress | None = None
    _task: Any = None

    def update(self, done: float, total: float | None = None, title: str | None = None) -> None:
        """`done` of `total` (None: unknown) so far, in bytes or items."""
        now = time.monotonic()
        self.title = title or self.title
        if self.quiet or now - self._start < BAR_AFTER_S:
            return
        if is_terminal(sys.stderr):
            self._draw(done, total)
        elif now - self._last_line >= 10:
            self._last_line = now
            shown = human_bytes if self.unit_bytes else human_count
            of = f" of {shown(total)} ({100 * done / total:.0f}%)" if total else ""
            note(f"{self.title}: {shown(done)}{of}")

    def _draw(self, done: float, total: float | None) -> None:
        if self._progress is None:
            from rich import progress as p
            from rich.console import Console

            amounts = (
                (p.DownloadColumn(), p.TransferSpeedColumn())
                if self.unit_bytes
                else (p.MofNCompleteColumn(),)
            )
            columns = (p.TextColumn("{task.description}"), p.BarColumn(), *amounts, p.TimeRemainingColumn())
            self._progress = p.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task(self.title, total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total, description=self.title)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def bar(title: str, *, unit_bytes: bool = True, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """`with bar("loading") as update: update(done, total)`."""
    shown = Bar(title, unit_bytes, quiet)
    try:
        yield shown.update
    finally:
        shown.close()
