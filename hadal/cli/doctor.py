"""`hadal doctor`: what this machine has, which path each operation takes here, and why."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli.terminal import BOLD, fields, human_bytes, paint, print_json, say, table


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure memory bandwidth and matrix products.")
    ] = True,
    json: o.Json = False,
) -> None:
    """Say what this machine has, and which fast paths it takes.

    For each operation: the path taken here, and why. Paste it into a bug report: it holds no
    keys, and of your files only where the cache is.

    Examples:
        hadal doctor
        hadal doctor --json > machine.json
        hadal doctor --no-measure
    """
    found = examine(measure=measure)
    if json:
        print_json(found)
        return
    _print(found)


def examine(*, measure: bool) -> dict[str, Any]:
    """All that the doctor knows, as data."""
    import torch

    from hadal import ops
    from hadal.cli import machine
    from hadal.cli.version import versions
    from hadal.weights import hub

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = hub.cache_dir()
    ceilings: dict[str, Any] = {}
    if measure:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        ceilings = {
            "memory_bandwidth_bytes_per_s": machine.bandwidth(device, fresh=True),
            "matmul_flop_per_s": machine.matmul_rate(device, dtype, fresh=True),
            "matmul_dtype": str(dtype).removeprefix("torch."),
        }
    return {
        "versions": versions(),
        "torch": {
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "default_device": device.type,
        },
        **machine.summary(),
        "ceilings": ceilings,
        "cache": {
            "downloads": str(folder),
            "free_bytes": machine.free_disk(folder),
            "own_files": str(machine.cache_folder()),
            "offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
        },
        "operations": [
            {"operation": operation, "path": path, "reason": reason}
            for operation, path, reason in ops.paths()
        ],
        "advice": advice(),
    }


def advice() -> list[str]:
    """What the owner of this machine could do for more speed or less trouble."""
    import torch

    from hadal.cli import machine

    found = []
    threads, cores = torch.get_num_threads(), machine.usable_cores()
    if threads > cores:
        found.append(f"torch uses {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}")
    if Path("/proc/driver/nvidia").exists() and not torch.cuda.is_available():
        found.append("an NVIDIA driver is here, but this torch cannot use it: install a CUDA build of torch")
    if sys.platform == "linux" and torch.version.cuda and not torch.cuda.is_available():
        found.append(
            "torch's CUDA build without a GPU wastes disk: HADAL_TORCH_INDEX in the Makefile gives the CPU's"
        )
    if machine.memory().available < 1 << 30:
        found.append("less than 1 GiB of memory is free: close something before loading a model")
    return found


def _print(found: dict[str, Any]) -> None:
    cpu, memory, torch_facts = found["cpu"], found["memory"], found["torch"]
    say(paint("This machine", BOLD))
    pairs: list[tuple[str, object]] = [
        ("processor", f"{cpu['name']}, {cpu['cores']} cores, {torch_facts['threads']} threads used"),
        ("features", " ".join(cpu["features"]) or "none of those that kernels ask for"),
        ("memory", f"{human_bytes(memory['total'])}, {human_bytes(memory['available'])} available"),
    ]
    for gpu in found["gpus"]:
        sizes = f"{human_bytes(gpu['total'])}, {human_bytes(gpu['free'])} free"
        pairs.append(("accelerator", f"{gpu['name']} ({gpu['capability']}), {sizes}"))
    if not found["gpus"]:
        pairs.append(("accelerator", "none: everything runs on the processor"))
    ceilings = found["ceilings"]
    if ceilings:
        gigabytes, rate = ceilings["memory_bandwidth_bytes_per_s"] / 1e9, ceilings["matmul_flop_per_s"] / 1e9
        pairs.append(("bandwidth", f"{gigabytes:.1f} GB/s (copy, read and write together; measured now)"))
        pairs.append(("matmul", f"{rate:,.0f} GFLOP/s in {ceilings['matmul_dtype']} (measured now)"))
    cache = found["cache"]
    pairs.append(("downloads", f"{cache['downloads']}, {human_bytes(cache['free_bytes'])} free"))
    pairs.append(("offline", "yes (HF_HUB_OFFLINE)" if cache["offline"] else "no"))
    fields(pairs)
    say()
    say(paint("Versions", BOLD))
    fields((name, value or "not installed") for name, value in found["versions"].items())
    say()
    say(paint("Operations: the path taken here, and why", BOLD))
    table(
        ("OPERATION", "PATH", "WHY"), [(x["operation"], x["path"], x["reason"]) for x in found["operations"]]
    )
    for line in found["advice"]:
        say()
        say(f"{paint('Advice:', BOLD)} {line}")
