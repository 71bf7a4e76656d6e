"""What every race shares: the machine's description, result files, shapes, medians."""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hadal.cli.machine import cpu, usable_cores
from hadal.config import Gqa, Mla, ModelConfig, Moe, Rope, preset

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


def clock(device: str, cpu_time: bool = False) -> Callable[[], float]:
    """Seconds; on CUDA when the device is done. `cpu_time`: of this process's work instead of the wall, which
    is what one thread on a busy machine can be judged by."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if cpu_time else time.perf_counter()

    return now


class Timed:
    """A function that adds up the time spent in it."""

    def __init__(self, function: Callable[..., Any], now: Callable[[], float]) -> None:
        self.function, self.now, self.seconds = function, now, 0.0

    def __call__(self, *args: Any, **rest: Any) -> Any:
        begin = self.now()
        try:
            return self.function(*args, **rest)
        finally:
            self.seconds += self.now() - begin

    def take(self) -> float:
        """What has added up since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def save(name: str, result: dict[str, Any], folder: str | None = None) -> Path:
    """Write a result as JSON, and say where."""
    path = Path(folder) if folder else RESULTS
    path.mkdir(parents=True, exist_ok=True)
    file = path / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {file}")
    return file


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}
