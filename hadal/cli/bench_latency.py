"""`hadal bench latency`: one sequence: first token, time per token, start-up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hadal.cli import bench_common as common
from hadal.cli import options as o
from hadal.cli.terminal import bar, fields, human_bytes, human_seconds, print_json, say, table

if TYPE_CHECKING:
    from hadal.bench.offline import Latency
    from hadal.engine import Engine


def latency(
    model: o.Model = "hadal-mini",
    prompt: common.Prompt = 128,
    output: common.Output = 64,
    repeats: common.Repeats = 5,
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
    """One sequence: first token, time per token, start-up.

    A decode step reads the weights that it touches and the cache, so bandwidth / bytes is its ceiling. A
    prompt costs its FLOP at the rate of matrix products, and at least one reading of the weights.
    Start-up is split into imports, loading, and what the first request takes beyond a later one.

    Examples:
        hadal bench latency
        hadal bench latency deepseek-v2-lite --random --quantize int8 --prompt 256
        hadal bench latency hadal-mini --threads 1 --json
    """
    begin = time.perf_counter()
    from hadal.bench import offline

    imported = time.perf_counter() - begin
    asked = o.Inference(
        device, dtype, quantize, max_num_seqs=1, exact=exact, speculation=speculation,
        num_speculative_tokens=speculative_tokens, speculation_forced_acceptance=forced_acceptance,
    )  # fmt: skip
    begin = time.perf_counter()
    engine = common.measured_engine(model, asked, prompt + output, random_weights, threads, force, quiet=json)
    loaded = time.perf_counter() - begin
    watch = common.Watch(engine.device, quiet=json)
    with bar("measuring", unit_bytes=False, quiet=json) as update:
        found = offline.latency(
            engine, watch.ceilings, prompt=prompt, output=output, repeats=repeats, progress=update
        )
    start = {"import_s": imported, "load_s": loaded, **found.startup}
    found.startup = {**start, "total_s": imported + loaded + found.startup["first_token_s"]}
    if json:
        print_json({**common.about(engine, watch), "result": found.as_json()})
    else:
        _print_latency(engine, watch, found)


def _print_latency(engine: Engine, watch: common.Watch, found: Latency) -> None:
    common.title(engine, f"one sequence, {found.prompt} tokens in, {found.output} out")
    ms = 1000.0
    rows = [
        (
            "time to first token",
            f"{found.ttft_p50_s * ms:,.2f} ms",
            f"{found.ttft_p95_s * ms:,.2f} ms",
            f"{found.ttft_floor_s * ms:,.2f} ms",
            common.percent(found.ttft_share),
        ),
        (
            "time per token",
            f"{found.per_token_p50_s * ms:,.2f} ms",
            f"{found.per_token_p95_s * ms:,.2f} ms",
            f"{ms / found.decode_ceiling:,.2f} ms",
            common.percent(1 / (found.per_token_p50_s * found.decode_ceiling)),
        ),
    ]
    table(("", "MEDIAN", "95%", "CEILING", "OF CEILING"), rows, right=(1, 2, 3, 4))
    say(
        f"{found.decode_rate:,.1f} tokens/s in the best run, of {found.decode_ceiling:,.0f} that "
        f"{human_bytes(found.step_bytes)} a step allow ({common.percent(found.decode_share)})"
    )
    if found.acceptance is not None:
        accepted = common.percent(found.acceptance)
        say(f"speculation: {accepted} of the drafts accepted, {found.tokens_per_step:.2f} tokens a step")
    say()
    fields((name, human_seconds(found.startup[key])) for name, key in _STARTUP)
    watch.tell(found.decode_rate > found.decode_ceiling)


_STARTUP = (
    ("imports", "import_s"),
    ("loading", "load_s"),
    ("first token, cold", "first_token_s"),
    ("  of it warm-up", "warm_up_s"),
    ("start to first token", "total_s"),
)
