"""How much main memory this process may have: the machine's, or its container's (cgroup's) limit if less."""

from __future__ import annotations

from pathlib import Path

import psutil

# (limit, used) of control groups, versions 2 and 1; without a limit the first is "max", or absurdly large.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def host_memory() -> tuple[int, int]:
    """(total, available) bytes."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit_file, used_file in CGROUPS:
        try:
            limit, used = int(Path(limit_file).read_text("ascii")), int(Path(used_file).read_text("ascii"))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if limit < total:
            total, available = limit, min(available, max(0, limit - used))
    return total, available
