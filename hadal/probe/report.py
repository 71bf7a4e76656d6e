"""A study as a folder: report.html (one file that loads nothing), tables, figures, results.json, recipe.json.

`results.json` depends on recipe, data, seed and models alone: the same run gives the same bytes. When it was
run, and how long it took, is in run.json.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hadal import __version__
from hadal.probe.identity import Identity
from hadal.probe.outcome import LayerCurve, Made, StudyOutcome
from hadal.probe.report_page import esc, page
from hadal.probe.study_figures import draw
from hadal.probe.verdicts import Verdict, summary, verdicts

__all__ = ["as_json", "draw", "esc", "identity_json", "page", "tables", "write"]


def write(
    outcome: StudyOutcome, folder: Path, run: Mapping[str, Any] | None = None, *, pictures: bool = True
) -> Path:
    """All files of a study; gives the report's path. `run`: what belongs to this run alone (time, date).
    `pictures` take half a second each."""
    folder.mkdir(parents=True, exist_ok=True)
    found = verdicts(outcome)
    results = as_json(outcome, found)
    _json(folder / "results.json", results)
    _json(folder / "recipe.json", outcome.recipe.to_dict())
    if run is not None:
        _json(folder / "run.json", dict(run))
    tables(outcome, found, folder / "tables")
    drawn = draw(outcome, folder / "figures") if pictures else []
    report = folder / "report.html"
    report.write_text(page(outcome, found, drawn), "utf-8")
    return report


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")


def identity_json(identity: Identity) -> dict[str, Any]:
    """Who made the vectors, without the date, which is the run's."""
    return {key: value for key, value in identity.to_json().items() if key != "date"}


def as_json(outcome: StudyOutcome, found: Sequence[Verdict]) -> dict[str, Any]:
    """Everything, as plain data that depends on nothing but what was asked."""
    checks = outcome.gathered.checks
    return {
        "format": "hadal study 1",
        "hadal": __version__,
        "simulation": outcome.is_simulation,
        "summary": summary(list(found)),
        "recipe": outcome.recipe.to_dict(),
        "data": {"digest": outcome.gathered.digest, "sizes": checks.sizes, "findings": checks.findings,
                 "confounds": checks.confounds},
        "makers": [_maker_row(made) | {"identity": identity_json(made.identity)} for made in outcome.made],
        "verdicts": [vars(v) for v in found],
        "results": [e.row() for e in outcome.entries],
        "curves": [_curve_row(c) for c in outcome.curves],
        "grids": {lang: {"names": names, "debiased CKA": np.round(v, 6).tolist()}
                  for lang, (names, v) in outcome.grids.items()},
        "refused": [dict(zip(("model", "language", "test", "why"), r, strict=True)) for r in outcome.refused],
        "clipped targets": outcome.clipped,
    }  # fmt: skip


def _maker_row(made: Made) -> dict[str, Any]:
    return {
        "model": made.maker.title, "role": made.maker.role, "language": made.material.language,
        "layers": list(made.layers), "primary layer": made.layers[made.primary],
        "normaliser": "+".join(made.fitted_steps), "fitted on": made.fitted,
        "IsoScore before": made.isotropy[0], "IsoScore after": made.isotropy[1],
    }  # fmt: skip


def _curve_row(row: LayerCurve) -> dict[str, Any]:
    c = row.curve
    numbers = {
        name: getattr(c, f"{name}_L").tolist() for name in ("statistic", "null_mean", "low", "high", "band")
    }
    corrected = [r.p_corrected for r in c.results]
    own = {"model": row.model, "role": row.role, "language": row.language, "name": c.name}
    return own | {"layers": list(c.layers)} | numbers | {"p_corrected": corrected}


# --- tables ---


def tables(outcome: StudyOutcome, found: Sequence[Verdict], folder: Path) -> None:
    """One CSV a table; the first line of each row says the model."""
    folder.mkdir(parents=True, exist_ok=True)
    _csv(folder / "verdicts.csv", [vars(v) for v in found])
    _csv(folder / "results.csv", [e.row() | _made_by(outcome, e.model, e.language) for e in outcome.entries])
    _csv(folder / "curves.csv", [
        {"model": c.model, "role": c.role, "language": c.language, "layer": layer, "name": c.curve.name}
        | {k: v for k, v in r.row().items() if k not in ("family", "name")}
        | _made_by(outcome, c.model, c.language)
        for c in outcome.curves
        for layer, r in zip(c.curve.layers, c.curve.results, strict=True)
    ])  # fmt: skip
    _csv(folder / "makers.csv", [
        {k: v for k, v in _maker_row(m).items() if k != "layers"} | {"made by": m.identity.label()}
        for m in outcome.made
    ])  # fmt: skip
    _csv(folder / "tokens.csv", outcome.tokens)
    checks = outcome.gathered.checks.findings
    _csv(folder / "checks.csv", [dict(zip(("check", "where", "message"), f, strict=True)) for f in checks])
    for language, (names, values) in outcome.grids.items():
        rows = [
            {"": name, **dict(zip(names, row, strict=True))} for name, row in zip(names, values, strict=True)
        ]
        made_by = "; ".join(m.identity.label() for m in outcome.made if m.material.language == language)
        _csv(folder / f"cka-{language}.csv", [row | {"made by": made_by} for row in rows])


def _made_by(outcome: StudyOutcome, model: str, language: str) -> dict[str, str]:
    labels = [
        m.identity.label() for m in outcome.made if (m.maker.title, m.material.language) == (model, language)
    ]
    return {"made by": labels[0]}


def _csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["nothing"])
        writer.writeheader()
        writer.writerows(rows)
