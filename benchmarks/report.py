"""The results of benchmarks/results/*.json as tables: in docs/benchmarks.md, those of ablations in
docs/ablations.md, ratios in README.md.

    python benchmarks/report.py             # write the sections, each between two markers
    python benchmarks/report.py --check     # only say whether it is up to date (status 1 if not)

A result is {"machine": …, "races": […]} (race_transformers.py, race_llama_cpp.py) or a plain table
{"machine": …, "title": …, "columns": […], "rows": [[…], …], "notes": …}; anything else is refused by name.
Files called ablation_… are families of ablations, as benchmarks/ablations.py writes them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
ABLATIONS = ROOT / "docs" / "ablations.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTHING = "No results are kept yet."
SMALL = "Not run on a GPU yet: these are shorter runs of a smaller model on a CPU, a trial of the method."


def machine_line(m: dict[str, Any]) -> str:
    """One sentence on where a result was measured."""
    where = m.get("gpu") or f"{m['cpu']}, {m['threads']} threads of {m['cores']} cores"
    names = ("torch", "transformers", "llama-cpp-python", "triton", "python")
    versions = [f"{name} {m[name]}" for name in names if m.get(name)]
    return f"{where}; {', '.join(versions)}; {m['date']}."


def rate(value: float) -> str:
    """Tokens per second: whole from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; the first column left, the others right."""
    head = f"| {' | '.join(columns)} |"
    rule = "|---|" + "---:|" * (len(columns) - 1)
    return [head, rule, *(f"| {' | '.join(row)} |" for row in rows)]


def races(result: dict[str, Any]) -> list[str]:
    """One table a race: median rates of both, and the ratio."""
    lines: list[str] = ["", f"{result['title']}."] if "title" in result else []
    for race in result["races"]:
        peer = race.get("against", "transformers")
        rows = [
            [case, rate(r["hadal"]["median"]), rate(r[peer]["median"]), f"**{r['ratio']:.2f}×**"]
            for case, r in race["rows"].items()
        ]
        title = f"**{race['model']}**, {race['dtype']}, {race['rounds']} rounds"
        lines += ["", title, "", *table(["tokens a second", "hadal", peer, "ratio"], rows)]
    return lines


def plain(result: dict[str, Any]) -> list[str]:
    """A result that is a table already."""
    rows = [[rate(c) if isinstance(c, float) else str(c) for c in row] for row in result["rows"]]
    lines = ["", f"**{result['title']}**", "", *table(result["columns"], rows)]
    return lines + (["", str(result["notes"])] if result.get("notes") else [])


def files(folder: Path, *, ablations: bool = False) -> list[Path]:
    """The result files of a folder: those of ablations, or all others."""
    return [f for f in sorted(folder.glob("*.json")) if f.stem.startswith("ablation_") == ablations]


def section(folder: Path = RESULTS) -> str:
    """All results of a folder, in the order of their names."""
    lines: list[str] = []
    for file in files(folder):
        result = json.loads(file.read_text("utf-8"))
        known = {"races"} <= result.keys() or {"title", "columns", "rows"} <= result.keys()
        if "machine" not in result or not known:
            has = ", ".join(result)
            raise SystemExit(f"{file}: needs machine, and races or title, columns and rows; it has {has}")
        body = races(result) if "races" in result else plain(result)
        lines += ["", f"### {file.stem}", "", machine_line(result["machine"]), *body]
    return "\n".join(lines or ["", NOTHING]) + "\n\n"


def summary(folder: Path = RESULTS) -> str:
    """The ratios against transformers alone: a row a case, with the machine's name."""
    rows = []
    for file in files(folder):
        result = json.loads(file.read_text("utf-8"))
        machine = result["machine"].get("gpu") or result["machine"]["cpu"]
        for race in result.get("races", []):
            if race.get("against", "transformers") != "transformers":
                continue
            cases = [f"{case} {r['ratio']:.1f}×" for case, r in race["rows"].items() if "whole" not in case]
            rows.append([f"{race['model']}, {race['dtype']}", machine, "; ".join(cases)])
    lines = table(["shape", "machine", "times the tokens a second of `transformers`"], rows)
    lines[1] = lines[1].replace("---:", "---")  # all text
    return "\n".join([*(lines if rows else [NOTHING]), ""])


def ablation(result: dict[str, Any], stem: str) -> list[str]:
    """A family: what was asked, on what, the table, what it says, and its curves where they are drawn."""
    scale, data = result["scale"], result["data"]
    seeds, packing = ", ".join(map(str, result["seeds"])), "apart" if data["masked"] else "end to end"
    how = (
        f"{scale['steps']:,} steps of {scale['batch_tokens']:,} tokens in rows of {scale['context']:,}; "
        f"seeds {seeds}. Data: {data['title']}; {data['tokens']:,} tokens, of which a run reads "
        f"{scale['tokens']:,}; documents {packing}."
    )
    lines = ["", f"### {result['title']}", "", f"*{result['question']}*", "", machine_line(result["machine"])]
    lines += [how, "", *table(result["columns"], result["rows"]), ""]
    lines += [f"- {verdict}" for verdict in result["verdicts"]]
    lines += [f"- **Failed:** {fault}" for fault in result["faults"]]
    image = f"images/{stem.replace('_', '-')}.png"
    if (ABLATIONS.parent / image).is_file():
        lines += ["", f"![{result['title']}: curves, mean of the seeds and deviation]({image})"]
    return [*lines, "", f"`benchmarks/results/{stem}.json`"]


def ablation_section(folder: Path = RESULTS) -> str:
    """All families of a folder, and a word where none of them ran on a GPU."""
    found = [(json.loads(file.read_text("utf-8")), file.stem) for file in files(folder, ablations=True)]
    on_gpu = any(result["machine"].get("gpu") for result, _ in found)
    lines = ["", SMALL] if found and not on_gpu else []
    for result, stem in found:
        lines += ablation(result, stem)
    return "\n".join(lines or ["", NOTHING]) + "\n\n"


def pages() -> list[tuple[Path, str]]:
    """Every page with results, and what stands between its markers."""
    return [(PAGE, section()), (ABLATIONS, ablation_section()), (README, summary())]


def page_with(text: str, body: str) -> str:
    """The page with `body` between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"a page needs the markers {BEGIN} and {END}, once each; one has not")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{body}{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    for page, body in pages():
        text = page.read_text("utf-8")
        wanted = page_with(text, body)
        if check and text != wanted:
            sys.exit(f"{page} differs from the results: run benchmarks/report.py")
        if not check:
            page.write_text(wanted, "utf-8")
            print(f"written: {page}")


if __name__ == "__main__":
    main()
