"""One conversation on a terminal: prints pieces as they come, keeps the history, obeys slash commands.

Reasoning is shown dim behind a bar (`│`), and folded to one line with /fold on. Ctrl-C stops the answer; at
the prompt a first one says how to leave, and a second one leaves with status 130.
"""

from __future__ import annotations

import contextlib
import difflib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Event
from types import FrameType
from typing import Any

import typer

from hadal.cli.guard import INTERRUPTED, describe, is_usage
from hadal.cli.machine import cache_folder
from hadal.cli.options import Sampling
from hadal.cli.speaker import Answer, Piece, Speaker
from hadal.cli.terminal import (
    DIM,
    CliError,
    error_line,
    fields,
    human_seconds,
    is_terminal,
    note,
    paint,
    say,
)

HISTORY_LINES = 1000
FENCE = '"""'
# C0 and C1 controls but tab and newline become visible stand-ins: a model's text never steers the terminal.
_HARMLESS = {
    c: chr(0x2400 + c) if c < 32 else "␦" for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"
}


@contextlib.contextmanager
def stoppable() -> Iterator[Event]:
    """Within, a first Ctrl-C sets the event and a second one raises KeyboardInterrupt.

    The engine is never cut in the middle of a step, which would leave its pages in an unknown state.
    """
    stop = Event()

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


class Printer:
    """Writes one answer as it arrives: reasoning dim behind `│ `, then the content as it is."""

    def __init__(self, *, fold: bool = False, show_reasoning: bool = True) -> None:
        self.fold = fold and is_terminal(sys.stdout)
        self.show_reasoning = show_reasoning
        self._kind: str | None = None
        self._line_start = True
        self._leading = True  # drop the empty lines that models put before an answer
        self._thinking_since = 0.0

    def piece(self, piece: Piece) -> None:
        """Print text that just arrived; on a terminal, without control characters that could steer it."""
        if is_terminal(sys.stdout):
            piece = Piece(piece.kind, piece.text.translate(_HARMLESS))
        if piece.kind == "reasoning":
            self._reasoning(piece.text)
        else:
            self._content(piece.text)
        sys.stdout.flush()

    def _reasoning(self, text: str) -> None:
        if not self.show_reasoning:
            return
        if self._kind is None:
            text = text.lstrip("\n")
        if not text:
            return
        if self._kind is None:
            self._thinking_since = time.monotonic()
        self._kind = "reasoning"
        if self.fold:
            self._folded("thinking for")
            return
        for line in text.splitlines(keepends=True):
            bar = "│ " if self._line_start else ""
            sys.stdout.write(paint(bar + line.rstrip("\n"), DIM) + ("\n" if line.endswith("\n") else ""))
            self._line_start = line.endswith("\n")

    def _content(self, text: str) -> None:
        if self._leading:
            text = text.lstrip("\n")
            if not text:
                return
            self._leading = False
            self._close_reasoning()
        self._kind = "content"
        sys.stdout.write(text)
        self._line_start = text.endswith("\n")

    def _close_reasoning(self) -> None:
        if self._kind != "reasoning":
            return
        if self.fold:
            self._folded("thought for")
            sys.stdout.write("\n")
        else:
            sys.stdout.write("" if self._line_start else "\n")
        sys.stdout.write("\n")
        self._line_start = True

    def _folded(self, what: str) -> None:
        """One line, written over itself while the reasoning goes on."""
        spent = human_seconds(time.monotonic() - self._thinking_since)
        sys.stdout.write("\r\x1b[K" + paint(f"▸ {what} {spent} (/why shows it)", DIM))
        self._line_start = False

    def end(self) -> None:
        """Finish the line."""
        if not self._line_start:
            sys.stdout.write("\n")
        sys.stdout.flush()


def answer_once(
    speaker: Speaker,
    messages: list[dict[str, Any]],
    sampling: Sampling,
    think: bool | None,
    printer: Printer | None,
) -> tuple[Answer, bool]:
    """Ask, print, and return the answer and whether Ctrl-C stopped it. `printer` None prints nothing."""
    answer: Answer | None = None
    with stoppable() as stop:
        for item in speaker.speak(messages, sampling, think, stop):
            if isinstance(item, Answer):
                answer = item
            elif printer is not None:
                printer.piece(item)
    if answer is None:
        raise CliError(f"{speaker.name} gave no answer")
    if printer is not None:
        printer.end()
    return answer, stop.is_set()


@dataclass
class Session:
    """A conversation with a speaker; `loop` runs it until the user leaves."""

    speaker: Speaker
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    think: bool | None = None
    fold: bool = False
    turns: list[dict[str, Any]] = field(default_factory=list)
    last: Answer | None = None

    def messages(self) -> list[dict[str, Any]]:
        """System message, if any, and all turns so far."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]

    def ask(self, text: str, printer: Printer) -> tuple[Answer, bool]:
        """One turn: the answer, and whether Ctrl-C stopped it; what was said by then stays in the history."""
        asked = [*self.messages(), {"role": "user", "content": text}]
        answer, stopped = answer_once(self.speaker, asked, self.sampling, self.think, printer)
        self.last = answer
        said = {"role": "assistant", "content": answer.content, "reasoning_content": answer.reasoning}
        self.turns += [asked[-1], said]
        return answer, stopped

    def turn(self, text: str) -> None:
        """One turn of a conversation, with its rate below."""
        answer, stopped = self.ask(text, Printer(fold=self.fold))
        note(f"  {answer.rate.line()}{ending(answer, stopped)}")

    def loop(self) -> int:
        """Read, answer, repeat. The exit status: 0 after /bye or the end of input, 130 after two Ctrl-C."""
        note(f"{self.speaker.name}: type a question, /help for commands, /bye or Ctrl-D to leave.")
        warned = False
        with _history():
            while True:
                try:
                    text = read_input().strip()
                except EOFError:
                    say()
                    return 0
                except KeyboardInterrupt:
                    say()
                    if warned:
                        return INTERRUPTED
                    warned = True
                    note("Ctrl-C again leaves; so do /bye and Ctrl-D.")
                    continue
                warned = False
                if text and self._turn(text):
                    return 0

    def _turn(self, text: str) -> bool:
        """Obey a command or ask; a fault is one line and the conversation goes on. True to leave."""
        try:
            if text.startswith("/"):
                return self.command(text)
            self.turn(text)
        except Exception as fault:
            if is_usage(fault):
                raise
            error_line(describe(fault)[0])
        return False

    def command(self, text: str) -> bool:
        """Obey one slash command; True to leave. Unknown ones are refused with a suggestion."""
        name, _, rest = text[1:].partition(" ")
        name = {"quit": "bye", "exit": "bye", "?": "help"}.get(name, name)
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            raise CliError(
                f"no command /{name}" + (f"; did you mean /{close[0]}?" if close else "; /help lists them")
            )
        return bool(COMMANDS[name][1](self, rest.strip()))


def ending(answer: Answer, stopped: bool) -> str:
    """What to add to the rate when the model did not end by itself."""
    if stopped:
        return " · stopped"
    return (
        " · cut at the longest length (--max-tokens, --max-model-len)"
        if answer.finish_reason == "length"
        else ""
    )


def read_input() -> str:
    """One question; one that begins with three quotes goes on to the next three. EOFError at the end."""
    line = input(">>> ")
    if not line.lstrip().startswith(FENCE):
        return line
    text = line.lstrip().removeprefix(FENCE)
    while not text.rstrip().endswith(FENCE):
        text += "\n" + input("... ")
    return text.rstrip().removesuffix(FENCE)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing, with what was typed kept for next time (the owner alone may read it)."""
    try:
        import readline
    except ImportError:  # a Python built without it: plain input
        yield
        return
    path = cache_folder() / "history"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


def _help(session: Session, rest: str) -> None:
    width = max(len(usage) for usage, _, _ in COMMANDS.values())
    for usage, _, text in COMMANDS.values():
        say(f"  {usage.ljust(width)}  {text}")
    say(f"  {FENCE.ljust(width)}  begins and ends a question of several lines")


def _clear(session: Session, rest: str) -> None:
    session.turns.clear()
    note("The conversation starts anew.")


def _system(session: Session, rest: str) -> None:
    if not rest:
        say(session.system or "No system message.")
        return
    session.system = None if rest == "default" else rest
    note("Set; it holds for the whole conversation." if session.system else "No system message any more.")


def _set(session: Session, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if not name:
        given = session.sampling.given()
        fields((key, given.get(key, "the model's own")) for key in Sampling.NUMBERS)
        return
    session.sampling = session.sampling.with_setting(name, value.strip())
    note(f"{name} is {value.strip() or 'the model`s own'}.")


def _switch(rest: str, now: bool | None, words: dict[str, bool | None]) -> bool | None:
    if rest not in words:
        raise CliError(f"say {' or '.join(words)}, not {rest!r}; it is {_word(now, words)}", 2)
    return words[rest]


def _word(value: bool | None, words: dict[str, bool | None]) -> str:
    return next((word for word, meaning in words.items() if meaning is value), "unset")


def _think(session: Session, rest: str) -> None:
    session.think = _switch(rest, session.think, {"on": True, "off": False, "auto": None})
    note(f"Thinking: {rest}.")


def _fold(session: Session, rest: str) -> None:
    session.fold = bool(_switch(rest, session.fold, {"on": True, "off": False}))
    note(f"Reasoning is {'folded; /why shows it' if session.fold else 'shown'}.")


def _why(session: Session, rest: str) -> None:
    if session.last is None or not session.last.reasoning:
        note("No reasoning to show yet.")
        return
    for line in session.last.reasoning.splitlines():
        say(paint(f"│ {line}", DIM))


def _retry(session: Session, rest: str) -> None:
    if len(session.turns) < 2:
        raise CliError("nothing to try again yet: ask something first")
    before = list(session.turns)
    del session.turns[-2:]
    try:
        session.turn(before[-2]["content"])
    except BaseException:
        session.turns = before
        raise


def _info(session: Session, rest: str) -> None:
    facts = {**session.speaker.facts(), "system message": session.system, "turns": len(session.turns) // 2}
    fields(facts.items())


def _bye(session: Session, rest: str) -> bool:
    return True


Command = Callable[[Session, str], bool | None]
COMMANDS: dict[str, tuple[str, Command, str]] = {
    "help": ("/help", _help, "this list"),
    "clear": ("/clear", _clear, "forget the conversation so far"),
    "system": ("/system TEXT", _system, "set the system message; 'default' removes it"),
    "set": ("/set NAME VALUE", _set, "temperature, top_p, top_k, min_p, max_tokens, seed; 'default' unsets"),
    "think": ("/think on|off|auto", _think, "whether to reason first, for models that can choose"),
    "fold": ("/fold on|off", _fold, "show reasoning as one line"),
    "why": ("/why", _why, "show the last answer's reasoning"),
    "retry": ("/retry", _retry, "ask the last question again"),
    "info": ("/info", _info, "the model, where it runs, the settings"),
    "bye": ("/bye", _bye, "leave"),
}


def leave(status: int) -> None:
    """End the verb with a status; 0 simply returns."""
    if status:
        raise typer.Exit(status)
