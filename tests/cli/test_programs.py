"""Whole programs: a conversation on a terminal (a pseudo-terminal), and a server that ps and chat find."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.helpers import ROOT, program

PROMPT = ">>> "


class Terminal:
    """A child process on a pseudo-terminal, read until a text appears."""

    def __init__(self, *arguments: str) -> None:
        self.leader, follower = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "2"}
        environment.pop("NO_COLOR", None)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "hadal", *arguments],
            stdin=follower, stdout=follower, stderr=follower,
            cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(follower)
        self.seen = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """What was printed up to and with `text`, since the last call."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.leader], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; there is {self.seen!r}"
            try:
                self.seen += os.read(self.leader, 65536).decode("utf-8", "replace")
            except OSError as fault:  # Linux: the other end is closed
                raise AssertionError(f"ended before {text!r}: {self.seen!r}") from fault
        shown, _, self.seen = self.seen.partition(text)
        return shown + text

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def interrupt(self, at_prompt: bool = False) -> None:
        """What Ctrl-C does on a terminal. At a prompt, a hand is slower than the moment in which Python has
        printed it but does not wait yet: a signal in between is noticed at the next key only."""
        if at_prompt:
            time.sleep(0.3)
            self._rests()
        os.killpg(self.child.pid, signal.SIGINT)

    def _rests(self, seconds: float = 60) -> None:
        """Return once the child sleeps and uses no processor time (where /proc tells): on a busy
        machine it may still be on its way to where it waits."""
        stat = Path(f"/proc/{self.child.pid}/stat")
        deadline, quiet, before = time.monotonic() + seconds, 0, [""]
        while stat.exists() and quiet < 10:
            assert time.monotonic() < deadline, "the program does not come to rest"
            fields = stat.read_text().rpartition(")")[2].split()
            now = [fields[0], *fields[11:13]]  # state, ticks in user and in system mode
            quiet = quiet + 1 if now == before and now[0] == "S" else 0
            before = now
            time.sleep(0.03)

    def status(self, seconds: float = 30) -> int:
        return self.child.wait(seconds)


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    running = Terminal(*arguments)
    try:
        yield running
    finally:
        running.child.kill()
        running.child.wait()
        os.close(running.leader)


def test_a_conversation_on_a_terminal(tiny_folder: Path) -> None:
    with terminal("run", str(tiny_folder), "--max-tokens", "8", "--seed", "1") as user:
        opening = user.until(PROMPT)
        assert "\x1b[1mtiny: a deepseek_v3 model" in opening, "the title stands out on a terminal"
        user.type("12 + 35?\n")
        answer = user.until(PROMPT)
        assert "\x1b[2m│ " in answer, "reasoning is dim"
        assert "8 tokens · " in answer
        user.type("/thnik on\n")
        assert "did you mean /think?" in user.until(PROMPT)
        user.type("/bye\n")
        assert user.status() == 0


def test_ctrl_c_stops_the_answer_then_twice_leaves_with_130(tiny_folder: Path) -> None:
    with terminal("run", str(tiny_folder), "--temperature", "5") as user:
        user.until(PROMPT)
        user.type("go on and on\n")
        user.until("│ ")
        user.interrupt()
        assert "· stopped" in user.until(PROMPT)
        user.interrupt(at_prompt=True)
        assert "Ctrl-C again leaves" in user.until(PROMPT)
        user.interrupt(at_prompt=True)
        assert user.status() == 130
        assert "Traceback" not in user.seen


def test_then_chat_goes_on_with_a_terminal(tiny_folder: Path) -> None:
    with terminal("run", str(tiny_folder), "12 + 35?", "--then-chat", "--max-tokens", "4") as user:
        user.until(PROMPT + "12 + 35?")
        user.until(PROMPT)
        user.type("\x04")
        assert user.status() == 0


def test_serve_until_sigterm(tiny_folder: Path) -> None:
    pytest.importorskip("gradio")
    child = subprocess.Popen(
        [sys.executable, "-m", "hadal", "serve", str(tiny_folder), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        lines = []
        while not lines or not lines[-1].startswith("Ollama clients:"):
            lines.append(child.stdout.readline())
            assert lines[-1], child.stderr.read() if child.stderr else ""
        url = lines[-1].split()[-1]
        assert lines[0] == f"Chat page:                   {url}/\n"
        _wait_healthy(url)
        found = json.loads(program("ps", "--json").out)
        assert [(s["model"], s["url"], s["pid"]) for s in found] == [("tiny", url, child.pid)]
        answer = program("chat", "--max-tokens", "5", "--seed", "1", stdin="12 + 35?")
        assert answer.status == 0, answer.err
        assert "5 tokens" in answer.err
        taken = program("serve", str(tiny_folder), "--no-ui", "--port", url.rpartition(":")[2])
        assert taken.status == 1
        assert "in use by another program" in taken.err.splitlines()[-1]
    finally:
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "Traceback" not in err
    assert program("ps", "--json").out.strip() == "[]", "a server that has ended is not listed"


def _wait_healthy(url: str) -> None:
    import urllib.request

    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(url + "/health", timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline, "the server never became healthy"
            time.sleep(0.1)


def test_serve_refuses_to_be_open_to_all(tiny_folder: Path) -> None:
    refused = program("serve", str(tiny_folder), "--host", "0.0.0.0")
    assert refused.status == 2
    assert "without an API key" in refused.err
    assert refused.err.count("\n") == 1
