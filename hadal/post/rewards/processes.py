"""Ending processes for good: a process, its group, and what it has started wherever that went."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time


def descendants(pid: int) -> list[int]:
    """Process ids of all that descends from `pid`, as far as the chain of parents is whole."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


def has_children() -> bool:
    """Whether this process has a child, running or ended. One system call, mostly."""
    try:
        return os.waitpid(-1, os.WNOHANG) is not None
    except ChildProcessError:
        return False


def end_children(seconds: float = 5.0) -> int:
    """Kill and reap every descendant of this process, until none is left or the time is over. Returns how
    many were met. A process that has called `adopt_orphans` misses none."""
    met: set[int] = set()
    limit = time.monotonic() + seconds
    while has_children() and time.monotonic() < limit:
        found = descendants(os.getpid())
        met.update(found)
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return len(met)


def end(process: subprocess.Popen[bytes], *, leads_group: bool = True) -> None:
    """Kill a process that leads its group, the group, and its descendants; wait for the first."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            process.send_signal(signal.SIGSTOP)  # it starts no more
        for _ in range(20):
            found = descendants(process.pid)
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not found:
                break
            time.sleep(0.002)
    if leads_group:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
