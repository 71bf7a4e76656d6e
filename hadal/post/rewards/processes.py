"""Ending processes for good: a process, its group, and what it has started wherever that went."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time


def parents() -> dict[int, int]:
    """The parent of every process of this machine, by process id."""
    if not os.path.isdir("/proc/self"):
        import psutil

        return {one.pid: one.info["ppid"] for one in psutil.process_iter(["ppid"])}
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # pid (name, which may hold anything) state parent …
                found[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    return found


def descendants(pid: int) -> list[int]:
    """Process ids of all that descends from `pid`, as far as the chain of parents is whole."""
    family, table = {pid}, parents()
    while grown := {child for child, parent in table.items() if parent in family} - family:
        family |= grown
    return sorted(family - {pid})


def reap() -> int | None:
    """Take leave of a child that has ended: its process id, 0 if all still run, None if there is none."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return None


def end_children(seconds: float = 5.0) -> int:
    """Kill and reap every descendant of this process, until none is left or the time is over. Returns how
    many were met, those that had ended unawaited among them: the count does not hang on who was faster. A
    process that has called `adopt_orphans` misses none."""
    met: set[int] = set()
    limit = time.monotonic() + seconds
    while (ended := reap()) is not None and time.monotonic() < limit:
        met |= {ended} - {0}
        found = descendants(os.getpid())
        met.update(found)
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0 if ended else 0.002)
    return len(met)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads its group, its descendants and the group; wait for it. It is killed whatever
    happens here, Ctrl-C included."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)  # it starts no more
            for _ in range(20):
                found = descendants(process.pid)
                for pid in found:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
                if not found:
                    break
                time.sleep(0.002)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
