"""Which servers run on this machine: each leaves a small JSON file while it lives, named by its process.

Files are under `$XDG_CACHE_HOME/hadal/servers`; one whose process has ended is taken away by the next reader.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hadal.cli.machine import cache_folder, write_private


@dataclass(frozen=True)
class Server:
    """A server process; `born`, its start time, tells it from a later process with the same number."""

    pid: int
    born: float
    url: str
    model: str
    started: float


def _folder() -> Path:
    return cache_folder() / "servers"


def _born(pid: int) -> float | None:
    """Start time of a living process in seconds of the epoch; None if there is none."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


@contextlib.contextmanager
def registered(url: str, model: str) -> Iterator[None]:
    """Within, `hadal ps` and `hadal chat` find this process's server."""
    pid = os.getpid()
    entry = Server(pid, _born(pid) or 0.0, url, model, time.time())
    path = _folder() / f"{pid}.json"
    with contextlib.suppress(OSError):  # a read-only home: the server runs all the same, `ps` just lacks it
        write_private(path, json.dumps(asdict(entry)))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def running() -> list[Server]:
    """Living servers of this user, the newest first."""
    found = []
    for path in sorted(_folder().glob("*.json")):
        try:
            entry = Server(**json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            path.unlink(missing_ok=True)  # half-written or of another version
            continue
        born = _born(entry.pid)
        if born is None or abs(born - entry.born) > 1:
            path.unlink(missing_ok=True)
            continue
        found.append(entry)
    return sorted(found, key=lambda s: -s.started)
