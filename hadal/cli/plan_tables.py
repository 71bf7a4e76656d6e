"""`hadal plan devices` and `hadal plan accuracy`: what the planner knows, and how well it predicts."""

from __future__ import annotations

from typing import Any

from hadal.cli import options as o
from hadal.cli.plan_common import amount
from hadal.cli.terminal import note, print_json, table


def devices(json: o.Json = False) -> None:
    """List the devices that are known.

    Examples:
        hadal plan devices
        hadal plan devices --json
    """
    from hadal.plan.answers import answer

    found = answer({"ask": "devices"})["devices"]
    if json:
        print_json(found)
        return
    table(
        ("DEVICE", "GB", "GB/S", "TFLOPS", "LINK GB/S", "SOURCE"),
        [
            (
                d["name"],
                f"{d['memory_bytes'] / 1e9:g}" if d["memory_bytes"] else "",
                f"{d['bandwidth_bytes_per_s'] / 1e9:,g}",
                ", ".join(f"{k} {v / 1e12:g}" for k, v in d["flops"].items()),
                f"{d['link_bytes_per_s'] / 1e9:g}" if d["link_bytes_per_s"] else "",
                f"{d['source']} ({d['date']})",
            )
            for d in found
        ],
        right=(1, 2, 4),
    )
    note('Any other: --on "memory=24GB, bandwidth=1008GB/s, bf16=165TFLOPS"')


def accuracy(json: o.Json = False) -> None:
    """Hold the planner against public figures.

    Examples:
        hadal plan accuracy
    """
    from hadal.plan.answers import answer

    found = answer({"ask": "accuracy"})["cases"]
    if json:
        print_json(found)
        return
    table(
        ("CASE", "PREDICTED", "PUBLISHED", "ERROR", "FITTED TO"),
        [
            (r["what"], _shown(r, "predicted"), _shown(r, "published"), _error(r), fitted(r["sample"]))
            for r in found
        ],
        right=(1, 2, 3),
    )
    note("* a known miss; docs/planning.md says why. `hadal plan accuracy --json` has the sources.")


def _shown(row: dict[str, Any], key: str) -> str:
    if row["unit"] in ("B", "parameters", "elements") and row["tolerance"] == 0:
        return f"{row[key]:,.0f}"
    return amount(row[key], row["unit"])


def _error(row: dict[str, Any]) -> str:
    return ("* " if row["tolerance"] is None else "") + f"{100 * row['error']:+.1f}%"


def fitted(sample: str) -> str:
    """Whether efficiencies were fitted to a case."""
    return {"in": "yes", "out": "no"}.get(sample, "")
