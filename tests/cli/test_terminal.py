"""What is printed: units, tables, JSON, errors on one line."""

from __future__ import annotations

import errno
import json

import pytest

from hadal.cli import terminal
from hadal.cli.guard import describe
from hadal.cli.terminal import CliError


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (70272, "70.3 kB"), (671e9, "671 GB"), (1.342e12, "1.34 TB")]
)
def test_bytes(n: float, text: str) -> None:
    assert terminal.human_bytes(n) == text


@pytest.mark.parametrize(
    ("n", "text"), [(671_026_419_200, "671.0B"), (15e6, "15.0M"), (2048, "2.0K"), (7, "7")]
)
def test_counts(n: float, text: str) -> None:
    assert terminal.human_count(n) == text


@pytest.mark.parametrize(
    ("s", "text"), [(0.0123, "12 ms"), (5, "5.0 s"), (75, "1 min 15 s"), (3700, "1 h 1 min")]
)
def test_seconds(s: float, text: str) -> None:
    assert terminal.human_seconds(s) == text


def test_table_aligns(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(("A", "N"), [("long name", 5), ("b", 12345)], right=(1,))
    assert capsys.readouterr().out == "A              N\nlong name      5\nb          12345\n"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "é"})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": "é"}


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.error_line("first\n  second")
    assert capsys.readouterr().err == "hadal: first second\n"


def test_no_bar_before_two_seconds_and_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    shown = terminal.Bar("loading")
    for moment, done in ((100.5, 1e9), (101.9, 2e9), (103.0, 3e9), (111.0, 4e9), (112.0, 5e9)):
        now[0] = moment
        shown.update(done, 8e9)
    shown.close()
    assert capsys.readouterr().err == "loading: 4 GB of 8 GB (50%)\n"


@pytest.mark.parametrize(
    ("fault", "expected", "status"),
    [
        (CliError("a; b", 2), "a; b", 2),
        (OSError(errno.ENOSPC, "x", "/big"), "No space left on device (/big); free some space", 1),
        (OSError(errno.EADDRINUSE, "x"), "Address already in use; another program listens there", 1),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            "CUDA out of memory; lower --max-model-len",
            1,
        ),
        (ModuleNotFoundError("x", name="gradio"), "'gradio' is missing; `pip install gradio`", 1),
        (ValueError("odd"), "unexpected ValueError: odd; HADAL_DEBUG=1 shows where", 1),
    ],
)
def test_faults_name_cause_and_remedy(fault: Exception, expected: str, status: int) -> None:
    line, code = describe(fault)
    assert expected in line
    assert code == status
