"""`hadal rm`: takes a downloaded model off this machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hadal.cli.terminal import CliError, human_bytes, is_terminal, note


def rm(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name from `hadal list`.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a downloaded model and give its space back.

    Examples:
        hadal rm deepseek-r1-distill-qwen-1.5b
        hadal rm deepseek-ai/DeepSeek-V2-Lite-Chat --yes
    """
    from hadal.cli.loading import installed
    from hadal.weights import hub

    entry = installed(model)
    size = f" ({human_bytes(entry.size_bytes)})" if entry else ""
    if not yes and entry is not None:
        if not is_terminal(sys.stdin):
            raise CliError(f"removing {model}{size} needs a yes: add --yes", 2)
        if not typer.confirm(f"Remove {model}{size} from {entry.path}?"):
            raise CliError("nothing was removed")
    hub.remove(model)
    note(f"Removed {model}{size}.")
