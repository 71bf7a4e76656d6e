"""Questions to the planner out of the page's controls, and its answers as HTML. Pure.

Every number that is shown carries where it comes from: formula, source and date when the mouse rests on it,
and again in a table that unfolds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hadal.ui.svg import HUES, Bar, Point, bars, log_lines, short

Json = Mapping[str, Any]
DTYPES = (
    ("as published", ""),
    ("BF16", "bf16"),
    ("FP8", "fp8"),
    ("INT8", "int8"),
    ("INT4", "int4"),
    ("FP32", "fp32"),
)
CACHES = (("as the weights suit", ""), ("BF16", "bf16"), ("FP8", "fp8"), ("FP32", "fp32"))
OFFLOADS = (("nothing", ""), ("experts to host memory", "cpu"), ("experts to the files", "disk"))
SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev")
RUN = (
    "model",
    "config",
    "device",
    "count",
    "ram",
    "other",
    "context",
    "batch",
    "prompt",
    "dtype",
    "kv_dtype",
    "offload",
    "mtp",
    "acceptance",
    "tp",
    "dp",
    "pp",
    "ep",
)
COST = ("tokens_in", "tokens_out", "cache_hits", "api", "hourly", "owned")
TRAINING = (
    "train_on",
    "train_tokens",
    "mfu",
    "goodput",
    "train_tp",
    "train_pp",
    "train_ep",
    "zero",
    "schedule",
    "recompute",
    "fp8",
)
PARTS = {"cache": 1, "activations": 2, "runtime": 3}


class QuestionError(ValueError):
    """A control holds what cannot be asked; the message says which and what would do."""


# --- questions ----------------------------------------------------------------------------------------------
def run_question(values: Json) -> dict[str, Any]:
    """The question "will it run" of the controls' values (by the names of RUN). Zero leaves a choice to the
    planner. Raises QuestionError."""
    found: dict[str, Any] = {"ask": "run", "model": _model(values), "on": machine(values)}
    for name in ("context", "batch", "prompt", "mtp", "tp", "dp", "pp", "ep"):
        if number := _number(values, name):
            found[name] = int(number)
    for name in ("dtype", "kv_dtype", "offload"):
        if values.get(name):
            found[name] = str(values[name])
    if found.get("mtp"):
        found["acceptance"] = _number(values, "acceptance")
    return found


def cost_question(values: Json) -> dict[str, Any]:
    """The question "at what cost": the run's, and tokens and prices."""
    found = {**run_question(values), "ask": "cost"}
    found["tokens_in"], found["tokens_out"] = (_number(values, n) * 1e6 for n in ("tokens_in", "tokens_out"))
    found["cache_hits"] = _number(values, "cache_hits")
    for name in ("hourly", "owned"):
        if values.get(name) not in (None, ""):
            found[name] = _number(values, name)
    if values.get("api"):
        found["api"] = str(values["api"])
    return found


def training_question(values: Json) -> dict[str, Any]:
    """The question about a training run. An MFU of 0 asks for the range."""
    found: dict[str, Any] = {
        "ask": "training",
        "model": _model(values),
        "on": str(values.get("train_on") or "").strip(),
        "tokens": _number(values, "train_tokens") * 1e12,
        "goodput": _number(values, "goodput"),
        "zero": int(_number(values, "zero")),
        "fp8": bool(values.get("fp8")),
        "recompute": list(values.get("recompute") or []),
    }
    found |= {n: x for n in ("tp", "pp", "ep") if (x := int(_number(values, f"train_{n}")))}
    if mfu := _number(values, "mfu"):
        found["mfu"] = mfu
    if values.get("schedule"):
        found["schedule"] = str(values["schedule"])
    return found


def machine(values: Json) -> str:
    """The machine in the planner's words: what is typed, or device, number and host memory."""
    typed = str(values.get("other") or "").strip()
    if typed:
        return typed
    count, ram = int(_number(values, "count")) or 1, _number(values, "ram")
    device = str(values.get("device") or "")
    return (f"{count}x{device}" if count > 1 else device) + (f", {ram:g}GB RAM" if ram else "")


def _model(values: Json) -> str | dict[str, Any]:
    pasted = str(values.get("config") or "").strip()
    if not pasted:
        return str(values.get("model") or "")
    try:
        found = json.loads(pasted)
    except (ValueError, RecursionError) as error:
        raise QuestionError(
            f"The pasted config.json is not JSON: {error}. Empty the box to use a name."
        ) from None
    if not isinstance(found, dict):
        raise QuestionError("The pasted config.json is no JSON object. Empty the box to use a name.")
    return found


def _number(values: Json, name: str) -> float:
    value = values.get(name)
    if value in (None, ""):
        return 0.0
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not abs(number) < 1e30:
        raise QuestionError(f"{name} is {str(value)[:30]!r}; it must be a number")
    return number


# --- numbers and their provenance ---------------------------------------------------------------------------
def amount(value: float | None, unit: str) -> str:
    """A value as people read it: "126.9 GB", "$5,576,000", "1,459 tokens/s"."""
    if value is None:
        return "never"
    if unit == "B":
        return f"{value / 1e9:,.1f} GB" if value >= 1e8 else f"{value / 1e6:,.1f} MB"
    if unit.startswith("$"):
        return f"${value:,.2f}{unit[1:]}" if value < 1000 else f"${value:,.0f}{unit[1:]}"
    if unit == "s":
        return f"{value:,.1f} s" if value >= 1 else f"{value * 1e3:,.3g} ms"
    if unit == "tokens" and value >= 1e9:
        return f"{value / 1e9:,.1f} billion tokens"
    if unit in ("FLOP", "FLOP/s") or value >= 1e12:
        return f"{value:.3g} {unit}" if value >= 1e15 else f"{short(value)} {unit}"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def provenance(figure: Json) -> str:
    """Formula, source and date in one line."""
    date = f" ({figure['date']})" if figure.get("date") else ""
    return f"{figure['name']}: {figure['formula']}. Source: {figure['source']}{date}"


def shown(figure: Json) -> str:
    """The figure's value, with its provenance under the mouse."""
    value = amount(figure["value"], figure["unit"])
    return f'<span class="hadal-figure" title="{escape(provenance(figure))}">{value}</span>'


def table(figures: Sequence[Json], heads: Sequence[str] = ("", "typical", "pessimistic to best")) -> str:
    """Figures with their ranges."""
    rows = []
    for f in figures:
        span = f"{amount(f['low'], f['unit'])} to {amount(f['high'], f['unit'])}" if "low" in f else ""
        rows.append(f"<tr><td>{escape(str(f['name']))}</td><td>{shown(f)}</td><td>{span}</td></tr>")
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return f'<table class="hadal-table"><tr>{head}</tr>{"".join(rows)}</table>'


def fold(figures: Sequence[Json]) -> str:
    """Where all these numbers come from, folded."""
    rows = "".join(_row([f["name"], f["formula"], f["source"]], f.get("date", "")) for f in figures)
    head = "<tr><th>figure</th><th>formula</th><th>source</th><th>date</th></tr>"
    return (
        '<details class="hadal-fold"><summary>Where these figures come from</summary>'
        f'<table class="hadal-table">{head}{rows}</table></details>'
    )


def _row(cells: Sequence[Any], date: Any) -> str:
    """A row of a table that ends with a date."""
    inner = "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
    return f'<tr>{inner}<td class="hadal-date">{escape(str(date))}</td></tr>'


def _list(items: Sequence[Any], kind: str = "") -> str:
    return (
        f'<ul class="{kind}">' + "".join(f"<li>{escape(str(x))}</li>" for x in items) + "</ul>"
        if items
        else ""
    )


def alarm(message: str) -> str:
    """A refusal, in the place of an answer."""
    return f'<div class="hadal-refusal" role="alert">{escape(message)}</div>'


# --- will it run --------------------------------------------------------------------------------------------
def run_html(a: Json) -> str:
    """The answer in words, memory by part, speeds, the sweep."""
    parts = [verdict(a), "<h3>Memory of the fullest device</h3>", memory_plot(a)]
    if a["speeds"]:
        parts += [
            "<h3>Speed</h3>",
            limits(a),
            table(a["speeds"]),
            "<h3>More sequences at once</h3>",
            sweep_plot(a),
        ]
    elif a["fits"] and a["why_no_speed"]:
        parts += ["<h3>Speed</h3>", f"<p>{escape(a['why_no_speed'])}</p>"]
    if a["notes"]:
        parts += ["<h3>Worth knowing</h3>", _list(a["notes"])]
    return "".join([*parts, fold([*a["memory"], a["needed"], a["usable"], *a["speeds"]])])


def verdict(a: Json) -> str:
    """Fits or not, and what to change."""
    need, have = shown(a["needed"]), shown(a["usable"])
    what = f"<b>{escape(a['model'])}</b> in {a['weights'].upper()}"
    where = f"{escape(a['on'])} ({escape(a['layout'])})"
    many = f", {a['batch']:,} sequences at once" if a["batch"] > 1 else ""
    if not a["fits"]:
        return (
            f'<div class="hadal-verdict hadal-no"><p>{what} <strong>does not fit</strong> {where}: '
            f"the fullest device needs {need} and has {have} to use, "
            f"for a context of {a['context']:,} tokens{many}.</p>"
            + (
                "<p>What would help:</p>" + _list(a["remedies"])
                if a["remedies"]
                else "<p>Nothing smaller helps.</p>"
            )
            + "</div>"
        )
    context = f"a context of {a['context']:,} tokens"
    if a["context"] < a["asked_context"]:
        context += f" (that is what fits; the model bears {a['asked_context']:,})"
    return (
        f'<div class="hadal-verdict hadal-yes"><p>{what} <strong>fits</strong> {where}: '
        f"{need} of {have} usable on the fullest device, with {context}{many}.{_pace(a)}</p></div>"
    )


def _pace(a: Json) -> str:
    by_name = {f["name"]: f for f in a["speeds"]}
    if not by_name:
        return ""
    each, first = by_name["decode, each sequence"], by_name["first token after"]
    return (
        f" Typically each sequence gets {shown(each)} ({amount(each['low'], each['unit'])} to "
        f"{amount(each['high'], each['unit'])}), the first after {shown(first)}."
    )


def limits(a: Json) -> str:
    """What limits prefill and decode."""
    by = a["limited_by"]
    return f"<p>Decode is limited by {escape(by['decode'])}; prefill by {escape(by['prefill'])}.</p>"


def memory_plot(a: Json) -> str:
    """Memory by part, and together beside what is usable."""
    rows = [
        Bar(f["name"], f["value"], amount(f["value"], "B"), provenance(f), _part_hue(f["name"]))
        for f in a["memory"]
    ]
    need = a["needed"]
    rows.append(
        Bar("together", need["value"], amount(need["value"], "B"), provenance(need), 4 if a["fits"] else 5)
    )
    usable = a["usable"]["value"]
    return bars(rows, "memory by part", (usable, f"usable: {amount(usable, 'B')}"))


def _part_hue(name: str) -> int:
    return next((hue for word, hue in PARTS.items() if word in name), 0)


def sweep_plot(a: Json) -> str:
    """Tokens a second over the number of sequences."""

    def line(key: str, of: str) -> list[Point]:
        return [
            Point(
                s["batch"],
                s[key],
                tip=f"{s['batch']:,} sequences: {s[key]:,.1f} tokens/s {of}, by {s['limited_by']}",
            )
            for s in a["sweep"]
            if s["batch"] > 0 and s[key] > 0
        ]

    together = line("tokens_per_s", "together")
    if len(together) < 2:
        return "<p>The cache holds no more sequences of this context.</p>"
    series = [("together", together), ("each sequence", line("per_sequence", "each"))]
    stages: list[str] = []
    for s in a["sweep"]:
        if not stages or stages[-1].split(": ", 1)[1] != s["limited_by"]:
            stages.append(f"from {s['batch']:,}: {s['limited_by']}")
    plot = log_lines(series, "tokens a second by sequences at once", "sequences at once", "tokens/s, typical")
    return plot + f'<p class="hadal-small">Limited by: {escape("; ".join(stages))}.</p>'


# --- cost ---------------------------------------------------------------------------------------------------
def cost_html(a: Json, prices: Json) -> str:
    """Cost here against the API's, and the API's prices by date."""
    figures = {f["name"]: f for f in a["figures"]}
    here = figures.get("cost here")
    api = next((f for name, f in figures.items() if name.startswith("API")), None)
    rows = []
    said = f"<p>Here it takes {shown(figures['hours here'])}"
    if here is None:
        said += f". Dollars here are not told: {escape(a['price_missing'])}"
    else:
        dollars = amount(here["value"], "$")
        rows.append(
            Bar("here", here["value"], dollars, provenance(here), 0, here.get("low"), here.get("high"))
        )
        said += f" and costs {shown(here)}"
    if api and here is not None:
        rows.append(Bar("API", api["value"], amount(api["value"], "$"), provenance(api), 1))
        times = here["value"] / api["value"] if api["value"] else float("inf")
        than = f"{times:,.1f} times as much as" if times >= 1 else f"{times:.0%} of"
        said += (
            f", {than} the {shown(api)} of the {escape(api['name'])} at its price of {escape(api['date'])}"
        )
    said += ".</p>"
    return "".join(
        [
            f'<div class="hadal-verdict">{said}</div>',
            bars(rows, "cost here and by API") if rows else "",
            table(a["figures"]),
            _even(figures),
            "<h3>API prices by date</h3>",
            price_table(prices),
            fold(a["figures"]),
        ]
    )


def _even(figures: Mapping[str, Json]) -> str:
    even = figures.get("break-even")
    if even is None:
        return ""
    if even["value"] is None:
        return "<p>Bought, it never pays: an own token costs more electricity than the API takes for it.</p>"
    return f"<p>Bought, it pays from {shown(even)} on.</p>"


def price_table(prices: Json) -> str:
    """Dollars per million tokens, with date and source."""
    names = ("name", "model", "in, cached", "in", "out", "source", "from")
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    rows = "".join(
        _row(
            [
                p["name"],
                p["model"],
                *(f"${p[k]:g}" for k in ("input_hit", "input_miss", "output")),
                p["source"],
            ],
            p["from"],
        )
        for p in prices.get("api", [])
    )
    small = '<p class="hadal-small">Dollars per million tokens.</p>'
    return f'<table class="hadal-table">{head}{rows}</table>{small}'


# --- training -----------------------------------------------------------------------------------------------
def training_html(a: Json) -> str:
    """Hours, days, dollars; what they leave out; memory and bubbles of the layout."""
    figures = {f["name"]: f for f in a["figures"]}
    days, hours = figures["days"], figures["device hours"]
    said = f"<p><b>{escape(a['model'])}</b> on {escape(a['on'])}: {shown(days)}, {shown(hours)} of devices"
    said += f", {shown(figures['cost'])}" if "cost" in figures else "; no price an hour is known"
    said += f", at an MFU of {a['mfu']:.1%} and a goodput of {a['goodput']:.0%}.</p>"
    fits = a["needed"] <= a["usable"]
    needs = "needs" if fits else "<strong>would need</strong>"
    memory = (
        f"<p>In the layout {escape(a['layout'])}, ZeRO-{a['zero']}, {escape(a['schedule'])}, the fullest "
        f"device {needs} {amount(a['needed'], 'B')} of {amount(a['usable'], 'B')} usable, with rows of "
        f"{a['sequence']:,} tokens. The layout is {escape(a['layout_why'])}.</p>"
    )
    rows = [
        Bar(f["name"], f["value"], amount(f["value"], "B"), provenance(f), i)
        for i, f in enumerate(a["memory"])
    ]
    plot = bars(rows, "memory of training by part", (a["usable"], f"usable: {amount(a['usable'], 'B')}"))
    ledger = "<h3>What such a figure leaves out</h3>" + _list(a["leaves_out"])
    source = f'<p class="hadal-small">MFU: {escape(a["mfu_source"])}.</p>'
    heading = "<h3>Memory of the fullest device</h3>"
    return "".join(
        [
            f'<div class="hadal-verdict">{said}</div>',
            _spans(a),
            source,
            heading,
            memory,
            plot,
            _bubbles(a["bubbles"]),
            ledger,
            fold([*a["figures"], *a["memory"]]),
        ]
    )


def _spans(a: Json) -> str:
    """The figures with the range between pessimistic and best, where the MFU is not given."""
    low, high = a["range"]["pessimistic"], a["range"]["best"]
    return table(
        [
            {**f, "low": low[f["name"]], "high": high[f["name"]]} if low[f["name"]] != high[f["name"]] else f
            for f in a["figures"]
        ]
    )


def _bubbles(rows: Sequence[Json]) -> str:
    if not rows:
        return ""
    drawn = [
        Bar(b["schedule"], b["bubble"], f"{b['bubble']:g} F", f"{b['schedule']}: {b['source']}", 3)
        for b in rows
    ]
    said = "Idle time of each device, in forward passes of a stage; a backward takes two."
    said = f'<p class="hadal-small">{said}</p>'
    return "<h3>Bubble by schedule</h3>" + bars(drawn, "pipeline bubbles") + said


def legend(names: Sequence[str]) -> str:
    """Coloured dots with their names."""
    dots = "".join(
        f'<span><i style="background:{HUES[i % 8]}"></i>{escape(n)}</span>' for i, n in enumerate(names)
    )
    return f'<p class="hadal-legend">{dots}</p>'
