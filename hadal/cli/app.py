"""The `hadal` command: its verbs, in groups, with help that costs no heavy import.

Each verb lies in a file of its own and imports the rooms that it uses when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hadal import __version__
from hadal.cli import (
    bench,
    chat,
    complete,
    convert,
    data,
    doctor,
    embed,
    evaluate,
    grpo,
    listing,
    needle,
    plan,
    probe,
    ps,
    pull,
    r1,
    rm,
    run,
    runs,
    samples,
    serve,
    sft,
    show,
    train,
    version,
)
from hadal.cli.family import Family, kinds_class
from hadal.cli.guard import guarded

GROUPS: dict[str, dict[str, Callable[..., None] | Family]] = {
    "Talk": {"run": run.run, "chat": chat.chat, "complete": complete.complete},
    "Serve": {"serve": serve.serve, "ps": ps.ps},
    "Models": {
        "show": show.show,
        "pull": pull.pull,
        "list": listing.list_models,
        "rm": rm.rm,
        "plan": plan.PLAN,
        "convert": convert.convert,
    },
    "Make and measure": {
        "data": data.DATA,
        "train": train.train,
        "sft": sft.sft,
        "grpo": grpo.grpo,
        "r1": r1.r1,
        "runs": runs.runs,
        "samples": samples.samples,
        "eval": evaluate.evaluate,
        "needle": needle.needle,
        "embed": embed.embed,
        "probe": probe.probe,
        "bench": bench.BENCH,
    },
    "This machine": {"doctor": doctor.doctor, "version": version.version},
}

EPILOG = """\b
Start here:
  hadal run                        chat with the small reasoning model on board
  hadal run hadal-mini "12 + 35?"  one question, one answer
  hadal serve                      OpenAI, DeepSeek and Ollama API, and a chat page
  hadal show                       the models that Hadal knows, and which fit here
  hadal VERB --help                what a verb does, with examples
"""


class Grouped(TyperGroup):
    """Lists the verbs under their groups."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """One section a group, in the order of `GROUPS`."""
        width = max(len(name) for verbs in GROUPS.values() for name in verbs)
        limit = formatter.width - 6 - width
        for group, verbs in GROUPS.items():
            commands = [(name, self.get_command(ctx, name)) for name in verbs]
            rows = [(name.ljust(width), c.get_short_help_str(limit)) for name, c in commands if c is not None]
            with formatter.section(group):
                formatter.write_dl(rows)


class Teaching(TyperCommand):
    """Shows examples where they help most: before the flags."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, what it does, examples, then arguments and flags."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        self.format_epilog(ctx, formatter)
        self.format_options(ctx, formatter)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hadal {__version__}")
        raise typer.Exit


def build() -> typer.Typer:
    """The application, with every verb guarded."""
    app = typer.Typer(
        name="hadal",
        cls=Grouped,
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        epilog=EPILOG,
    )

    @app.callback()
    def hadal(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        """Hadal: the DeepSeek-V3/R1 system in one package. Talk to models, serve them, look inside them."""

    for verbs in GROUPS.values():
        for name, verb in verbs.items():
            if isinstance(verb, Family):
                app.add_typer(_family(verb), name=name)
            else:
                _command(app, name, verb)
    return app


def _command(app: typer.Typer, name: str, verb: Callable[..., None]) -> None:
    help_text, epilog = _help(verb.__doc__ or "")
    app.command(name, cls=Teaching, help=help_text, epilog=epilog)(guarded(verb))


def _family(family: Family) -> typer.Typer:
    help_text, epilog = _help(family.about)
    group = typer.Typer(
        cls=kinds_class(family), help=help_text, epilog=epilog, rich_markup_mode=None, add_completion=False
    )
    for name, verb in family.kinds.items():
        _command(group, name, verb)
    return group


def _help(text: str) -> tuple[str, str | None]:
    """A docstring's help and, below it, its examples."""
    help_text, _, examples = text.partition("Examples:")
    return help_text.strip(), "\b\nExamples:\n" + _indented(examples) if examples else None


def _indented(examples: str) -> str:
    lines = [line.strip() for line in examples.strip().splitlines() if line.strip()]
    return "\n".join("  " + line for line in lines)


app = build()
