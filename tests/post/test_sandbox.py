"""Hostile programs in the sandbox: none passes, nothing outside changes. All are harmless if they get out."""

from __future__ import annotations

import os
import platform
import socket
import time
from pathlib import Path

import pytest

from hadal.post.rewards import sandbox
from hadal.post.rewards.sandbox import Limits, SandboxError
from tests.post.helpers import children

HOLDS = sandbox.guarantees()["seccomp"]
locked = pytest.mark.skipif(not HOLDS, reason="needs Linux with seccomp, x86_64 or aarch64")
QUICK = Limits(seconds=1.0)

# Programs that end by themselves, with an error, where the kernel refuses; the number is the most harm done.
REFUSED = {
    "fork bomb": "import os, time\nfor _ in range(50):\n if os.fork() == 0: time.sleep(3); os._exit(0)",
    "fork by ctypes": "import ctypes\nif ctypes.CDLL(None).fork() < 0: raise OSError",
    "thread bomb": "from threading import *\nfor _ in range(50): Timer(3, int).start()",
    "a program": "import subprocess\nsubprocess.run(['true'], check=True)",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "posix_spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {{}})",
    "file outside": "open({folder!r} + '/written', 'w').write('x')",
    "file inside": "open('here', 'w').write('x')",
    "removal": "import os\nos.remove({folder!r} + '/kept')",
    "renaming": "import os\nos.rename({folder!r} + '/kept', {folder!r} + '/moved')",
    "file by ctypes": "import ctypes\nopen = ctypes.CDLL(None).open\n"
                      "if open({folder!r}.encode() + b'/c', 0o102, 0o600) < 0: raise OSError",
    "reading a file": "open({folder!r} + '/kept').read()",
    "reading the parent's environment": "import os\nopen(f'/proc/{{os.getppid()}}/environ', 'rb').read()",
    "a socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 0.5).send(b'x')",
    "a socket by ctypes": "import ctypes\nif ctypes.CDLL(None).socket(2, 1, 0) < 0: raise OSError",
    "killing the parent": "import os\nos.kill(os.getppid(), 0)",
    "signal to all": "import os\nos.kill(-1, 0)",
    "raising a limit": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
    "a shared memory file": "import os\nos.memfd_create('x')",
    "a library of others": "import numpy",
}  # fmt: skip
# Programs that are ended from outside, or hit a limit: status.
ENDED = {
    "infinite loop": ("while True: pass", {"timeout"}),
    "sleep": ("import time\ntime.sleep(60)", {"timeout"}),
    "a long operation": ("9**9**9", {"timeout"}),
    "deaf to signals": (
        "import signal\nfor s in range(1, 32):\n"
        " try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\nwhile True: pass",
        {"timeout"},
    ),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", {"memory"}),
    "one large block": ("bytearray(10**12)", {"memory"}),
    "output flood": ("while True: print('x' * 1000)", {"output"}),
    "flood of errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
    "endless recursion": ("def f(): f()\nf()", {"failed"}),
    "deep brackets": ("(" * 5000 + ")" * 5000, {"failed", "memory", "killed"}),
    "an early end": ("import os\nos._exit(0)", {"killed"}),
    "exit": ("raise SystemExit(0)", {"left"}),
    "abort": ("import os\nos.abort()", {"killed"}),
    "an error that hangs": ("class E(Exception):\n def __str__(s):\n  while 1: pass\nraise E", {"timeout"}),
}  # fmt: skip


@pytest.fixture
def server() -> socket.socket:
    """A listener that nobody should reach."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    yield listener
    listener.close()


@locked
@pytest.mark.parametrize("name", REFUSED)
def test_attempts_are_refused(name: str, tmp_path: Path, server: socket.socket) -> None:
    """By the kernel, without Python's own wall before it."""
    (tmp_path / "kept").write_text("secret")
    before = sorted(os.listdir(tmp_path))
    program = REFUSED[name].format(folder=str(tmp_path), port=server.getsockname()[1])
    outcome = sandbox.run(program + "\nprint('done')", limits=Limits(seconds=20.0), audit=False)
    assert not outcome.passed and "done" not in outcome.stdout, outcome
    assert outcome.status == "failed" and "secret" not in outcome.stdout + outcome.stderr + outcome.detail
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "kept").read_text() == "secret"
    assert not children()
    with pytest.raises(BlockingIOError):
        server.accept()


@locked
@pytest.mark.parametrize("name", ENDED)
def test_programs_that_do_not_end_are_ended(name: str) -> None:
    program, wanted = ENDED[name]
    started = time.monotonic()
    outcome = sandbox.run(program, limits=Limits(0.05 if "timeout" in wanted else 5, memory_mib=256))
    assert outcome.status in wanted, outcome
    assert time.monotonic() - started < 10 and not children()
    assert len(outcome.stdout) <= 64 << 10 and len(outcome.stderr) <= 64 << 10


@locked
def test_honest_programs_run() -> None:
    program = (
        "import math, re, sys, datetime, random\nfrom collections import Counter, defaultdict\n"
        "from typing import List\nimport os.path, concurrent.futures\n"
        "n, text = int(input()), sys.stdin.read()\n"
        "print(math.comb(n, 2), Counter(text.strip()).most_common(1), os.path.join('a', 'b'))\n"
        "print(datetime.datetime.strptime('2024-02-29', '%Y-%m-%d').year, 'é'.encode('utf-16-le'))\n"
        "if __name__ == '__main__': print('main')"
    )
    outcome = sandbox.run(program, stdin="5\naab\n", limits=Limits(seconds=10))
    assert outcome.passed, outcome
    assert outcome.stdout == "10 [('a', 2)] a/b\n2024 b'\\xe9\\x00'\nmain\n"


@locked
def test_the_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAL_API_KEY", "sk-secret")
    outcome = sandbox.run("import os\nprint(dict(os.environ))", limits=Limits(seconds=10))
    assert outcome.passed and "secret" not in outcome.stdout and "HADAL" not in outcome.stdout


@locked
def test_a_report_cannot_be_damaged_into_a_pass() -> None:
    """The report's descriptor is open in the program: what is no report is no pass."""
    for text in (b"{", b"[]", b'{"status": 1}', b"x" * 20000):
        program = f"import os\nfor fd in range(3, 1024):\n try: os.write(fd, {text!r})\n except OSError: pass"
        assert not sandbox.run(program, limits=Limits(seconds=10)).passed


def test_limits_alone_refuse_what_is_not_hostile(tmp_path: Path) -> None:
    """Where the kernel cannot lock: Python's own events, and the limits."""
    for name in ("file outside", "a program", "a socket", "reading a file", "fork bomb"):
        program = REFUSED[name].format(folder=str(tmp_path), port=9)
        outcome = sandbox.run(program, limits=Limits(seconds=20.0), isolation="limits")
        assert outcome.status == "failed" and "PermissionError" in outcome.detail, (name, outcome)
    assert sandbox.run("while True: pass", limits=QUICK, isolation="limits").status == "timeout"
    assert not children() and not os.listdir(tmp_path)


def test_there_is_no_third_isolation() -> None:
    with pytest.raises(SandboxError, match="isolation is 'none'; it must be one of seccomp, limits"):
        sandbox.run("", isolation="none")


@pytest.mark.skipif(platform.system() != "Linux", reason="a machine that cannot lock is simulated on Linux")
def test_without_a_lock_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A jail whose lock fails says so, and the program never starts."""
    jail = tmp_path / "jail.py"
    jail.write_text(Path(sandbox.__file__).with_name("jail.py").read_text("utf-8"))
    (tmp_path / "lock.py").write_text(
        "def die_with_parent(p): pass\ndef lock(profile): raise OSError('no seccomp here')\n"
    )
    monkeypatch.setattr(sandbox, "_JAIL", jail)
    with pytest.raises(SandboxError, match=r'no seccomp here.*isolation = "limits"'):
        sandbox.run("print('ran')", limits=Limits(seconds=10))
    sandbox.check.cache_clear()
    try:
        assert sandbox.guarantees() == {"seccomp": False, "limits": True}
    finally:
        sandbox.check.cache_clear()


@locked
def test_the_check_sees_a_lock_that_lets_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jail = tmp_path / "jail.py"
    jail.write_text(Path(sandbox.__file__).with_name("jail.py").read_text("utf-8"))
    (tmp_path / "lock.py").write_text("def die_with_parent(p): pass\ndef lock(profile): pass\n")
    monkeypatch.setattr(sandbox, "_JAIL", jail)
    sandbox.check.cache_clear()
    try:
        with pytest.raises(SandboxError, match=r"does not hold.*a socket.*reading a file.*a signal"):
            sandbox.check()
    finally:
        sandbox.check.cache_clear()
