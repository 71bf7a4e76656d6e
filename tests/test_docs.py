"""The pages tell the truth: files, tests and links that they name exist; their tables equal the results."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "hadal|tests|docs|benchmarks|recipes"
NAMED = re.compile(rf"`((?:{FOLDERS})/[\w./-]*?)(?:::(\w+))?`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_and_tests_that_a_page_names_exist(page: Path) -> None:
    wrong = []
    for path, name in NAMED.findall(page.read_text("utf-8")):
        file = ROOT / path
        if not file.exists():
            wrong.append(path)
        elif name and name not in functions(file):
            wrong.append(f"{path}::{name}")
    assert not wrong, f"{page.name} names what does not exist: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    dead = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not dead, f"{page.name} links to {dead}"


def functions(file: Path) -> set[str]:
    """Names of the functions and classes of a Python file."""
    tree = ast.parse(file.read_text("utf-8"))
    return {
        n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }


def test_the_list_of_pages_is_complete() -> None:
    text = (ROOT / "docs" / "index.md").read_text("utf-8")
    missing = [
        p.name
        for p in sorted((ROOT / "docs").glob("*.md"))
        if p.stem != "index" and f"({p.name})" not in text
    ]
    assert not missing, f"docs/index.md does not list {missing}"


def test_every_row_of_the_feature_table_names_a_test() -> None:
    text = (ROOT / "README.md").read_text("utf-8").split("<!-- features: begin -->")[1]
    rows = text.split("<!-- features: end -->")[0].strip().splitlines()[2:]
    unproved = [row for row in rows if "`tests/" not in row.rsplit("|", 2)[1]]
    assert len(rows) > 10 and not unproved, unproved


def test_the_accuracy_of_the_model_on_board_is_the_measured_one() -> None:
    from hadal.evals.puzzles import accuracy_section

    report = json.loads((ROOT / "docs" / "results" / "hadal-mini-accuracy.json").read_text("utf-8"))
    wanted = accuracy_section(report)
    for page in (ROOT / "docs" / "hadal-mini.md", ROOT / "hadal" / "assets" / "hadal-mini" / "README.md"):
        assert wanted in page.read_text("utf-8"), page


def report_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_tables_are_those_of_the_result_files() -> None:
    report = report_script()
    for page, body in report.pages():
        text = page.read_text("utf-8")
        assert report.page_with(text, body) == text, f"{page.name}: run benchmarks/report.py"


def test_results_become_tables(tmp_path: Path) -> None:
    report = report_script()
    assert report.NOTHING in report.section(tmp_path)
    machine = {
        "cpu": "X",
        "threads": 2,
        "cores": 4,
        "torch": "2.13.0",
        "date": "2026-11-21",
        "python": "3.11",
    }
    spread = {"median": 1234.5, "min": 1000.0, "max": 1500.0}
    rows = {"batch 1": {"hadal": spread, "transformers": {**spread, "median": 99.94}, "ratio": 12.349}}
    race = {"model": "m", "dtype": "float32", "rounds": 3, "rows": rows}
    (tmp_path / "a.json").write_text(json.dumps({"machine": machine, "races": [race]}))
    plain = {
        "machine": machine,
        "title": "Overhead",
        "columns": ["what", "rate"],
        "rows": [["server", 10.25]],
    }
    (tmp_path / "b.json").write_text(json.dumps(plain))
    text = report.section(tmp_path)
    assert "| batch 1 | 1,234 | 99.9 | **12.35×** |" in text and "| server | 10.2 |" in text
    assert "| m, float32 | X | batch 1 12.3× |" in report.summary(tmp_path)
    assert "X, 2 threads of 4 cores; torch 2.13.0, python 3.11; 2026-11-21." in text
    (tmp_path / "c.json").write_text(json.dumps({"machine": machine, "speed": 1}))
    with pytest.raises(SystemExit, match=r"c\.json: needs machine, and races"):
        report.section(tmp_path)


def test_the_transcript_is_what_the_model_on_board_says() -> None:
    from hadal import Engine, SamplingParams

    engine = Engine.load("hadal-mini", device="cpu", max_num_seqs=1)
    question = [{"role": "user", "content": "What is 345 + 78?"}]
    done = engine.chat(question, SamplingParams(temperature=0))
    told = (
        "\n".join(f"│ {line}" for line in done.reasoning.strip().splitlines())
        + f"\n\n{done.content.strip()}\n"
    )
    for page in (ROOT / "README.md", ROOT / "docs" / "hadal-mini.md"):
        assert told in page.read_text("utf-8"), f"{page.name} shows another answer than:\n{told}"


def test_the_sizes_that_the_readme_states() -> None:
    def lines(room: str) -> int:
        return sum(len(f.read_text("utf-8").splitlines()) for f in (ROOT / "hadal" / room).rglob("*.py"))

    text = (ROOT / "README.md").read_text("utf-8")
    core, network = re.findall(r"about ([\d,]+) lines of Python, the network itself ([\d,]+)", text)[0]
    rooms = ("config", "ops", "model", "weights", "engine", "train")
    assert sum(map(lines, rooms)) == pytest.approx(int(core.replace(",", "")), rel=0.1)
    assert lines("model") == pytest.approx(int(network.replace(",", "")), rel=0.1)
    from hadal.config import PRESETS

    assert f"{len(PRESETS)} known models" in text
