"""What a run tells: metrics.jsonl, TensorBoard, and a live line.

One JSON object a line, with `kind`: "step" (losses, rates, balance), "load" (tokens per gate and expert
since the last one, for heat maps), "heldout", "heldout_ema", "accuracy", "spike", "checkpoint", "export",
"stop". Rates and times are wall-clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hadal.train.trainer import StepStats

Json = Mapping[str, Any]


class JsonLines:
    """An append-only file of JSON objects. Going on after a step first drops what was logged beyond it."""

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        kept: list[str] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                record = _parse(line)
                if record is not None and record.get("step", 0) <= after_step:
                    kept.append(line)
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Json) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _parse(line: str) -> dict[str, Any] | None:
    """A record, or None for a line that a dying process left unfinished."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


class Metrics:
    """All that a run reports. `folder` gets metrics.jsonl and, where wanted, a `tensorboard` folder."""

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        total_tokens: int,
        peak_flops: float,
        tensorboard: bool,
        after_step: int = 0,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(stderr=True)
        self._jsonl = JsonLines(folder / "metrics.jsonl", after_step=after_step)
        self._board = _board(folder / "tensorboard", after_step, self.console) if tensorboard else None
        self._total_steps, self._total_tokens, self._peak = total_steps, total_tokens, peak_flops
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        if self.console.is_terminal:
            self._live.start()
        self.heldout_loss: float | None = None
        self.accuracy: float | None = None
        self.rates: list[float] = []  # tokens/s of every logged stretch
        self._since, self._tokens, self._flops = time.perf_counter(), 0, 0.0

    def worked(self, tokens: int, flops: float) -> None:
        """Count a step's work towards the rates."""
        self._tokens += tokens
        self._flops += flops

    def restart_clock(self) -> None:
        """After something that is not training (evaluation, checkpoint, export): rates are those of
        training."""
        self._since, self._tokens, self._flops = time.perf_counter(), 0, 0.0

    def step(self, stats: StepStats, *, load: list[list[int]] | None = None) -> None:
        """Log one step with the rates since the last call."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rate, mfu = self._tokens / seconds, self._flops / seconds / self._peak
        if self._tokens:
            self.rates.append(rate)
        self.restart_clock()
        record: dict[str, Any] = {
            "kind": "step",
            "step": stats.step,
            "tokens": stats.tokens,
            "loss": stats.loss,
            "mtp_loss": stats.mtp_loss,
            "balance_loss": stats.balance_loss,
            "grad_norm": stats.grad_norm,
            "max_violation": stats.max_violation,
            "max_violation_worst": stats.max_violation_worst,
            "learning_rate": stats.knobs.learning_rate,
            "bias_speed": stats.knobs.bias_speed,
            "mtp_weight": stats.knobs.mtp_weight,
            "tokens_per_second": rate,
            "mfu": mfu,
        }
        self._jsonl.write(record)
        self._curves(
            stats.step, {k: v for k, v in record.items() if k not in ("kind", "step", "tokens")}, "train"
        )
        if load:
            self._jsonl.write({"kind": "load", "step": stats.step, "load": load})
        self._line(self._describe(stats, rate, mfu))

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Log something that happened: a held-out loss, a checkpoint, an export, a stop."""
        self._jsonl.write({"kind": kind, "step": step, **values})
        self._curves(step, dict(_numbers(values)), kind)
        if kind == "heldout":
            self.heldout_loss = values["loss"]
        if kind == "accuracy":
            self.accuracy = values["accuracy"]
        plain = {k: v for k, v in values.items() if not isinstance(v, Mapping)}
        self.say(f"step {step}: {kind} " + " ".join(f"{k}={_short(v)}" for k, v in plain.items()))
        for name, table in values.items():
            if isinstance(table, Mapping) and table:
                self.say(f"  {name}: " + ", ".join(f"{k} {_of_table(v)}" for k, v in table.items()))

    def say(self, text: str) -> None:
        """A line that stays above the live one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()
        self._jsonl.close()
        if self._board is not None:
            self._board.close()

    def _describe(self, stats: StepStats, rate: float, mfu: float) -> str:
        left = max(0, self._total_tokens - stats.tokens) / rate if rate else 0.0
        held = f" mtp {stats.mtp_loss:.4f}" if stats.mtp_loss else ""  # none without an MTP module
        held += f" heldout {self.heldout_loss:.4f}" if self.heldout_loss is not None else ""
        held += f" accuracy {self.accuracy:.1%}" if self.accuracy is not None else ""
        return (
            f"step {stats.step}/{self._total_steps} loss {stats.loss:.4f}{held} "
            f"| {rate:,.0f} tok/s MFU {mfu:.1%} | MaxVio {stats.max_violation:.2f} "
            f"grad {stats.grad_norm:.2f} lr {stats.knobs.learning_rate:.2e} | {_duration(left)} left"
        )

    def _line(self, text: str) -> None:
        if self.console.is_terminal:
            self._live.update(Text(text))
        else:
            self.say(text)

    def _curves(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{prefix}/{name}", value, step)


def _board(folder: Path, after_step: int, console: Console) -> Any:
    """A TensorBoard writer, or None and a word about it where the extra is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("no TensorBoard curves: pip install 'hadal[train]' (metrics.jsonl has everything)")
        return None
    return SummaryWriter(str(folder), purge_step=after_step + 1)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _numbers(values: Json, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record, those of its tables as "table/key"."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{key}/")
        elif isinstance(value, int | float):
            yield path + key, value


def _short(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _of_table(value: object) -> str:
    """A share, or the loss and bits per byte of a domain, and the share of documents without a fault where
    there are such."""
    if not isinstance(value, Mapping):
        return f"{value:.0%}" if isinstance(value, float) else str(value)
    bits, exact = value.get("bits_per_byte"), value.get("exact")
    more = [f"{bits:.3f} bits/byte"] if bits is not None else []
    more += [f"{exact:.0%} exact"] if exact else []
    return f"{value['loss']:.3f}" + (f" ({', '.join(more)})" if more else "")
