"""The command line: one file a verb. `hadal --help` is instant: rooms are imported by the verb that runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 failed, 2 misused, 130 stopped with Ctrl-C."""
    sys.exit(status(arguments))


def status(arguments: Sequence[str] | None = None) -> int:
    """Run one verb (from `sys.argv` by default) and return its exit status."""
    import typer

    from hadal.cli.app import app
    from hadal.cli.guard import INTERRUPTED, is_usage
    from hadal.cli.terminal import error_line

    with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(
            args=None if arguments is None else list(arguments), prog_name="hadal", standalone_mode=False
        )
    except KeyboardInterrupt:
        return INTERRUPTED
    except typer.Abort:
        return INTERRUPTED
    except Exception as fault:
        if os.environ.get("HADAL_DEBUG") or not is_usage(fault):
            raise
        error_line(_usage(fault))
        return 2
    return code if isinstance(code, int) else 0


def _terminate(signum: int, frame: object) -> None:
    """SIGTERM ends a verb as `exit` would, so that cleaning up happens; the server installs its own."""
    raise SystemExit(128 + signum)


def _usage(fault: Exception) -> str:
    """One line for a wrong flag or value, with where its help is."""
    message = fault.format_message() if hasattr(fault, "format_message") else str(fault)
    context = getattr(fault, "ctx", None)
    path = context.command_path if context is not None else "hadal"
    end = "" if message.endswith(("?", ")")) else ";"
    return f"{message.rstrip('.')}{end} see `{path} --help`"
