"""`hadal embed`: texts to vectors, out of any layer, in a file that says who made them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hadal.cli import options as o
from hadal.cli.terminal import CliError, bar, human_seconds, is_terminal, note, print_json, say

if TYPE_CHECKING:
    from hadal.probe.backends import Backend, Item
    from hadal.probe.identity import Embeddings

Pool = Literal["mean", "last", "weighted", "span", "span-last"]

Texts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[TEXT]...", help="The texts; without them and --input, lines of stdin."),
]
Model = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=o.MODEL_HELP)]
Source = Annotated[
    Path | None,
    typer.Option("--input", "-i", metavar="FILE", help="A .jsonl, or a .txt with a text a line."),
]
TextField = Annotated[str, typer.Option("--field", help="Where a row of .jsonl has its text.")]
IdField = Annotated[str, typer.Option(help="Where it has its name; rows without are numbered.")]
SpanField = Annotated[
    str | None,
    typer.Option(help="Where it has its target: [begin, end] in characters, pairs of these, or a word."),
]
Layer = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N]",
        help="0: the embedding, i: the output of block i, -1: after the final norm (default); or all.",
    ),
]
Pooling = Annotated[
    Pool | None,
    typer.Option(help="Of which tokens the vector is made; default: span with --span-field, else mean."),
]
Special = Annotated[bool, typer.Option("--special", help="Pool BOS and other control tokens too.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help=".parquet, .npy or .jsonl; default: JSONL to stdout."),
]
Service = Annotated[
    Literal["local", "endpoint", "simulate"],
    typer.Option(help="A model here, a service at --url, or made-up vectors, marked as such."),
]
ServiceUrl = Annotated[str | None, typer.Option(metavar="URL", help="With endpoint: its address, …/v1.")]
Cache = Annotated[
    Path | None, typer.Option(metavar="FILE", help="With endpoint: keep what came, to go on later.")
]
Rpm = Annotated[float | None, typer.Option(min=0.01, help="With endpoint: requests a minute.")]
Tpm = Annotated[float | None, typer.Option(min=1, help="With endpoint: tokens a minute.")]
Price = Annotated[
    float | None, typer.Option(min=0, help="With endpoint: of a million tokens, for --estimate.")
]
EstimateOnly = Annotated[bool, typer.Option("--estimate", help="Say what it would take, and stop.")]


def embed(
    texts: Texts = None,
    model: Model = "hadal-mini",
    source: Source = None,
    text_field: TextField = "text",
    id_field: IdField = "id",
    span_field: SpanField = None,
    layer: Layer = None,
    pool: Pooling = None,
    special: Special = False,
    out: Out = None,
    backend: Service = "local",
    url: ServiceUrl = None,
    api_key: o.ApiKey = None,
    cache: Cache = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    price: Price = None,
    seed: Annotated[int, typer.Option(help="With simulate.")] = 0,
    estimate: EstimateOnly = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    quantize: o.Quantize = None,
    yes: o.Yes = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Turn texts into vectors: the hidden states of a model.

    No padding and no control token gets into a vector. Files carry who made them, and do not open under
    another name.

    Examples:
        hadal embed "I see the moon." "Je vois la lune."
        hadal embed -m qwen2.5-1.5b -i words.jsonl --span-field word --layer all -o words.parquet
        hadal embed -i texts.txt --backend endpoint --url http://127.0.0.1:11435/v1 --cache kept.sqlite
    """
    from hadal.probe import table
    from hadal.probe.backends import Local, check_items

    if out is not None:
        _check_out(table.ending(out), source)
    items, columns = _items(texts, source, text_field, id_field, span_field)
    layers = _layers(layer, backend)
    check_items(items)
    asked = o.Inference(device, dtype, quantize)
    service = {"url": url, "api_key": api_key, "cache": cache, "requests_per_minute": rpm}
    service |= {"tokens_per_minute": tpm, "price": price}
    maker = _backend(backend, model, asked, service, seed, special, (yes, force, json))
    if estimate:
        _tell_estimate(maker, items, backend, json)
        return
    pooling: Pool | None = pool or ("span" if span_field is not None else None)
    if isinstance(maker, Local) and (pooling or "").startswith("span") and (cut := maker.clipped(items)):
        note(f"{len(cut)} targets share a token with a neighbour, the first: {cut[0]!r}")
    begin = time.perf_counter()
    with bar("embedding", unit_bytes=False, quiet=json) as update:
        found = maker.embed(items, layers, pooling, progress=update)
    _give(found, columns, out, time.perf_counter() - begin, json)


def _items(
    texts: list[str] | None, source: Path | None, text_field: str, id_field: str, span_field: str | None
) -> tuple[list[Item], dict[str, list[Any]]]:
    """Texts, and columns to write beside their vectors."""
    from hadal.probe.backends import Item
    from hadal.probe.texts import from_lines, read_items

    if texts and source is not None:
        raise CliError("give texts or --input, not both", 2)
    if source is not None:
        items, rows = read_items(source, text_field=text_field, id_field=id_field, span_field=span_field)
        taken = {id_field, text_field, "id", "text", "span", "vectors"}
        if span_field is not None and not all(isinstance(row[span_field], str) for row in rows):
            taken.add(span_field)
        return items, {"text": [item.text for item in items], **_columns(rows, taken)}
    if span_field is not None:
        raise CliError("--span-field belongs to an --input of .jsonl", 2)
    if not texts and is_terminal(sys.stdin):
        raise CliError("no texts: give them as arguments, with --input, or on stdin", 2)
    items = [Item(str(i), text) for i, text in enumerate(texts)] if texts else from_lines(sys.stdin)
    return items, {"text": [item.text for item in items]}


def _check_out(out: Path, source: Path | None) -> None:
    """Refuses, before anything runs, a place where nothing can be written, and the input itself."""
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise CliError(f"--out {out} is the input: it would be overwritten; name another file", 2)
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise CliError(f"--out {out} cannot be written; name a file in a folder that can", 2)


def _columns(rows: list[dict[str, Any]], taken: set[str]) -> dict[str, list[Any]]:
    """Fields of texts, numbers or truth values, one kind a column; None where a row lacks it. Says which
    others are left out."""
    found: dict[str, list[Any]] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values} - {type(None)}
        if name in taken or name.startswith("layer_"):
            continue
        if kinds in ({str}, {bool}) or (kinds and kinds <= {int, float}):
            found[name] = values
        else:
            note(f"field {name!r} is not written beside the vectors: it is not text or number in every row")
    return found


def _layers(layer: str | None, backend: str) -> list[int] | None:
    """As backends take them: None is their default, which for a model here would be all."""
    if layer is None:
        return None if backend == "endpoint" else [-1]
    if layer == "all":
        if backend == "endpoint":
            raise CliError("name the layers: a service does not say how many it has", 2)
        return None
    try:
        return [int(n) for n in layer.split(",")]
    except ValueError:
        raise CliError(f"--layer is numbers with commas between, or all, not {layer!r}", 2) from None


def _backend(
    backend: str, model: str, asked: o.Inference, service: dict[str, Any], seed: int, special: bool,
    manner: tuple[bool, bool, bool],
) -> Backend:  # fmt: skip
    given = [name for name, value in service.items() if value is not None and name != "api_key"]
    if backend != "endpoint" and given:
        raise CliError(f"--{given[0].split('_')[0]} belongs to --backend endpoint", 2)
    if special and backend != "local":
        raise CliError("--special belongs to a model here", 2)
    if backend == "endpoint":
        from hadal.probe.endpoint import Endpoint

        if service["url"] is None:
            raise CliError("--backend endpoint needs --url", 2)
        return Endpoint(model=model, **service)
    if backend == "simulate":
        from hadal.probe.backends import Simulation

        return Simulation(seed=seed)
    from hadal.cli.loading import prepare_model
    from hadal.probe.backends import Local

    yes, force, quiet = manner
    prepare_model(model, asked, yes=yes, force=force)
    with bar(f"loading {model}", quiet=quiet) as update:
        return Local(
            model, device=asked.device, dtype=asked.dtype, quantize=asked.quantize, special=special,
            progress=update,
        )  # fmt: skip


def _tell_estimate(maker: Backend, items: list[Item], backend: str, json: bool) -> None:
    from dataclasses import asdict

    told = maker.estimate(items)
    if json:
        print_json(asdict(told))
        return
    seconds = "time unknown" if told.seconds is None else human_seconds(told.seconds)
    cost = "" if told.cost is None else f", cost {told.cost:.4g}"
    asked = f"{told.requests:,} {'pass' if backend == 'local' else 'request'}"
    asked += "" if told.requests == 1 else "es" if backend == "local" else "s"
    say(f"{told.texts:,} texts, {told.tokens:,} tokens, {asked}, {seconds}{cost}")
    note(told.note)


def _give(
    found: Embeddings, columns: dict[str, list[Any]], out: Path | None, seconds: float, json: bool
) -> None:
    from hadal.probe import table

    if out is not None:
        table.write(out, found, columns)
    if json:
        vectors = {} if out is not None else {"vectors": found.vectors.tolist()}
        body = {"identity": found.identity.to_json(), "digest": found.digest(), "ids": found.ids}
        print_json(body | {"width": found.vectors.shape[2], "seconds": seconds, "out": out} | vectors)
        return
    if out is None:
        for line in table.lines(found, columns):
            say(line)
    n, layers, width = found.vectors.shape
    note(found.identity.label())
    where = f" to {out}" if out is not None else ""
    counted = f"{n} text{'s' * (n > 1)}, {layers} layer{'s' * (layers > 1)} of {width}"
    note(f"{counted}{where} in {human_seconds(seconds)}")
