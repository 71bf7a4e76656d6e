"""`hadal bench serve`: a server under open-loop load."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hadal.cli import bench_common as common
from hadal.cli import options as o
from hadal.cli.terminal import BOLD, CliError, bar, human_seconds, note, paint, print_json, say, table

if TYPE_CHECKING:
    from hadal.bench.client import Endpoint
    from hadal.bench.load import LoadResult, Prompt
    from hadal.bench.server import Started

VOCAB = 1000  # token ids that any model has

Rates = Annotated[
    list[str] | None,
    typer.Option(
        "--rate",
        metavar="R",
        help="Requests a second, or inf: all at once. May be given again. Default: 1, 4.",
    ),
]
Requests = Annotated[int, typer.Option("--requests", min=1, help="Most requests of each rate.")]
Seconds = Annotated[
    float, typer.Option("--seconds", min=0.1, help="After which no more requests of a rate are sent.")
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.1, help="Seconds after which an answer is given up.")
]
Lengths = Annotated[
    str,
    typer.Option("--prompt", metavar="N[-M]", help="Tokens of each prompt, or from N to M at random."),
]
Dataset = Annotated[
    Path | None,
    typer.Option("--dataset", metavar="FILE", help="JSONL with prompt or messages instead of random tokens."),
]
SloFirst = Annotated[
    float, typer.Option("--slo-ttft", min=0, metavar="MS", help="A good answer's first token, in ms.")
]
SloToken = Annotated[
    float, typer.Option("--slo-token", min=0, metavar="MS", help="And its mean time for each later one.")
]
Seats = Annotated[
    int | None, typer.Option("--max-num-seqs", min=1, metavar="N", help="Seats of a server started here.")
]


def serve(
    model: o.Model = "hadal-mini",
    url: o.Url = None,
    rate: Rates = None,
    requests: Requests = 32,
    seconds: Seconds = 60.0,
    timeout: Timeout = 120.0,
    prompt: Lengths = "32-128",
    output: common.Output = 64,
    dataset: Dataset = None,
    slo_ttft: SloFirst = 1000.0,
    slo_token: SloToken = 100.0,
    seed: Annotated[int, typer.Option("--seed", help="Of arrivals and prompts.")] = 0,
    api_key: o.ApiKey = None,
    random_weights: common.RandomWeights = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    quantize: o.Quantize = None,
    exact: o.Exact = False,
    max_num_seqs: Seats = None,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """A server under load: waits, gaps, goodput, by request rate.

    Requests arrive by chance (Poisson) whether or not earlier ones are done, and are streamed through the
    public API. Without --url a server is started here, on loopback, and stopped at the end; then the
    ceiling of its output at the measured number of running requests stands beside the result.

    Examples:
        hadal bench serve --rate 2 --rate 8
        hadal bench serve --url http://127.0.0.1:11435 --rate inf --requests 100 --json
        hadal bench serve --dataset questions.jsonl --slo-ttft 500 --slo-token 50
    """
    import asyncio

    from hadal.bench import client, load

    rates = [_rate(text) for text in rate or ["1", "4"]]
    lengths = _lengths(prompt)
    slo = load.Slo(slo_ttft / 1000, slo_token / 1000)
    asked = o.Inference(
        device, dtype, quantize, lengths[1] + output if random_weights else None, max_num_seqs, exact=exact
    )
    own: Any = nullcontext() if url else _own_server(model, asked, random_weights, force, quiet=json)
    with own as started:
        endpoint = client.Endpoint.of(url or started.url, api_key)
        endpoint = asyncio.run(_ready(endpoint, started))
        watch = common.Watch(started.device, (started.pid,), quiet=json) if started else None
        vocab = started.vocab_size if started else VOCAB
        results = []
        for number, wanted in enumerate(rates):
            prompts = _prompts(dataset, requests, lengths, vocab, output, seed + number)
            with bar(f"{wanted:g} requests a second", unit_bytes=False, quiet=json) as update:
                offer = load.offer(
                    endpoint, prompts, wanted, seconds=seconds, timeout=timeout, slo=slo, seed=seed,
                    progress=update,
                )  # fmt: skip
                results.append(asyncio.run(offer))
            if started is not None and watch is not None:
                bandwidth = watch.ceilings.bandwidth
                results[-1].output_ceiling = _serving_ceiling(started, bandwidth, results[-1])
    if json:
        print_json(_serve_json(endpoint, started, watch, results))
    else:
        _print_serve(endpoint, started, watch, results)
    if not any(found.ok for found in results):
        why = next(iter(results[0].faults), "none sent")
        raise CliError(f"no request succeeded at {endpoint.url}: {why}")


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not value > 0:
        raise CliError(f"--rate {text} is no rate; give requests a second above 0, or inf for all at once", 2)
    return value


def _lengths(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        found = int(low), int(high or low)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise CliError(f"--prompt {text} is no length; give tokens as 128, or a range as 32-128", 2)
    return found


def _prompts(
    dataset: Path | None, count: int, lengths: tuple[int, int], vocab: int, output: int, seed: int
) -> list[Prompt]:
    from hadal.bench import load

    if dataset is not None:
        return load.prompts_of_file(dataset, count, output)
    return load.random_prompts(count, lengths, vocab, output, seed)


async def _ready(endpoint: Endpoint, started: Started | None) -> Endpoint:
    """The endpoint with a model's name, after one small request that warms up; a server that is just starting
    gets ten seconds. A server that cannot count tokens in each event is not asked to."""
    import asyncio

    from hadal.bench import client

    deadline = time.monotonic() + (10 if started is not None else 0)
    while True:
        try:
            known = await client.models(endpoint)
            break
        except client.ServerFault:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(0.1)
    if not known:
        raise CliError(f"{endpoint.url} serves no model; start one with `hadal serve MODEL`")
    endpoint = replace(endpoint, model=known[0])
    small = {"prompt": [1, 2, 3, 4], "max_tokens": 4}
    answer = await client.ask(endpoint, "/v1/completions", small, 60)
    if answer.fault is not None and answer.fault.startswith("status 4"):
        endpoint = replace(endpoint, exact=False)
    return endpoint


def _own_server(model: str, asked: o.Inference, random_weights: bool, force: bool, *, quiet: bool) -> Any:
    from hadal.bench.server import Wanted, own_server
    from hadal.cli.loading import introduce, name_of, prepare_model
    from hadal.weights.info import inspect

    options = asked.keywords()
    if random_weights:
        return own_server(Wanted(model, common.config_of(model), {**options, "force": force}))
    introduce(model, quiet=quiet)
    prepare_model(model, asked, force=force)
    return own_server(Wanted(model, None, {**options, "name": name_of(inspect(model))}))


def _serving_ceiling(started: Started, bandwidth: float, found: LoadResult) -> float:
    """Tokens a second that bandwidth allows with as many requests running as there were on average."""
    running = min(max(1.0, found.running), started.max_num_seqs)
    context = (found.input_tokens + found.output_tokens / 2) / max(1, found.ok)
    return running * bandwidth / started.work.bytes(round(running), context)


def _serve_json(
    endpoint: Endpoint,
    started: Started | None,
    watch: common.Watch | None,
    results: list[LoadResult],
) -> dict[str, Any]:
    server = {"url": endpoint.url, "model": endpoint.model, "own": started is not None}
    if started is not None:
        server |= {"device": started.device, "dtype": started.dtype, "quantize": started.quantize}
    measured = {"ceilings": None} if watch is None else watch.as_json()
    rows = [r.as_json() for r in results]
    return {**common.where(), "server": server, **measured, "results": rows}


def _print_serve(
    endpoint: Endpoint, started: Started | None, watch: common.Watch | None, results: list[LoadResult]
) -> None:
    packed = f", weights {started.quantize}" if started and started.quantize else ""
    where = f" ({started.dtype}{packed} on {started.device})" if started else ""
    say(paint(f"{endpoint.model}{where} at {endpoint.url}", BOLD))
    header = ["RATE/s", "DONE/s", "OK", "TTFT p50", "p90", "p99", "GAP p50", "p90", "p99", "WHOLE p50", "p99"]
    header += ["GOOD/s", "OUTPUT/s", *(["CEILING/s"] if started else [])]
    rows = []
    for r in results:
        waits = [r.ttft[k] for k in ("p50", "p90", "p99")] + [r.itl[k] for k in ("p50", "p90", "p99")]
        cells = [f"{r.rate:g}", f"{r.achieved_rate:.2f}", f"{r.ok}/{r.requests}"]
        cells += [_wait(s) for s in [*waits, r.e2e["p50"], r.e2e["p99"]]]
        cells += [f"{r.goodput:.2f}", f"{r.output_rate:,.1f}"]
        rows.append([*cells, *([f"{r.output_ceiling:,.0f}"] if r.output_ceiling else [])])
    table(header, rows, right=tuple(range(len(header))))
    slo = results[0].slo
    note(f"Good: first token within {_wait(slo['ttft_s'])}, then {_wait(slo['per_token_s'])} a token.")
    for r in results:
        if r.late_s > 0.05:
            note(f"At {r.rate:g}/s this client sent up to {_wait(r.late_s)} late: it was busy itself.")
        for fault, count in sorted(r.faults.items(), key=lambda item: -item[1])[:3]:
            note(f"At {r.rate:g}/s, {count} failed: {fault}")
    if watch is None:
        note("No ceiling: which machine and weights are behind the address is not known here.")
    else:
        watch.tell(False)


def _wait(s: float) -> str:
    if s != s:
        return "–"
    return f"{1000 * s:.1f} ms" if s < 0.1 else human_seconds(s)
