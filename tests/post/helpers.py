"""What the tests of rewards share."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import psutil

from hadal.post.rewards import Completion, Rewards, Total, read


def said(text: str, *, tokens: int = 1, cut: bool = False, opened: bool = False, **record: Any) -> Completion:
    """A completion of a record with these fields."""
    return Completion(record, text, tokens, "length" if cut else "stop", opened)


def one(table: dict[str, Any], completion: Completion) -> Total:
    """The total of one completion under one table, in this process alone."""
    with Rewards(read([table])) as rewards:
        return rewards.score([completion])[0]


def children() -> list[int]:
    """Processes that descend from this one, but for Python's own, which stays once a test has needed it."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "from multiprocessing.resource_tracker import" not in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def alive(folder: Path) -> list[int]:
    """Processes that have left a file PID.pid in a folder and still run."""
    found = []
    for path in folder.glob("*.pid"):
        try:
            if psutil.Process(int(path.stem)).status() != psutil.STATUS_ZOMBIE:
                found.append(int(path.stem))
        except psutil.NoSuchProcess:
            continue
    return found


def gone_within(folder: Path, seconds: float) -> bool:
    """Whether all of them end in this time."""
    limit = time.monotonic() + seconds
    while alive(folder) and time.monotonic() < limit:
        time.sleep(0.02)
    return not alive(folder)
