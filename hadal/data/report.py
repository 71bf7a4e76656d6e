"""What became of the documents: counts at every stage, tokens by source, samples of what was dropped and why.

`report.json` holds it all; `report.md` and the terminal show the same rows. A sample is chosen by a hash of
its name, so it is random, and the same each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hadal.data.shards import ShardError
from hadal.data.words import hash64

EXCERPT = 240
STAGES = ("read", "language", "quality", "exact", "near", "contamination")
_TITLES = {
    "read": "without text", "language": "other language", "quality": "quality", "exact": "exact copies",
    "near": "near copies", "contamination": "in evaluation sets",
}  # fmt: skip


class Dropped:
    """What one source loses, by stage and rule, with samples."""

    SAMPLES = 3

    def __init__(self, source: str) -> None:
        self.source = source
        self._entries: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, stage: str, rule: str, name: str, why: str, text: str, size: int | None = None) -> None:
        """Count a document; `name` empty: do not show it. `size` in bytes (default: of the text)."""
        entry = self._entries.setdefault((stage, rule), {"count": 0, "bytes": 0, "samples": []})
        entry["count"] += 1
        entry["bytes"] += len(text.encode()) if size is None else size
        if name:
            samples = [*entry["samples"], {"name": name, "why": why, "text": excerpt(text)}]
            entry["samples"] = _fewest(samples, self.SAMPLES)

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, in order of stage and rule."""
        order = sorted(self._entries, key=lambda key: (STAGES.index(key[0]), key[1]))
        return [{"source": self.source, "stage": s, "rule": r, **self._entries[s, r]} for s, r in order]


def excerpt(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text[: 2 * EXCERPT].split())
    return line if len(line) <= EXCERPT else line[: EXCERPT - 1] + "…"


def _fewest(samples: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    return sorted(samples, key=lambda s: (hash64(s["name"].encode()), s["name"]))[:count]


def merge(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries of many parts, one for each source, stage and rule."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry in entries:
        key = (entry["source"], entry["stage"], entry["rule"])
        mine = found.setdefault(key, {**dict(zip(("source", "stage", "rule"), key, strict=True)),
                                      "count": 0, "bytes": 0, "samples": []})  # fmt: skip
        mine["count"] += entry["count"]
        mine["bytes"] += entry["bytes"]
        mine["samples"] = _fewest([*mine["samples"], *entry["samples"]], Dropped.SAMPLES)
    return list(found.values())


def funnel(
    sources: Sequence[str], parts: Sequence[Mapping[str, Any]], dropped: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Documents and bytes that each source brings, loses at each stage, and keeps. `parts`: the results of
    `read_piece` with their source."""
    table: dict[str, Any] = {}
    for name in sources:
        mine = [p for p in parts if p["source"] == name]
        row: dict[str, Any] = {
            "read": sum(p["read"] for p in mine), "read_bytes": sum(p["read_bytes"] for p in mine),
            "dropped": dict.fromkeys(STAGES, 0), "dropped_bytes": dict.fromkeys(STAGES, 0),
            "languages": {},
        }  # fmt: skip
        for part in mine:
            for language, count in part["languages"].items():
                row["languages"][language] = row["languages"].get(language, 0) + count
        for entry in dropped:
            if entry["source"] == name:
                row["dropped"][entry["stage"]] += entry["count"]
                row["dropped_bytes"][entry["stage"]] += entry["bytes"]
        row["kept"] = row["read"] - sum(row["dropped"].values())
        row["kept_bytes"] = row["read_bytes"] - sum(row["dropped_bytes"].values())
        table[name] = row
    return table


def read_report(folder: Path) -> dict[str, Any]:
    """`report.json` of a finished folder. Raises ShardError."""
    path = folder / "report.json"
    if not path.is_file():
        raise ShardError(
            f"{path} does not exist: {folder} was not made by `hadal data prepare`, or not to its end"
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        tables(report)
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not a report: {error!r}; make the set again") from None
    assert isinstance(report, dict)
    return report


Table = tuple[str, list[str], list[list[str]]]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """(title, header, rows) of what a person reads first."""
    sources = report["sources"]
    total = {stage: sum(s["dropped"][stage] for s in sources.values()) for stage in STAGES}
    shown = [stage for stage in STAGES if total[stage]]
    header = ["source", "documents", *(_TITLES[stage] for stage in shown), "kept", "MB kept"]
    rows = [
        [name, _n(s["read"]), *(_n(-s["dropped"][stage]) for stage in shown), _n(s["kept"]),
         f"{s['kept_bytes'] / 1e6:,.2f}"]
        for name, s in sources.items()
    ]  # fmt: skip
    if len(rows) > 1:
        every = list(sources.values())
        rows.append(
            ["all", _n(sum(s["read"] for s in every)), *(_n(-total[stage]) for stage in shown),
             _n(sum(s["kept"] for s in every)), f"{sum(s['kept_bytes'] for s in every) / 1e6:,.2f}"]
        )  # fmt: skip
    return [("Documents", header, rows), _mixture(report)]


def _mixture(report: Mapping[str, Any]) -> Table:
    mixture, heldout = report["mixture"], report["heldout"]
    total = max(1, sum(m["tokens"] for m in mixture.values()))
    rows = [
        [name, _n(m["available_tokens"]), _n(m["tokens"]), f"{m['tokens'] / total:.1%}",
         f"{m['tokens'] / max(1, m['available_tokens']):.2f}", f"{m['bytes'] / max(1, m['tokens']):.2f}",
         _n(heldout.get(name, {}).get("tokens", 0))]
        for name, m in mixture.items()
    ]  # fmt: skip
    header = ["source", "tokens there", "tokens taken", "share", "epochs", "bytes/token", "tokens held out"]
    return ("Tokens", header, rows)


def _n(number: int) -> str:
    return f"{number:,}".replace("-", "−")


def summary(report: Mapping[str, Any]) -> str:
    """One line: what came out, and how fast."""
    output = report["output"]
    rate = report.get("tokens_per_minute_per_core")
    speed = f"; {rate / 1e6:.2f}M tokens a minute and core" if rate else ""
    fim = f", {output['fim_documents']:,} rearranged for filling in" if output["fim_documents"] else ""
    made = f"{output['tokens']:,} tokens in {output['documents']:,} documents, {output['shards']:,} shards"
    return f"{made}{fim}{speed}"


def dropped_rows(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What was dropped, the most frequent rules first."""
    return sorted(report["dropped"], key=lambda e: (-e["count"], e["source"], e["stage"], e["rule"]))


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    lines = [f"# {report['name']}", "", summary(report) + ".", ""]
    for title, header, rows in tables(report):
        lines += [f"## {title}", "", "| " + " | ".join(header) + " |"]
        lines += ["|---" + "|---:" * (len(header) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    lines += ["## Dropped", ""]
    for entry in dropped_rows(report):
        lines += [
            f"### {entry['source']}: {_TITLES[entry['stage']]}, {entry['rule']} ({entry['count']:,})",
            "",
        ]
        for sample in entry["samples"]:
            text = sample["text"].replace("`", "'")
            lines.append(f"- `{sample['name']}`: {sample['why']}" + (f"  \n  `{text}`" if text else ""))
        lines.append("")
    if not report["dropped"]:
        lines += ["Nothing.", ""]
    lines += ["## Languages", "", "| source | documents by language |", "|---|---|"]
    for name, source in report["sources"].items():
        told = sorted(source["languages"].items(), key=lambda pair: (-pair[1], pair[0]))
        lines.append(f"| {name} | {', '.join(f'{language} {count:,}' for language, count in told)} |")
    return "\n".join(lines) + "\n"
