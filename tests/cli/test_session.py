"""A conversation: what is printed and remembered, commands, Ctrl-C; with a speaker made of a script."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from threading import Event
from typing import Any

import pytest

from hadal.cli import session as sessions
from hadal.cli.meter import Rate
from hadal.cli.options import Sampling
from hadal.cli.session import Printer, Session
from hadal.cli.speaker import Answer, Piece
from hadal.cli.terminal import CliError

RATE = Rate(5, 0, 7, 0.1, 0.4, 20.0, 0.25)


class Scripted:
    """Answers each question by a fixed list of pieces, and records what it was asked."""

    name = "scripted"

    def __init__(self, *pieces: tuple[str, str], interrupt_after: int | None = None) -> None:
        self.pieces = [Piece(kind, text) for kind, text in pieces]  # type: ignore[arg-type]
        self.asked: list[tuple[list[dict[str, Any]], Sampling, bool | None]] = []
        self.interrupt_after = interrupt_after

    def speak(
        self, messages: Any, sampling: Sampling, think: bool | None, stop: Event
    ) -> Iterator[Piece | Answer]:
        self.asked.append((list(messages), sampling, think))
        said: list[Piece] = []
        for number, piece in enumerate(self.pieces):
            said.append(piece)
            yield piece
            if self.interrupt_after == number:
                os.kill(os.getpid(), signal.SIGINT)
            if stop.is_set():
                break
        reasoning, content = ("".join(p.text for p in said if p.kind == k) for k in ("reasoning", "content"))
        yield Answer(content.strip(), reasoning.strip(), "stop", RATE, 0.2)

    def facts(self) -> dict[str, Any]:
        return {"model": self.name}


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What the user types, line by line; an exception class stands for Ctrl-C or Ctrl-D."""
    left = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


REASONED = (
    ("reasoning", "12 + 35:\n2 + 5"),
    ("reasoning", " = 7"),
    ("content", "\n\nIt is "),
    ("content", "47."),
)


def test_reasoning_behind_a_bar_then_the_answer_then_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(Scripted(*REASONED))
    session.turn("12 + 35?")
    printed = capsys.readouterr()
    assert printed.out == "│ 12 + 35:\n│ 2 + 5 = 7\n\nIt is 47.\n"
    assert "7 tokens · 20.0 tokens/s · first token after 100 ms · 25% of this machine's memory" in printed.err
    assert session.turns == [
        {"role": "user", "content": "12 + 35?"},
        {"role": "assistant", "content": "It is 47.", "reasoning_content": "12 + 35:\n2 + 5 = 7"},
    ]


def test_hidden_reasoning(capsys: pytest.CaptureFixture[str]) -> None:
    Session(Scripted(*REASONED)).ask("?", Printer(show_reasoning=False))
    assert capsys.readouterr().out == "It is 47.\n"


def test_an_answer_cut_inside_its_reasoning_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    Session(Scripted(("reasoning", "so"))).ask("?", Printer())
    assert capsys.readouterr().out == "│ so\n"


def test_folded_reasoning_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "is_terminal", lambda stream: True)
    Session(Scripted(*REASONED)).ask("?", Printer(fold=True))
    shown = capsys.readouterr().out
    assert "2 + 5" not in shown
    assert shown.count("\n") == 3
    assert "▸ thought for" in shown.split("\n")[0].rsplit("\x1b[K", 1)[1]
    assert shown.endswith("\n\nIt is 47.\n")


def test_the_history_goes_along_and_the_system_message_leads() -> None:
    speaker = Scripted(("content", "yes"))
    session = Session(speaker, Sampling(seed=3), system="Be brief.", think=False)
    session.turn("one")
    session.turn("two")
    messages, sampling, think = speaker.asked[1]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert (sampling.seed, think) == (3, False)


def test_loop_until_bye(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "hello", "", "/bye", "never read")
    speaker = Scripted(("content", "hi"))
    assert Session(speaker).loop() == 0
    assert len(speaker.asked) == 1


def test_end_of_input_leaves_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch)
    assert Session(Scripted()).loop() == 0


def test_one_ctrl_c_at_the_prompt_warns_and_two_leave_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, KeyboardInterrupt, "hello", KeyboardInterrupt, KeyboardInterrupt)
    speaker = Scripted(("content", "hi"))
    assert Session(speaker).loop() == 130
    assert len(speaker.asked) == 1, "a question between two Ctrl-C starts the count anew"
    assert "Ctrl-C again leaves" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "count", "/bye")
    session = Session(Scripted(("content", "1 "), ("content", "2 "), ("content", "3"), interrupt_after=1))
    before = signal.getsignal(signal.SIGINT)
    assert session.loop() == 0
    assert session.turns[1]["content"] == "1 2"
    assert "· stopped" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_during_one_answer_leaves_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), sessions.stoppable():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_fault_is_one_line_and_the_conversation_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Scripted):
        def speak(self, *arguments: Any) -> Iterator[Piece | Answer]:
            if not self.asked:
                self.asked.append(arguments[:3])  # type: ignore[arg-type]
                raise CliError("the engine is gone; start it again")
            yield from super().speak(*arguments)

    typed(monkeypatch, "one", "two", "/bye")
    session = Session(Failing(("content", "fine")))
    assert session.loop() == 0
    assert "hadal: the engine is gone; start it again\n" in capsys.readouterr().err
    assert [t["content"] for t in session.turns] == ["two", "fine"], "the failed question left no trace"


def test_several_lines_between_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, '"""first', "second", 'third"""', "/bye")
    speaker = Scripted(("content", "ok"))
    Session(speaker).loop()
    assert speaker.asked[0][0][-1]["content"] == "first\nsecond\nthird"
    typed(monkeypatch, '"""one line"""')
    assert sessions.read_input() == "one line"


def test_commands_change_the_session(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Scripted(*REASONED)
    session = Session(speaker)
    for text in (
        "/set temperature 0.6",
        "/set max-tokens 50",
        "/system Speak French.",
        "/think off",
        "/fold on",
    ):
        assert session.command(text) is False
    assert session.sampling == Sampling(temperature=0.6, max_tokens=50)
    assert (session.system, session.think, session.fold) == ("Speak French.", False, True)
    session.command("/set temperature default")
    session.command("/system default")
    session.command("/think auto")
    assert (session.sampling.temperature, session.system, session.think) == (None, None, None)
    session.turn("12 + 35?")
    capsys.readouterr()
    session.command("/why")
    assert capsys.readouterr().out == "│ 12 + 35:\n│ 2 + 5 = 7\n"
    session.command("/retry")
    assert speaker.asked[1][0] == speaker.asked[0][0], "a retry asks the same question without its answer"
    assert len(session.turns) == 2
    session.command("/clear")
    assert session.turns == []
    assert session.command("/bye") is True


def test_help_and_info_name_everything(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(Scripted())
    session.command("/help")
    shown = capsys.readouterr().out
    assert all(usage in shown for usage, _, _ in sessions.COMMANDS.values())
    session.command("/info")
    assert "scripted" in capsys.readouterr().out
    session.command("/set")
    assert "the model's own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/hepl", "no command /hepl; did you mean /help?"),
        ("/xyzzy", "no command /xyzzy; /help lists them"),
        ("/set tempreature 1", "did you mean temperature?"),
        ("/set temperature hot", "temperature is a number or 'default', not 'hot'"),
        ("/set top_k 1.5", "top_k is a whole number"),
        ("/set temperature -1", "temperature must be from 0.0 to 100.0, not -1.0"),
        ("/think maybe", "say on or off or auto, not 'maybe'"),
        ("/retry", "nothing to try again yet"),
    ],
)
def test_wrong_commands_are_refused(text: str, expected: str) -> None:
    session = Session(Scripted())
    with pytest.raises(Exception, match=expected.replace("?", r"\?").replace(".", r"\.")):
        session.command(text)
    assert session == Session(session.speaker)
