"""`hadal complete`: continues a text as it stands, without a chat template."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli.terminal import CliError, is_terminal, note, print_json, table

if TYPE_CHECKING:
    from hadal.engine import Engine, TokenLogprob, Update

Prompt = Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="The text; without it, stdin.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="Longest continuation.")]
Logprobs = Annotated[
    int | None,
    typer.Option(min=0, max=20, metavar="N", help="Log-probability of each token and of the N likeliest."),
]


def complete(
    model: o.Model,
    prompt: Prompt = None,
    max_tokens: MaxTokens = 128,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    seed: o.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    logprobs: Logprobs = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
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
    """Continue a text as it stands, without a chat template.

    Only the model's begin token, if it has one, goes before it.

    Examples:
        hadal complete hadal-mini "2, 4, 6, 8," --max-tokens 16 --temperature 0
        hadal complete hadal-mini "12 + 35 =" --logprobs 5 --json
        hadal complete deepseek-v2-lite --max-tokens 200 < story.txt
    """
    from hadal.cli.loading import introduce, load_engine

    if prompt is None:
        if is_terminal(sys.stdin):
            raise CliError("no text: give it as PROMPT, or on stdin", 2)
        prompt = sys.stdin.read()
    asked = o.Sampling(temperature, top_p, top_k, None, max_tokens, seed)
    asked.params({})
    introduce(model, quiet=json)
    how = o.Inference(
        device, dtype, quantize, max_model_len, exact=exact, speculation=speculation,
        num_speculative_tokens=speculative_tokens, offload=offload, expert_cache_gb=expert_cache_gb,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    engine = load_engine(model, how, yes=yes, force=force, quiet=json)
    params = asked.params(engine.sampling_defaults)
    params = replace(params, stop=tuple(stop or ()), logprobs=logprobs)
    if echo and not json:
        sys.stdout.write(prompt)
    updates, stopped = _stream(engine, prompt, params, quiet=json)
    _report(engine, prompt, updates, echo=echo, json=json)
    if stopped:
        from hadal.cli.guard import INTERRUPTED

        raise typer.Exit(INTERRUPTED)


def _stream(engine: Engine, prompt: str, params: Any, *, quiet: bool) -> tuple[list[Update], bool]:
    from hadal.cli.session import stoppable

    updates: list[Update] = []
    with stoppable() as stop:
        stream: Any = engine.stream(prompt, params)
        try:
            for update in stream:
                updates.append(update)
                if not quiet:
                    sys.stdout.write(update.text)
                    sys.stdout.flush()
                if stop.is_set():
                    break
        finally:
            stream.close()
    if not updates:
        raise CliError("the engine ended the answer before its first token; run again with HADAL_DEBUG=1")
    if updates[-1].error:
        raise CliError(f"the engine could not continue the text: {updates[-1].error}")
    return updates, stop.is_set()


def _report(engine: Engine, prompt: str, updates: list[Update], *, echo: bool, json: bool) -> None:
    from hadal.cli.meter import Rate
    from hadal.cli.speaker import bandwidth_share

    last = updates[-1]
    text = "".join(update.text for update in updates)
    chosen = [entry for update in updates for entry in update.logprobs or ()]
    rate = Rate.of_metrics(last)
    rate = replace(rate, bandwidth_share=bandwidth_share(engine, rate))
    if json:
        shown = [_logprob(engine, entry) for entry in chosen] if chosen else None
        print_json(
            {
                "model": engine.name,
                "text": prompt + text if echo else text,
                "finish_reason": last.finish_reason or "abort",
                "logprobs": shown,
                **rate.as_json(),
            }
        )
        return
    if not text.endswith("\n"):
        print(flush=True)
    if chosen:
        shown = [_logprob(engine, entry) for entry in chosen]
        rows = [
            (
                repr(s["token"]),
                f"{s['logprob']:.3f}",
                "  ".join(f"{t['token']!r} {t['logprob']:.3f}" for t in s["top"]),
            )
            for s in shown
        ]
        table(("token", "log-probability", "likeliest"), rows, right=(1,))
    note(rate.line())


def _logprob(engine: Engine, entry: TokenLogprob) -> dict[str, Any]:
    assert engine.tokenizer is not None  # the prompt was text
    word = engine.tokenizer.token_text
    top = [{"token": word(i), "id": i, "logprob": value} for i, value in entry.top]
    return {"token": word(entry.token_id), "id": entry.token_id, "logprob": entry.logprob, "top": top}
