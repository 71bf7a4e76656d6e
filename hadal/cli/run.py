"""`hadal run`: one answer, or a conversation, with a model loaded in this process."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hadal.cli import options as o
from hadal.cli.terminal import CliError, is_terminal, note, print_json, say

Prompt = Annotated[
    str | None,
    typer.Argument(metavar="[PROMPT]", help="One question; without it, a conversation. - reads stdin."),
]


def run(
    model: o.Model = "hadal-mini",
    prompt: Prompt = None,
    system: o.System = None,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    min_p: o.MinP = None,
    max_tokens: o.MaxTokens = None,
    seed: o.Seed = None,
    think: o.Think = None,
    hide_thinking: Annotated[
        bool, typer.Option("--hide-thinking", help="Do not print the reasoning.")
    ] = False,
    fold: o.Fold = False,
    then_chat: Annotated[
        bool, typer.Option("--then-chat", help="After PROMPT, go on as a conversation if this is a terminal.")
    ] = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    quantize: o.Quantize = None,
    cache_dtype: o.CacheDtype = "auto",
    offload: o.Offload = None,
    expert_cache_gb: o.ExpertCache = None,
    max_model_len: o.MaxModelLen = None,
    exact: o.Exact = False,
    speculation: o.Speculation = None,
    speculative_tokens: o.SpeculativeTokens = None,
    yes: o.Yes = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Talk to a model: one question, or a conversation.

    Its reasoning is shown dim behind a bar, then its answer, then the rate: tokens per second, the time to
    the first token, and the share of this machine's memory bandwidth that this is.

    Examples:
        hadal run
        hadal run hadal-mini "What is 12 + 35?"
        hadal run deepseek-r1-distill-qwen-1.5b --temperature 0.6 --max-tokens 2000
        cat question.txt | hadal run hadal-mini - --json
        hadal run ./my-model --device cuda --dtype bfloat16
    """
    from hadal.cli.loading import introduce, load_engine
    from hadal.cli.session import Session, leave
    from hadal.cli.speaker import LocalSpeaker

    question = read_prompt(prompt, json)
    sampling = o.Sampling(temperature, top_p, top_k, min_p, max_tokens, seed)
    sampling.params({})  # a bad value is refused before the model is loaded
    introduce(model, quiet=json)
    asked = o.Inference(
        device, dtype, quantize, max_model_len, exact=exact, speculation=speculation,
        num_speculative_tokens=speculative_tokens, offload=offload, expert_cache_gb=expert_cache_gb,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    speaker = LocalSpeaker(load_engine(model, asked, yes=yes, force=force, quiet=json))
    session = Session(speaker, sampling, system, think, fold)
    if question is None:
        leave(session.loop())
        return
    if then_chat and not json:
        say(f">>> {question}")
    one_shot(session, question, json=json, show_reasoning=not hide_thinking)
    if then_chat and not json and is_terminal(sys.stdin) and is_terminal(sys.stdout):
        leave(session.loop())


def read_prompt(prompt: str | None, json: bool) -> str | None:
    """The question: the argument, stdin for `-` or where stdin is no terminal; None for a conversation."""
    if prompt == "-" or (prompt is None and not is_terminal(sys.stdin)):
        text = sys.stdin.read().strip()
        if not text:
            raise CliError(
                "no question: give one as PROMPT, on stdin, or run in a terminal for a conversation", 2
            )
        return text
    if prompt is not None and not prompt.strip():
        raise CliError("the question is empty; leave PROMPT out for a conversation", 2)
    if prompt is None and json:
        raise CliError("--json answers one question: give it as PROMPT", 2)
    return prompt


def one_shot(session: object, question: str, *, json: bool, show_reasoning: bool) -> None:
    """Ask once and print; ends with status 130 if Ctrl-C stopped the answer."""
    from hadal.cli.guard import INTERRUPTED
    from hadal.cli.session import Printer, Session, answer_once, ending

    assert isinstance(session, Session)
    if json:
        messages = [*session.messages(), {"role": "user", "content": question}]
        answer, stopped = answer_once(session.speaker, messages, session.sampling, session.think, None)
        print_json(
            {
                "model": session.speaker.name,
                "content": answer.content,
                "reasoning": answer.reasoning,
                "finish_reason": answer.finish_reason,
                **answer.rate.as_json(),
            }
        )
    else:
        printer = Printer(fold=session.fold, show_reasoning=show_reasoning)
        answer, stopped = session.ask(question, printer)
        note(f"{answer.rate.line()}{ending(answer, stopped)}")
    if stopped:
        raise typer.Exit(INTERRUPTED)
