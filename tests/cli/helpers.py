"""Runs the command line: in this process, or as a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hadal import cli

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """Status and what was printed."""

    status: int
    out: str
    err: str


def hadal(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """`hadal ARGUMENTS` in this process."""
    capsys.readouterr()
    status = cli.status(list(arguments))
    printed = capsys.readouterr()
    return Outcome(status, printed.out, printed.err)


def program(*arguments: str, stdin: str = "", timeout: float = 60, **environment: str) -> Outcome:
    """`python -m hadal ARGUMENTS` as a process of its own, with no terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "hadal", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
