"""Help is instant, loads no tensor library, teaches by examples; misuse is one line with what was meant."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from hadal.cli.app import GROUPS
from tests.cli.helpers import ROOT, hadal, program

VERBS = [name for verbs in GROUPS.values() for name in verbs]


def test_help_lists_every_verb_and_group(capsys: pytest.CaptureFixture[str]) -> None:
    shown = hadal(capsys, "--help")
    assert shown.status == 0
    for group, verbs in GROUPS.items():
        assert f"{group}:" in shown.out
        for verb in verbs:
            assert re.search(rf"^  {verb} +\S", shown.out, re.M), verb
    assert "..." not in shown.out.partition("Talk:")[2], "a verb's first sentence does not fit its line"


def test_help_loads_no_heavy_library() -> None:
    """What makes it instant, of every verb: seconds on a busy machine would prove nothing."""
    heavy = "('torch', 'numpy', 'rich', 'fastapi', 'huggingface_hub', 'tokenizers', 'psutil')"
    code = (
        "import sys; from hadal import cli; from hadal.cli.app import GROUPS\n"
        "lines = [[]]\n"
        "for verbs in GROUPS.values():\n"
        "    for name, verb in verbs.items():\n"
        "        lines += [[name], *([name, kind] for kind in getattr(verb, 'kinds', ()))]\n"
        "found = {cli.status([*line, '--help']) for line in lines}\n"
        f"print(len(lines) > 30, found, [m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.strip() == "True {0} []"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = hadal(capsys, verb, "--help")
    assert shown.status == 0
    assert f"Usage: hadal {verb}" in shown.out
    assert re.search(rf"Examples:\n    .*hadal {verb}", shown.out), "no example"
    assert shown.out.index("Examples:") < shown.out.index("Options:")


def test_no_arguments_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    shown = hadal(capsys)
    assert "Start here:" in shown.out + shown.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu"], "Did you mean 'run'?"),
        (["run", "--temprature", "1"], "--temperature"),
        (["convert", "a"], "Missing argument 'TARGET'"),
        (["bench", "--batch", "x"], "--batch"),
        (["run", "hadal-mini", "hi", "--temperature", "-3"], "temperature must be from 0.0 to 100.0, not -3"),
        (["run", "hadal-mini", "hi", "--top-p", "2"], "top_p must be above 0.0 and at most 1.0, not 2.0"),
        (["run", "hadal-mini", "  "], "the question is empty"),
        (["chat", "--url", "ftp://x"], "'ftp://x' is no server's address"),
        (["chat", "--url", "http://x:notaport"], "is no server's address"),
        (["eval", "--suite", "mmlu"], "'puzzles'"),
    ],
)
def test_misuse_is_one_line_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = hadal(capsys, *arguments)
    assert shown.status == 2
    assert shown.out == ""
    assert shown.err.startswith("hadal: ")
    assert shown.err.count("\n") == 1, shown.err
    assert expected in shown.err


def test_version_in_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from hadal import __version__

    assert hadal(capsys, "--version").out == f"hadal {__version__}\n"
    found = json.loads(hadal(capsys, "version", "--json").out)
    assert found["hadal"] == __version__
    assert found["torch"]


def test_no_escape_sequences_without_a_terminal() -> None:
    for arguments in (["--help"], ["version"], ["rnu"]):
        shown = program(*arguments)
        assert "\x1b" not in shown.out + shown.err


def test_a_closed_pipe_is_no_fault() -> None:
    command = f"{sys.executable} -m hadal version | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("hadal")
    assert done.stderr == ""
