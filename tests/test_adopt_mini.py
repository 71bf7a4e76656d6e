"""benchmarks/adopt_mini.py: what puts a newly trained model on board, without training one."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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
        (script.PAGE, ("accuracy", "training", "data", "stages", "dense")),
        (ROOT / "docs" / "r1.md", ("stages-r1-mini",)),
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


# --- a run of `hadal r1` ---
def figures(right: float) -> dict[str, Any]:
    row = {"problems": 1, "pass@1": right, "cons": 1.0, "length": 50.4, "language": 1.0, "form": 1.0}
    settings = {"samples": 16, "temperature": 0.6, "top_p": 0.95, "max_tokens": 99}
    return {"all": row, "tasks": {"chat": row}, "settings": settings}


def stage(inputs: str, seconds: float, **more: Any) -> dict[str, Any]:
    material = {"inputs": dict.fromkeys(inputs.split(), "digest"), "files": more.pop("files", {})}
    facts = {"trained_tokens": 10, "sampled_tokens": 5, "rows": 3} | more.pop("facts", {})
    named = {"digest": "digest", "seconds": seconds, "facts": facts}
    return {"finished": True, "material": material, **named, **more}


@pytest.fixture
def run(script: ModuleType, tmp_path: Path) -> Path:
    """An R1 run with the model on board in the place of its results, and its pre-training beside it."""
    from hadal.weights import hub

    before = tmp_path / "before" / "export-ema"
    shutil.copytree(script.ON_BOARD, before)
    told = json.loads((before / "config.json").read_text()) | {"hadal": script.facts(script.ON_BOARD)}
    (before / "config.json").write_text(json.dumps(told))
    stages = {
        "base": stage("", 60.0, files={"x": hub.digest(before)}, measured=figures(0.5)),
        "aside": stage("base", 1000.0),
        "sft": stage("base", 120.0, measured=figures(0.75)),
        "r1": stage("sft", 30.0, measured=figures(1.0)),
        "dense-distilled": stage("r1", 5.0, measured=figures(0.875)),
        "moe-base": stage("", 5.0) | {"finished": False},
    }
    for name in ("r1", "dense-distilled"):
        shutil.copytree(script.ON_BOARD, tmp_path / "run" / name / "export")
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"stages": stages}))
    return tmp_path / "run"


def test_a_run_of_r1_gives_two_models(script: ModuleType, run: Path) -> None:
    assert list(script.candidates(run)) == ["r1", "dense-distilled"]
    stages = script.adopt_r1.stages_of(run)
    assert "moe-base" not in stages
    assert script.adopt_r1.way(stages, "dense-distilled") == ["base", "sft", "r1", "dense-distilled"]
    assert script.adopt_r1.seconds(stages, "r1") == 210.0
    (run / "manifest.json").write_text(json.dumps({"stages": {"r1": stages["r1"] | {"finished": False}}}))
    with pytest.raises(SystemExit, match="no stage of r1, dense-distilled is finished"):
        script.candidates(run)


def test_the_pre_training_is_that_of_the_model_it_began_with(script: ModuleType, run: Path) -> None:
    stages, before = script.adopt_r1.stages_of(run), run.parent / "before"
    nothing = run.parent / "nothing"
    found = script.adopt_r1.pretraining(stages, before, script.ON_BOARD)
    assert found["seconds"] > 0 and found["files"] in stages["base"]["material"]["files"].values()
    assert script.adopt_r1.pretraining(stages, nothing, before / "export-ema") == found
    script.adopt_r1.place(run / "r1" / "export", before / "export-ema", stages, "r1", found)
    assert script.adopt_r1.pretraining(stages, nothing, before / "export-ema")["seconds"] == found["seconds"]
    stages["base"]["material"]["files"] = {"x": "another"}
    with pytest.raises(SystemExit, match="no model that the run began with"):
        script.adopt_r1.pretraining(stages, before, before / "export-ema")


def test_stages_are_gathered_from_runs_side_by_side(script: ModuleType, run: Path, tmp_path: Path) -> None:
    taught, base = stage("r1", 7.0, digest="rows"), stage("", 3.0, digest="other base")
    student = stage("", 9.0, files={"taught.jsonl": "rows"}, measured=figures(0.5))
    zero = stage("base", 1.0, measured=figures(0.5)) | {"digest": "zero"}
    zero["material"]["inputs"] = {"base": "other base"}
    (tmp_path / "students").mkdir()
    more = {"taught": taught, "moe-distilled": student, "zero": zero, "base": base}
    (tmp_path / "students" / "manifest.json").write_text(json.dumps({"stages": more}))
    stages = script.adopt_r1.stages_of(run, [tmp_path / "students"])
    assert script.adopt_r1.way(stages, "moe-distilled") == ["base", "sft", "r1", "taught", "moe-distilled"]
    assert stages["base"]["seconds"] == 60.0 and stages["zero"]["apart"] and not stages["sft"]["apart"]
    assert "| zero | R1-Zero: the base by rewards alone (of a base that was made anew) |" in (
        script.adopt_r1.stage_table(stages, script.adopt_r1.MAIN)
    )


def test_cards_have_figures_by_stage_and_task(script: ModuleType, run: Path) -> None:
    stages, export = script.adopt_r1.stages_of(run), run / "r1" / "export"
    before = script.adopt_r1.pretraining(stages, run.parent / "before", script.ON_BOARD)
    card = script.adopt_r1.card(export, stages, "r1", before, "| Addition | 300/300 |")
    assert card.startswith("# hadal-mini\n") and "| Addition | 300/300 |" in card
    assert "| sft | the base anew, on accepted samples and general data | 75.0% | 100.0% | 50 |" in card
    assert "| task | base | sft | r1 |" in card and "| chat | 50.0% / 100.0% / 50 | 75.0%" in card
    assert "30 tokens trained on, 15 sampled, 3.5 minutes" in card
    student = script.adopt_r1.card(export, stages, "dense-distilled", before, "x")
    assert student.startswith("# hadal-mini-dense\n") and "| task | r1 | dense-distilled |" in student


def test_what_goes_into_the_package_names_no_place(script: ModuleType, run: Path, tmp_path: Path) -> None:
    from hadal.weights import hub
    from hadal.weights.manifest import read_manifest, verify_files

    stages, export = script.adopt_r1.stages_of(run), run / "r1" / "export"
    before = script.adopt_r1.pretraining(stages, run.parent / "before", script.ON_BOARD)
    script.adopt_r1.fits(export, script.ON_BOARD)
    script.adopt_r1.place(export, tmp_path / "hadal-mini", stages, "r1", before)
    placed = json.loads((tmp_path / "hadal-mini" / "config.json").read_text())
    assert placed["hadal"]["stage"] == "r1" and "base" not in placed["hadal"]
    assert script.facts(tmp_path / "hadal-mini") == {**before, "then": "recipes/r1/mini.toml"}
    verify_files(tmp_path / "hadal-mini", sorted(read_manifest(tmp_path / "hadal-mini") or {}))
    assert hub.entry_of("hadal-mini", tmp_path / "hadal-mini").config == hub.entry_of("x", export).config
    (export / "tokenizer_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="is not the one on board"):
        script.adopt_r1.fits(export, script.ON_BOARD)


def test_the_pages_say_how_long_it_took(script: ModuleType) -> None:
    """In words that the next adoption finds again."""
    for seconds in ((450.0,), (450.0, 264.0)):
        assert re.fullmatch(script.TIME_TAKEN, script.time_taken(*seconds))
    for page in (script.PAGE, script.README):
        assert len(re.findall(script.TIME_TAKEN, page.read_text("utf-8"))) == 1, page
