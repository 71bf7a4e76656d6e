"""The plan page without a browser: controls → questions → HTML."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest

from hadal.plan import answer
from hadal.ui import plan_view as view
from hadal.ui.svg import Bar, Point, bars, decades, heat, log_lines, scatter

VALUES: dict[str, Any] = {
    "model": "deepseek-v3", "config": "", "device": "h200", "count": 8, "ram": 0, "other": "", "context": 0,
    "batch": 32, "prompt": 1024, "dtype": "", "kv_dtype": "", "offload": "", "mtp": 0, "acceptance": 0.85,
    "tp": 0, "dp": 0, "pp": 0, "ep": 0, "tokens_in": 10, "tokens_out": 1, "cache_hits": 0,
    "api": "deepseek-chat", "hourly": "", "owned": None,
    "train_on": "2048xh800", "train_tokens": 14.8, "mfu": 0.3894, "goodput": 1,
    "train_tp": 1, "train_pp": 16, "train_ep": 64, "zero": 1, "schedule": "dualpipe", "recompute": ["norm"],
    "fp8": True,
}  # fmt: skip


class Titles(HTMLParser):
    """What an HTML text shows, and what it says under the mouse."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_controls_become_the_planners_question() -> None:
    assert view.run_question(VALUES) == {
        "ask": "run", "model": "deepseek-v3", "on": "8xh200", "batch": 32, "prompt": 1024,
    }  # fmt: skip
    more = view.run_question(
        {
            **VALUES,
            "count": 1,
            "ram": 52,
            "config": '{"model_type": "llama"}',
            "mtp": 1,
            "tp": 4,
            "dtype": "fp8",
        }
    )
    assert more["model"] == {"model_type": "llama"} and more["on"] == "h200, 52GB RAM"
    assert (more["mtp"], more["acceptance"], more["tp"], more["dtype"]) == (1, 0.85, 4, "fp8")
    assert view.run_question({**VALUES, "other": " 64GB RAM "})["on"] == "64GB RAM"
    cost = view.cost_question({**VALUES, "hourly": "2.5"})
    assert (cost["tokens_in"], cost["hourly"]) == (10e6, 2.5) and "owned" not in cost
    training = view.training_question(VALUES)
    assert (training["tokens"], training["pp"], training["mfu"]) == (14.8e12, 16, 0.3894)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"config": "{"}, "not JSON"), ({"config": "[1]"}, "no JSON object"),
     ({"batch": "many"}, "batch is 'many'"), ({"ram": "inf"}, "ram is 'inf'"),
     ({"config": "[" * 100_000}, "not JSON")],
)  # fmt: skip
def test_what_cannot_be_asked_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(view.QuestionError, match=said):
        view.run_question({**VALUES, **change})


def test_what_fits_is_said_with_the_provenance_of_every_figure() -> None:
    found = answer(view.run_question(VALUES))
    page = Titles(view.run_html(found))
    assert "deepseek-v3 in FP8 fits 8 × H200" in page.text and "svg" in page.tags
    for figure in (*found["memory"], *found["speeds"]):
        assert view.provenance(figure) in page.titles or view.provenance(figure) in page.text
        assert figure["formula"] in page.text and figure["source"] in page.text  # and in the fold
    assert "sequences at once" in page.text and found["sweep"][-1]["limited_by"] in page.text


def test_what_does_not_fit_says_what_would_help() -> None:
    found = answer(view.run_question({**VALUES, "device": "a100-40", "count": 1, "ram": 52, "batch": 1}))
    page = Titles(view.run_html(found))
    assert "does not fit" in page.text and "no FP8 units" in page.text
    assert all(remedy in page.text for remedy in found["remedies"]) and found["remedies"]


def test_cost_and_training() -> None:
    prices = answer({"ask": "prices"})
    cost = Titles(view.cost_html(answer(view.cost_question(VALUES)), prices))
    assert "API" in cost.text and all(
        p["from"] in cost.text and p["source"] in cost.text for p in prices["api"]
    )
    owned = Titles(view.cost_html(answer(view.cost_question({**VALUES, "owned": 250_000})), prices))
    assert "Bought, it" in owned.text
    h20 = {**VALUES, "model": "deepseek-v2-lite", "device": "h20", "count": 1}
    without = Titles(view.cost_html(answer(view.cost_question(h20)), prices))
    assert "Dollars here are not told: no hourly price" in without.text
    free = view.training_question({**VALUES, "train_tp": 0, "train_pp": 0, "train_ep": 0})
    assert "proposed" in Titles(view.training_html(answer(free))).text
    found = answer(view.training_question(VALUES))
    training = Titles(view.training_html(found))
    assert "2,673,612 h of devices" in training.text and "MFU of 38.9%" in training.text
    assert all(line in training.text for line in found["leaves_out"])
    assert all(b["schedule"] in training.text for b in found["bubbles"])


def test_nothing_in_an_answer_becomes_html() -> None:
    found = answer(view.run_question(VALUES))
    evil = "<img src=x onerror=alert(1)>"
    page = Titles(view.run_html({**found, "model": evil, "notes": [evil], "on": evil}) + view.alarm(evil))
    assert "img" not in page.tags and page.text.count(evil) == 4


def test_plots_are_well_formed_and_stay_inside() -> None:
    plots = [
        bars([Bar("a & b", 3, "3 <GB>", "tip"), Bar("c", 1, "1", low=0.5, high=9)], "t", (5, "usable")),
        log_lines(
            [("x", [Point(1, 10), Point(512, 2000)]), ("y", [Point(1, 10), Point(512, 4)])], "t", "n", "r"
        ),
        scatter([Point(0, 0, "mid"), Point(1e-3, 5, "<top>"), Point(-2, 5, "top")], "t", "x", "y"),
        heat(["0 'a'", "1 'b'"], 256, [[0.0] * 256, [1.0] * 256], [[""] * 256, ["e"] * 256], "t", "expert"),
    ]
    for plot in plots:
        root = ElementTree.fromstring(plot)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for shape in root.iter("{http://www.w3.org/2000/svg}rect"):
            left, wide = float(shape.attrib["x"]), float(shape.attrib["width"])
            assert left >= 0 and left + wide <= width
        for dot in root.iter("{http://www.w3.org/2000/svg}circle"):
            assert 0 <= float(dot.attrib["cx"]) <= width and 0 <= float(dot.attrib["cy"]) <= height
    assert decades(4, 2000) == pytest.approx([5, 10, 20, 50, 100, 200, 500, 1000, 2000])
    assert decades(1, 1e6) == pytest.approx([10.0**i for i in range(7)])
