"""Every public case of the planner within its tolerance, and docs/planning.md equal to what is computed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hadal.cli.plan_tables import _error, _shown, fitted
from hadal.plan.accuracy import Case, as_json, cases

ROOT = Path(__file__).resolve().parents[2]
CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_public_case(case: Case) -> None:
    if case.tolerance is None:
        assert case.note, "a known miss must say why"
        assert abs(case.error) > 0.1, "this is no miss any more: give it a tolerance"
    else:
        assert abs(case.error) <= case.tolerance, f"{case.predicted} for {case.published}"


def test_exact_quantities_are_exact_and_our_own_times_within_a_fifth() -> None:
    for case in CASES:
        if case.unit in ("parameters", "elements") or case.id.startswith(("kv-", "bubble-")):
            assert case.tolerance is not None and case.tolerance <= 1e-4, case.id
        if case.sample == "in":
            assert case.tolerance is not None and case.tolerance <= 0.2, case.id
        assert (case.sample != "") == case.what.startswith("Hadal, ") == bool(case.result), case.id


def measured(file: str, key: str, race: int = 0) -> float:
    """A figure of benchmarks/results by the key that data/published.toml names it with."""
    found = json.loads((ROOT / "benchmarks" / "results" / file).read_text("utf-8"))
    model, what, *column = key.split(" | ")
    if "raw" in found:
        return float(found["raw"][model][what])
    if "races" in found:
        race_of = [r for r in found["races"] if r["model"] == model][race]
        return float(race_of["rows"][what]["hadal"]["median"])
    names = {"decode": "decode rate", "output": "output rate"}
    at = found["columns"].index(names[column[0]])
    return float(next(row[at] for row in found["rows"] if row[:2] == [model, what]))


@pytest.mark.parametrize("case", [c for c in CASES if c.result], ids=lambda c: c.id)
def test_our_own_figures_are_those_of_the_result_files(case: Case) -> None:
    assert case.published == pytest.approx(measured(*case.result), rel=1e-12)


def table() -> str:
    """The table of docs/planning.md."""
    lines = ["| case | predicted | published | error | fitted | source |", "|---|---:|---:|---:|---|---|"]
    rows = as_json()
    for r in rows:
        cells = (
            r["what"],
            _shown(r, "predicted"),
            _shown(r, "published"),
            _error(r),
            fitted(r["sample"]),
            r["source"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- *{r['what']}*: {r['note']}." for r in rows if r["note"])]
    return "\n".join(lines)


def test_the_page_shows_what_is_computed() -> None:
    page = (ROOT / "docs" / "planning.md").read_text("utf-8")
    shown = re.search(r"<!-- accuracy: begin -->\n(.*)\n<!-- accuracy: end -->", page, re.S)
    assert shown is not None
    assert shown[1] == table(), "run `python -m tests.plan.test_accuracy` to write it anew"


if __name__ == "__main__":
    path = ROOT / "docs" / "planning.md"
    text = path.read_text("utf-8")
    new = f"<!-- accuracy: begin -->\n{table()}\n<!-- accuracy: end -->"
    path.write_text(
        re.sub(r"<!-- accuracy: begin -->.*<!-- accuracy: end -->", lambda _: new, text, flags=re.S), "utf-8"
    )
