"""What this machine is and what it can do: processor, memory, accelerator, and two measured ceilings.

Decoding one token reads every active weight and the cache once, so its ceiling is *memory bandwidth*; prefill
is bound by *matrix products*. Both are measured here by a fraction of a second of work, and kept in
`$XDG_CACHE_HOME/hadal/machine.json` under the device, thread count and torch version.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KEEP_DAYS = 30
# The processor features that a kernel somewhere asks for.
CPU_FEATURES = tuple(
    "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_int8 "  # x86
    "asimd asimddp i8mm bf16 sve".split()  # ARM
)


def cache_folder() -> Path:
    """Where Hadal keeps its own small files: `$XDG_CACHE_HOME/hadal`, by default `~/.cache/hadal`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hadal"


def write_private(path: Path, text: str) -> None:
    """Write whole or not at all (a temporary file, then a rename), readable by the owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


@dataclass(frozen=True)
class Cpu:
    """The processor: its name, the cores that this process may use, and the features that kernels ask for."""

    name: str
    cores: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory, less where a container (cgroup) allows less."""

    total: int
    available: int


@dataclass(frozen=True)
class Gpu:
    """An accelerator as torch sees it; bytes of memory."""

    name: str
    capability: str
    total: int
    free: int


def cpu() -> Cpu:
    """Reads /proc/cpuinfo where there is one."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    return Cpu(name, usable_cores(), tuple(f for f in CPU_FEATURES if f in flags))


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, not the machine's total."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> Memory:
    """Main memory that this process may have: the machine's, or its container's limit if less."""
    from hadal.engine.host import host_memory

    return Memory(*host_memory())


def gpus() -> list[Gpu]:
    """The CUDA devices that torch can use; empty without any (and then torch is not even imported)."""
    if not any(any(Path("/dev").glob(pattern)) for pattern in ("nvidia[0-9]*", "dxg", "kfd")):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(of.name, f"sm_{of.major}{of.minor}", int(total), int(free)))
    return found


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes together, on this device and thread count."""
    from hadal.bench.ceilings import copy_bandwidth

    return copy_bandwidth(device)


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large square matrix product in `dtype`."""
    from hadal.bench.ceilings import matmul_rate

    return matmul_rate(device, dtype)


def _key(device: torch.device, what: str) -> str:
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu().name} x{torch.get_num_threads()}"
    return f"{what} | {platform.node()} | {name} | torch {torch.__version__}"


def _recorded(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _ceiling(device: torch.device, what: str, measure: Any, fresh: bool) -> float:
    path, key = cache_folder() / "machine.json", _key(device, what)
    entry = _recorded(path).get(key)
    if not fresh and isinstance(entry, dict) and time.time() - float(entry.get("at", 0)) < KEEP_DAYS * 86400:
        return float(entry["value"])
    value = float(measure())
    with contextlib.suppress(OSError):  # a read-only home only means measuring again next time
        record = {**_recorded(path), key: {"value": value, "at": time.time()}}
        write_private(path, json.dumps(record, indent=1))
    return value


def bandwidth(device: torch.device, *, fresh: bool = False) -> float:
    """Measured memory bandwidth of the device in bytes per second; from the record unless `fresh`."""
    return _ceiling(device, "copy", lambda: measure_bandwidth(device), fresh)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, fresh: bool = False) -> float:
    """Measured rate of matrix products in FLOP per second; from the record unless `fresh`."""
    return _ceiling(device, f"matmul {dtype}", lambda: measure_matmul(device, dtype), fresh)


def summary() -> dict[str, Any]:
    """The machine as data, without its ceilings."""
    return {"cpu": asdict(cpu()), "memory": asdict(memory()), "gpus": [asdict(g) for g in gpus()]}
