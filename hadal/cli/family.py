"""A verb with kinds, as `hadal bench latency`: its own help, a default kind, and "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

Verb = Callable[..., None]


@dataclass(frozen=True)
class Family:
    """A group of verbs. `about`: its help and, after "Examples:", examples. `default`: the kind that is meant
    where the first word is none."""

    about: str
    kinds: dict[str, Verb]
    default: str


def kinds_class(family: Family) -> type[TyperGroup]:
    """The group's class: words that name no kind go to the default one, unless they nearly name a kind."""

    class Kinds(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            first = args[0] if args else ""
            if first not in family.kinds and first not in ("-h", "--help"):
                close = difflib.get_close_matches(first, family.kinds, n=1, cutoff=0.75)
                if close and not Path(first).exists():
                    ctx.fail(f"No kind {first!r}. Did you mean {close[0]!r}?")
                args = [family.default, *args]
            return super().parse_args(ctx, args)

        def format_help(self, ctx: Any, formatter: Any) -> None:
            """Usage, what it does, kinds, examples, then flags."""
            self.format_usage(ctx, formatter)
            self.format_help_text(ctx, formatter)
            width = max(map(len, family.kinds))
            limit = formatter.width - 6 - width
            rows = []
            for name in family.kinds:
                command = self.get_command(ctx, name)
                assert command is not None
                rows.append((name.ljust(width), command.get_short_help_str(limit)))
            with formatter.section("Kinds"):
                formatter.write_dl(rows)
            self.format_epilog(ctx, formatter)
            self.format_options(ctx, formatter)

        def format_commands(self, ctx: Any, formatter: Any) -> None:
            """Written by `format_help`, before the examples."""

    return Kinds
