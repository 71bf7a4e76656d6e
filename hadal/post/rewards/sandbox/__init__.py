"""A program that a model wrote, run where it can do no harm.

    outcome = run("print(1 + 1)", limits=Limits(seconds=2))      # outcome.status, outcome.stdout

Each program has a process, a session and a temporary folder of its own, an environment of a few fixed
variables, limits of the kernel on memory, CPU time and files, a limit on its output, and a wall clock. Then
there are two isolations:

    "seccomp"   Linux, no privilege needed: from its first line on, the program can open no file (for reading
                neither), no socket, start no process and no thread, signal nobody (sandbox/lock.py). Modules
                of the standard library that it names are imported before. The kernel holds this.
    "limits"    anywhere: only Python's own audit events hold the same, which code that wants out gets around.
                For programs that are trusted not to be hostile. Never taken unless asked for.

What no isolation holds: asserts that run in the same process as the program can be deceived by it (an object
that equals everything, a `check` replaced). Tests of input and output are compared outside.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import selectors
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hadal.post.rewards.processes import end

ISOLATIONS = ("seccomp", "limits")
_JAIL = Path(__file__).with_name("jail.py")
_MAX_REPORT = 8192
_START_SECONDS = 0.5  # for the interpreter


class SandboxError(RuntimeError):
    """The sandbox itself does not work on this machine; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """seconds: wall clock from the start of the program's process, its start-up allowed for; CPU time is
    bounded by the same, rounded up. memory_mib: address space. output_kib: of stdout and of stderr."""

    seconds: float = 5.0
    memory_mib: int = 512
    output_kib: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """status: "passed" (ran to its end), "failed" (raised), "left" (called exit), "timeout", "memory",
    "output" (too much of it), "killed" (by a signal; detail names it)."""

    status: str
    detail: str
    stdout: str
    stderr: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run(
    program: str,
    *,
    stdin: str = "",
    limits: Limits = Limits(),
    isolation: str = "seccomp",
    audit: bool = True,
) -> Outcome:
    """Run one program to its end or its limit. `audit=False` leaves Python's own wall out (for tests of the
    kernel's). Raises SandboxError where the isolation cannot be had."""
    if isolation not in ISOLATIONS:
        raise SandboxError(f"isolation is {isolation!r}; it must be one of {', '.join(ISOLATIONS)}")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hadal-sandbox-")))
        report, report_in = os.pipe()
        stack.callback(os.close, report)
        config = {
            "program": program,
            "parent": os.getpid(),
            "report": report_in,
            "memory_mib": limits.memory_mib,
            "cpu_seconds": math.ceil(limits.seconds) + 1,
            "lock": isolation == "seccomp",
            "audit": audit,
        }
        try:
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            (folder / "stdin").write_bytes(stdin.encode("utf-8", "replace"))
            started = time.monotonic()
            with (folder / "stdin").open("rb") as given:
                process = _start(folder, given, report_in)
        finally:
            os.close(report_in)
        stack.callback(_close, process)
        texts, broke = _watch(process, report, limits, started)
    return _judge(process.returncode, texts, broke, limits, time.monotonic() - started)


def _start(folder: Path, stdin: Any, report_in: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-S", "-s", "-B", str(_JAIL), str(folder / "config.json")]
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": str(folder), "PYTHONHASHSEED": "0",
                   "PYTHONIOENCODING": "utf-8:replace"}  # fmt: skip
    return subprocess.Popen(
        command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env=environment,
        pass_fds=(report_in,), start_new_session=True,
    )  # fmt: skip


def _watch(
    process: subprocess.Popen[bytes], report: int, limits: Limits, started: float
) -> tuple[list[bytes], str]:
    """Read stdout, stderr and the report until all are closed, one is too long or the time is over; then end
    the process. Returns the three texts, and "timeout" or "output" if it did not end by itself."""
    assert process.stdout is not None and process.stderr is not None
    files = (process.stdout.fileno(), process.stderr.fileno(), report)
    texts = [bytearray(), bytearray(), bytearray()]
    most = (limits.output_kib << 10, limits.output_kib << 10, _MAX_REPORT)
    deadline, broke = started + limits.seconds + _START_SECONDS, ""
    try:
        with selectors.DefaultSelector() as selector:
            for index, file in enumerate(files):
                selector.register(file, selectors.EVENT_READ, index)
            while selector.get_map() and not broke:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline:
                    broke = "timeout"
                for key, _ in ready:
                    piece = os.read(key.fd, 65536)
                    texts[key.data] += piece
                    if not piece:
                        selector.unregister(key.fd)
                    elif len(texts[key.data]) > most[key.data]:
                        broke = "output"
    finally:
        if not broke:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.05, deadline - time.monotonic()))
        end(process)
    return [bytes(text[:limit]) for text, limit in zip(texts, most, strict=True)], broke


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _judge(code: int | None, texts: list[bytes], broke: str, limits: Limits, seconds: float) -> Outcome:
    stdout, stderr, report = (text.decode("utf-8", "replace") for text in texts)
    if broke == "timeout":
        status, detail = broke, f"longer than {limits.seconds:g} s"
    elif broke == "output":
        status, detail = broke, f"more than {limits.output_kib} KiB"
    elif not report:
        import signal

        name = signal.Signals(-code).name if code and code < 0 else f"status {code}"
        status, detail = ("timeout", "CPU time") if name in ("SIGXCPU",) else ("killed", name)
    else:
        try:
            told = json.loads(report)
            status, detail = str(told["status"]), str(told["detail"])
        except (ValueError, KeyError, TypeError):
            status, detail = "killed", "its report is damaged"
    if status == "no lock":
        raise SandboxError(
            f"programs cannot be locked in here: {detail}. Run on Linux with seccomp, or set isolation ="
            ' "limits" for programs that are trusted'
        )
    return Outcome(status, detail, stdout, stderr, seconds)


# What the kernel must refuse. Every attempt is harmless where it succeeds.
_PROBE = """
import os, socket, threading
def attempt(name, function, *arguments):
    try:
        got = function(*arguments)
    except (PermissionError, RuntimeError):
        return
    except OSError:
        got = None
    if name == "fork" and got == 0:
        os._exit(0)
    print(name)
attempt("a socket", socket.socket)
attempt("a pair of sockets", socket.socketpair)
attempt("reading a file", os.open, "/dev/null", os.O_RDONLY)
attempt("writing a file", os.open, "probe", os.O_WRONLY | os.O_CREAT)
attempt("a folder", os.mkdir, "probe-folder")
attempt("fork", os.fork)
attempt("a program", os.execv, "/no/program", ["no"])
attempt("a thread", threading.Thread(target=int).start)
attempt("a signal to another process", os.kill, os.getppid(), 0)
attempt("a signal to all", os.kill, -1, 0)
print("done")
"""


@functools.cache
def check() -> None:
    """Try what the lock must refuse, once in this process. Raises SandboxError where anything got through."""
    outcome = run(_PROBE, limits=Limits(seconds=20), audit=False)
    if outcome.stdout != "done\n" or not outcome.passed:
        found = ", ".join(outcome.stdout.split("\n")[:-2]) or f"{outcome.status} {outcome.detail}"
        raise SandboxError(f"the sandbox does not hold on this machine ({found}); code is not run here")


def guarantees() -> dict[str, bool]:
    """Which isolations hold on this machine."""
    try:
        check()
    except SandboxError:
        return {"seccomp": False, "limits": True}
    return {"seccomp": True, "limits": True}
