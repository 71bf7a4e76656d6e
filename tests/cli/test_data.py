"""`hadal data`: prepare, report and tokenizer from the outside; misuse is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.helpers import ROOT, hadal
from tests.data.conftest import write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", documents=40).folder


SMALL = ("--set", "mixture.tokens=6000", "--workers", "1")


def test_prepare_then_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    made = hadal(capsys, "data", "prepare", str(folder / "recipe.toml"), "--out", out, *SMALL)
    assert made.status == 0, made.err
    for told in ("near copies", "in evaluation sets", "tokens taken", "% like english/en-003", "report.md"):
        assert told in made.out, told
    assert max(map(len, made.out.splitlines()[:-1])) < 130 and "\x1b" not in made.out
    again = hadal(capsys, "data", str(folder / "recipe.toml"), "--out", out, *SMALL)
    assert again.status == 0 and "(was there already)" in again.out, "prepare is the default kind"
    report = hadal(capsys, "data", "report", out, "--verify")
    assert "agree with their hashes" in report.out
    found = json.loads(hadal(capsys, "data", "report", out, "--json").out)
    assert found["sources"]["english"]["dropped"]["near"] == 1
    (tmp_path / "set" / "train-00000.bin").write_bytes(b"")
    damaged = hadal(capsys, "data", "report", out, "--verify")
    assert damaged.status == 1 and "train-00000.bin has SHA-256" in damaged.err


def test_a_tokenizer_that_prepare_uses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokenizer"
    arguments = ("data", "tokenizer", str(folder / "english.jsonl"), "--vocab-size", "420", "--out", str(out))
    made = hadal(capsys, *arguments)
    assert made.status == 0 and "vocabulary" in made.out, made.err
    again = hadal(capsys, *arguments)
    assert again.status == 2 and "exists; choose another --out" in again.err
    tokens = ("--set", f"tokens.tokenizer={out}", *SMALL)
    shards = hadal(
        capsys, "data", "prepare", str(folder / "recipe.toml"), "--out", str(tmp_path / "s"), *tokens
    )
    assert shards.status == 0, shards.err


@pytest.mark.parametrize(
    ("arguments", "expected", "status"),
    [
        (["data", "prepare", "nowhere.toml"], "no recipe at nowhere.toml", 2),
        (["data", "prepare", "RECIPE", "--set", "fim.raet=1"], "Did you mean 'rate'?", 2),
        (["data", "prepare", "RECIPE", "--executor", "slurm"], "--partition NAME belong together", 2),
        (["data", "prepare", "RECIPE", "--partition", "x"], "--partition NAME belong together", 2),
        (["data", "reprot", "x"], "Did you mean 'report'?", 2),
        (["data", "report", "nowhere"], "holds no finished shards", 1),
        (["data", "tokenizer", "nowhere", "--out", "x"], "leads to no file", 2),
    ],
)
def test_misuse_is_one_line(
    arguments: list[str], expected: str, status: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = hadal(capsys, *(str(folder / "recipe.toml") if a == "RECIPE" else a for a in arguments))
    assert shown.status == status and expected in shown.err and shown.err.count("\n") == 1, shown.err


def test_ctrl_c_leaves_no_set_and_no_process(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=3000)
    command = [sys.executable, "-m", "hadal", "data", "prepare", str(corpus.recipe)]
    command += ["--out", str(tmp_path / "set")]
    process = subprocess.Popen(
        [*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((tmp_path / "set.work").glob("read-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "goes on from here" in said and "Traceback" not in said
    assert not (tmp_path / "set").exists()
    assert not [pid for pid in workers if alive(pid)]


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
