"""Rewards that misbehave, each in its own way; called in worker processes by their names."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hadal.post.rewards import Completion, Score


def length(completion: Completion, scale: float = 10.0) -> tuple[float, dict[str, Any]]:
    print("a reward may print")
    return min(1.0, completion.tokens / scale), {"tokens": completion.tokens}


def raises(completion: Completion) -> float:
    raise ValueError("no such luck")


def leaves(completion: Completion) -> float:
    sys.exit(0)


def hangs(completion: Completion) -> float:
    if folder := completion.record.get("folder"):
        (Path(folder) / f"{os.getpid()}.pid").touch()
    while True:
        time.sleep(1)


def hangs_in_c(completion: Completion) -> float:
    """One operation of the interpreter, deaf to signals and holding its lock."""
    return float(len(str(9**9**8)))


def dies(completion: Completion) -> float:
    os._exit(3)


def crashes(completion: Completion) -> float:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0


def eats_memory(completion: Completion) -> float:
    return float(len(bytearray(64 << 30)))


def forks(completion: Completion) -> float:
    """Both processes come back."""
    os.fork()
    return 1.0


def forks_away(completion: Completion) -> float:
    """A grandchild in a session of its own, whose parent is gone."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            (Path(completion.record["folder"]) / f"{os.getpid()}.pid").touch()
            time.sleep(60)
        os._exit(0)
    os.wait()
    folder = Path(completion.record["folder"])
    while not list(folder.glob("*.pid")):
        time.sleep(0.005)
    return 1.0


def asks_a_program(completion: Completion) -> float:
    """Children that are waited for are no fault."""
    return float(subprocess.run(["true"], check=False).returncode == 0)


def gives_nan(completion: Completion) -> float:
    return math.nan


def gives_too_much(completion: Completion) -> Score:
    return Score(2.0)


def gives_text(completion: Completion) -> Any:
    return "one"


def gives_words(completion: Completion) -> Any:
    return 1.0, "because"


def gives_a_flood(completion: Completion) -> tuple[float, dict[str, Any]]:
    return 1.0, {"text": "x" * (4 << 20)}


def tells_the_environment(completion: Completion) -> tuple[float, dict[str, Any]]:
    return 1.0, dict(os.environ)


def opens_a_socket(completion: Completion) -> float:
    socket.socket().close()
    return 1.0
