"""What the machine can do, measured: bytes a second of memory, operations a second of matrix products.

Bandwidth is the best of three plain loops over buffers far larger than any cache, as decoding could not do
better: *copy* (a read and a write counted), *triad* (a = b + s·c: two reads and a write) and *read* (a sum).
Matrix products are timed in each number format; formats that torch cannot multiply here are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

BUDGET_S = 0.25  # a measurement's time, after a warm-up call
CPU_BYTES, GPU_BYTES = 1 << 28, 1 << 30  # a buffer's size


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_time(work: Callable[[], object], device: torch.device, budget_s: float | None = None) -> float:
    """Seconds of the fastest call of `work` within about `budget_s` (0: one call), after a warm-up.

    On a GPU several calls are timed together once one takes less than 100 µs, so that waiting counts little.
    """
    work()
    synchronise(device)
    calls, best, spent = 1, float("inf"), 0.0
    limit = BUDGET_S if budget_s is None else budget_s
    while spent < limit or best == float("inf"):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronise(device)
        took = time.perf_counter() - start
        best, spent = min(best, took / calls), spent + took
        if device.type == "cuda" and took / calls < 1e-4:
            calls = min(64, calls * 2)
    return best


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second (`copy`, `triad`, `read`); operations a second by format (`matmul`)."""

    copy: float
    triad: float
    read: float
    matmul: dict[str, float] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """The best of the three loops."""
        return max(self.copy, self.triad, self.read)

    def best(self, other: Ceilings) -> Ceilings:
        """The better of two measurements in everything: neighbours can only lower one."""
        return Ceilings(
            max(self.copy, other.copy),
            max(self.triad, other.triad),
            max(self.read, other.read),
            {name: max(rate, other.matmul[name]) for name, rate in self.matmul.items()},
        )

    def matmul_for(self, dtype: torch.dtype, quantize: str | None = None) -> float:
        """The best rate that a prefill could use: in its own format, FP32 (wider), or what its weights are
        kept in (8 bits for INT4 too: no processor multiplies four)."""
        names = ["float32", str(dtype).removeprefix("torch.")]
        if quantize is not None:
            names += ["bfloat16", "fp8" if quantize == "fp8" else "int8"]
        return max(self.matmul[name] for name in names if name in self.matmul)


def measure(device: torch.device) -> Ceilings:
    """All ceilings of a device, the better of two rounds; some seconds."""
    return _once(device).best(_once(device))


def _once(device: torch.device) -> Ceilings:
    bandwidths = copy_bandwidth(device), triad_bandwidth(device), read_bandwidth(device)
    return Ceilings(*bandwidths, matmuls(device))


def _buffer(device: torch.device, nbytes: int | None) -> Tensor:
    """FP32 ones; by default large, on a CPU at most a 32nd of the free memory."""
    if nbytes is None and device.type == "cpu":
        from hadal.engine.host import host_memory

        nbytes = max(1 << 24, min(CPU_BYTES, host_memory()[1] // 32))
    return torch.ones((nbytes or GPU_BYTES) // 4, dtype=torch.float32, device=device)


def copy_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes a second that a large copy reads and writes together."""
    source = _buffer(device, nbytes)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_time(lambda: target.copy_(source), device)


def triad_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes a second of a = b + s·c."""
    b, c = _buffer(device, nbytes), _buffer(device, nbytes)
    out = torch.empty_like(b)
    return 3 * b.nbytes / best_time(lambda: torch.add(b, c, alpha=3.0, out=out), device)


def read_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes a second that a sum reads."""
    source = _buffer(device, nbytes)
    return source.nbytes / best_time(lambda: source.sum(), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large square product in `dtype`."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=torch.float32, device=device).to(dtype)
    b = a.clone()
    return 2 * n**3 / best_time(lambda: a @ b, device)


def _int8_rate(device: torch.device) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=torch.int8, device=device)
    b = a.clone().t()
    return 2 * n**3 / best_time(lambda: torch._int_mm(a, b), device)


def _fp8_rate(device: torch.device) -> float:
    n = 8192
    a = torch.ones(n, n, dtype=torch.float32, device=device).to(torch.float8_e4m3fn)
    b = a.clone().t()
    one = torch.ones((), dtype=torch.float32, device=device)
    return 2 * n**3 / best_time(lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16), device)


def matmuls(device: torch.device) -> dict[str, float]:
    """FLOP (or integer operations) a second of the formats that torch multiplies on this device."""
    rates = {name: matmul_rate(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    rates["int8"] = _int8_rate(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        rates["fp8"] = _fp8_rate(device)
    return rates
