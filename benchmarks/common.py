"""What every race shares: the machine's description, result files, shapes, medians."""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import psutil
import torch

from hadal.cli.machine import cpu, usable_cores
from hadal.config import Gqa, Mla, ModelConfig, Moe, Rope, preset

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"


def shapes() -> dict[str, ModelConfig]:
    """Models raced, with random weights: their shapes are what counts."""
    return {
        "hadal-mini": preset("hadal-mini").config,
        "ds-410m": ModelConfig(  # the V3 architecture: 410M parameters, 134M a token
            "deepseek_v3", 32768, 1024, 3072, 12, 8, Mla(512, 512, 128, 64, 128), Rope(1e4),
            Moe(32, 1, 4, 256, 1, 1, "sigmoid", "noaux_tc", 1, 1, True, 1.0),
            max_position_embeddings=4096, bos_token_id=0, eos_token_id=(1,),
        ),
        "qwen-0.5b": ModelConfig(
            "qwen2", 151936, 896, 4864, 24, 14, Gqa(2, 64, True), Rope(1e6), tie_word_embeddings=True,
            max_position_embeddings=4096, bos_token_id=1, eos_token_id=(2,),
        ),
        "qwen-1.5b": preset("deepseek-r1-distill-qwen-1.5b").config,
        "v2-lite": preset("deepseek-v2-lite").config,
    }  # fmt: skip


def machine(device: str) -> dict[str, Any]:
    """Processor, card, threads and versions, as they go into a result."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu().name,
        "cores": usable_cores(),
    }
    for name in ("transformers", "triton"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = None
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def save(name: str, result: dict[str, Any], folder: str | None = None) -> Path:
    """Write a result as JSON, and say where."""
    path = Path(folder) if folder else RESULTS
    path.mkdir(parents=True, exist_ok=True)
    file = path / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {file}")
    return file


class Neighbours:
    """What other processes take of the processor: the cores that were busy, less our own processes' share."""

    LIMIT = 0.4  # cores; more spoils a measurement on all cores

    def __init__(self, pids: list[int]) -> None:
        self.own = [psutil.Process(pid) for pid in pids]
        self.mark()

    def _times(self) -> tuple[float, float]:
        t = psutil.cpu_times()
        busy = t.user + t.nice + t.system + t.irq + t.softirq + t.steal
        mine = [p.cpu_times() for p in self.own]
        return time.perf_counter(), busy - sum(m.user + m.system for m in mine)

    def mark(self) -> None:
        """Begin to count."""
        self.since, self.before = self._times()

    def cores(self) -> float:
        """Cores that others kept busy since the mark, on average."""
        now, busy = self._times()
        return (busy - self.before) / max(now - self.since, 1e-9)

    def undisturbed(self, work: Callable[[], T], patience_s: float) -> tuple[T, float]:
        """The result of `work` and the cores that others used meanwhile. While that is too much, it waits for
        half a quiet second and tries again, for `patience_s` at most; then the quietest try counts."""
        until = time.monotonic() + patience_s
        best: tuple[T, float] | None = None
        while True:
            self.mark()
            result = work()
            cores = self.cores()
            if best is None or cores < best[1]:
                best = result, cores
            if cores <= self.LIMIT or time.monotonic() >= until:
                return best
            while time.monotonic() < until:
                self.mark()
                time.sleep(0.5)
                if self.cores() <= self.LIMIT:
                    break


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}
