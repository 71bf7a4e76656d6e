"""benchmarks/adopt_mini.py: what puts a newly trained model on board, without training one."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("adopt_mini", ROOT / "benchmarks" / "adopt_mini.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "benchmarks"))
        spec.loader.exec_module(module)
        yield module


def export(folder: Path, loss: float, average: float | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    hadal = {"heldout_loss": loss, "average": average}
    (folder / "config.json").write_text(json.dumps({"hadal": hadal}))
    return folder


def test_the_lower_held_out_loss_decides_not_the_examination(script: ModuleType, tmp_path: Path) -> None:
    last, average = export(tmp_path / "export", 0.2), export(tmp_path / "export-ema", 0.1, 0.99)
    assert script.chosen(tmp_path) == average
    report = {"accuracy": 0.5}
    kept = json.dumps({"weights": script.digest(average), "report": report})
    (tmp_path / "accuracy.json").write_text(kept)
    assert script.candidates(tmp_path) == {"train": average} and script.kept(average).parent == tmp_path
    assert script.measured(average, script.kept(average), "cpu") == report
    shutil.rmtree(average)
    assert script.chosen(tmp_path) == last
    shutil.rmtree(last)
    with pytest.raises(SystemExit, match="neither export nor export-ema"):
        script.chosen(tmp_path)


def test_a_lower_mean_is_told(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((ROOT / "docs" / "results" / "hadal-mini-accuracy.json").read_text("utf-8"))
    assert script.compare(report)
    assert not script.compare({**report, "accuracy": report["accuracy"] - 1e-4})
    assert "addition" in capsys.readouterr().out


def test_the_pages_tell_of_the_run_that_is_kept(script: ModuleType) -> None:
    log = (ROOT / "docs" / "results" / "hadal-mini-training.jsonl").read_text("utf-8").splitlines()
    recipe = json.loads((ROOT / "docs" / "results" / "hadal-mini-recipe.json").read_text("utf-8"))
    told = script.told([json.loads(line) for line in log], script.facts(script.ON_BOARD), recipe)
    assert told in script.PAGE.read_text("utf-8")
    for page, names in (
        (script.PAGE, ("accuracy", "training", "data")),
        (script.SPECULATION, ("acceptance",)),
    ):
        text = page.read_text("utf-8")
        for name in names:
            assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1
    kept = ROOT / "docs" / "results" / "hadal-mini-data.json"
    assert not kept.is_file() or script.data_table(kept) in script.PAGE.read_text("utf-8")


def test_an_export_of_an_earlier_trainer_gets_the_tokenizer_on_board(
    script: ModuleType, tmp_path: Path
) -> None:
    names = ("tokenizer.json", "tokenizer_config.json")
    for name in (*names, "manifest.json"):
        shutil.copyfile(script.ON_BOARD / name, tmp_path / name)
    whole = {name: (tmp_path / name).read_bytes() for name in (*names, "manifest.json")}
    script.complete(tmp_path)
    assert all((tmp_path / name).read_bytes() == data for name, data in whole.items())
    earlier = json.loads(whole["tokenizer.json"]) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(earlier), encoding="utf-8")
    script.complete(tmp_path)
    assert all((tmp_path / name).read_bytes() == data for name, data in whole.items())


def test_marks_and_sentences_are_there_once_or_it_stops(script: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nIt solves 98.6% of them.\n")
    script.between(page, "x", "new\n")
    script.replaced(page, r"solves [\d.]+%", "solves 99.1%")
    assert page.read_text() == "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nIt solves 99.1% of them.\n"
    with pytest.raises(SystemExit, match="once each"):
        script.between(page, "y", "new")
    with pytest.raises(SystemExit, match="0 times"):
        script.replaced(page, "nothing", "")


def test_every_test_that_it_runs_exists(script: ModuleType) -> None:
    missing = [name for name in script.TESTS if not (ROOT / "tests" / name).exists()]
    assert len(script.TESTS) > 10 and not missing


def test_a_data_report_becomes_a_table(script: ModuleType, tmp_path: Path) -> None:
    from hadal.data.prepare import ON_BOARD, prepare
    from hadal.data.puzzle_source import puzzle_recipe

    prepare(puzzle_recipe(5000, 1, "hadal-mini", ON_BOARD, 3), tmp_path / "set")
    table = script.data_table(tmp_path / "set" / "report.json")
    assert "| countdown-4 |" in table and "| all |" in table
    assert table.endswith("Of the 45 questions of the examination 0 remain.")
