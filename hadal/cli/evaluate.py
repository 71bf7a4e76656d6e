"""`hadal eval`: how often a model is right: on puzzles, on a set with answers, on tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hadal.cli import options as o

if TYPE_CHECKING:
    from hadal.engine import Engine

    Load = Callable[[], tuple[Engine, dict[str, Any]]]


# --- flags ---
Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=o.MODEL_HELP + " Default: hadal-mini.")]
Suite = Annotated[
    Literal["puzzles"],
    typer.Option(help="puzzles: the seeded tasks that hadal-mini was trained on, unseen ones."),
]
ProblemSet = Annotated[
    Path | None,
    typer.Option(
        "--set", metavar="FILE", help="Problems with answers, JSONL: GSM8K's, HumanEval's or your own."
    ),
]
Tasks = Annotated[
    str | None, typer.Option(metavar="NAME[,NAME]", help="Tasks of lm-eval (needs hadal[eval]).")
]
Include = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="With --tasks: your own, as lm-eval's YAML files.")
]
Server = Annotated[
    str | None, typer.Option("--server", metavar="URL", help="With --tasks: a running server's model.")
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Problems of each task. Puzzles: 200; else all there are."),
]
Samples = Annotated[
    int | None,
    typer.Option(min=1, metavar="K", help="Answers to each problem: pass@1 and cons@K. Of a set: 4."),
]
Temperature = Annotated[
    float | None, typer.Option(help="Default: 0.6 as DeepSeek measures; one answer to a puzzle: 0.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Default: 0.95.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        min=1,
        metavar="N",
        help="Of an answer. Puzzles: 768; sets: 32,768 or what the context leaves; tasks: as they say.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of puzzles and samples; 0 is the held-out set of the model card.")]
FewShot = Annotated[
    int | None, typer.Option("--few-shot", min=0, metavar="N", help="With --tasks: examples.")
]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--plain", help="Ask in the chat template, or as text. Default: tasks as text."),
]
Instruction = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="With --set: put behind each problem, instead of what its kind has."),
]
Extract = Annotated[
    str | None,
    typer.Option(metavar="RULE[,RULE]", help="With --set: where an answer stands (boxed,bold,last-number)."),
]
Timeout = Annotated[
    float, typer.Option(min=0.1, metavar="S", help="With --set: for a program that a model wrote.")
]
Isolation = Annotated[
    Literal["seccomp", "limits"],
    typer.Option(help="With --set: what holds such a program; limits holds only what is not hostile."),
]
Check = Annotated[
    bool, typer.Option("--check", help="With --set: judge the set's own answers, without a model.")
]
Kept = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Keep results.json and samples.jsonl there.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what --out holds.")]
Seats = Annotated[
    int, typer.Option("--max-num-seqs", min=1, metavar="N", help="Answers that are made at once.")
]


@dataclass(frozen=True)
class Asked:
    """What was asked of the verb."""

    model: str | None
    problems: Path | None
    tasks: str | None
    include: Path | None
    server: str | None
    api_key: str | None
    limit: int | None
    samples: int | None
    temperature: float | None
    top_p: float | None
    max_tokens: int | None
    seed: int
    few_shot: int | None
    chat: bool | None
    think: bool | None
    system: str | None
    instruction: str | None
    extract: str | None
    timeout: float
    isolation: str
    check: bool
    out: Path | None
    resume: bool
    yes: bool
    force: bool
    json: bool

    def refuse_lonely(self) -> None:
        """Refuse flags that would be left unheard."""
        if self.problems is not None and self.tasks is not None:
            raise typer.BadParameter("--set and --tasks are two evaluations; ask for one at a time")
        for name in ("include", "server", "few_shot"):
            if getattr(self, name) is not None and self.tasks is None:
                raise typer.BadParameter(f"--{name.replace('_', '-')} goes with --tasks")
        for name in ("check", "instruction", "extract"):
            if getattr(self, name) not in (None, False) and self.problems is None:
                raise typer.BadParameter(f"--{name} goes with --set")
        for name in ("samples", "temperature", "top_p"):
            if getattr(self, name) is not None and self.tasks is not None:
                flag = f"--{name.replace('_', '-')}"
                raise typer.BadParameter(
                    f"{flag} is for puzzles and sets; a task of lm-eval says how it samples"
                )
        if self.resume and self.out is None:
            raise typer.BadParameter("--resume needs the --out that is to be taken up")

    def load(self, inference: o.Inference) -> tuple[Engine, dict[str, Any]]:
        """The engine, and what the results say of it."""
        from hadal.cli.loading import load_engine
        from hadal.evals.folder import described

        name = self.model or "hadal-mini"
        engine = load_engine(name, inference, yes=self.yes, force=self.force, quiet=self.json)
        how = {"quantize": inference.quantize, "offload": inference.offload}
        return engine, {**described(engine), **how}


def evaluate(
    model: Model = None,
    suite: Suite = "puzzles",
    problems: ProblemSet = None,
    tasks: Tasks = None,
    include: Include = None,
    server: Server = None,
    api_key: o.ApiKey = None,
    limit: Limit = None,
    samples: Samples = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    few_shot: FewShot = None,
    chat: Chat = None,
    think: o.Think = None,
    system: o.System = None,
    instruction: Instruction = None,
    extract: Extract = None,
    timeout: Timeout = 5.0,
    isolation: Isolation = "seccomp",
    check: Check = False,
    out: Kept = None,
    resume: Resume = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    quantize: o.Quantize = None,
    offload: o.Offload = None,
    expert_cache_gb: o.ExpertCache = None,
    max_num_seqs: Seats = 64,
    max_model_len: o.MaxModelLen = None,
    exact: o.Exact = False,
    yes: o.Yes = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Measure a model's accuracy, task by task.

    Puzzles are unseen ones, decoded greedily, with 95% intervals. A set (--set) is sampled as DeepSeek does:
    pass@1 is the mean over samples, cons@K the majority's answer. Tasks of lm-eval (--tasks) run here or
    through a server (--server), with the same score.

    Examples:
        hadal eval hadal-mini
        hadal eval hadal-mini --limit 50 --samples 16
        hadal eval deepseek-r1-distill-qwen-1.5b --set aime.jsonl --samples 64 --out runs/aime
        hadal eval --set HumanEval.jsonl.gz --check
        hadal eval qwen2.5-1.5b --tasks gsm8k,arc_easy --few-shot 5
        hadal eval --tasks my_task --include tasks --server http://127.0.0.1:11435 --chat
    """
    asked = Asked(
        model, problems, tasks, include, server, api_key, limit, samples, temperature, top_p, max_tokens,
        seed, few_shot, chat, think, system, instruction, extract, timeout, isolation, check, out, resume,
        yes, force, json,
    )  # fmt: skip
    asked.refuse_lonely()
    inference = o.Inference(
        device, dtype, quantize, max_model_len, max_num_seqs=max_num_seqs, exact=exact, offload=offload,
        expert_cache_gb=expert_cache_gb,
    )  # fmt: skip
    _measure(asked, partial(asked.load, inference))


def _measure(asked: Asked, load: Load) -> None:
    """The evaluation that was asked for. `load`: called once what needs no model has been checked."""
    from hadal.cli import evaluate_sets as sets

    if asked.tasks is not None:
        from hadal.cli import evaluate_tasks

        evaluate_tasks.run(asked, load)
    elif asked.problems is not None and asked.check:
        sets.check(asked.problems, asked)
    elif asked.problems is not None:
        sets.answers(asked.problems, asked, load)
    elif asked.samples is None and asked.temperature is None and asked.top_p is None and asked.out is None:
        sets.puzzles(asked, *load())
    else:
        sets.sampled_puzzles(asked, load)
