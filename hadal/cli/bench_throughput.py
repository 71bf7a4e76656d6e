"""`hadal bench throughput`: many sequences at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hadal.cli import bench_common as common
from hadal.cli import options as o
from hadal.cli.terminal import bar, human_seconds, note, print_json, table

if TYPE_CHECKING:
    from hadal.bench.offline import Throughput
    from hadal.engine import Engine


def throughput(
    model: o.Model = "hadal-mini",
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, help="Sequences at once; may be given again. Default: 1, 4, 16."),
    ] = None,
    prompt: common.Prompt = 128,
    output: common.Output = 64,
    repeats: common.Repeats = 3,
    random_weights: common.RandomWeights = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    quantize: o.Quantize = None,
    exact: o.Exact = False,
    speculation: o.Speculation = None,
    speculative_tokens: o.SpeculativeTokens = None,
    forced_acceptance: common.ForcedAcceptance = None,
    threads: common.Threads = None,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Many sequences at once: prompts, answers, decoding alone.

    OUTPUT/s counts the generated tokens over all the time, DECODE/s over the time after the last prompt.
    The decode ceiling counts the experts that this model's gates really chose, on random tokens.

    Examples:
        hadal bench throughput
        hadal bench throughput hadal-mini --batch 1 --batch 32 --prompt 256 --output 128
        hadal bench throughput deepseek-r1-distill-qwen-1.5b --random --dtype bfloat16 --json
    """
    from hadal.bench import offline

    batches = sorted(set(batch or [1, 4, 16]))
    asked = o.Inference(
        device, dtype, quantize, max_num_seqs=max(batches), exact=exact, speculation=speculation,
        num_speculative_tokens=speculative_tokens, speculation_forced_acceptance=forced_acceptance,
    )  # fmt: skip
    engine = common.measured_engine(model, asked, prompt + output, random_weights, threads, force, quiet=json)
    watch = common.Watch(engine.device, quiet=json)
    results = []
    for size in batches:
        with bar(f"batch {size}", unit_bytes=False, quiet=json) as update:
            results.append(
                offline.throughput(
                    engine, watch.ceilings, batch=size, prompt=prompt, output=output, repeats=repeats,
                    progress=update,
                )
            )  # fmt: skip
    if json:
        print_json({**common.about(engine, watch), "results": [result.as_json() for result in results]})
    else:
        _print_throughput(engine, watch, results)


def _print_throughput(engine: Engine, watch: common.Watch, results: list[Throughput]) -> None:
    one = results[0]
    common.title(engine, f"prompts of {one.prompt} tokens, answers of {one.output}")
    header = ("BATCH", "FIRST", "PROMPT/s", "OF CEILING", "OUTPUT/s", "DECODE/s", "CEILING/s", "OF CEILING")
    rows = [
        (
            r.batch,
            human_seconds(r.first_token_s),
            f"{r.prefill_rate:,.0f}",
            common.percent(r.prefill_rate / r.prefill_ceiling),
            f"{r.output_rate:,.1f}",
            f"{r.decode_rate:,.1f}",
            f"{r.decode_ceiling:,.0f}",
            common.percent(r.decode_rate / r.decode_ceiling),
        )
        for r in results
    ]
    table(header, rows, right=tuple(range(8)))
    if one.experts_measured is not None:
        chosen = ", ".join(
            f"{r.experts_measured:.1f} ({r.experts_even:.1f} if even)" for r in results if r.experts_measured
        )
        note(f"Experts of a layer that a step touches: {chosen}.")
    for r in results:
        if r.acceptance is not None:
            accepted = common.percent(r.acceptance)
            note(
                f"Batch {r.batch}: {accepted} of the drafts accepted, {r.tokens_per_step:.2f} tokens a step."
            )
    watch.tell(any(r.decode_rate > r.decode_ceiling for r in results))
