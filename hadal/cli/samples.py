"""`hadal samples`: what a model that is trained by rewards has said, and what it was worth."""

from __future__ import annotations

import json as codec
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hadal.cli import options as o
from hadal.cli.terminal import BOLD, CYAN, DIM, RED, CliError, note, paint, print_json, say

if TYPE_CHECKING:
    from hadal.post.samples import Sampled, SampledGroup

GREEN = "\x1b[32m"
INDENT = "    "


def samples(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or a file of samples.")],
    step: Annotated[
        str,
        typer.Option(
            "--step", metavar="STEPS", help="A step, 10-20, last, or all. Of --html and --json: all."
        ),
    ] = "",
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="Of this task only.")] = "",
    reward: Annotated[
        str, typer.Option("--reward", metavar="LOW:HIGH", help="With rewards in this range: 0.5:, :0, 1.")
    ] = ":",
    verdict: Annotated[
        Literal["right", "wrong"] | None,
        typer.Option("--verdict", help="Judged so by the rewards of accuracy."),
    ] = None,
    cut: Annotated[bool, typer.Option("--cut", help="Only those that were cut off.")] = False,
    search: Annotated[
        str, typer.Option("--search", metavar="TEXT", help="With this text in prompt or completion.")
    ] = "",
    limit: Annotated[
        int, typer.Option("--limit", min=0, metavar="N", help="At most N prompts, the latest; 0: all.")
    ] = 0,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one HTML file with filters, which needs nothing else."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Show what a run of `hadal grpo` has said.

    Prompts, completions, rewards and what they were given for, advantages; by default of the last step.

    Long output is for a pager: `hadal samples RUN --step all | less`.

    Examples:
        hadal samples runs/grpo-smoke
        hadal samples runs/grpo-smoke --step 1-4 --verdict wrong --search "37"
        hadal samples runs/grpo-smoke --html samples.html
        hadal samples runs/grpo-smoke --reward :0 --json
    """
    from hadal.post.samples import Filter, SamplesError, range_of, read, steps_of

    groups = read(run)
    try:
        steps = steps_of(step or ("all" if html or json else "last"), groups)
        low, high = range_of(reward)
    except SamplesError as error:
        raise CliError(str(error), 2) from None
    right = None if verdict is None else verdict == "right"
    found = Filter(steps, task, low, high, right, cut, search).apply(groups)
    found = found[-limit:] if limit else found
    if html is not None:
        from hadal.post.samples_page import page

        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(found, f"Samples of {run.name or run}"), encoding="utf-8")
        note(f"written: {html}, {len(found)} prompts")
    if json:
        print_json([group.as_json() for group in found])
    elif html is None:
        whole = {(group.step, group.number): group for group in groups}
        for group in found:
            _tell(group, whole[group.step, group.number])
        if not found:
            note(_nothing(groups))


def _nothing(groups: list[SampledGroup]) -> str:
    tasks = ", ".join(sorted({group.task for group in groups}))
    return f"None is so. There are steps {groups[0].step} to {groups[-1].step}, and the tasks {tasks}."


def _tell(group: SampledGroup, whole: SampledGroup) -> None:
    """A group: its prompt, then each completion that was asked for."""
    rewards = [one.reward for one in whole.completions]
    judged = [one.right for one in whole.completions if one.right is not None]
    right = f", {sum(judged)} of {len(judged)} right" if judged else ""
    mean = sum(rewards) / len(rewards)
    head = f"step {group.step} · {_clean(group.task)} · prompt {group.number} · mean reward {mean:.3f}{right}"
    say(paint(head, BOLD))
    say(paint(textwrap.indent(_clean(group.prompt), "  "), CYAN))
    for one in group.completions:
        say()
        say(f"  {_facts(one)}")
        for name, part in one.parts.items():
            rest = {key: value for key, value in part.items() if key != "value"}
            said = f" {codec.dumps(rest, ensure_ascii=False)}" if rest else ""
            say(paint(_clean(f"  {name} {part.get('value')}{said}"), DIM))
        say(textwrap.indent(_clean(one.text), INDENT, lambda line: True))
    say()


def _facts(one: Sampled) -> str:
    verdict = ""
    if one.right is not None:
        verdict = paint("right", GREEN) + ", " if one.right else paint("wrong", RED) + ", "
    advantage = "" if one.advantage is None else f", advantage {one.advantage:+.3f}"
    end = "cut off" if one.cut else one.finish_reason
    return f"{verdict}reward {one.reward:.3f}{advantage}, {one.tokens} tokens, {_clean(end)}"


def _clean(text: str) -> str:
    """A model's text without what could steer the terminal, and in the terminal's own encoding."""
    from hadal.post.samples import harmless

    encoding = sys.stdout.encoding or "utf-8"
    return harmless(text).encode(encoding, "replace").decode(encoding)
