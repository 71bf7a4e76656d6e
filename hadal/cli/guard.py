"""Faults become one line on stderr and an exit status; a traceback only with HADAL_DEBUG=1.

Status: 0 done, 1 failed, 2 misused (a wrong flag or value), 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import typer

from hadal.cli.terminal import CliError, error_line

F = TypeVar("F", bound=Callable[..., None])

INTERRUPTED = 130

# Faults that stand for a wrong value given by the user; by name, so that no room is imported here.
_MISUSE = ("RequestError", "SettingsError", "RecipeError", "TemplateError", "PlanError")
_OS_REMEDY = {
    errno.ENOSPC: "free some space, or point HF_HOME (downloads) or XDG_CACHE_HOME at another disk",
    errno.EADDRINUSE: "another program listens there: choose another --port, or stop it (`hadal ps`)",
    errno.EACCES: "you may not use it: choose a place of your own",
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.ENOENT: "check the path",
}


def describe(fault: BaseException) -> tuple[str, int]:
    """The line to print for a fault, and the status to exit with."""
    if isinstance(fault, CliError):
        return str(fault), fault.status
    if isinstance(fault, OSError) and fault.errno is not None:
        what = os.strerror(fault.errno)
        place = f" ({fault.filename})" if fault.filename else ""
        remedy = _OS_REMEDY.get(fault.errno)
        return f"{what}{place}" + (f"; {remedy}" if remedy else ""), 1
    if isinstance(fault, MemoryError) or "out of memory" in str(fault).lower():
        cause = str(fault).split(". ")[0] or "out of memory"
        return f"{cause}; lower --max-model-len or --max-num-seqs, or take a smaller model (`hadal show`)", 1
    if type(fault).__module__.startswith("hadal."):
        return str(fault), 2 if type(fault).__name__ in _MISUSE else 1
    if isinstance(fault, ModuleNotFoundError):
        return f"the Python package {fault.name!r} is missing; `pip install {fault.name}` gives it", 1
    line = f"{type(fault).__name__}: {fault}"
    return f"unexpected {line}; HADAL_DEBUG=1 shows where, `hadal doctor` what to report with it", 1


def guarded(verb: F) -> F:
    """A verb whose faults end in one line and a status instead of a traceback."""

    @functools.wraps(verb)
    def run(*args: object, **kwargs: object) -> None:
        try:
            verb(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _drop_stdout()
            raise typer.Exit(0) from None  # the reader (`| head`) has what it wanted
        except Exception as fault:
            if is_usage(fault):
                raise
            if os.environ.get("HADAL_DEBUG"):
                raise
            message, status = describe(fault)
            error_line(message)
            raise typer.Exit(status) from None

    return run  # type: ignore[return-value]


def is_usage(fault: BaseException) -> bool:
    """Typer's own: a wrong flag or value, `Exit`, `Abort`."""
    usage = typer.BadParameter.__mro__[1]
    return isinstance(fault, usage | typer.Exit | typer.Abort)


def _drop_stdout() -> None:
    """Point stdout at nothing, so that Python's flush at exit does not complain about the closed pipe."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
