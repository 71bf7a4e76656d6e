"""One function that answers every question of the planner, as plain data in and out: for `--json`, the HTTP
API and pages. Strict: a key that nothing would read, or a value of the wrong kind, is refused by name.

    answer({"ask": "run", "model": "deepseek-v3", "on": "8xH800", "batch": 64})
    answer({"ask": "cost", "model": "deepseek-v2-lite", "on": "a100-80", "tokens_in": 1e6, "tokens_out": 1e5})
    answer({"ask": "training", "model": "deepseek-v3", "on": "2048xH800", "tokens": 14.8e12, "mfu": 0.3894})
    answer({"ask": "pipeline", "stages": 16, "micro_batches": 32})
    answer({"ask": "models"}), and alike: devices, prices, accuracy
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from hadal.config import PRESETS, ModelConfig, Preset
from hadal.plan import accuracy, cost, pipeline, pretraining
from hadal.plan.ask import Ask, Running
from hadal.plan.figures import Figure, PlanError, PriceMissing, known_keys
from hadal.plan.known import config_of
from hadal.plan.layout import Layout
from hadal.plan.machines import Machine, devices, parse
from hadal.plan.memory import CACHE_DTYPES, DTYPES
from hadal.plan.proposal import RECOMPUTE, propose
from hadal.plan.roofline import LEVELS, efficiency
from hadal.plan.serving import running

Json = Mapping[str, Any]
_NUMBER = (int, float)
_LAYOUT = {"tp": int, "dp": int, "pp": int, "ep": int}
_RUN: dict[str, Any] = {
    "model": (str, dict), "on": str, "dtype": DTYPES, "kv_dtype": CACHE_DTYPES, "context": int, "prompt": int,
    "batch": int, "mtp": int, "acceptance": _NUMBER, "offload": ("cpu", "disk"), **_LAYOUT,
}  # fmt: skip
_MONEY = {"hourly": _NUMBER, "kwh": _NUMBER, "watts": _NUMBER, "pue": _NUMBER}
KEYS: dict[str, dict[str, Any]] = {
    "run": _RUN,
    "cost": {
        **_RUN, **_MONEY, "tokens_in": _NUMBER, "tokens_out": _NUMBER, "cache_hits": _NUMBER, "api": str,
        "api_date": str, "owned": _NUMBER,
    },
    "training": {
        "model": (str, dict), "on": str, "tokens": _NUMBER, "sequence": int, "mfu": _NUMBER,
        "goodput": _NUMBER, "hourly": _NUMBER, **_LAYOUT, "zero": int, "schedule": pipeline.KINDS,
        "micro_batch": int, "recompute": list, "fp8": bool,
    },
    "pipeline": {
        "stages": int, "micro_batches": int, "forward": _NUMBER, "backward": _NUMBER, "weights": _NUMBER,
        "overlapped": _NUMBER, "schedule": pipeline.KINDS,
    },
    "models": {},
    "devices": {},
    "prices": {},
    "accuracy": {},
}  # fmt: skip
# Bounds of one answer, since questions may come from elsewhere.
MOST_LAYERS, MOST_EXPERTS, MOST_STAGES, MOST_MICRO_BATCHES = 1000, 10_000, 64, 512


def answer(question: Json, here: Machine | None = None) -> dict[str, Any]:
    """The answer as plain data. here: the machine that is meant where the question has no `on`.

    Raises PlanError (a ValueError) with cause, value and remedy. Reads no files.
    """
    ask = question.get("ask")
    if ask not in KEYS:
        raise PlanError(f"ask is {ask!r}; use one of {', '.join(KEYS)}")
    q = {key: value for key, value in question.items() if key != "ask" and value is not None}
    _judge(str(ask), q)
    match ask:
        case "run":
            return {"ask": ask, **running(ask_of(q, here)).as_json()}
        case "cost":
            return {"ask": ask, **_costs(q, here)}
        case "training":
            return {"ask": ask, **training(q, here)}
        case "pipeline":
            return {"ask": ask, **_pipelines(q)}
        case "models":
            return {"ask": ask, "models": [_preset(p) for p in PRESETS.values()]}
        case "devices":
            return {"ask": ask, "devices": [_device(d) for d in devices().values()]}
        case "prices":
            return {"ask": ask, **cost.prices_as_json()}
        case _:
            return {"ask": ask, "cases": accuracy.as_json()}


def _judge(ask: str, q: Json) -> None:
    """Keys and kinds of values."""
    allowed = KEYS[ask]
    known_keys(f"a question that asks {ask!r}", q, tuple(allowed))
    for key, value in q.items():
        kind = allowed[key]
        if isinstance(kind, tuple) and isinstance(kind[0], str):
            if value not in kind:
                raise PlanError(f"{key} is {value!r}; use one of {', '.join(kind)}")
            continue
        wrong = isinstance(value, bool) and kind is not bool
        if wrong or not isinstance(value, kind):
            names = kind if isinstance(kind, tuple) else (kind,)
            raise PlanError(f"{key} is {value!r}; it must be {' or '.join(k.__name__ for k in names)}")
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise PlanError(f"{key} is {value}; it must be finite")


def _model(q: Json) -> tuple[str, ModelConfig, int]:
    if "model" not in q:
        raise PlanError("which model? Give its name, or a config.json's content")
    if isinstance(q["model"], str):
        return config_of(q["model"])
    config = ModelConfig.from_hf(q["model"])
    experts = 0 if config.moe is None else config.moe.n_routed_experts
    if config.num_hidden_layers > MOST_LAYERS or experts > MOST_EXPERTS:
        raise PlanError(f"at most {MOST_LAYERS} layers and {MOST_EXPERTS} experts are planned for")
    return f"a {config.model_type} model", config, config.max_position_embeddings


def _machine(q: Json, here: Machine | None) -> Machine:
    if "on" in q:
        return parse(q["on"], files=False)
    if here is None:
        raise PlanError('on which machine? Give "on", such as "8xH800" or "A100-40GB, 52GB RAM"')
    return here


def ask_of(q: Json, here: Machine | None = None, model: tuple[str, ModelConfig, int] | None = None) -> Ask:
    """The question about running a model; `model` where its shape is already known."""
    name, config, stated = model or _model(q)
    return Ask(
        config=config,
        machine=_machine(q, here),
        name=name,
        stated_context=stated,
        dtype=q.get("dtype"),
        cache=q.get("kv_dtype"),
        context=q.get("context"),
        prompt=q.get("prompt", 1024),
        batch=q.get("batch", 1),
        drafts=q.get("mtp", 0),
        acceptance=q.get("acceptance"),
        offload=q.get("offload"),
        **{key: q.get(key) for key in _LAYOUT},
    )


# --- cost ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Costs:
    """What tokens cost here and by API. `price_missing`: why dollars here are not told, and what would."""

    run: Running
    figures: tuple[Figure, ...]
    price_missing: str | None

    def as_json(self) -> dict[str, Any]:
        """The whole answer."""
        return {
            "run": self.run.as_json(),
            "figures": [f.as_json() for f in self.figures],
            "price_missing": self.price_missing,
        }


def _costs(q: Json, here: Machine | None) -> dict[str, Any]:
    return costs(ask_of(q, here), q).as_json()


def costs(ask: Ask, q: Json) -> Costs:
    """What tokens in and out cost on a machine and by API. A model that does not fit has no cost there."""
    found = running(ask)
    if not found.fits:
        where = ask.machine.describe()
        raise PlanError(f"{ask.name} does not fit {where}; `hadal plan {ask.name}` says what would help")
    if found.why_no_speed:
        raise PlanError(found.why_no_speed)
    by_name = {f.name: f for f in found.speeds}
    fill, decode = by_name["prefill"], by_name["decode"]
    rates = {
        "pessimistic": (fill.low or 0.0, decode.low or 0.0),
        "typical": (fill.value, decode.value),
        "best": (fill.high or 0.0, decode.high or 0.0),
    }
    hour, missing = _an_hour(ask.machine, q)
    figures = cost.experiment(
        q.get("tokens_in", 0),
        q.get("tokens_out", 0),
        rates=rates,
        an_hour=hour,
        price=cost.api_price(q["api"], q.get("api_date")) if "api" in q else None,
        hits=q.get("cache_hits", 0.0),
        owned=q.get("owned"),
    )
    return Costs(found, tuple(figures), missing)


def _an_hour(machine: Machine, q: Json) -> tuple[Figure | None, str | None]:
    """Dollars of an hour: rent, or electricity of what is owned; or why they are not known."""
    try:
        if "owned" in q:
            return cost.power(machine, q.get("kwh"), q.get("watts"), q.get("pue")), None
        return cost.hourly(machine, q.get("hourly")), None
    except PriceMissing as missing:
        return None, str(missing)


# --- training -----------------------------------------------------------------------------------------------
def training(
    q: Json, here: Machine | None = None, model: tuple[str, ModelConfig, int] | None = None
) -> dict[str, Any]:
    """Hours, days and dollars, what they leave out, and the memory of a device under the layout."""
    name, config, _ = model or _model(q)
    machine = _machine(q, here)
    if "tokens" not in q:
        raise PlanError("how many tokens? Give tokens, such as 14.8e12")
    rent, missing = _an_hour(machine, q)
    sequence = q.get("sequence", pretraining.usual_sequence(config))
    goodput = q.get("goodput", 1.0)
    shares = {
        level: q["mfu"] if "mfu" in q else efficiency(machine.device.kind, level).train for level in LEVELS
    }
    runs = {
        level: pretraining.run(
            config, machine, q["tokens"], sequence=sequence, mfu=mfu, goodput=goodput, hourly=rent
        )
        for level, mfu in shares.items()
    }
    layout, why = _training_layout(q, config, machine, sequence)
    parts = pretraining.memory(config, layout)
    return {
        "model": name,
        "on": machine.describe(),
        "mfu": shares["typical"],
        "mfu_source": "as given" if "mfu" in q else efficiency(machine.device.kind, "typical").source,
        "goodput": goodput,
        "figures": [f.as_json() for f in runs["typical"].figures],
        "range": {level: {f.name: f.value for f in run.figures} for level, run in runs.items()},
        "leaves_out": list(pretraining.LEDGER),
        "price_known": rent is not None,
        "price_missing": missing,
        "sequence": sequence,
        "sequence_short": "sequence" not in q and sequence < pretraining.USUAL_SEQUENCE,
        "layout": layout.layout.describe(),
        "layout_why": why,
        "zero": layout.zero,
        "schedule": layout.schedule,
        "memory": [f.as_json() for f in parts],
        "needed": pretraining.total(parts),
        "usable": machine.usable,
        "bubbles": _bubbles(layout.layout.pp, pipeline.Times()) if layout.layout.pp > 1 else [],
    }


def _training_layout(
    q: Json, config: ModelConfig, machine: Machine, sequence: int
) -> tuple[pretraining.TrainingLayout, str]:
    """The layout that is asked for, else the planner's own; and where it comes from."""
    recompute = q.get("recompute", [])
    for kind in recompute:
        if kind not in RECOMPUTE:
            raise PlanError(f"recompute: {kind!r} is none of {', '.join(RECOMPUTE)}")
    tp, pp = q.get("tp", 1), q.get("pp", 1)
    dp = q.get("dp", max(1, machine.count // max(1, tp * pp)))
    asked = pretraining.TrainingLayout(
        Layout(tp, dp, pp, q.get("ep", 1)),
        zero=q.get("zero", 1),
        schedule=q.get("schedule", "1f1b"),
        micro_batch=q.get("micro_batch", 1),
        sequence=sequence,
        recompute=tuple(recompute),
        fp8=q.get("fp8", False),
    )
    if not _LAYOUT.keys() & q.keys():
        proposal = propose(config, machine, asked)
        return proposal.of, proposal.why
    asked.layout.check(config, machine.count)
    return asked, "as given"


# --- pipelines and devices ----------------------------------------------------------------------------------
def times_of(q: Json) -> pipeline.Times:
    """Durations of a stage's parts; V3's proportions unless given."""
    return pipeline.Times(
        q.get("forward", 1.0), q.get("backward", 2.0), q.get("weights", 1.0), q.get("overlapped")
    )


def _bubbles(stages: int, times: pipeline.Times) -> list[dict[str, Any]]:
    kinds = [k for k in get_args(pipeline.Kind) if stages % 2 == 0 or not k.startswith("dual")]
    return [
        {
            "schedule": pipeline.NAMES[kind],
            "bubble": pipeline.bubble(kind, stages, times),
            "devices": stages // 2 if kind == "dualpipev" else stages,
            **pipeline.costs(kind, stages),
            "source": "arXiv 2412.19437, table 2; DualPipe's repository",
        }
        for kind in kinds
    ]


def _pipelines(q: Json) -> dict[str, Any]:
    stages, times = q.get("stages", 16), times_of(q)
    if stages > MOST_STAGES or q.get("micro_batches", 0) > MOST_MICRO_BATCHES:
        raise PlanError(f"at most {MOST_STAGES} stages and {MOST_MICRO_BATCHES} micro-batches are drawn")
    found: dict[str, Any] = {"stages": stages, "bubbles": _bubbles(stages, times)}
    if "schedule" in q:
        line = pipeline.timeline(q["schedule"], stages, q.get("micro_batches", 2 * stages), times)
        found |= {
            "length": line.length,
            "bubble_carried_out": line.bubble,
            "timeline": [
                {
                    "device": d.device,
                    "start": d.start,
                    "end": d.end,
                    "parts": [
                        {"op": p.op, "stage": p.stage, "batch": p.batch, "way": p.way} for p in d.parts
                    ],
                }
                for d in line.done
            ],
        }
    return found


def _preset(p: Preset) -> dict[str, Any]:
    """What a chooser of models needs to know."""
    return {
        "name": p.name,
        "title": p.title,
        "context": p.context,
        "longest_context": p.config.max_position_embeddings,
        "parameters": p.config.parameters().main,
        "experts": p.config.moe is not None,
        "mtp": p.config.num_nextn_predict_layers,
    }


def _device(d: Any) -> dict[str, Any]:
    return {
        "name": d.name,
        "title": d.title,
        "memory_bytes": d.memory or None,
        "bandwidth_bytes_per_s": d.bandwidth,
        "flops": dict(d.flops),
        "link_bytes_per_s": d.link,
        "network_bytes_per_s": d.network,
        "watts": d.watts,
        "note": d.note,
        "source": d.source,
        "date": d.date,
    }
