"""The one function of the planner: plain data in and out, strict, costs and training by hand."""

from __future__ import annotations

import json
from math import inf
from typing import Any

import pytest

from hadal.config import preset
from hadal.plan import PlanError, answer, parse
from hadal.plan.cost import api_cost, api_price, api_prices, break_even, hourly, power
from hadal.plan.layout import Layout
from hadal.plan.pretraining import TrainingLayout, device_hours, memory, total

QUESTIONS: list[dict[str, Any]] = [
    {"ask": "run", "model": "deepseek-v3", "on": "8xH800", "batch": 64},
    {"ask": "run", "model": "deepseek-v3", "on": "8xh200", "mtp": 1, "acceptance": 0.85, "kv_dtype": "fp8"},
    {"ask": "cost", "model": "deepseek-v2-lite", "on": "a100-80", "tokens_in": 1e6, "tokens_out": 1e5,
     "api": "deepseek-chat"},
    {"ask": "training", "model": "deepseek-v3", "on": "2048xH800", "tokens": 14.8e12, "mfu": 0.3894,
     "pp": 16, "ep": 64},
    {"ask": "training", "model": "hadal-mini", "on": "h100", "tokens": 2e9},
    {"ask": "pipeline", "stages": 8, "micro_batches": 20, "schedule": "dualpipe"},
    {"ask": "pipeline", "stages": 5},
    {"ask": "devices"},
    {"ask": "prices"},
    {"ask": "accuracy"},
]  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q["ask"])
def test_answers_are_plain_data_with_provenance(question: dict[str, Any]) -> None:
    found = answer(json.loads(json.dumps(question)))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["ask"] == question["ask"]

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "formula" in value:
                assert value["source"] and value["unit"] is not None and value["formula"]
            for inner in value.values():
                walk(inner)
        if isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(found)


def test_a_model_by_its_config_and_the_machine_at_hand() -> None:
    config = preset("deepseek-v2-lite").config
    by_name = answer({"ask": "run", "model": "deepseek-v2-lite", "on": "h100", "context": 4096})
    by_shape = answer({"ask": "run", "model": config.to_hf(), "context": 4096}, parse("h100"))
    assert by_shape["memory"] == by_name["memory"] and by_shape["speeds"] == by_name["speeds"]


RUN: dict[str, Any] = {"ask": "run", "model": "deepseek-v3", "on": "h100"}
TRAIN: dict[str, Any] = {"ask": "training", "model": "deepseek-v3", "on": "h100", "tokens": 1e12}
COST: dict[str, Any] = {
    "ask": "cost",
    "model": "deepseek-v2-lite",
    "on": "h100",
    "tokens_in": 1,
    "tokens_out": 1,
}


@pytest.mark.parametrize(
    ("question", "complaint"),
    [
        ({}, "ask is None"),
        ({"ask": "rum"}, "use one of run, cost"),
        ({"ask": "run", "model": "deepseek-v3"}, "on which machine"),
        ({"ask": "run", "on": "h100"}, "which model"),
        (RUN | {"contxt": 1}, "unknown key 'contxt'.*context"),
        (RUN | {"batch": "2"}, "batch is '2'; it must be int"),
        (RUN | {"batch": True}, "batch is True"),
        (RUN | {"dtype": "fp4"}, "use one of int4"),
        (RUN | {"on": "/etc/hosts.toml"}, "unknown device"),
        (RUN | {"on": "9999999999xh100"}, "at most 1,000,000"),
        (
            RUN | {"model": preset("deepseek-v2").config.to_hf() | {"num_hidden_layers": 10**9}},
            "at most 1000",
        ),
        ({"ask": "pipeline", "stages": 10**6}, "at most 64 stages"),
        ({"ask": "pipeline", "stages": 4, "micro_batches": 10**6}, "512 micro-batches"),
        ({"ask": "training", "model": "deepseek-v3", "on": "h100"}, "how many tokens"),
        (TRAIN | {"mfu": 1.5}, "MFU is 1.5"),
        (TRAIN | {"tokens": inf}, "must be finite"),
        (TRAIN | {"recompute": ["x"]}, "recompute"),
        (COST | {"model": "deepseek-v3"}, "does not fit"),
        (COST | {"on": "a100-40", "hourly": -1}, "hourly is -1"),
        (TRAIN | {"on": "a100-40", "hourly": -1}, "hourly is -1"),
        (COST | {"tokens_in": 0, "tokens_out": 0}, "no experiment"),
    ],
)
def test_questions_are_read_strictly(question: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        answer(question)


# --- cost ---------------------------------------------------------------------------------------------------
def test_api_prices_by_date() -> None:
    with pytest.raises(PlanError, match="'yesterday' is no day"):
        api_price("deepseek-chat", "yesterday")
    r1 = api_price("deepseek-reasoner", "2025-02-01")
    assert (r1.input_hit, r1.input_miss, r1.output) == (0.14, 0.55, 2.19)
    assert api_price("deepseek-chat", "2025-03-01").output == 1.10
    assert api_price("deepseek-chat", "2025-09-10").input_miss == 0.56
    assert api_price("deepseek-chat").input_hit == 0.028
    assert all(p.source and p.since for p in api_prices())
    with pytest.raises(PlanError, match="the first is from 2025-01-20"):
        api_price("deepseek-reasoner", "2024-12-01")
    with pytest.raises(PlanError, match="Known: deepseek-chat, deepseek-reasoner"):
        api_price("gpt-5")


def test_costs_by_hand() -> None:
    price = api_price("deepseek-reasoner", "2025-02-01")
    assert api_cost(price, 1e6, 1e6).value == pytest.approx(2.74)
    assert api_cost(price, 2e6, 1e6, 0.5).value == pytest.approx(0.14 + 0.55 + 2.19)
    assert hourly(parse("2048xh800")).value == 4096 and hourly(parse("8xh20"), 1.5).value == 12
    assert power(parse("8xh100"), kwh=0.1, pue=1.25).value == pytest.approx(0.7)
    assert break_even(1800, 3e-7, 1e-7) == pytest.approx(9e9)
    assert break_even(1800, 1e-7, 3e-7) == inf
    with pytest.raises(PlanError, match="no hourly price is known for H20"):
        hourly(parse("h20"))
    with pytest.raises(PlanError, match="--watts"):
        power(parse("h20"))


def test_what_was_bought_breaks_even() -> None:
    question = {
        "ask": "cost", "model": "deepseek-v2-lite", "on": "rtx-4090", "dtype": "int4", "tokens_in": 1e6,
        "tokens_out": 1e5, "api": "deepseek-chat", "owned": 1800, "kwh": 0.30,
    }  # fmt: skip
    figures = {f["name"]: f["value"] for f in answer(question)["figures"]}
    api = next(v for k, v in figures.items() if k.startswith("API"))
    assert figures["break-even"] == pytest.approx(1800 / (api - figures["cost here"]) * 1.1e6)
    assert figures["cost here"] == pytest.approx(figures["hours here"] * 0.45 * 0.30)


@pytest.mark.parametrize(
    ("more", "flag"), [({}, "--hourly"), ({"owned": 9000}, "--watts"), ({"api": "deepseek-chat"}, "--hourly")]
)
def test_without_a_price_the_hours_are_told(more: dict[str, Any], flag: str) -> None:
    found = answer({**COST, "on": "h20", "tokens_in": 2e6, "tokens_out": 5e5, **more})
    figures = {f["name"].split(" (")[0]: f for f in found["figures"]}
    assert figures["hours here"]["value"] > 0 and flag in found["price_missing"]
    assert figures.keys() == {"hours here"} | ({"API"} if "api" in more else set())
    priced = answer({**COST, "on": "h20", "tokens_in": 2e6, "tokens_out": 5e5, "hourly": 2})
    cost = next(f["value"] for f in priced["figures"] if f["name"] == "cost here")
    assert priced["price_missing"] is None and cost == pytest.approx(2 * figures["hours here"]["value"])


# --- training -----------------------------------------------------------------------------------------------
def test_rows_are_no_longer_than_the_model_bears() -> None:
    mini, v3 = answer(QUESTIONS[4]), answer(QUESTIONS[3])
    assert (mini["sequence"], mini["sequence_short"]) == (2048, True)
    assert (v3["sequence"], v3["sequence_short"]) == (4096, False)
    assert mini["figures"] == answer({**QUESTIONS[4], "sequence": 2048})["figures"]
    with pytest.raises(PlanError, match="bears 1 to 2,048"):
        answer({**QUESTIONS[4], "sequence": 4096})


@pytest.mark.parametrize(
    ("model", "on", "layout"),
    [("hadal-mini", "h100", "one device"), ("deepseek-r1-distill-qwen-7b", "8xh100", "TP2 DP4"),
     ("deepseek-v2-lite", "8xh100", "DP8 EP4"), ("llama-3.1-405b", "16384xh100", "TP8 DP128 PP16")],
)  # fmt: skip
def test_a_layout_is_proposed_that_fits_where_smaller_ones_do_not(model: str, on: str, layout: str) -> None:
    found = answer({"ask": "training", "model": model, "on": on, "tokens": 1e12})
    assert found["layout"] == layout and found["needed"] <= found["usable"]
    assert found["layout_why"].startswith("proposed")
    if layout != "one device":
        least = answer({"ask": "training", "model": model, "on": on, "tokens": 1e12, "tp": 1})
        assert least["layout_why"] == "as given" and least["needed"] > least["usable"]


def test_where_no_layout_fits_it_is_said_why_and_what_would() -> None:
    question = {"ask": "training", "model": "deepseek-r1-distill-qwen-7b", "on": "8xh100", "tokens": 1e12}
    found = answer({**question, "sequence": 65536})
    assert found["needed"] > found["usable"] and "none of 9 fits" in found["layout_why"]
    assert "mostly activations" in found["layout_why"]
    assert "With all of --recompute TP4 DP2 fits" in found["layout_why"]
    again = answer({**question, "sequence": 65536, "recompute": ["norm", "up", "swiglu", "rows"]})
    assert (again["layout"], again["needed"] <= again["usable"]) == ("TP4 DP2", True)
    alone = answer({**question, "on": "h100"})["layout_why"]
    assert alone.startswith("it does not fit") and "mostly gradients" in alone and "more devices" in alone


def test_v3_on_2048_h800() -> None:
    found = answer(QUESTIONS[3])
    values = {f["name"]: f["value"] for f in found["figures"]}
    assert values["device hours"] == pytest.approx(2.664e6, rel=0.01)
    assert values["days"] == pytest.approx(54.2, rel=0.01) and values["cost"] == pytest.approx(
        5.328e6, rel=0.01
    )
    assert any("failed" in line for line in found["leaves_out"]) and len(found["leaves_out"]) >= 6
    assert [b["bubble"] for b in found["bubbles"]] == [45, 15, 14, 14]


def test_mfu_and_goodput_are_two_things() -> None:
    assert device_hours(3.6e18, 1e15, 0.5, 0.5) == pytest.approx(4.0)
    low, high = (
        {f["name"]: f["value"] for f in answer({**QUESTIONS[3], "goodput": g})["figures"]} for g in (1.0, 0.8)
    )
    assert high["device hours"] == pytest.approx(low["device hours"] / 0.8)
    assert high["FLOP/s a device"] == low["FLOP/s a device"]
    with pytest.raises(PlanError, match="goodput is 0"):
        device_hours(1, 1, 0.5, 0)


def test_memory_of_training_by_layout() -> None:
    config = preset("deepseek-r1-distill-qwen-7b").config
    n = config.parameters().main
    sizes = [
        {f.name: f.value for f in memory(config, TrainingLayout(Layout(dp=8), zero=zero))}
        for zero in range(4)
    ]
    assert sizes[0]["parameters"] == 2 * n and sizes[0]["masters, FP32"] == 4 * n
    assert sizes[1]["masters, FP32"] == n / 2 and sizes[1]["gradients, FP32"] == 4 * n
    assert sizes[2]["gradients, FP32"] == n / 2 and sizes[3]["parameters"] == n / 4
    plain, again = (
        total(memory(config, TrainingLayout(Layout(dp=8), recompute=kinds)))
        for kinds in ((), ("norm", "swiglu"))
    )
    assert again < plain
    with pytest.raises(PlanError, match="zero is 4"):
        memory(config, TrainingLayout(zero=4))


def test_dualpipe_takes_two_stages_a_device() -> None:
    v3 = preset("deepseek-v3").config
    x = Layout(dp=128, pp=16, ep=64)
    one, two = (
        {f.name: f.value for f in memory(v3, TrainingLayout(x, schedule=s))} for s in ("1f1b", "dualpipe")
    )
    assert 1.5 < two["parameters"] / one["parameters"] < 2
    assert two["activations"] / one["activations"] == pytest.approx(17 / 16)
    assert TrainingLayout(schedule="dualpipe").in_flight() == 1  # one stage is no pipeline
